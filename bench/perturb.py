"""Text as people really type it: typos, other case, odd white space. Seeded: the same text gives the same noise.

Each text has a random generator of its own, from the seed, the kind of noise and the text, so that neither order nor
number of texts changes what happens to one of them.
"""

from __future__ import annotations

import random
import re

from ..errors import UsageError, nearest

__all__ = ["PERTURBATIONS", "perturb"]

# Neighbours on a QWERTY keyboard, in the same row.
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEAR = {
    letter: row[max(0, place - 1) : place] + row[place + 1 : place + 2]
    for row in _ROWS
    for place, letter in enumerate(row)
}
_WORD = re.compile(r"[^\W\d_]{4,}")
TYPOS_PER_WORD = 0.15
SPACES_CHANGED, SPACES_LOST = 0.2, 0.05


def perturb(text: str, kind: str, seed: int = 0) -> str:
    """``text`` with noise of one ``kind``:

    * ``typos``: 15 % of the words of four letters or more get one: two letters swapped, one lost, one doubled, or one
      of its neighbours on the keyboard;
    * ``case``: the whole text in capitals, in small letters, or Each Word With A Capital;
    * ``whitespace``: 20 % of the spaces become several, a tab or a line break, 5 % are lost; some spaces around it.

    >>> perturb("a moving picture", "case", 4) == perturb("a moving picture", "case", 4)
    True
    """
    if kind not in PERTURBATIONS:
        raise UsageError(f"no perturbation {kind!r}", hint=nearest(kind, PERTURBATIONS))
    chooser = random.Random(f"{seed}\0{kind}\0{text}")
    if kind == "typos":
        return _WORD.sub(
            lambda match: _typo(match[0], chooser) if chooser.random() < TYPOS_PER_WORD else match[0], text
        )
    if kind == "case":
        return chooser.choice((str.upper, str.lower, str.title))(text)
    spaced = re.sub(" ", lambda _: _space(chooser), text)
    return " " * chooser.randint(0, 2) + spaced + chooser.choice(("", " ", "\n"))


PERTURBATIONS = ("typos", "case", "whitespace")
"""The kinds of noise that :func:`perturb` knows."""


def _typo(word: str, chooser: random.Random) -> str:
    """One edit inside ``word`` (four letters or more); the first letter stays, as it does when people type."""
    place = chooser.randrange(1, len(word) - 1)
    before, here, after = word[:place], word[place], word[place + 1 :]
    kind = chooser.choice(("swap", "lose", "double", "near"))
    if kind == "swap" and after[0] != here:
        return before + after[0] + here + after[1:]
    if kind == "lose":
        return before + after
    if kind == "near" and here.lower() in _NEAR:
        return before + chooser.choice(_NEAR[here.lower()]) + after
    return before + here + here + after


def _space(chooser: random.Random) -> str:
    drawn = chooser.random()
    if drawn < SPACES_LOST:
        return ""
    return chooser.choice(("  ", "   ", "\t", "\n")) if drawn < SPACES_LOST + SPACES_CHANGED else " "
