"""``profile:NAME`` as a target: rows that no worker ran, marked ``predicted``, with interval and method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..artifact import open_artifact
from ..errors import Unsupported
from .measure import Subject
from .metrics import METRICS
from .predict import Prediction, predict, predicted_metrics
from .predict_calibration import Calibration, load_calibration
from .predict_work import work_of
from .profiles import DeviceProfile, find_profile
from .records import Measurement, Summary

__all__ = ["predicted_rows"]

_RUNTIMES = {"onnx": "onnxruntime", "gguf": "llama.cpp", "coreml": "coreml", "torch": "torch"}


def predicted_rows(
    subjects: Sequence[Subject],
    profile: str | DeviceProfile,
    *,
    length: int,
    new_tokens: int,
    calibration: Calibration | None = None,
) -> list[Measurement]:
    """What ``subjects`` would do on the device ``profile`` (a name, or a path that ends in ``.toml``).

    ``calibration`` relates runtimes other than llama.cpp to it; by default the one of this machine, if there is one.
    """
    device = profile if isinstance(profile, DeviceProfile) else find_profile(profile)
    found = calibration if calibration is not None else load_calibration()
    rows: list[Measurement] = []
    for subject in subjects:
        rows += _subject(subject, device, length, new_tokens, found)
    return rows


def _subject(
    subject: Subject, device: DeviceProfile, length: int, new_tokens: int, calibration: Calibration | None
) -> list[Measurement]:
    if subject.kind != "artifact":
        reason = "only artifacts are predicted: torch is not what runs on a device"
        return [_row(subject, device, Prediction("latency_ms", reason=reason), "torch", subject.subject_id or "", {})]
    artifact = open_artifact(subject.folder, check=False)
    manifest = artifact.manifest
    runtime, identity = _RUNTIMES[manifest.format], subject.subject_id or manifest.artifact_id
    generation = manifest.task == "text-generation"
    room = new_tokens if generation else 0
    protocol = {"length": length, "new_tokens": room, "batch_size": 1}
    try:
        work = work_of(artifact)
        if length + room > manifest.max_length:
            raise Unsupported(f"takes at most {manifest.max_length} tokens, the run needs {length + room}")
        found = predict(work, device, length=length, new_tokens=room, calibration=calibration)
    except Unsupported as error:
        found = [Prediction(name, reason=error.message) for name in predicted_metrics(manifest.task)]
    return [_row(subject, device, one, runtime, identity, protocol) for one in found]


def _row(
    subject: Subject,
    device: DeviceProfile,
    found: Prediction,
    runtime: str,
    identity: str,
    protocol: Mapping[str, Any],
) -> Measurement:
    summary = None
    if found.value is not None:
        summary = Summary(found.value, "derived", found.n, found.low, found.high, found.level)
    return Measurement(
        subject=subject.name,
        metric=found.metric,
        unit=METRICS[found.metric].unit,
        source="predicted",
        summary=summary,
        samples=(),
        artifact_id=identity,
        runtime=runtime,
        runtime_version="",
        backend=device.processor,
        device=device.title,
        threads=0,
        protocol={**protocol, "method": dict(found.method)},
        environment={},
        context=int(protocol.get("length", 0)) + int(protocol.get("new_tokens", 0)) or None,
        reason=found.reason,
        target=f"profile:{device.name}",
    )
