"""Sensors of machines that we do not have: their files in a folder, their text from the documented formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgestill.runtimes.sensors import FIELDS, energy_between, parse_dumpsys, read_sensors


def put(root: Path, name: str, value: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


@pytest.fixture
def desktop(tmp_path: Path) -> Path:
    """Two packages with DRAM, an AMD-like core subzone, mmio's copy, two thermal zones of one type."""
    rapl = "sys/class/powercap"
    zones = {"intel-rapl:0": ("package-0", 5_000_000), "intel-rapl:0:0": ("core", 3_000_000),
             "intel-rapl:0:1": ("dram", 1_000_000), "intel-rapl:1": ("package-1", 7_000_000),
             "intel-rapl:1:1": ("dram", 2_000_000), "intel-rapl:2": ("psys", 90_000_000),
             "intel-rapl-mmio:0": ("package-0", 5_000_001)}  # fmt: skip
    for zone, (name, energy) in zones.items():
        put(tmp_path, f"{rapl}/{zone}/name", name)
        put(tmp_path, f"{rapl}/{zone}/energy_uj", energy)
        put(tmp_path, f"{rapl}/{zone}/max_energy_range_uj", 262_143_328_850)
    for number, (kind, degrees) in enumerate([("x86_pkg_temp", 54_000), ("acpitz", 27_800), ("acpitz", -274_000)]):
        put(tmp_path, f"sys/class/thermal/thermal_zone{number}/type", kind)
        put(tmp_path, f"sys/class/thermal/thermal_zone{number}/temp", degrees)
    for core in (0, 1, 10):
        put(tmp_path, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", 2_400_000 + core)
        put(tmp_path, f"sys/devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count", 2)
        put(tmp_path, f"sys/devices/system/cpu/cpu{core}/thermal_throttle/package_throttle_count", 9)
    return tmp_path


def test_a_desktop(desktop: Path) -> None:
    found = read_sensors(root=desktop)
    assert found["energy_j"] == {"package-0": 5.0, "core": 3.0, "dram": 1.0, "package-1": 7.0, "dram (1:1)": 2.0,
                                 "psys": 90.0}  # fmt: skip
    assert found["energy_range_j"]["package-0"] == pytest.approx(262143.32885)
    assert found["temperature_c"] == {"x86_pkg_temp": 54.0, "acpitz": 27.8}  # a zone that is off is left out
    assert list(found["frequency_mhz"]) == ["cpu0", "cpu1", "cpu10"]
    assert found["frequency_mhz"]["cpu10"] == pytest.approx(2400.010)
    assert found["throttling"] == {"core_throttle_count": 6, "package_throttle_count": 9}
    assert set(found["reasons"]) == {"battery_c", "battery_percent", "thermal_status"}


def test_a_board_with_a_fan_and_a_battery(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/thermal/cooling_device0/type", "cpufreq-cpu0")
    put(tmp_path, "sys/class/thermal/cooling_device0/cur_state", 2)
    put(tmp_path, "sys/class/thermal/cooling_device1/type", "pwm-fan")
    put(tmp_path, "sys/class/thermal/cooling_device1/cur_state", 4)
    put(tmp_path, "sys/class/power_supply/ac/type", "Mains")
    put(tmp_path, "sys/class/power_supply/battery/type", "Battery")
    put(tmp_path, "sys/class/power_supply/battery/temp", 312)
    put(tmp_path, "sys/class/power_supply/battery/capacity", 87)
    found = read_sensors(root=tmp_path)
    assert found["throttling"] == {"cpufreq-cpu0 (cooling_device0)": 2}  # a fan throttles nothing
    assert (found["battery_c"], found["battery_percent"]) == (31.2, 87)


def test_what_is_missing_is_null_with_its_reason(tmp_path: Path) -> None:
    found = read_sensors(root=tmp_path)
    assert {found[name] for name in FIELDS} == {None}
    assert set(found["reasons"]) == set(FIELDS)
    assert all(found["reasons"].values())
    json.dumps(found, allow_nan=False)


def test_an_energy_counter_that_may_not_be_read_is_told_from_none(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/powercap/intel-rapl:0/name", "package-0")
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").mkdir()  # an error for root too, as EACCES is for others
    found = read_sensors(root=tmp_path)
    assert found["energy_j"] is None
    assert "intel-rapl:0/energy_uj can't be read" in found["reasons"]["energy_j"]


def test_garbage_in_a_sensor_is_no_number(desktop: Path) -> None:
    put(desktop, "sys/class/thermal/thermal_zone0/temp", "N/A")
    put(desktop, "sys/class/powercap/intel-rapl:0/energy_uj", "")
    found = read_sensors(root=desktop)
    assert found["temperature_c"] == {"acpitz": 27.8}
    assert "package-0" not in found["energy_j"]


def reading(**joules: float) -> dict[str, Any]:
    return {"energy_j": joules or None, "energy_range_j": dict.fromkeys(joules, 100.0), "reasons": {"energy_j": "none"}}


def test_energy_adds_packages_and_memory_and_nothing_twice(desktop: Path) -> None:
    before = read_sensors(root=desktop)
    for zone, more in {"0": 3_000_000, "0:0": 2_000_000, "0:1": 500_000, "1": 1_000_000, "2": 8_000_000}.items():
        path = desktop / f"sys/class/powercap/intel-rapl:{zone}/energy_uj"
        path.write_text(str(int(path.read_text()) + more))
    joules, reason = energy_between(before, read_sensors(root=desktop))
    assert (joules, reason) == (pytest.approx(3 + 0.5 + 1), None)


def test_a_counter_that_wrapped_is_unwrapped() -> None:
    assert energy_between(reading(**{"package-0": 98.0}), reading(**{"package-0": 3.0})) == (pytest.approx(5.0), None)
    before, after = reading(**{"package-0": 98.0}), reading(**{"package-0": 3.0})
    after["energy_range_j"] = None
    assert energy_between(before, after) == (None, "the energy counter package-0 ran backwards")


def test_without_a_sensor_there_is_no_energy() -> None:
    assert energy_between(reading(), reading()) == (None, "none")
    assert energy_between(reading(psys=1.0), reading(psys=4.0)) == (3.0, None)


BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Max charging current: 500000
  status: 2
  level: 87
  scale: 100
  voltage: 4203
  temperature: 295
  technology: Li-ion
"""
THERMAL = """IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 3
Thermal Status: 2
Cached temperatures:
\tTemperature{mValue=25.0, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
HAL Ready: true
HAL connection:
\tThermalHAL 2.0 connected: yes
Current temperatures from HAL:
\tTemperature{mValue=41.75, mType=0, mName=CPU0, mStatus=0}
\tTemperature{mValue=-0.5, mType=3, mName=VIRTUAL-SKIN, mStatus=2}
Current cooling devices from HAL:
\tCoolingDevice{mValue=1, mType=2, mName=thermal-cpufreq-0}
"""


def test_a_phone_tells_by_dumpsys() -> None:
    found = parse_dumpsys(BATTERY, THERMAL)
    assert (found["battery_c"], found["battery_percent"], found["thermal_status"]) == (29.5, 87, 2)
    assert found["temperature_c"] == {"CPU0": 41.75, "VIRTUAL-SKIN": -0.5}
    assert found["throttling"] == {"thermal-cpufreq-0": 1.0}
    assert set(found["reasons"]) == {"energy_j", "frequency_mhz"}


def test_a_phone_without_thermal_service_tells_nothing_of_it() -> None:
    found = parse_dumpsys("", "Can't find service: thermalservice\n")
    assert {found[name] for name in FIELDS} == {None}
    assert set(found["reasons"]) == set(FIELDS)


def test_a_reading_has_the_same_keys_everywhere(tmp_path: Path) -> None:
    assert set(read_sensors(root=tmp_path)) == set(parse_dumpsys(BATTERY, THERMAL))
