"""Figures: what is measured side by side with other tools, in which unit, against which limit.

A figure is a function in ``groups/``, registered by :func:`figure`; a new file there is found by itself::

    @figure("decode_speed_ratio", group="decode", unit="ratio", limit=0.95, sense="at_least", variants=("onnx:int4",),
            peer="onnxruntime called directly", title="decode speed over the plain runtime's")
    def decode_speed_ratio(context, variant):
        ...
        return Taken(value, "how it was measured", interval)

A name on the command line is a group (``decode``), a figure (``decode_speed_ratio``) or one of its variants
(``decode_speed_ratio[onnx:int4]``).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgestill.errors import UsageError, nearest

if TYPE_CHECKING:
    from .context import Context
    from .environments import Environment

__all__ = ["FIGURES", "Figure", "Row", "Subject", "Taken", "Unavailable", "figure", "judge", "load_groups", "select"]

Sense = Literal["at_most", "at_least"]


class Unavailable(Exception):
    """A peer (or a model) can't be had on this machine; the text says why. The figure has no value then."""


@dataclass(frozen=True)
class Taken:
    """A measured value, how it was taken, and its 95 % interval (``None``: exact, or a single sample).

    ``doubt`` says why a miss would not count (an absolute time on a busy machine); a value that holds in spite of it
    does count. ``void`` says why the value proves nothing either way (a tiny model): it is shown, not judged.
    """

    value: float
    how: str
    interval: tuple[float, float] | None = None
    doubt: str = ""
    void: str = ""


Measure = Callable[["Context", str], Taken]


@dataclass(frozen=True)
class Figure:
    """One figure, or one a variant. ``limit=None``: reported, not judged. ``environment`` is where its peer lives.

    ``slow`` says what it takes ("an hour on two cores"): it is then only taken when it is named, or with ``--slow``.
    """

    id: str
    group: str
    title: str
    unit: str
    measure: Measure
    peer: str
    limit: float | None = None
    sense: Sense = "at_most"
    variants: tuple[str, ...] = ()
    environment: Environment | None = None
    slow: str = ""


@dataclass(frozen=True)
class Subject:
    """What one row is about: a figure and one of its variants (``""``: it has none). ``left_out``: too slow to be taken
    unasked."""

    figure: Figure
    variant: str
    left_out: bool = False

    @property
    def name(self) -> str:
        return f"{self.figure.id}[{self.variant}]" if self.variant else self.figure.id


@dataclass(frozen=True)
class Row:
    """A line of the result. ``holds`` is ``None`` when there is nothing to judge or no judgement possible: ``how`` says
    which."""

    figure: str
    value: float | None
    unit: str
    limit: float | None
    holds: bool | None
    how: str
    sense: Sense = "at_most"
    status: Literal["measured", "undecided", "unavailable", "failed", "left out"] = "measured"

    def document(self) -> dict[str, object]:
        """The keys that a line of ``--json`` has."""
        keys = ("figure", "value", "unit", "limit", "holds", "how")
        return {key: getattr(self, key) for key in keys}


FIGURES: dict[str, Figure] = {}


def figure(
    name: str,
    *,
    group: str,
    title: str,
    unit: str,
    peer: str,
    limit: float | None = None,
    sense: Sense = "at_most",
    variants: Sequence[str] = (),
    environment: Environment | None = None,
    slow: str = "",
) -> Callable[[Measure], Measure]:
    """Register the decorated function as the figure ``name``."""

    def register(measure: Measure) -> Measure:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), name
        assert name not in FIGURES, f"two figures are called {name}"
        FIGURES[name] = Figure(
            name, group, title, unit, measure, peer, limit, sense, tuple(variants), environment, slow
        )
        return measure

    return register


def load_groups() -> None:
    """Import every file of ``groups/``, which registers its figures."""
    from . import groups

    for info in sorted(pkgutil.iter_modules(groups.__path__), key=lambda info: info.name):
        importlib.import_module(f"{groups.__name__}.{info.name}")


def select(names: Sequence[str], figures: Iterable[Figure] | None = None, *, slow: bool = False) -> list[Subject]:
    """What ``names`` mean (all figures when there is none), in the order of registration, each once.

    Figures that are slow are left out, and say so, unless they are named themselves or ``slow`` asks for them.
    Raises :class:`UsageError` with the nearest name for an unknown one.
    """
    known = list(FIGURES.values() if figures is None else figures)
    everything = list(_subjects(known))
    asked = set(names)
    everything = [
        dataclasses.replace(s, left_out=bool(s.figure.slow) and not slow and not {s.name, s.figure.id} & asked)
        for s in everything
    ]  # fmt: skip
    if not names:
        return everything
    words = {
        *(item.name for item in everything), *(one.id for one in known), *(one.group for one in known)
    }  # fmt: skip
    for name in names:
        if name not in words:
            raise UsageError(f"no figure or group {name!r}", hint=f"{nearest(name, sorted(words))}; --list shows all")
    return [s for s in everything if {s.name, s.figure.id, s.figure.group} & asked]


def _subjects(figures: Iterable[Figure]) -> Iterator[Subject]:
    for one in figures:
        for variant in one.variants or ("",):
            yield Subject(one, variant)


def judge(subject: Subject, taken: Taken) -> Row:
    """Put a value to its figure's limit, by the bound of its interval: one that spans the limit decides nothing."""
    one = subject.figure
    how = taken.how
    if not math.isfinite(taken.value):
        return Row(subject.name, None, one.unit, one.limit, False, f"{how}; not a finite number", one.sense, "failed")
    low, high = taken.interval or (taken.value, taken.value)
    if taken.interval:
        how += f"; 95 % interval {low:.4g} to {high:.4g}"
    holds: bool | None = None
    if one.limit is not None and taken.void:
        how += f"; not judged: {taken.void}"
    elif one.limit is not None:
        worst, best = (high, low) if one.sense == "at_most" else (low, high)
        sign = 1 if one.sense == "at_most" else -1
        if sign * worst <= sign * one.limit:
            holds = True
        elif sign * best > sign * one.limit and not taken.doubt:
            holds = False
        else:
            how += f"; undecided: {taken.doubt or 'the interval spans the limit'}"
            return Row(subject.name, taken.value, one.unit, one.limit, None, how, one.sense, "undecided")
    return Row(subject.name, taken.value, one.unit, one.limit, holds, how, one.sense)
