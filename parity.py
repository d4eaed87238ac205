"""``edgestill bench parity``: the same inputs on x86, Arm and WASM, and who says something else.

A score that was taken on one machine holds for another only if both compute the same. What differs is mostly int8: an
x86 without VNNI cuts sums that overflow 16 bits (:mod:`edgestill.runtimes.saturation`), Arm and WASM don't. A machine
that has VNNI does not show that, so such an x86 is emulated beside it, with this machine's own runtime.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .artifact import Artifact, open_artifact
from .bench.environment import describe_environment
from .bench.parity import Difference, default_limit, difference
from .bench.sample_text import SAMPLE_TEXT
from .errors import BadInput, EdgestillError, Inconclusive, MissingDependency, Unsupported, UsageError
from .runtimes.precision import PRECISE
from .runtimes.session import SessionOptions
from .runtimes.targets import open_target
from .stages import Observer

__all__ = ["ParityRequest", "ParityResult", "ParityRow", "check_parity"]

Status = Literal["reference", "same", "differs", "failed", "missing"]
_ARM = ("aarch64", "arm64")
_X86 = ("x86_64", "AMD64")
_VNNI = ("avx512_vnni", "avx_vnni")


@dataclass(frozen=True)
class ParityRequest:
    """Compare what ``artifact`` (ONNX) says on each machine about ``examples`` sentences of ``length`` tokens at most.

    ``limit``: rms of the difference over rms of the reference (default by quantisation); ``core``: the Arm core that is
    emulated; ``strict``: a machine that is missing here fails too.
    """

    artifact: Path
    limit: float | None = None
    core: str = "cortex-a76"
    examples: int = 2
    length: int = 24
    strict: bool = False


@dataclass(frozen=True)
class ParityRow:
    """One machine: ``target`` and ``sums`` (``default`` or ``exact``, see :mod:`edgestill.runtimes.precision`).

    ``missing`` could not be tried, with ``reason`` and ``hint``; ``failed`` was tried and did not run there.
    """

    name: str
    target: str
    source: Literal["measured", "emulated"]
    sums: Literal["default", "exact"]
    status: Status
    runtime_version: str | None = None
    rms: float | None = None
    largest: float | None = None
    argmax_changes: int | None = None
    positions: int | None = None
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True)
class ParityResult:
    """All rows against ``reference``; ``saturation`` is the simulated share of int8 pairs that overflow 16 bits."""

    artifact: str
    artifact_id: str
    quantisation: str
    reference: str
    limit: float
    rows: tuple[ParityRow, ...]
    examples: int
    tokens: int
    saturation: Mapping[str, Any] | None
    exit_code: int
    schema_version: int = 1


@dataclass(frozen=True)
class _Place:
    name: str
    target: str
    source: Literal["measured", "emulated"]
    sums: Literal["default", "exact"] = "default"
    unavailable: str = ""

    @property
    def extra(self) -> dict[str, str]:
        return {PRECISE: "1"} if self.sums == "exact" else {}


def check_parity(request: ParityRequest, observer: Observer) -> ParityResult:
    """Run the artifact everywhere and compare. The reference is Arm where it is there, else WASM, else exact x86.

    Raises :class:`Unsupported` for what is no ONNX artifact, :class:`Inconclusive` when a single machine ran it.
    """
    artifact = open_artifact(request.artifact)
    manifest = artifact.manifest
    if manifest.format != "onnx":
        raise Unsupported(f"{request.artifact.name} is {manifest.format}", hint="parity compares ONNX runtimes")
    limit = default_limit(manifest.quantisation) if request.limit is None else request.limit
    if not (math.isfinite(limit) and limit >= 0):
        raise UsageError(f"a limit of {limit}", hint="a share such as 0.01")
    ids, mask = _inputs(artifact, request)
    observer.started("parity", f"{request.artifact.name} on several machines")
    places = _places(request.core)
    outputs: dict[_Place, npt.NDArray[np.float32]] = {}
    rows: dict[_Place, ParityRow] = {}
    for index, place in enumerate(places):
        observer.advanced(f"running on {place.name}", index / len(places))
        rows[place] = _run(place, artifact, ids, mask, outputs)
    reference = next((place for place in _by_trust(places) if place in outputs), None)
    if reference is None or len(outputs) < 2:
        why = "; ".join(f"{row.name}: {row.reason}" for row in rows.values() if row.reason)
        raise Inconclusive(f"nothing to compare with: {why}", hint=_hints(rows.values()))
    for place, output in outputs.items():
        apart = difference(output, outputs[reference], mask, manifest.task)
        rows[place] = _judge(rows[place], apart, limit, place is reference)
        exact = next((p for p in outputs if p.target == place.target and p.sums == "exact"), None)
        if exact is not None and place.sums == "default":
            rows[place] = _overflow(rows[place], difference(output, outputs[exact], mask, manifest.task))
    found = tuple(rows.values())
    bad = any(row.status in ("differs", "failed") or (request.strict and row.status == "missing") for row in found)
    return ParityResult(
        request.artifact.name, manifest.artifact_id, manifest.quantisation, reference.name, limit, found, len(ids),
        int(mask.sum()), _simulated(artifact, ids, mask), int(bad),
    )  # fmt: skip


def _places(core: str) -> list[_Place]:
    """Where it is run: this machine both ways, the x86 without VNNI both ways, an Arm core, a browser."""
    machine = platform.machine()
    host: list[_Place] = []
    if machine in _ARM:
        host.append(_Place("arm64 (this machine)", "host", "measured"))
    elif machine in _X86:
        vnni = set(describe_environment()["cpu_flags"]) & set(_VNNI)
        name = f"x86 {'with' if vnni else 'without'} VNNI"
        host += [_Place(name, "host", "measured"), _Place(f"{name}, exact", "host", "measured", "exact")]
    if machine not in _ARM:
        host.append(_Place(f"arm64 {core}", f"qemu:{core}", "emulated"))
    if not any(place.name == "x86 without VNNI" for place in host):
        away = "" if machine in _X86 else f"this machine is {machine}: an x86 is needed for its runtime"
        name = "x86 without VNNI"
        host.append(_Place(name, "qemu:x86-avx2", "emulated", "default", away))
        host.append(_Place(f"{name}, exact", "qemu:x86-avx2", "emulated", "exact", away))
    return [*host, _Place("wasm", "web", "measured")]


def _by_trust(places: list[_Place]) -> list[_Place]:
    arm = [place for place in places if place.name.startswith("arm64")]
    wasm = [place for place in places if place.target == "web"]
    return [*arm, *wasm, *(place for place in places if place.sums == "exact"), *places]


def _run(
    place: _Place, artifact: Artifact, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64],
    outputs: dict[_Place, npt.NDArray[np.float32]],
) -> ParityRow:  # fmt: skip
    row = ParityRow(place.name, place.target, place.source, place.sums, "missing", reason=place.unavailable)
    if place.unavailable:
        return row
    try:
        options = SessionOptions(1, None, place.extra)
        with open_target(place.target) as target, target.open_worker(artifact.path, options) as worker:
            outputs[place] = worker.forward(ids, mask)
            return replace(row, status="same", runtime_version=worker.info().version)
    except EdgestillError as error:
        status: Status = "missing" if _is_missing(error) else "failed"
        return replace(row, status=status, reason=error.message, hint=error.hint)


def _is_missing(error: EdgestillError) -> bool:
    """Nothing was tried: a tool or a target is not here. An instruction that the core lacks was tried."""
    nothing = isinstance(error, MissingDependency) or type(error) in (UsageError, Unsupported)
    return nothing and "illegal instruction" not in error.message


def _judge(row: ParityRow, apart: Difference, limit: float, is_reference: bool) -> ParityRow:
    status: Status = "reference" if is_reference else "differs" if apart.rms > limit else "same"
    reason = f"{apart.rms:.2g} is over {limit:g}" if status == "differs" else ""
    return replace(
        row, status=status, reason=reason, rms=None if math.isinf(apart.rms) else apart.rms,
        largest=None if math.isinf(apart.largest) else apart.largest, argmax_changes=apart.argmax_changes,
        positions=apart.positions,
    )  # fmt: skip


def _overflow(row: ParityRow, apart: Difference) -> ParityRow:
    """On one machine, exact and default kernels differ by nothing but sums that overflow."""
    if apart.equal:
        return row
    reason = f"its int8 sums overflow 16 bits: default and exact differ by {apart.rms:.2g}"
    return replace(row, status="differs", reason=reason, hint="quantise with 7 bits: onnx:int8-dynamic, onnx:int8")


def _simulated(artifact: Artifact, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> dict[str, Any] | None:
    from .runtimes.saturation import saturation

    try:
        found = saturation(artifact, ids, mask)
    except EdgestillError:  # onnx is not installed, or the graph has no such nodes to look at: the rows say enough
        return None
    return asdict(found) if found else None


def _inputs(artifact: Artifact, request: ParityRequest) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sentences of the built-in sample, padded on the right."""
    from .benchmark import sample_ids

    if not 1 <= request.examples <= len(SAMPLE_TEXT) or request.length < 2:
        raise UsageError(f"{request.examples} examples of {request.length} tokens", hint=f"1 to {len(SAMPLE_TEXT)}, 2")
    length = min(request.length, artifact.manifest.max_length)
    rows = [row[:length] for row in sample_ids(artifact.path)[: request.examples] if row]
    if not rows:
        raise BadInput(f"{artifact.path.name}: its tokenizer makes no token of the sample", hint="check tokenizer.json")
    width = max(map(len, rows))
    ids = np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int64)
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int64)
    return ids, mask


def _hints(rows: Iterable[ParityRow]) -> str:
    return "; ".join(dict.fromkeys(row.hint for row in rows if row.hint))
