"""What can be measured on and predicted for, for ``edgestill devices``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .artifact import open_artifact
from .bench.points import DecodePoint, load_points
from .bench.predict import MethodError, method_errors
from .bench.predict_calibration import Calibration, calibrate, save_calibration
from .bench.predict_work import work_of
from .bench.profiles import DeviceProfile, find_profile, profile_names
from .errors import UsageError
from .runtimes.targets import SCHEMES
from .stages import Observer

__all__ = [
    "CalibrateRequest", "Calibrated", "DeviceSheet", "ProfileLine", "TargetKind", "TargetList", "calibrate_host",
    "list_targets", "show_profile",
]  # fmt: skip


@dataclass(frozen=True)
class TargetKind:
    """A kind of target: how it is typed, where its numbers come from, what it is."""

    address: str
    source: str
    description: str


@dataclass(frozen=True)
class ProfileLine:
    """A device that can be predicted: what is documented of it, and how many published speeds it is fitted on."""

    name: str
    title: str
    processor: str
    memory: str | None
    bandwidth: str | None
    points: int


@dataclass(frozen=True)
class TargetList:
    """All kinds of targets, and the devices that ``profile:NAME`` knows."""

    kinds: tuple[TargetKind, ...]
    profiles: tuple[ProfileLine, ...] = ()
    schema_version: int = 1


@dataclass(frozen=True)
class DeviceSheet:
    """All that is known of one device, each number with its source; ``errors``: of the methods of prediction."""

    profile: DeviceProfile
    points: tuple[DecodePoint, ...]
    errors: dict[str, MethodError]
    schema_version: int = 1


@dataclass(frozen=True)
class CalibrateRequest:
    """Measure ``subjects`` (artifacts of one model in llama.cpp and in another runtime) on this machine."""

    subjects: tuple[Path, ...]
    threads: int = 2
    length: int = 128
    new_tokens: int = 32
    launches: int = 3


@dataclass(frozen=True)
class Calibrated:
    """The ratios that were measured, and the file that predictions read them from."""

    calibration: Calibration
    path: str
    schema_version: int = 1


def list_targets() -> TargetList:
    """The kinds of targets that this edgestill knows, and the documented devices."""
    kinds = tuple(TargetKind(kind.form, kind.source, kind.description) for kind in SCHEMES.values())
    profiles = []
    for name in profile_names():
        profile = find_profile(name)
        fitted = sum(point.device == profile.fitted_as for point in load_points())
        memory, bandwidth = (fact.shown if fact else None for fact in (profile.memory, profile.bandwidth))
        profiles.append(ProfileLine(name, profile.title, profile.processor, memory, bandwidth, fitted))
    return TargetList(kinds, tuple(profiles))


def show_profile(name: str) -> DeviceSheet:
    """What is documented of a device, or of the profile file at a path that ends in ``.toml``."""
    profile = find_profile(name.removeprefix("profile:"))
    points = tuple(point for point in load_points() if point.device == profile.fitted_as)
    return DeviceSheet(profile, points, dict(method_errors()))


def calibrate_host(request: CalibrateRequest, observer: Observer) -> Calibrated:
    """Measure how other runtimes compare with llama.cpp here, so that they can be predicted elsewhere."""
    from .bench.environment import describe_environment, device_label
    from .benchmark import BenchRequest, bench_subjects

    artifacts = [open_artifact(path) for path in request.subjects]
    formats = {artifact.manifest.format for artifact in artifacts}
    if "gguf" not in formats or len(formats) < 2:
        raise UsageError(
            "calibrating compares runtimes: it needs a GGUF artifact and one of another format",
            hint="edgestill devices calibrate GGUF-ARTIFACT ONNX-ARTIFACT, of one model",
        )
    result = bench_subjects(
        BenchRequest(
            request.subjects, threads=request.threads, length=request.length, new_tokens=request.new_tokens,
            launches=request.launches,
        ),
        observer,
    )  # fmt: skip
    names = list(dict.fromkeys(row.subject for row in result.measurements))
    works = {name: work_of(artifact) for name, artifact in zip(names, artifacts, strict=True)}
    found = calibrate(works, result.measurements, machine=device_label(describe_environment()))
    return Calibrated(found, str(save_calibration(found)))
