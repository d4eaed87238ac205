"""Two tokenisations of one text: where they agree, and a loss between models that count with different ids.

Tokens are compared by the characters that they cover (offsets into the text). Both have read exactly the same text
where both end a token at the same place; there, what one model expects next can be compared with what the other does.
A character whose bytes are spread over several tokens ends with the last of them.

A teacher with another vocabulary has no probability for the student's tokens. The universal logit loss (Boizard et al.,
arXiv 2402.12030) compares the *sorted* probabilities: how sure the teacher is and of how many things, not of which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from ..errors import RecipeError
from ..vocabularies import Vocabularies, compare_vocabularies
from .rows import log_softmax, valid, wide
from .signal import Dense

__all__ = ["Encoded", "align_positions", "chunks", "encode_spans", "relate", "universal_logit"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """A text's token ids ``[n]`` with the place in the text ``starts [n]``, ``ends [n]`` (in characters) of each."""

    ids: Ints
    starts: Ints
    ends: Ints

    @property
    def boundaries(self) -> Ints:
        """Where tokens end cleanly ``[b]``, ascending: nothing that comes later covers a character before it."""
        # What covers nothing (special tokens, a lone space whose offsets are trimmed) stands where the text is by then.
        reached = np.maximum.accumulate(self.ends) if len(self.ends) else self.ends
        empty = self.starts >= self.ends
        begins = np.where(empty, reached, self.starts)
        following = np.minimum.accumulate(np.append(begins[1:], np.iinfo(np.int64).max)[::-1])[::-1]
        return np.unique(reached[following >= reached])


def encode_spans(tokenizer: Any, text: str, *, special: bool = False) -> Encoded:
    """``text`` by a fast tokenizer, with offsets; ``special``: with the special tokens that it puts around a text."""
    row = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(row["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return Encoded(np.asarray(row["input_ids"], dtype=np.int64), offsets[:, 0], offsets[:, 1])


def chunks(first: Encoded, second: Encoded) -> list[tuple[slice, slice]]:
    """The shortest stretches of tokens of both that cover the same text, in order.

    Equal tokenisations give one token each (more only where several share a character). What follows the last common
    place belongs to no chunk.
    """
    common = np.intersect1d(first.boundaries, second.boundaries)
    last = [_last_before(side, common) for side in (first, second)]
    found: list[tuple[slice, slice]] = []
    begin = [0, 0]
    for ends in zip(*last, strict=True):
        if ends[0] > begin[0] and ends[1] > begin[1]:
            found.append((slice(begin[0], int(ends[0])), slice(begin[1], int(ends[1]))))
            begin = [int(end) for end in ends]
    return found


def align_positions(student: Encoded, teacher: Encoded) -> Ints:
    """Pairs ``[n, 2]`` of token numbers (student, teacher) after which both have read the same text.

    Both predict something there: the last tokens of the text are left out. Equal tokenisations give ``(i, i)``, but for
    the tokens before the last of those that share a character.
    """
    pairs = [(ours.stop - 1, theirs.stop - 1) for ours, theirs in chunks(student, teacher)]
    open_ended = [pair for pair in pairs if pair[0] + 1 < len(student.ids) and pair[1] + 1 < len(teacher.ids)]
    return np.asarray(open_ended, dtype=np.int64).reshape(-1, 2)


def universal_logit(student: Tensor, signal: Dense, mask: Tensor) -> Tensor:
    """``T · sum_i |p_(i) − q_(i)|`` of the probabilities sorted from high to low, the shorter list filled with zeros.

    ``student`` logits [..., V], ``signal.logits`` [..., V'] of the teacher at the same places (see
    :func:`align_positions`), both softened by T and cut at the signal's ``vocab_size`` (``None`` where the tokenizers
    differ); without the T between 0 and 2 for each valid place. It is the Wasserstein distance of arXiv 2402.12030,
    equation 3: equal distributions over other names are at distance 0.
    """
    ours, theirs = (
        log_softmax(wide(valid(logits, mask)[..., : signal.vocab_size]), signal.temperature)
        .exp()
        .sort(-1, descending=True)
        .values
        for logits in (student, signal.logits.detach())
    )
    width = max(ours.shape[-1], theirs.shape[-1])
    ours, theirs = (F.pad(side, (0, width - side.shape[-1])) for side in (ours, theirs))
    return (ours - theirs).abs().sum(-1) * signal.temperature


def relate(teacher: Any, teacher_rows: int, student: Any, student_rows: int) -> Vocabularies:
    """:func:`compare_vocabularies`, for a student that is to be trained token by token.

    Raises :class:`RecipeError` with the reason when the vocabularies are different.
    """
    found = compare_vocabularies(teacher, teacher_rows, student, student_rows)
    if found.relation == "different":
        raise RecipeError(
            f"teacher and student count with different tokens: {found.reason}",
            hint="start the student from the teacher, or trim the teacher's vocabulary ([student] vocabulary)",
        )
    return found


def _last_before(side: Encoded, places: Ints) -> Sequence[int]:
    """How many tokens of ``side`` lie before each of ``places``."""
    reached = np.maximum.accumulate(side.ends) if len(side.ends) else side.ends
    return np.searchsorted(reached, places, side="right").tolist()
