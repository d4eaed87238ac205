"""A phone is measured when it is cool: battery temperature and Android's thermal status, waited for, bounded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import WorkerError
from ..sensors import parse_dumpsys
from .shell import RemoteShell

__all__ = ["Limits", "read_thermal", "wait_until_cool"]

_POLL_SECONDS = 10.0
_MARK = "edgestill-next"


@dataclass(frozen=True)
class Limits:
    """Cool: the battery at most at ``battery_c``, Android's thermal status (0 none … 6 shutdown) at most ``status``.
    It is waited for ``wait_s`` seconds at most."""

    battery_c: float = 38.0
    status: int = 0
    wait_s: float = 600.0


def read_thermal(shell: RemoteShell) -> dict[str, Any]:
    """One reading of a phone, see :func:`edgestill.runtimes.sensors.parse_dumpsys`."""
    script = f"dumpsys battery 2>/dev/null; echo {_MARK}; dumpsys thermalservice 2>/dev/null; true"
    battery, _, thermal = shell.steady(lambda: shell.run(script)).text.partition(_MARK)
    return parse_dumpsys(battery, thermal)


def wait_until_cool(
    shell: RemoteShell, limits: Limits, *, pause: Callable[[float], object] = time.sleep
) -> dict[str, Any]:
    """Wait, and say for the record how long, under which limits, and how warm it was at the end.

    :class:`WorkerError` when it is still too warm after ``limits.wait_s``: what a throttling phone tells is no
    number. What a phone does not tell counts as cool and stands as ``None`` with its reason.
    """
    begin = time.monotonic()
    while (why := _too_warm(reading := read_thermal(shell), limits)) is not None:
        waited = time.monotonic() - begin
        if waited + _POLL_SECONDS > limits.wait_s:
            raise WorkerError(
                f"{shell.name} is too warm to measure after {waited:.0f} s: {why}",
                hint="let it rest unplugged, or allow more: adb:SERIAL?battery_c=40&wait_s=1800",
            )
        pause(_POLL_SECONDS)
    names = ("battery_c", "battery_percent", "thermal_status")
    reasons = {name: reading["reasons"][name] for name in names if name in reading["reasons"]}
    return {
        "waited_s": round(time.monotonic() - begin, 1),
        "limit_battery_c": limits.battery_c,
        "limit_thermal_status": limits.status,
        **{name: reading[name] for name in names},
        "reasons": reasons,
    }


def _too_warm(reading: Mapping[str, Any], limits: Limits) -> str | None:
    battery, status = reading["battery_c"], reading["thermal_status"]
    if battery is not None and battery > limits.battery_c:
        return f"the battery has {battery:g} °C, {limits.battery_c:g} are allowed"
    if status is not None and status > limits.status:
        return f"its thermal status is {status}, {limits.status} is allowed"
    return None
