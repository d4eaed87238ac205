"""Small inline SVG charts without a plotting library: a Pareto scatter and line panels. Colours come from style.css."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from ..pick import pareto_front

__all__ = ["Axis", "Point", "line_panel", "reliability_chart", "scatter", "ticks"]

_RIGHT, _TOP, _BOTTOM = 18, 16, 46  # margins of a scatter, in pixels; the left one fits its numbers
_LETTER = 6.3  # width of a character of the 11 px label font, on average
_LINE = 13

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Axis:
    """``lower`` says in which direction it gets better; ``log`` draws powers; ``scale`` divides (bytes to MB)."""

    title: str
    lower: bool
    log: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Point:
    """One subject in a scatter. ``series`` is a CSS class (``onnx``, ``gguf``, ``coreml``, ``reference``); ``mark``
    says how it was judged; ``low``/``high`` is the interval of ``y``; ``source`` dashes what was not measured."""

    name: str
    x: float
    y: float
    series: str
    mark: str = "device_verified"
    low: float | None = None
    high: float | None = None
    source: str = "measured"
    best: bool = False


class _Scale:
    """From values between ``low`` and ``high`` to pixels between ``start`` and ``end``, with round ticks."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, log: bool = False, wanted: int = 5
    ) -> None:
        self._log = log
        self._low, self._high = self._map(low), self._map(high)
        self._start, self._end = start, end
        self.ticks = [tick for tick in ticks(low, high, log=log, wanted=wanted) if low <= tick <= high]

    def _map(self, value: float) -> float:
        return math.log(value) if self._log else value

    def __call__(self, value: float) -> float:
        share = (self._map(value) - self._low) / (self._high - self._low)
        share = min(max(share, 0.0), 1.0)  # whiskers end at the frame
        return self._start + share * (self._end - self._start)


def _padded(values: Sequence[float], axis: Axis, start: float, end: float) -> _Scale:
    """Room around the data, but none beyond 0 where it gets better downwards, nor much beyond 1 where upwards."""
    low, high = min(values), max(values)
    if axis.log and low > 0:
        return _Scale(low / 1.35, high * 1.35, start, end, log=True)
    pad = (high - low) * 0.14 or abs(high) * 0.1 or 1.0
    bottom, top = low - pad, high + pad
    if axis.lower and bottom < 0 <= low:
        bottom = 0.0
    if not axis.lower and top > 1 >= high:
        top = 1 + (1 - bottom) * 0.04
    return _Scale(bottom, top, start, end)


def ticks(low: float, high: float, *, log: bool = False, wanted: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``: steps of 1, 2 or 5 times a power of ten; ``log``: 1-2-5 series.

    >>> ticks(0, 10)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    >>> ticks(3, 120, log=True)
    [5.0, 10.0, 20.0, 50.0, 100.0]
    """
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [base * 10.0**power for power in powers for base in (1, 2, 5)]
        inside = [tick for tick in found if low <= tick <= high]
        if len(inside) >= 2:
            return inside
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(base * power for base in (1, 2, 5, 10) if base * power >= rough * 0.75)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def scatter(points: Sequence[Point], x: Axis, y: Axis, *, label: str, width: int = 520, height: int = 360) -> str:
    """Points with labels that do not overlap, the Pareto front of those that were verified as a step line, and
    whiskers for intervals. Empty text when there is nothing to draw."""
    if not points:
        return ""
    points = [_scaled(point, x, y) for point in points]
    low, high = min(p.y for p in points), max(p.y for p in points)
    room = high - low or abs(high) * 0.1
    ends = [end for p in points for end in (p.y, p.low, p.high) if end is not None]
    up = _padded([min(max(end, low - room), high + room) for end in ends], y, height - _BOTTOM, _TOP)
    left = 34 + _LETTER * max(len(_number(tick)) for tick in up.ticks or [0.0])
    across = _padded([p.x for p in points], x, left, width - _RIGHT)
    parts = [_open(label, "chart", width, height), _grid(across, up, x, y, left, width, height)]
    front = _front(points, x, y)
    if len(front) > 1:
        parts.append(_steps(front, across, up))
    taken: list[Box] = [(across(p.x) - 6, up(p.y) - 6, across(p.x) + 6, up(p.y) + 6) for p in points]
    marks, labels = [], []
    area = (left, 0.0, float(width), float(height - _BOTTOM))
    for point in sorted(points, key=lambda p: (not p.best, p.mark == "failed", p.x, p.name)):
        px, py = across(point.x), up(point.y)
        marks.append(_mark(point, px, py, up))
        labels.append(_place(point, px, py, taken, area))
    return "".join([*parts, *marks, *labels, "</svg>"])


def line_panel(values: Mapping[str, Sequence[tuple[float, float]]], *, label: str, x_title: str = "step") -> str:
    """One or more series over a common axis, e.g. a loss over steps; a dot where the last value is."""
    series = {name: [p for p in rows if math.isfinite(p[1])] for name, rows in values.items()}
    series = {name: rows for name, rows in series.items() if len(rows) > 1}
    if not series:
        return ""
    width, height, left, right = 320, 190, 48, 308
    steps = [point[0] for rows in series.values() for point in rows]
    spread = [point[1] for rows in series.values() for point in rows]
    across = _Scale(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1, left, right, wanted=4)
    up = _padded(spread, Axis("", True, min(spread) > 0 and max(spread) > 20 * min(spread)), height - 34, 12)
    parts = [_open(label, "chart panel", width, height)]
    for tick in up.ticks[:: max(1, len(up.ticks) // 4)]:
        row = up(tick)
        parts += [_line("grid", left, row, right, row), _text("tick", left - 5, row + 3.5, _number(tick), "end")]
    parts += [_text("tick", across(tick), height - 18, _number(tick)) for tick in across.ticks]
    parts.append(_text("axis", (left + right) / 2, height - 4, x_title))
    for index, rows in enumerate(series.values()):
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in _thin(rows))
        last = rows[-1]
        parts.append(f'<polyline class="line line-{index}" points="{path}"/>')
        parts.append(f'<circle class="end line-{index}" cx="{across(last[0]):.1f}" cy="{up(last[1]):.1f}" r="3"/>')
    return "".join([*parts, "</svg>"])


def reliability_chart(lines: Mapping[str, Sequence[tuple[float, float]]], *, label: str) -> str:
    """Accuracy over confidence, both from 0 to 1, a line a model; on the dashed diagonal a model is as right as it is
    sure, below it it is too sure of itself."""
    if not any(lines.values()):
        return ""
    width, height, left, right = 320, 300, 44, 306
    across, up = _Scale(0, 1, left, right), _Scale(0, 1, height - 40, 10)
    parts = [_open(label, "chart panel", width, height)]
    for tick in up.ticks:
        row, column = up(tick), across(tick)
        parts += [_line("grid", left, row, right, row), _text("tick", left - 6, row + 3.5, _number(tick), "end")]
        parts += [_line("grid", column, 10, column, height - 40), _text("tick", column, height - 25, _number(tick))]
    parts.append(f'<path class="front" d="M{across(0):.1f} {up(0):.1f}L{across(1):.1f} {up(1):.1f}"/>')
    parts.append(_text("axis", (left + right) / 2, height - 6, "confidence"))
    parts.append(f'<g transform="translate(12 {height / 2 - 15}) rotate(-90)">{_text("axis", 0, 0, "accuracy")}</g>')
    for name, rows in lines.items():
        kind = escape(name, quote=True)
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in rows)
        parts.append(f'<g class="model {kind}"><title>{kind}</title><polyline class="line" points="{path}"/>')
        parts += [f'<circle class="end" cx="{across(a):.1f}" cy="{up(b):.1f}" r="2.6"/>' for a, b in rows]
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _thin(rows: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """Means of neighbours, so that a long run does not make a long file."""
    size = -(-len(rows) // most)
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [(sum(a for a, _ in c) / len(c), sum(b for _, b in c) / len(c)) for c in chunks]


def _scaled(point: Point, x: Axis, y: Axis) -> Point:
    low, high = (None if bound is None else bound / y.scale for bound in (point.low, point.high))
    return replace(point, x=point.x / x.scale, y=point.y / y.scale, low=low, high=high)


def _front(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """The verified points that no other verified one beats, from left to right."""
    good = {p.name: p for p in points if p.mark in ("device_verified", "program_verified")}
    flat = {name: ((1 if x.lower else -1) * p.x, (1 if y.lower else -1) * p.y) for name, p in good.items()}
    return sorted((good[name] for name in pareto_front(flat)), key=lambda p: (p.x, p.y))


def _open(label: str, kind: str, width: int, height: int) -> str:
    name = escape(label, quote=True)
    return f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{name}">'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _grid(across: _Scale, up: _Scale, x: Axis, y: Axis, left: float, width: int, height: int) -> str:
    bottom, right = height - _BOTTOM, width - _RIGHT
    parts = []
    for tick in up.ticks:
        row = up(tick)
        parts += [_line("grid", left, row, right, row), _text("tick", left - 7, row + 3.5, _number(tick), "end")]
    for tick in across.ticks:
        column = across(tick)
        parts += [_line("grid", column, _TOP, column, bottom), _text("tick", column, bottom + 16, _number(tick))]
    parts.append(_text("axis", (left + right) / 2, height - 8, _title(x)))
    turned = _text("axis", 0, 0, _title(y))
    return "".join([*parts, f'<g transform="translate(14 {(_TOP + bottom) / 2}) rotate(-90)">{turned}</g>'])


def _title(axis: Axis) -> str:
    """With an arrow to where it is better."""
    return f"← {axis.title}" if axis.lower else f"{axis.title} →"


def _steps(front: Sequence[Point], across: _Scale, up: _Scale) -> str:
    """The border of what can be had: for each size the best y that is reached up to it."""
    path = [f"M{across(front[0].x):.1f} {up(front[0].y):.1f}"]
    path += [f"H{across(point.x):.1f}V{up(point.y):.1f}" for point in front[1:]]
    return f'<path class="front" d="{"".join(path)}"/>'


def _mark(point: Point, px: float, py: float, up: _Scale) -> str:
    classes = f"mark {point.series} {point.mark.replace('_', '-')} {point.source}" + (" best" if point.best else "")
    value = f"{point.name}: {point.x:.4g}, {point.y:.4g} ({point.source}, {point.mark.replace('_', ' ')})"
    parts = [f'<g class="{escape(classes, quote=True)}"><title>{escape(value)}</title>']
    if point.low is not None and point.high is not None:
        parts.append(
            f'<line class="whisker" x1="{px:.1f}" x2="{px:.1f}" y1="{up(point.low):.1f}" y2="{up(point.high):.1f}"/>'
        )
    if point.best:
        parts.append(f'<circle class="halo" cx="{px:.1f}" cy="{py:.1f}" r="10"/>')
    if point.mark == "failed":
        parts.append(f'<path class="cross" d="M{px - 5:.1f} {py - 5:.1f}l10 10m0 -10l-10 10"/>')
    elif point.mark == "reference":
        parts.append(f'<path class="dot" d="M{px:.1f} {py - 6.5:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5z"/>')
    else:
        parts.append(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="5.5"/>')
    return "".join([*parts, "</g>"])


def _place(point: Point, px: float, py: float, taken: list[Box], area: Box) -> str:
    """The label in the first spot around its point that is free and inside; a line leads to it when it is far."""
    width = len(point.name) * _LETTER
    best: tuple[float, float, float, Box] | None = None
    for distance in (0, 14, 28, 42, 58, 76, 96):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            gap = 9 + distance * 0.45
            x0 = px + gap if dx > 0 else px - gap - width if dx < 0 else px - width / 2
            y0 = py - _LINE / 2 + dy * (_LINE + distance * 0.75)
            box = (x0, y0, x0 + width, y0 + _LINE)
            outside = x0 < area[0] + 2 or box[2] > area[2] - 2 or y0 < area[1] + 2 or box[3] > area[3] - 1
            overlap = sum(_overlap(box, other) for other in taken)
            cost = overlap + (1e6 if outside else 0) + distance * 0.01
            if best is None or cost < best[0]:
                best = (cost, x0, y0, box)
            if cost < 1:
                break
        if best is not None and best[0] < 1:
            break
    assert best is not None  # the loops ran
    _, x0, y0, box = best
    taken.append(box)
    leader = ""
    cx, cy = min(max(px, box[0]), box[2]), min(max(py, box[1]), box[3])
    if math.hypot(cx - px, cy - py) > 16:
        leader = _line("leader", px, py, cx, cy)
    return leader + _text("label best" if point.best else "label", x0, y0 + 10, point.name, "start")


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"
