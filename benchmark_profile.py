"""``edgestill bench --profile``: where the time of each subject goes, in launches of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench.profile import Profiled, profile_artifact
from .runtimes.targets import open_target, parse_target
from .stages import Observer

if TYPE_CHECKING:
    from .bench.measure import Subject

__all__ = ["profile_subjects"]

# What runs no worker, or one whose times mean nothing.
_NO_WORKER = ("profile", "qemu")
_REPEATS = {"quick": 2, "normal": 5, "thorough": 20}


def profile_subjects(
    subjects: Sequence[Subject],
    targets: Sequence[str],
    *,
    ids: Any,
    new_tokens: int,
    threads: int,
    effort: str,
    observer: Observer,
    page: Path | None = None,
) -> list[Profiled]:
    """Profile each subject on each target that has times to profile; on this machine with a roofline against its own
    measured peaks.

    ``effort``: ``quick``, ``normal`` or ``thorough``. ``page``: an HTML file to write the profiles to.
    """
    found = []
    for text in targets:
        scheme = parse_target(text).scheme
        if scheme in _NO_WORKER:
            observer.advanced(f"{text} has no profiler", None)
            continue
        host = scheme == "host"
        peaks = None
        if host and any(_timed(subject) for subject in subjects):
            from .bench.peaks import measure_peaks

            peaks = measure_peaks(threads, rounds=1 if effort == "quick" else 3, progress=observer.advanced)
        with open_target(text) as target:
            for subject in subjects:
                observer.advanced(f"profiling {subject.name}", None)
                found.append(
                    profile_artifact(
                        subject.folder, subject=subject.name, open_worker=target.open_worker, ids=ids,
                        new_tokens=new_tokens, threads=threads, repeats=_REPEATS[effort], target=text,
                        source="emulated" if target.source == "emulated" else "measured", peaks=peaks,
                    )
                )  # fmt: skip
    if page is not None:
        from .bench.report.roofline import write_profile_page

        write_profile_page(found, page)
    return found


def _timed(subject: Subject) -> bool:
    """Not a program that is only interpreted."""
    from .artifact import ARTIFACT_FILE, open_artifact

    if not (subject.folder / ARTIFACT_FILE).is_file():
        return False
    return open_artifact(subject.folder, check=False).manifest.format != "coreml"
