"""Energy, temperature, frequency and throttling, where a machine has sensors. Standard library only.

Linux tells them below ``/sys`` (powercap for energy, thermal zones, cpufreq, the throttle counters of x86, cooling
devices); Android tells more through ``dumpsys``, whose text :func:`parse_dumpsys` reads. A sensor that is missing or
that may not be read is ``None``, with the reason in ``reasons``: never a guess. Virtual machines have none of them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FIELDS", "energy_between", "parse_dumpsys", "read_sensors"]

FIELDS = ("energy_j", "temperature_c", "frequency_mhz", "throttling", "battery_c", "battery_percent", "thermal_status")
"""What a reading holds, beside ``time_s``, ``energy_range_j`` and ``reasons``."""

_NOT_ANDROID = "only Android tells it"


def read_sensors(*, root: Path = Path("/")) -> dict[str, Any]:
    """One reading, as plain JSON.

    ``time_s`` is monotonic. ``energy_j``: joules since some start, by domain (``package-0``, ``dram``), which wrap
    around at ``energy_range_j``. ``temperature_c`` by thermal zone, ``frequency_mhz`` by core; ``throttling``: counters
    of throttling events (x86) and states of the processor's cooling devices (ARM; 0 is none). ``battery_c``,
    ``battery_percent``. ``thermal_status`` is Android's, 0 (none) to 6 (shutdown). ``root`` is where ``sys`` is.
    """
    energy, ranges, energy_reason = _energy(root)
    battery, percent = _battery(root)
    found: dict[str, Any] = {
        "energy_j": energy,
        "temperature_c": _temperatures(root),
        "frequency_mhz": _frequencies(root),
        "throttling": _throttling(root),
        "battery_c": battery,
        "battery_percent": percent,
        "thermal_status": None,
    }
    why = {
        "energy_j": energy_reason,
        "temperature_c": "no thermal zone that can be read",
        "frequency_mhz": "no cpufreq interface",
        "throttling": "no throttle counter and no cooling device of the processor",
        "battery_c": "no battery",
        "battery_percent": "no battery",
        "thermal_status": _NOT_ANDROID,
    }
    reasons = {name: why[name] for name in FIELDS if found[name] is None}
    return {"time_s": time.monotonic(), "energy_range_j": ranges, **found, "reasons": reasons}


def energy_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """Joules that the processor and its memory took between two readings, or ``None`` and the reason.

    Packages and DRAM are added up (cores and graphics are parts of a package; ``psys`` is the whole board and counts
    only where there is no package). A counter that wrapped around once is unwrapped. Everything that the machine did
    meanwhile is in it, not the measured process alone.
    """
    first, last = before.get("energy_j"), after.get("energy_j")
    if not first or not last:
        return None, str((after.get("reasons") or {}).get("energy_j", "the worker has no energy sensor"))
    ranges = after.get("energy_range_j") or {}
    names = [name for name in first if name in last and name.startswith(("package", "dram"))]
    names = names or [name for name in first if name in last]
    if not names:
        return None, "no energy sensor was there at both readings"
    total = 0.0
    for name in names:
        spent = float(last[name]) - float(first[name])
        if spent < 0 and not ranges.get(name):
            return None, f"the energy counter {name} ran backwards"
        total += spent if spent >= 0 else spent + float(ranges[name])
    return total, None


def parse_dumpsys(battery: str, thermal: str) -> dict[str, Any]:
    """A reading from the text of Android's ``dumpsys battery`` and ``dumpsys thermalservice``.

    Temperatures that the hardware layer tells now are preferred to cached ones. Fields that the text does not hold are
    ``None``, with the reason.
    """
    facts = {key.strip().lower(): value.strip() for key, _, value in (x.partition(":") for x in battery.splitlines())}
    now = thermal.partition("Current temperatures from HAL")[2].partition("Current cooling devices")[0] or thermal
    zones = {
        name: float(value) for value, name in re.findall(r"Temperature\{mValue=(-?[\d.]+),.*?mName=([^,}]+)", now)
    }  # fmt: skip
    cooling = {
        name: float(value) for value, name in re.findall(r"CoolingDevice\{mValue=(\d+),.*?mName=([^,}]+)", thermal)
    }
    status = re.search(r"Thermal Status:\s*(\d)", thermal)
    tenths, level = facts.get("temperature", ""), facts.get("level", "")
    found: dict[str, Any] = {
        "energy_j": None,
        "temperature_c": zones or None,
        "frequency_mhz": None,
        "throttling": cooling or None,
        "battery_c": int(tenths) / 10 if re.fullmatch(r"-?\d+", tenths) else None,
        "battery_percent": int(level) if level.isdigit() else None,
        "thermal_status": int(status[1]) if status else None,
    }
    untold = {name: "dumpsys does not tell it" for name in FIELDS if found[name] is None}
    return {"time_s": time.monotonic(), "energy_range_j": None, **found, "reasons": untold}


def _read(path: Path) -> str | None:
    """A file of one value, or ``None``: some sensors are listed and answer with an error."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _read(path)
    return float(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


def _energy(root: Path) -> tuple[dict[str, float] | None, dict[str, float] | None, str]:
    """Powercap's domains. Two sockets have a ``dram`` each: the zone's number is added from the second on."""
    found: dict[str, float] = {}
    ranges: dict[str, float] = {}
    zones = sorted((root / "sys/class/powercap").glob("*-rapl:*"))
    zones = [zone for zone in zones if "mmio" not in zone.name]  # the same counters by another way
    for zone in zones:
        value, name = _number(zone / "energy_uj"), _read(zone / "name")
        if value is None or not name:
            continue
        name = name if name not in found else f"{name} ({zone.name.partition(':')[2]})"
        found[name] = value / 1e6
        if limit := _number(zone / "max_energy_range_uj"):
            ranges[name] = limit / 1e6
    if found:
        return found, ranges, ""
    if zones:
        return None, None, f"{zones[0].name}/energy_uj can't be read: since 2020 Linux lets only root"
    return None, None, "no energy counter (powercap): a virtual machine, or a board without one"


def _temperatures(root: Path) -> dict[str, float] | None:
    found: dict[str, float] = {}
    for zone in _numbered(root / "sys/class/thermal", "thermal_zone"):
        value = _number(zone / "temp")
        if value is not None and -100_000 < value < 300_000:  # a zone that is off says -274000
            name = _read(zone / "type") or zone.name
            found[name if name not in found else f"{name} ({zone.name})"] = value / 1000
    return found or None


def _frequencies(root: Path) -> dict[str, float] | None:
    found = {}
    for core in _numbered(root / "sys/devices/system/cpu", "cpu"):
        value = _number(core / "cpufreq/scaling_cur_freq")
        if value is not None:
            found[core.name] = value / 1000
    return found or None


def _throttling(root: Path) -> dict[str, float] | None:
    found: dict[str, float] = {}
    for core in _numbered(root / "sys/devices/system/cpu", "cpu"):
        for kind in ("core", "package"):
            value = _number(core / f"thermal_throttle/{kind}_throttle_count")
            if value is not None and kind == "core":
                found["core_throttle_count"] = found.get("core_throttle_count", 0) + value
            elif value is not None:  # every core of a package shows the same one
                found["package_throttle_count"] = max(found.get("package_throttle_count", 0), value)
    for device in _numbered(root / "sys/class/thermal", "cooling_device"):
        name, value = _read(device / "type") or "", _number(device / "cur_state")
        if value is not None and name.lower().startswith(("processor", "cpufreq", "thermal-cpufreq", "cpu")):
            found[f"{name} ({device.name})"] = value
    return found or None


def _battery(root: Path) -> tuple[float | None, int | None]:
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if (_read(supply / "type") or "").lower() == "battery":
            tenths, percent = _number(supply / "temp"), _number(supply / "capacity")
            return (None if tenths is None else tenths / 10), (None if percent is None else int(percent))
    return None, None


def _numbered(folder: Path, prefix: str) -> Iterator[Path]:
    """``prefix0``, ``prefix1`` … in ``folder``, in the order of their numbers."""
    pattern = re.compile(rf"{prefix}(\d+)")
    entries = ((pattern.fullmatch(path.name), path) for path in folder.glob(f"{prefix}*"))
    for _, path in sorted((int(match[1]), path) for match, path in entries if match):
        yield path
