"""Training text that is read while it is learnt from: memory follows a block of documents, not the corpus.

A file is read from its beginning in every pass, in blocks of :data:`BLOCK` documents that are shuffled inside; several
files take turns, document by document. What other splits hold is left out, as where all text is in memory. What that
would need all text for is not done: a text that stands twice in a file is read twice, and a file that is sorted stays
so from block to block. The order depends on the seed and the files only, so that a place in it is a number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import BadInput

__all__ = ["BLOCK", "Document", "StreamedFile", "TextStream"]

BLOCK = 256

Document = tuple[str, list[tuple[str, str]]]
"""A normalised text, and the pieces of it that are learnt from, each normalised and as it is."""


@dataclass(frozen=True)
class StreamedFile:
    """One file: ``read`` opens it at its beginning; at most ``most`` texts of it are taken in a pass.

    ``stamp`` is what :func:`stamp_of` said when the other splits were dealt.
    """

    path: Path
    read: Callable[[], Iterator[Document]]
    most: int
    stamp: tuple[int, int]

    @staticmethod
    def stamp_of(path: Path) -> tuple[int, int]:
        """Size in bytes and time of the last change in nanoseconds."""
        facts = path.stat()
        return facts.st_size, facts.st_mtime_ns

    def documents(self, seed: int, held_out: frozenset[str]) -> Iterator[list[str]]:
        """What each document gives to training, in the order of the pass; :class:`BadInput` for a file that changed."""
        if self.stamp_of(self.path) != self.stamp:
            raise BadInput(f"{self.path} has changed since its text was split", hint="run the same command again")
        reader, left = self.read(), self.most
        for number in itertools.count():
            block = list(itertools.islice(reader, BLOCK))
            if not block:
                return
            for place in np.random.default_rng([seed, number]).permutation(len(block)).tolist():
                key, pieces = block[place]
                if key in held_out:
                    continue
                found = [text for piece, text in pieces if piece and piece not in held_out][:left]
                left -= len(found)
                yield found
                if not left:
                    return


@dataclass(frozen=True)
class TextStream:
    """The training text of all sets; iterating opens the files anew. ``sha256`` covers all that decides its texts.

    ``count`` is how many there are at most.
    """

    files: tuple[StreamedFile, ...]
    held_out: frozenset[str]
    seed: int
    count: int
    sha256: str

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        open_files = [file.documents(self.seed, self.held_out) for file in self.files]
        while open_files:
            for reader in list(open_files):
                document = next(reader, None)
                if document is None:
                    open_files.remove(reader)
                else:
                    yield from document
