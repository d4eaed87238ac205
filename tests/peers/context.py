"""What a figure works with: settings, a scratch folder, models, artifacts, environments, earlier measurements."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edgestill.artifact import Artifact
from edgestill.bench.environment import LoadProbe
from edgestill.checkpoints import ModelFolder
from edgestill.export import export
from edgestill.progress import Progress, silent
from edgestill.recipe import ExportConfig

from .environments import Environment, Prepared, prepare
from .models import Kind, real_model, tiny_model
from .registry import Unavailable

__all__ = ["Context", "busy_note"]

T = TypeVar("T")


@dataclass
class Context:
    """One invocation. ``repeats`` is the number of fresh processes (or pairs of them) behind each figure."""

    scratch: Path
    tiny: bool = False
    repeats: int = 3
    threads: int = 2
    progress: Progress = silent
    _known: dict[object, Any] = field(default_factory=dict)

    def once(self, key: object, take: Callable[[], T]) -> T:
        """``take()``, or what it gave for ``key`` before: figures share launches. So is :class:`Unavailable`."""
        if key not in self._known:
            try:
                self._known[key] = take()
            except Unavailable as reason:
                self._known[key] = reason
        found = self._known[key]
        if isinstance(found, Unavailable):
            raise found
        return found  # type: ignore[no-any-return]

    def model(self, kind: Kind) -> ModelFolder:
        """The model folder that figures about encoders or decoders are taken on."""
        out = self.scratch / kind

        def take() -> ModelFolder:
            self.progress(f"preparing the {kind}")
            return tiny_model(kind, out) if self.tiny else real_model(kind, out, self.progress)

        return self.once(("model", kind), take)

    def model_note(self, kind: Kind) -> str:
        """The model in a few words."""
        model = self.model(kind)
        name = "tiny random" if self.tiny else {"encoder": "all-MiniLM-L6-v2", "decoder": "SmolLM2-135M"}[kind]
        return f"{name} {model.architecture}, {model.layers} layers"

    @contextlib.contextmanager
    def artifact(self, kind: Kind, to: str) -> Iterator[Artifact]:
        """Our artifact of the model, exported now and removed afterwards."""
        out = self.scratch / f"{kind}-{to.replace(':', '-')}"
        self.progress(f"exporting {to}")
        try:
            yield export(self.model(kind).path, out, ExportConfig(to=to))
        finally:
            shutil.rmtree(out, ignore_errors=True)

    @property
    def void(self) -> str:
        """Why a comparison on models proves nothing, if so."""
        if self.tiny:
            return "a tiny model"
        return "a single launch has no interval" if self.repeats < 2 else ""

    def environment(self, environment: Environment) -> Prepared:
        """A peer's environment, made if need be."""
        return self.once(environment.name, lambda: prepare(environment, self.progress))


def busy_note(probe: LoadProbe) -> str:
    """``""``, or that others used the machine, and how much of it."""
    if not probe.result["busy"]:
        return ""
    others, stolen = probe.result["others_fraction"], probe.result["steal_fraction"]
    return f"busy machine: others used {others:.0%} of it" + (f", {stolen:.0%} stolen" if stolen > 0.01 else "")
