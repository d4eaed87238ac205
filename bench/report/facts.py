"""What a report is told about a run beside its measurements: plain, frozen, nothing that reads files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...artifact import Manifest, Task
from ..robustness import NoiseRow

__all__ = ["ArtifactFacts", "DataFacts", "DistillFacts", "ModelFacts", "RunFacts", "StageFacts"]


@dataclass(frozen=True)
class ModelFacts:
    """The teacher or the student. ``source`` is where it came from (an address, or what it was made of)."""

    name: str
    architecture: str
    parameters: int
    layers: int
    hidden_size: int
    vocab_size: int
    size_bytes: int
    model_id: str
    license: str | None = None
    source: str = ""


@dataclass(frozen=True)
class DataFacts:
    """One data set; ``counts`` maps a split to how many examples it has."""

    name: str
    kind: Literal["text", "labelled"]
    source: str
    sha256: str
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DistillFacts:
    """How the student was taught: weights of the ``losses``, the teacher layers it kept, what it was like on the dev
    split before and after, ``curve``, the rows of ``training.jsonl`` (``step`` and any numbers beside it), and
    ``cost``, tokens by what was done with them (:class:`edgestill.distill.cost.Cost`)."""

    losses: Mapping[str, float]
    steps: int
    seconds: float | None = None
    tokens_seen: int = 0
    keep: Sequence[int] = ()
    teacher_layers: int | None = None
    dev_before: Mapping[str, float] = field(default_factory=dict)
    dev_after: Mapping[str, float] = field(default_factory=dict)
    curve: Sequence[Mapping[str, Any]] = ()
    cost: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ArtifactFacts:
    """One artifact: its variant name, its description, and the folder relative to the run folder
    (``artifacts/NAME``, or ``quarantine/NAME`` for one that failed)."""

    name: str
    manifest: Manifest
    folder: str
    of: Literal["student", "teacher"] = "student"

    @property
    def quarantined(self) -> bool:
        """Whether it was put aside because it failed."""
        return self.folder.split("/")[0] == "quarantine"


@dataclass(frozen=True)
class StageFacts:
    """One stage of the run; ``reused``: its inputs had not changed, so it was not run again."""

    name: str
    seconds: float | None
    status: Literal["done", "reused", "failed"] = "done"


@dataclass(frozen=True)
class RunFacts:
    """Everything that the pipeline hands over. ``student`` is ``None`` when the teacher is shipped as it is; ``date``
    (ISO) is left out where bytes must repeat; ``problems`` are lines about artifacts that could not be made at all;
    ``noise`` is what perturbed text does to teacher and student."""

    name: str
    task: Task
    teacher: ModelFacts
    student: ModelFacts | None
    artifacts: Sequence[ArtifactFacts]
    recipe_text: str
    recipe_sha256: str
    description: str = ""
    license: str | None = None
    data: Sequence[DataFacts] = ()
    distill: DistillFacts | None = None
    noise: Sequence[NoiseRow] = ()
    stages: Sequence[StageFacts] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    problems: Sequence[str] = ()
    baseline: str = "teacher"
    date: str | None = None
