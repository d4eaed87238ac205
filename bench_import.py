"""``edgestill bench import``: results of other tools as measurements of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .artifact import open_artifact
from .bench.imported.reading import read_results
from .bench.records import Measurement, read_measurements, write_measurements
from .files import check_place

__all__ = ["ImportRequest", "ImportResult", "import_results"]


@dataclass(frozen=True)
class ImportRequest:
    """Read ``files``. ``device`` for those that do not say it; ``artifact``: the artifact of ours that they measured;
    ``out``: measurements to add them to (JSON lines)."""

    files: tuple[Path, ...]
    device: str | None = None
    artifact: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class ImportResult:
    """The rows, each with ``origin`` set to the tool."""

    measurements: tuple[Measurement, ...]
    out: str | None = None
    schema_version: int = 1


def import_results(request: ImportRequest) -> ImportResult:
    """Read all files, or none: a file that can't be read leaves ``out`` as it is."""
    if request.out is not None:
        check_place(request.out)
    subject, identity = None, ""
    if request.artifact is not None:
        artifact = open_artifact(request.artifact)
        subject, identity = request.artifact.resolve().name, artifact.manifest.artifact_id
    rows: list[Measurement] = []
    for path in request.files:
        rows += read_results(path, device=request.device, subject=subject, artifact_id=identity)
    if request.out is not None:
        known = read_measurements(request.out) if request.out.exists() else []
        write_measurements(request.out, [*known, *[row for row in rows if row not in known]])
    return ImportResult(tuple(rows), str(request.out) if request.out else None)
