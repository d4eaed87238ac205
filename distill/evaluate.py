"""How near a student is to its teacher on held-out text, before and after training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from .batches import Batch, Examples, collate
from .chunked import chunk_rows
from .losses import shift
from .student import base_model
from .teacher import Teacher, vectors

__all__ = ["DEV_TEXTS", "DEV_TOKENS", "HeldOut"]

DEV_TEXTS = 600
DEV_TOKENS = 2048
BATCH_SIZE = 32


class HeldOut:
    """The teacher's answers on the dev split, kept, to measure students against them.

    At most :data:`DEV_TEXTS` texts (encoders) or about :data:`DEV_TOKENS` predicted tokens (decoders).
    """

    def __init__(self, examples: Examples, teacher: Teacher, vocab_size: int) -> None:
        self._generation = teacher.folder.task == "text-generation"
        self._embeddings = teacher.folder.task == "feature-extraction"
        self._every_token = teacher.folder.task == "token-classification"
        self._vocab_size = vocab_size
        self._device = teacher.device
        rows = self._choose(examples)
        rows.sort(key=lambda row: len(examples.ids[row]))
        self._batches = [
            collate([examples[row] for row in rows[begin : begin + BATCH_SIZE]], teacher.pad_id)
            for begin in range(0, len(rows), BATCH_SIZE)
        ]
        self._theirs = [self._answer(teacher.model, batch) for batch in self._batches]
        # Of the teacher only the head is kept: the rest may be released.
        self._their_head: Any = _head(teacher.model) if self._batches and self._generation else None

    def _choose(self, examples: Examples) -> list[int]:
        if not self._generation:
            return list(range(min(len(examples), DEV_TEXTS)))
        rows: list[int] = []
        tokens = 0
        while len(rows) < len(examples) and tokens < DEV_TOKENS:
            tokens += len(examples.ids[len(rows)]) - 1
            rows.append(len(rows))
        return rows

    @torch.inference_mode()
    def _answer(self, model: nn.Module, batch: Batch) -> Tensor:
        """Vectors [B, D], logits [N, C] of all real tokens, or states [N, D] before the head at predicting places."""
        batch = {name: value.to(self._device) for name, value in batch.items()}
        if not self._generation:
            said = vectors(model, batch).float()
            return said[batch["attention_mask"].bool()] if self._every_token else said
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = base_model(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return shift(hidden, ids, mask)[0]

    @torch.inference_mode()
    def measure(self, student: nn.Module) -> dict[str, float]:
        """Metrics by name; none without dev text. KL and cross-entropy in nats, means over texts or tokens.

        Embeddings: ``spearman`` between the cosine similarities of all pairs, mean ``cosine`` to the teacher.
        Classification, of texts or of every token: ``kl``, ``top1_agreement``. Generation: also ``cross_entropy``
        and ``teacher_cross_entropy``.
        """
        if not self._batches:
            return {}
        ours = [self._answer(student, batch) for batch in self._batches]
        if self._embeddings:
            found = _compare_embeddings(_numpy(ours), _numpy(self._theirs))
        elif self._generation:
            found = self._compare_tokens(student, ours)
        else:
            found = _means(_compare_logits(torch.cat(ours), torch.cat(self._theirs)))
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _compare_tokens(self, student: nn.Module, ours: list[Tensor]) -> dict[str, float]:
        our_head, their_head = _head(student), self._their_head
        rows = chunk_rows(self._vocab_size)
        parts: list[dict[str, Tensor]] = []
        for batch, mine, theirs in zip(self._batches, ours, self._theirs, strict=True):
            following = shift(batch["input_ids"], batch["input_ids"], batch["attention_mask"])[1]
            for begin in range(0, len(mine), rows):
                piece = slice(begin, begin + rows)
                logits = [
                    head(states[piece])[..., : self._vocab_size]
                    for head, states in ((our_head, mine), (their_head, theirs))
                ]
                part = _compare_logits(*logits)
                for name, side in (("cross_entropy", logits[0]), ("teacher_cross_entropy", logits[1])):
                    part[name] = torch.nn.functional.cross_entropy(
                        side.cpu().double(), following[piece], reduction="none"
                    )
                parts.append(part)
        return _means({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _head(model: nn.Module) -> Any:
    inner: Any = model
    return inner.get_output_embeddings()


def _compare_logits(ours: Tensor, theirs: Tensor) -> dict[str, Tensor]:
    mine, reference = (torch.log_softmax(logits.cpu().double(), dim=-1) for logits in (ours, theirs))
    probability = reference.exp()
    kl = torch.where(probability > 0, probability * (reference - mine), 0.0).sum(-1)
    return {"kl": kl, "top1_agreement": (mine.argmax(-1) == reference.argmax(-1)).double()}


def _means(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(tensor.mean()) for name, tensor in values.items()}


def _numpy(parts: list[Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    stacked = torch.cat(parts).cpu().double().numpy()
    return stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)


def _compare_embeddings(
    ours: np.ndarray[Any, np.dtype[np.float64]], theirs: np.ndarray[Any, np.dtype[np.float64]]
) -> dict[str, float]:
    found = {}
    if ours.shape[1] == theirs.shape[1]:
        found["cosine"] = float((ours * theirs).sum(1).mean())
    pairs = np.triu_indices(len(ours), 1)
    mine, reference = (ours @ ours.T)[pairs], (theirs @ theirs.T)[pairs]
    if len(mine) > 2 and np.ptp(mine) > 0 and np.ptp(reference) > 0:
        found["spearman"] = float(spearmanr(mine, reference).statistic)
    return found
