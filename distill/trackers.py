"""TensorBoard, MLflow and trackio through the Trainer's own callbacks; what they write stays in the work folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import MissingDependency

__all__ = ["check_trackers", "trackers_write_into"]


def check_trackers(names: Sequence[str]) -> None:
    """Raise :class:`MissingDependency` for a tracker that is not installed, before any work is done."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingDependency(
                f"[distill] report_to: {name} is not installed", hint=f"pip install {name}, or leave it out"
            )


@contextlib.contextmanager
def trackers_write_into(folder: Path) -> Iterator[None]:
    """Tell them where to write, unless the user's environment already does."""
    places = {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
        "MLFLOW_TRACKING_URI": (folder / "mlruns").absolute().as_uri(),
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    ours = {name: value for name, value in places.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
