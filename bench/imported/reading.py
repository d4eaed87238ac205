"""Which tool wrote a file, and its rows as our own records. One module a format; a file is never believed unchecked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import BadInput, UsageError
from ..records import Measurement
from . import aihub, coreml_report, llama_bench, ort_perf_test
from .rows import Origin

__all__ = ["KNOWN", "read_results"]

LARGEST_FILE = 64 << 20

KNOWN: Mapping[str, str] = {
    "llama-bench": "llama-bench -o json (or jsonl)",
    "ai-hub": "Qualcomm AI Hub, the JSON of ProfileJob.download_profile",
    "onnxruntime_perf_test": "onnxruntime_perf_test MODEL RESULT_FILE",
    "xcode": "a note of Xcode's Core ML performance report (docs/prediction.md)",
}

_JSON: Mapping[str, tuple[Callable[[Any], bool], Callable[[Any, Origin], list[Measurement]]]] = {
    "llama-bench": (llama_bench.is_ours, llama_bench.rows),
    "ai-hub": (aihub.is_ours, aihub.rows),
    "xcode": (coreml_report.is_ours, coreml_report.rows),
}


def read_results(
    path: Path, *, device: str | None = None, subject: str | None = None, artifact_id: str = ""
) -> list[Measurement]:
    """The measurements in ``path``. ``device`` names what a file does not say itself, or says it better; ``subject``
    (by default the model's name in the file) and ``artifact_id`` tie rows to an artifact of ours.

    Raises :class:`BadInput` for a file that is no result of a known tool, or damaged, and :class:`UsageError` when
    nobody says which device it is from.
    """
    origin = Origin(path, device, subject, artifact_id)
    if path.suffix == ".mlperf" and path.exists():
        raise BadInput(
            f"{path}: the format of Xcode's .mlperf files is not published", hint="write its numbers into a note, "
            "see docs/prediction.md, Importing",
        )  # fmt: skip
    text = _text(path)
    stripped = text.lstrip()
    if stripped[:1] in ("[", "{"):
        document = _json(path, stripped)
        found = [read for fits, read in _JSON.values() if fits(document)]
        if len(found) == 1:
            return _checked(path, lambda: found[0](document, origin))
    elif ort_perf_test.is_ours(text):
        return _checked(path, lambda: ort_perf_test.rows(text, origin))
    raise BadInput(f"{path} is no result of a tool that is known", hint="known: " + "; ".join(KNOWN.values()))


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise BadInput(f"{path} is a folder", hint="pass a result file")
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise BadInput(f"{path} has {size / 1e6:.0f} MB: no result is that long", hint="pass a result file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist", hint="check the path") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not text", hint="known: " + "; ".join(KNOWN.values())) from None
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error.strerror}", hint="check the path") from None


def _json(path: Path, text: str) -> Any:
    """A document, or the lines of a JSON lines file as a list."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as whole:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or isinstance(whole, RecursionError):
            raise BadInput(f"{path} is not valid JSON: {_short(whole)}", hint="write the file again") from None
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON: {_short(error)}", hint="write the file again") from None


def _checked(path: Path, read: Callable[[], list[Measurement]]) -> list[Measurement]:
    try:
        rows = read()
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise BadInput(f"{path} is damaged: {type(error).__name__}: {error}", hint="write the file again") from None
    if not rows:
        raise BadInput(f"{path} holds no measurement that edgestill has a metric for", hint="measure again")
    return rows


def _short(error: BaseException) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
