"""Student, projectors and the weighted sum of losses: the one module that the Trainer trains.

Everything that needs a gradient happens in its ``forward``, so that it may be wrapped as a whole. Only ``student`` is
saved in the end; projectors live beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..artifact import Task
from ..loss_names import parse_loss
from . import ranks
from .batches import LEARN_OWN, Batch
from .chunked import chunked_head
from .losses import Loss, predicting, reduce_step, select_losses, shift
from .signal import INSIDE, Attention, Dense, Embedding, Hidden, Labels, Relations, Signal, Sparse
from .student import base_model, blocks
from .taps import Taps
from .teacher import Said, vectors

__all__ = ["Counts", "Objective", "Projectors", "count_items"]

Counts = dict[str, int]


def count_items(batches: Sequence[Batch]) -> Counts:
    """What the losses of one optimiser step are divided by: counts over all its forward passes."""
    counts = {"predicted": 0, "tokens": 0, "examples": 0, "labelled": 0}
    for batch in batches:
        mask = batch["attention_mask"]
        learn = batch.get("learn")
        counts["predicted"] += int(predicting(mask, learn).sum())
        counts["tokens"] += int((mask if learn is None else learn > 0).sum())
        counts["examples"] += len(mask)
        counts["labelled"] += int((batch["label"] >= 0).sum())
        if "aligned" in batch:
            counts["aligned"] = counts.get("aligned", 0) + int((batch["aligned"] >= 0).sum())
    return counts


class Projectors(nn.Module):
    """Linear maps from the student's width to the teacher's, one a layer; none where the widths agree."""

    def __init__(self, layers: int, width: int, target: int, seed: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList()
        if width != target:
            chooser = torch.Generator().manual_seed(seed)
            for _ in range(layers):
                linear = nn.Linear(width, target, bias=False)
                with torch.no_grad():
                    linear.weight.normal_(0.0, width**-0.5, generator=chooser)
                self.maps.append(linear)

    def forward(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Bring block outputs [B, T, D] to the teacher's width."""
        if not self.maps:
            return tuple(states)
        return tuple(linear(state) for linear, state in zip(self.maps, states, strict=True))


class Objective(nn.Module):
    """The weighted losses of ``student`` against a teacher.

    ``weights`` by loss name (``jsd:0.5``); ``temperature`` softens the losses between probabilities; ``vocab_size`` is
    the tokenizer's; ``teacher_width`` is that of the teacher's hidden states. ``foreign``: the teacher counts with
    other tokens (:mod:`.foreign`), so its logits are not cut at ``vocab_size``.
    """

    def __init__(
        self,
        student: nn.Module,
        task: Task,
        weights: Mapping[str, float],
        *,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        teacher_width: int | None = None,
        seed: int = 0,
        foreign: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.foreign = foreign
        self.task = task
        self.losses: dict[str, Loss] = select_losses(weights, task)
        by_full_name = {parse_loss(name).text: weight for name, weight in weights.items()}
        self.weights = {name: float(by_full_name[name]) for name in self.losses}
        self.temperature = temperature
        self.vocab_size = vocab_size
        self._taps: Taps | None = None
        self.projectors: Projectors | None = None
        layers = len(blocks(student))
        if self.inside:
            self._taps = Taps(student, range(layers), self.inside)
        if Hidden in self.inside:
            width = base_model(student).config.hidden_size
            self.projectors = Projectors(layers, width, teacher_width or width, seed)

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss asks the teacher (plain cross-entropy does not)."""
        return any(loss.signal is not Labels for loss in self.losses.values())

    @property
    def inside(self) -> frozenset[type]:
        """Kinds of signals that its losses hear inside of both models."""
        return frozenset(loss.signal for loss in self.losses.values()).intersection(INSIDE)

    def train(self, mode: bool = True) -> Self:
        """Train without dropout: the teacher's answer is for the whole network, and noise only hides it."""
        super().train(mode)
        self.student.eval()
        return self

    def forward(self, batch: Batch, said: Said, counts: Counts) -> tuple[Tensor, Tensor]:
        """The weighted loss of one forward pass and its raw components ``[k]`` (in the order of ``losses``).

        Both are already divided by ``counts`` of the whole optimiser step, so passes simply add up.
        """
        raw: dict[str, Tensor] = {}
        output = self._hidden(batch) if self.task == "text-generation" else vectors(self.student, batch)
        # Autocast ends with the student's layers: a small KL over a large vocabulary is noise in bf16.
        with torch.autocast(output.device.type, enabled=False):
            return self._losses(_wide(output), batch, said, counts, raw)

    def _losses(
        self, output: Tensor, batch: Batch, said: Said, counts: Counts, raw: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.task == "text-generation":
            total = self._generation(output, batch, said, counts, raw)
        else:
            total = self._pooled(output, batch, said, counts, raw)
        if self._taps is not None:
            total = total + self._inside(self._taps, batch, said, counts, raw)
        return total, torch.stack([raw[name] for name in self.losses])

    def _value(self, name: str, output: Any, signal: Signal, mask: Tensor, counts: Counts) -> Tensor:
        loss = self.losses[name]
        unit: str = loss.unit[self.task]
        if loss.signal is Dense and "aligned" in counts:
            unit = "aligned"
        return reduce_step(loss.values(output, signal, mask), counts[unit])

    def _pairwise(self, name: str, output: Tensor, signal: Signal, counts: Counts) -> Tensor:
        """This process's share of a loss that compares the texts of the whole pass, wherever they are."""
        assert isinstance(signal, Embedding)
        ours, theirs = ranks.gather_rows(output), ranks.gather_rows(signal.vectors)
        everything = torch.ones(len(ours), dtype=torch.bool, device=ours.device)
        return self._value(name, ours, Embedding(theirs), everything, counts) / ranks.world()

    def _hidden(self, batch: Batch) -> Tensor:
        """The student's states [B, T, D] before its language-model head."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        states: Tensor = base_model(self.student)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return states

    def _inside(self, taps: Taps, batch: Batch, said: Said, counts: Counts, raw: dict[str, Tensor]) -> Tensor:
        """Losses over states, attention and relations, at the real tokens (where some are not learnt: at those)."""
        real = batch["attention_mask"]
        learnt = batch["learn"] > 0 if "learn" in batch else real
        heard = taps.take()
        pairs: dict[type, tuple[Any, Signal]] = {}
        if self.projectors is not None and heard.blocks is not None:
            pairs[Hidden] = self.projectors([_wide(state) for state in heard.blocks]), Hidden(said.blocks or ())
        if heard.attention is not None:
            pairs[Attention] = heard.attention, Attention(said.attention or ())
        if heard.relations is not None and said.relations is not None:
            pairs[Relations] = heard.relations, replace(said.relations, real=real)
        total: Tensor | None = None
        for name, loss in self.losses.items():
            if loss.signal in INSIDE:
                value = self._value(name, *pairs[loss.signal], learnt, counts)
                raw[name] = value.detach()
                total = self.weights[name] * value if total is None else total + self.weights[name] * value
        assert total is not None  # taps are there for a loss
        return total

    def _pooled(self, output: Tensor, batch: Batch, said: Said, counts: Counts, raw: dict[str, Tensor]) -> Tensor:
        everything = torch.ones(len(output), dtype=torch.bool, device=output.device)
        if self.task == "token-classification":
            everything = batch["attention_mask"].bool()
        total = output.new_zeros(())
        for name, loss in self.losses.items():
            if loss.signal in INSIDE:
                continue
            mask, signal = everything, self._signal(loss, said.vectors, batch["label"].clamp_min(0))
            if loss.signal is Labels:
                mask = batch["label"] >= 0
            if loss.pairwise and ranks.world() > 1:
                value = self._pairwise(name, output, signal, counts)
            else:
                value = self._value(name, output, signal, mask, counts)
            raw[name] = value.detach()
            total = total + self.weights[name] * value
        return total

    def _signal(self, loss: Loss, theirs: Tensor | Sparse | None, ids: Tensor) -> Signal:
        if loss.signal is Labels:
            return Labels(ids, self.vocab_size)
        assert theirs is not None  # needs_teacher said so
        if isinstance(theirs, Sparse):
            return theirs
        if loss.signal is Embedding:
            return Embedding(theirs)
        return Dense(theirs, self.temperature, None if self.foreign else self.vocab_size)

    def _generation(self, hidden: Tensor, batch: Batch, said: Said, counts: Counts, raw: dict[str, Tensor]) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        names = [name for name, loss in self.losses.items() if loss.signal not in INSIDE]
        if not names:
            return hidden.new_zeros(())
        learn = batch.get("learn")
        states, following = shift(hidden, ids, mask, learn)
        heard: Tensor | None = None  # the places where a teacher with other tokens has read the same text
        if "aligned" in batch and said.final is not None:
            rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
            row, place = (shift(value, ids, mask, learn)[0] for value in (rows, batch["aligned"]))
            heard, theirs = place >= 0, said.final[row, place.clamp_min(0)]
        else:
            theirs = None if said.final is None else shift(said.final, ids, mask, learn)[0]
        # Whether the next word is that of the text (or of a teacher), and not the student's own.
        given = torch.ones(len(states), dtype=torch.bool, device=states.device)
        if learn is not None:
            given = learn[:, 1:][predicting(mask, learn)] != LEARN_OWN

        def chunk(logits: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
            every = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
            if heard is not None:
                every, logits = heard[begin:end], logits[..., : self.vocab_size]
            signal: Tensor | Sparse | None = None
            if said.sparse is not None:
                signal = said.sparse.rows(begin, end)
            elif theirs is not None and said.head is not None:
                with torch.no_grad():
                    signal = said.head(theirs[begin:end])
            values = [
                self._value(name, logits, self._signal(self.losses[name], signal, following[begin:end]),
                            given[begin:end] if self.losses[name].signal is Labels else every, counts)
                for name in names
            ]  # fmt: skip
            weights = values[0].new_tensor([self.weights[name] for name in names])
            parts = torch.stack(values)
            return (parts * weights).sum(), parts.detach()

        student: Any = self.student
        total, parts = chunked_head(states, student.get_output_embeddings(), chunk)
        raw.update(zip(names, parts.unbind(), strict=True))
        return total


def _wide(states: Tensor) -> Tensor:
    """At least fp32, whatever autocast made of them."""
    return states if states.dtype in (torch.float32, torch.float64) else states.float()
