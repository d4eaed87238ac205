"""What a trimmed vocabulary costs on text that it was not chosen by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .align import Encoded, chunks, encode_spans

__all__ = ["Coverage", "coinciding_tokens", "measure_coverage"]


@dataclass(frozen=True)
class Coverage:
    """Shares (0 to 1) over held-out ``texts`` of ``characters``, which the teacher reads as ``tokens``.

    ``kept``: tokens that the student has, too. ``coinciding``: tokens that stand in the student's tokenisation at the
    same place (a dropped token also changes its neighbours). ``same_texts``: texts tokenised alike as a whole.
    ``growth``: student tokens for each teacher token, so 1.02 means 2 % more tokens a character.
    """

    texts: int
    characters: int
    tokens: int
    kept: float
    coinciding: float
    same_texts: float
    growth: float

    def facts(self) -> dict[str, float]:
        """The fields, shares to six digits."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def measure_coverage(
    teacher: Any, student: Any, keep: Sequence[int], texts: Iterable[str], *, prefix: str = ""
) -> Coverage | None:
    """Coverage of ``texts`` by the tokenizer ``student``, whose id ``i`` is ``keep[i]`` of ``teacher``'s.

    ``None`` without a token to count.
    """
    known = np.asarray(keep, dtype=np.int64)
    number = characters = theirs = ours = kept = same = alike = 0
    for text in texts:
        whole, trimmed = encode_spans(teacher, prefix + text), encode_spans(student, prefix + text)
        number, characters = number + 1, characters + len(text)
        theirs, ours = theirs + len(whole.ids), ours + len(trimmed.ids)
        kept += int(np.isin(whole.ids, known).sum())
        same += sum(part.stop - part.start for part, _ in coinciding_tokens(whole, trimmed, keep))
        alike += int(np.array_equal(whole.ids, known[trimmed.ids]))
    if not theirs:
        return None
    return Coverage(number, characters, theirs, kept / theirs, same / theirs, alike / number, ours / theirs)


def coinciding_tokens(teacher: Encoded, student: Encoded, keep: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """The chunks (teacher's tokens, student's tokens) of one text that are the same tokens on both sides."""
    known = np.asarray(keep, dtype=np.int64)
    for theirs, ours in chunks(teacher, student):
        if np.array_equal(teacher.ids[theirs], known[student.ids[ours]]):
            yield theirs, ours
