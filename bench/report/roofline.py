"""The roofline plot, and the page that ``edgestill bench --profile-page FILE`` writes: one file, no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ... import __version__
from ...files import atomic_write
from ..peaks import MEMORY, Peaks
from ..profile import Profiled
from ..roofline import Attained
from .build import html_environment, trusted
from .plots import _line, _number, _open, _Scale, _text

__all__ = ["roofline_chart", "write_profile_page"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 400, 64, 622, 18, 352
_SERIES = ("onnx", "gguf", "coreml", "reference")


def write_profile_page(profiles: Sequence[Profiled], out: Path) -> None:
    """Write the page, whole or not at all. Equal arguments give equal bytes; names are escaped."""
    peaks = next((profile.peaks for profile in profiles if profile.peaks is not None), None)
    points = {f"{p.subject} {r.phase}": r for p in profiles for phase in p.phases if (r := phase.roofline) is not None}
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    page = html_environment().get_template("profile.html.jinja").render(
        profiles=profiles, peaks=peaks, memory=MEMORY, version=__version__, style=trusted(style),
        chart=trusted(roofline_chart(points, peaks)) if peaks is not None else "", number=_short,
    )  # fmt: skip
    atomic_write(out, page)


def roofline_chart(points: dict[str, Attained], peaks: Peaks) -> str:
    """Operations a second over operations a byte, both in logs: the slope is the measured bandwidth, the level the
    measured peaks of float and int8 products; a dot a phase, with its distance to the roof. ``""`` without a point."""
    bandwidth = peaks.bandwidth
    floats, whole = peaks.arithmetic("float"), peaks.arithmetic("int8")
    if not points or bandwidth is None or floats is None or whole is None:
        return ""
    assert bandwidth.rate
    assert floats.rate
    assert whole.rate
    levels = {"float": floats.rate / 1e9}
    if whole.rate > floats.rate:
        levels["int8"] = whole.rate / 1e9
    slope = bandwidth.rate / 1e9
    ridge = max(levels.values()) / slope
    wide = [point.intensity for point in points.values()] + [ridge]
    high = [point.flops_per_s / 1e9 for point in points.values()]
    low_x, high_x = min(wide) / 3, max(wide) * 4
    low_y = min(*high, low_x * slope) / 2 if len(high) > 1 else min(high[0], low_x * slope) / 2
    across = _Scale(low_x, high_x, _LEFT, _RIGHT, log=True)
    up = _Scale(low_y, max(levels.values()) * 2, _BOTTOM, _TOP, log=True)
    parts = [_open("Roofline: operations a second over operations a byte", "chart", _WIDTH, _HEIGHT)]
    for tick in up.ticks[:: max(1, len(up.ticks) // 8)]:
        parts.append(_line("grid", _LEFT, up(tick), _RIGHT, up(tick)))
        parts.append(_text("tick", _LEFT - 7, up(tick) + 3.5, _number(tick), "end"))
    for tick in across.ticks[:: max(1, len(across.ticks) // 8)]:
        parts.append(_line("grid", across(tick), _TOP, across(tick), _BOTTOM))
        parts.append(_text("tick", across(tick), _BOTTOM + 16, _number(tick)))
    for name, level in levels.items():
        start = level / slope
        parts.append(_line("front", across(max(low_x, start)), up(level), _RIGHT, up(level)))
        parts.append(_text("label", _RIGHT - 4, up(level) - 5, f"{name} peak {_short(level)} GFLOP/s", "end"))
    parts.append(_line("front", across(low_x), up(low_x * slope), across(ridge), up(ridge * slope)))
    parts.append(_text("label", across(low_x) + 6, up(low_x * slope) - 12, f"{_short(slope)} GB/s", "start"))
    for index, (name, point) in enumerate(points.items()):
        parts.append(_point(name, point, _SERIES[index % len(_SERIES)], across, up))
    parts.append(_text("axis", (_LEFT + _RIGHT) / 2, _HEIGHT - 8, "operations a byte"))
    turned = _text("axis", 0, 0, "GFLOP/s")
    parts.append(f'<g transform="translate(14 {(_TOP + _BOTTOM) / 2}) rotate(-90)">{turned}</g>')
    return "".join([*parts, "</svg>"])


def _point(name: str, point: Attained, series: str, across: _Scale, up: _Scale) -> str:
    x, y = across(point.intensity), up(point.flops_per_s / 1e9)
    roof = up(min(point.peak, point.intensity * point.bandwidth) / 1e9)
    label = f"{name} {point.fraction:.0%}"
    left = x > (_LEFT + _RIGHT) / 2
    return (
        f'<g class="mark {series} device-verified measured">{_line("whisker", x, y, x, roof)}'
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="5"/></g>'
        + _text("label", x + (-9 if left else 9), y + 4, label, "end" if left else "start")
    )


def _short(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` digits and no power of ten."""
    if value is None:
        return "—"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
