"""A student that counts with other tokens than its teacher: both read the same text, each in its own pieces.

Where both have just read the same characters (:mod:`.align`) their next-token distributions are compared by the
universal logit loss (arXiv 2402.12030); elsewhere the teacher is not heard. A long text is cut into windows at such
places, so that each window is the same text for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints import ModelFolder, load_tokenizer
from ..errors import RecipeError, Unsupported
from ..files import hash_json
from ..loss_names import parse_loss
from ..recipe import DistillConfig, StudentConfig
from ..vocabularies import compare_vocabularies
from .align import Encoded, align_positions, chunks, encode_spans, universal_logit
from .batches import Batch, Examples, collate
from .evaluate import DEV_TOKENS, HeldOut
from .signal import Dense
from .student import base_model
from .teacher import Said, Teacher

__all__ = [
    "ForeignHeldOut",
    "ForeignTeacher",
    "PairedExamples",
    "check_foreign",
    "encode_pairs",
    "held_out_of",
    "is_foreign",
]

LOSSES = ("universal_logit", "cross_entropy")
# Settings that need one vocabulary, and where it is said what is wrong with them.
_ONE_VOCABULARY = ("cache", "streaming", "on_policy", "sequence", "teacher", "patience")
_PROBED, _MOST_LOSSY = 200, 0.05
_BATCH = 32


@dataclass(frozen=True)
class PairedExamples(Examples):
    """The same windows of text for both: ``ids`` by the student's tokenizer, ``their_ids`` by the teacher's.

    ``aligned[e][i]``: the teacher's token after which it has read what the student has after its token ``i``, where
    both go on; −1: none.
    """

    their_ids: tuple[tuple[int, ...], ...] = ()
    aligned: tuple[tuple[int, ...], ...] = ()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "their_ids": self.their_ids[index], "aligned": self.aligned[index]}

    def digest(self) -> str:
        """sha256 of the content."""
        return hash_json([super().digest(), self.their_ids, self.aligned])

    @property
    def share(self) -> float:
        """Which part of the predicting places of the student are aligned."""
        places = sum(len(ids) - 1 for ids in self.ids)
        return sum(place >= 0 for row in self.aligned for place in row) / max(places, 1)


def is_foreign(teacher: ModelFolder, start: ModelFolder) -> bool:
    """Whether ``start`` has another vocabulary than ``teacher``."""
    return (
        start.path != teacher.path
        and load_tokenizer(start.path).get_vocab() != load_tokenizer(teacher.path).get_vocab()
    )


def check_foreign(
    teacher: ModelFolder, start: ModelFolder, config: DistillConfig, student: StudentConfig, texts: Sequence[str]
) -> None:
    """Refuse what can't be learnt across two vocabularies, saying why.

    Raises :class:`Unsupported` for a task, a loss or a setting that compares token by token, and :class:`RecipeError`
    for a tokenizer that loses text: what its model reads is then not what the other one reads.
    """
    ours, theirs = load_tokenizer(start.path), load_tokenizer(teacher.path)
    reason = compare_vocabularies(theirs, teacher.vocab_size, ours, start.vocab_size).reason
    what = "[student] has another vocabulary than the teacher" + (f" ({reason})" if reason else "")
    if teacher.task != "text-generation":
        raise Unsupported(f"{what}: only text-generation learns across it", hint="use a model with its tokenizer")
    wrong = [name for name, weight in config.loss.items() if weight and parse_loss(name).name not in LOSSES]
    if wrong:
        raise Unsupported(
            f"{what}: loss {wrong[0]!r} compares token by token", hint=f"use {' and '.join(LOSSES)} instead"
        )
    default = DistillConfig(loss={"cross_entropy": 1.0})
    for name in _ONE_VOCABULARY:
        if getattr(config, name) != getattr(default, name):
            raise Unsupported(f"{what}: [distill] {name} needs a common one", hint=f"leave {name} out")
    if student.vocabulary is not None or student.steps > 1:
        setting = "vocabulary" if student.vocabulary is not None else "steps"
        raise Unsupported(f"{what}: [student] {setting} needs a common one", hint=f"leave {setting} out")
    for who, tokenizer in (("student", ours), ("teacher", theirs)):
        _check_keeps_text(who, tokenizer, texts[:_PROBED])


def _check_keeps_text(who: str, tokenizer: Any, texts: Sequence[str]) -> None:
    lost = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back.strip() != text.strip():
            lost.append((text, back))
    if len(lost) > _MOST_LOSSY * len(texts):
        text, back = (part.strip()[:60] for part in lost[0])
        raise RecipeError(
            f"the {who}'s tokenizer loses text in {len(lost)} of {len(texts)} examples: {text!r} comes back as "
            f"{back!r}",
            hint="what one model reads is not what the other reads; take a tokenizer that keeps its text",
        )


def encode_pairs(
    texts: Sequence[str], student: Any, teacher: Any, max_length: int, *, prefix: str = ""
) -> PairedExamples:
    """Tokenise ``texts`` by both, in windows of at most ``max_length`` tokens of each that cover the same text.

    A stretch of text that has no common place within ``max_length`` tokens is left out. Raises :class:`RecipeError`
    when no place of any text is common.
    """
    ours: list[tuple[int, ...]] = []
    theirs: list[tuple[int, ...]] = []
    aligned: list[tuple[int, ...]] = []
    for text in texts:
        first, second = (encode_spans(tokenizer, prefix + text, special=True) for tokenizer in (student, teacher))
        for mine, other in _windows(first, second, max_length):
            left, right = _part(first, mine), _part(second, other)
            if len(left.ids) < 2:
                continue
            row = np.full(len(left.ids), -1, np.int64)
            pairs = align_positions(left, right)
            row[pairs[:, 0]] = pairs[:, 1]
            ours.append(tuple(left.ids.tolist()))
            theirs.append(tuple(right.ids.tolist()))
            aligned.append(tuple(row.tolist()))
    if texts and not any(place >= 0 for row in aligned for place in row):
        raise RecipeError(
            "the tokens of student and teacher never end at the same place of a text",
            hint="longer texts, or a student with the teacher's tokenizer",
        )
    return PairedExamples(tuple(ours), (-100,) * len(ours), their_ids=tuple(theirs), aligned=tuple(aligned))


def _windows(first: Encoded, second: Encoded, most: int) -> list[tuple[slice, slice]]:
    """Stretches of whole chunks with at most ``most`` tokens on each side; all of a text that is short enough."""
    if len(first.ids) <= most and len(second.ids) <= most:
        return [(slice(0, len(first.ids)), slice(0, len(second.ids)))]
    found: list[tuple[slice, slice]] = []
    for mine, other in chunks(first, second):
        if max(mine.stop - mine.start, other.stop - other.start) > most:
            continue
        if found:
            last, last_other = found[-1]
            joined = slice(last.start, mine.stop), slice(last_other.start, other.stop)
            fits = max(joined[0].stop - joined[0].start, joined[1].stop - joined[1].start) <= most
            if fits and last.stop == mine.start and last_other.stop == other.start:
                found[-1] = joined
                continue
        found.append((mine, other))
    return found


def _part(side: Encoded, tokens: slice) -> Encoded:
    return Encoded(side.ids[tokens], side.starts[tokens], side.ends[tokens])


class ForeignTeacher(Teacher):
    """A teacher that reads its own tokens of a batch, and answers over its own vocabulary."""

    def __init__(self, folder: ModelFolder, pad_id: int, device: str | torch.device) -> None:
        super().__init__(folder, (), pad_id, device)
        self.size = min(len(load_tokenizer(folder.path)), folder.vocab_size)

    def say(self, batch: Batch) -> Said:
        """States at the teacher's places of the batch, and its head cut at its tokenizer's size."""
        said = super().say({"input_ids": batch["their_ids"], "attention_mask": batch["their_mask"]})
        assert said.head is not None  # text-generation
        return Said(final=said.final, head=CutHead(said.head, self.size))


class CutHead(nn.Module):
    """A language-model head without the rows that pad its matrix."""

    def __init__(self, head: nn.Module, size: int) -> None:
        super().__init__()
        self.head, self.size = head, size

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``[..., size]``."""
        logits: Tensor = self.head(states)
        return logits[..., : self.size]


class ForeignHeldOut:
    """How near a student is to a teacher with other tokens, on held-out text.

    Over about :data:`.evaluate.DEV_TOKENS` predicted tokens of the student: ``universal_logit`` and
    ``aligned_agreement`` at the aligned places (both most likely next tokens begin with the same text: one is the
    beginning of the other), ``aligned_share``, and ``cross_entropy`` of the student on its own tokens.
    """

    def __init__(self, examples: Examples, teacher: Teacher, vocab_size: int, tokenizer: Any) -> None:
        self._teacher, self._vocab_size = teacher, vocab_size
        self._ours, self._theirs = _texts_of(tokenizer), _texts_of(load_tokenizer(teacher.folder.path))
        self._examples = examples
        self._rows: list[int] = []
        tokens = 0
        while len(self._rows) < len(examples) and tokens < DEV_TOKENS:
            tokens += len(examples.ids[len(self._rows)]) - 1
            self._rows.append(len(self._rows))

    @torch.inference_mode()
    def measure(self, student: nn.Module) -> dict[str, float]:
        """Metrics by name; none without dev text."""
        if not self._rows or not isinstance(self._examples, PairedExamples):
            return {}
        sums = {"universal_logit": 0.0, "aligned_agreement": 0.0, "cross_entropy": 0.0}
        aligned = predicted = 0
        model: Any = student
        for begin in range(0, len(self._rows), _BATCH):
            rows = self._rows[begin : begin + _BATCH]
            batch = collate([self._examples[row] for row in rows], self._teacher.pad_id)
            batch = {name: value.to(self._teacher.device) for name, value in batch.items()}
            ids, mask = batch["input_ids"], batch["attention_mask"]
            states = base_model(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            said = self._teacher.say(batch)
            assert said.final is not None
            assert said.head is not None
            for row in range(len(rows)):
                length = int(mask[row].sum())
                logits = model.get_output_embeddings()(states[row, : length - 1])[..., : self._vocab_size].float()
                sums["cross_entropy"] += float(
                    nn.functional.cross_entropy(logits.double(), ids[row, 1:length], reduction="sum")
                )
                predicted += length - 1
                places = batch["aligned"][row, : length - 1]
                here = places >= 0
                theirs = said.head(said.final[row, places[here]]).float()
                every = torch.ones(len(theirs), dtype=torch.bool, device=theirs.device)
                sums["universal_logit"] += float(universal_logit(logits[here], Dense(theirs), every).double().sum())
                aligned += len(theirs)
                for mine, other in zip(logits[here].argmax(-1).tolist(), theirs.argmax(-1).tolist(), strict=True):
                    sums["aligned_agreement"] += _begin_alike(self._ours[mine], self._theirs[other])
        found = {
            "cross_entropy": sums.pop("cross_entropy") / max(predicted, 1),
            "aligned_share": aligned / max(predicted, 1),
        }
        return found | ({name: total / aligned for name, total in sums.items()} if aligned else {})


def held_out_of(examples: Examples, teacher: Teacher, vocab_size: int, tokenizer: Any) -> HeldOut | ForeignHeldOut:
    """What measures a student whose tokens ``tokenizer`` makes against ``teacher``."""
    if isinstance(teacher, ForeignTeacher):
        return ForeignHeldOut(examples, teacher, vocab_size, tokenizer)
    return HeldOut(examples, teacher, vocab_size)


def _texts_of(tokenizer: Any) -> list[str]:
    """What each id says on its own."""
    return [tokenizer.decode([index]) for index in range(len(tokenizer))]


def _begin_alike(first: str, second: str) -> bool:
    return first == second or bool(first and second and (first.startswith(second) or second.startswith(first)))
