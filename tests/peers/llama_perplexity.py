"""What ``llama-perplexity --kl-divergence`` computes, done again in numpy from logits, its 16-bit store included.

The tool keeps a base model's log-probabilities as 16 bits a token: ``scale`` and ``minimum`` a row, codes rounded to
the nearest step, with a floor 16 below the highest logit. From those and another model's logits it takes KL, Δp and
perplexity over the second half of each window. The arithmetic here is single precision where the tool's is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgestill.errors import BadInput

__all__ = ["Base", "Row", "Statistics", "parse_output", "read_base", "scored", "store"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]
_FLOOR = np.float32(16)
_HEADER = 8 + 4 + 4 + 4  # magic, tokens of a window, tokens of the vocabulary, windows


@dataclass(frozen=True)
class Row:
    """One position of the store: ``log p = scale * codes + minimum``."""

    scale: np.float32
    minimum: np.float32
    codes: Codes


@dataclass(frozen=True)
class Base:
    """The file that the tool writes for a base model: token ids ``[windows, length]`` and the place of its rows."""

    path: Path
    tokens: npt.NDArray[np.int32]
    vocab_size: int

    @property
    def first(self) -> int:
        """Positions before it are context only: the tool scores the second half of a window."""
        return self.tokens.shape[1] // 2

    def rows(self, window: int) -> list[Row]:
        """The stored positions of a window: ``first`` … length - 2."""
        count = self.tokens.shape[1] - 1 - self.first
        width = 2 * ((self.vocab_size + 1) // 2) + 4
        offset = _HEADER + 4 * self.tokens.size + window * count * width * 2
        raw = np.fromfile(self.path, "<u2", count * width, offset=offset).reshape(count, width)
        heads = np.ascontiguousarray(raw[:, :4]).view("<f4")
        return [Row(head[0], head[1], row[4 : 4 + self.vocab_size]) for head, row in zip(heads, raw, strict=True)]


def read_base(path: Path) -> Base:
    """Open such a file; :class:`BadInput` when it is none."""
    with path.open("rb") as stream:
        magic = stream.read(8)
        length, vocab_size, windows = np.fromfile(stream, "<i4", 3).tolist()
        if magic != b"_logits_":
            raise BadInput(f"{path} was not written by llama-perplexity")
        tokens = np.fromfile(stream, "<i4", length * windows).reshape(windows, length)
    return Base(path, tokens, vocab_size)


def store(logits: Floats) -> Row:
    """A row of logits as the tool keeps it."""
    top = logits.max()
    bottom = np.maximum(logits.min(), top - _FLOOR)
    total = _log_sum(logits, top)
    scale = np.float32((top - bottom) / np.float32(65535))
    codes = np.zeros(len(logits), np.uint16)
    if scale:
        steps = np.float32(1) / scale * (logits - bottom)
        codes = np.where(logits > bottom, np.rint(steps), 0).astype(np.uint16)
    return Row(scale, np.float32(bottom - top - total), codes)


def _exp(values: Floats) -> Floats:
    """As the C library's ``expf``, which rounds correctly but for a handful of arguments."""
    return np.exp(values.astype(np.float64)).astype(np.float32)


def _log_sum(logits: Floats, top: np.float32) -> np.float32:
    return np.float32(np.log(_exp(logits - top).astype(np.float64).sum()))


@dataclass
class Statistics:
    """Sums over positions, as the tool makes them; :meth:`printed` are the lines that it prints."""

    nll: list[float] = field(default_factory=list)
    nll_base: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)

    def add(self, base: Row, logits: Floats, target: int) -> None:
        """One position: the base's row, the other model's logits there, the token that came next."""
        top = logits.max()
        total = _log_sum(logits, top)
        nll = np.float32(np.float32(top + total) - logits[target])
        stored = np.float32(base.scale) * base.codes.astype(np.float32) + np.float32(base.minimum)
        nll_base = np.float32(-stored[target])
        known = stored > -_FLOOR
        terms = _exp(stored[known]) * (stored[known] - logits[known] + np.float32(top + total))
        self.nll.append(float(nll))
        self.nll_base.append(float(nll_base))
        self.kl.append(float(terms.astype(np.float64).sum()))
        self.change.append(float(_exp(-nll[None])[0] - _exp(-nll_base[None])[0]))
        self.same_top.append(int(logits.argmax()) == int(stored.argmax()))

    def printed(self) -> dict[str, float]:
        """By the names that the tool prints, per cent where it prints per cent."""
        kl, change = np.sort(self.kl).astype(np.float32), np.sort(self.change).astype(np.float32)
        mean, base = float(np.mean(self.nll)), float(np.mean(self.nll_base))
        return {
            "Mean PPL(Q)": np.exp(mean), "Mean PPL(base)": np.exp(base), "Mean ln(PPL(Q)/PPL(base))": mean - base,
            "Mean PPL(Q)/PPL(base)": np.exp(mean - base), "Mean KLD": float(np.mean(self.kl)),
            "Maximum KLD": float(kl[-1]), "99.0% KLD": _quantile(kl, 0.99), "Median KLD": _quantile(kl, 0.5),
            "Mean Δp": 100 * float(np.mean(self.change)), "99.0% Δp": 100 * _quantile(change, 0.99),
            "1.0% Δp": 100 * _quantile(change, 0.01),
            "RMS Δp": 100 * float(np.sqrt(np.mean(np.square(self.change)))),
            "Same top p": 100 * float(np.mean(self.same_top)),
        }  # fmt: skip


def _quantile(values: Floats, share: float) -> float:
    """Between the two nearest values in order; ``values`` are sorted."""
    return float(np.quantile(values.astype(np.float64), share))


_LINE = re.compile(r"^\s*(?P<name>[A-Z0-9][^:]*?)\s*:\s*(?P<value>-?\d+(?:\.(?P<places>\d+))?)\s*%?(?:\s*±.*)?$")


def parse_output(text: str) -> dict[str, tuple[float, float]]:
    """The statistics that the tool printed: name -> (value, one unit of its last digit)."""
    found = {}
    for line in text.splitlines():
        if match := _LINE.match(line):
            name = " ".join(match["name"].split())
            found[name] = (float(match["value"]), 10.0 ** -len(match["places"] or ""))
    return found


def scored(base: Base, logits: Iterable[Sequence[Floats]]) -> Statistics:
    """Statistics of the windows' ``logits`` (a row for each stored position) against the store of ``base``."""
    found = Statistics()
    for window, rows in enumerate(logits):
        targets = base.tokens[window, base.first + 1 :].tolist()
        for row, values, target in zip(base.rows(window), rows, targets, strict=True):
            found.add(row, values, target)
    return found
