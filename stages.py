"""A run folder and its stages: what was done, from what, with what result; nothing is done twice, nothing is lost.

``run.json`` maps each stage to the hash of its input (configuration, input ids, the stage's own version, library
versions, threads) and of its output. A stage is skipped when both still hold. It is written after every stage, whole
or not at all, so a killed run goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bench.environment import package_versions
from .errors import UsageError
from .files import atomic_write, hash_json, hash_tree, read_json

__all__ = ["Observer", "RunFolder", "StageRecord", "find_run"]

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class StageRecord:
    """One stage as ``run.json`` keeps it. ``seconds`` is its wall time; ``facts`` what later stages need to know."""

    input_hash: str
    output_hash: str
    seconds: float
    finished: str
    outputs: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Observer:
    """What a run tells the outside. This one listens and says nothing; ``terminal.py`` has the one that draws."""

    def started(self, name: str, title: str) -> None:
        """A stage begins."""

    def advanced(self, message: str, fraction: float | None = None) -> None:
        """The current stage is at ``fraction`` (0-1, or unknown); this is the ``progress`` of the rooms below."""

    def asks(self, message: str) -> None:
        """Somebody has to do something (open an address on a phone) before the current stage goes on."""

    def finished(self, name: str, seconds: float, note: str) -> None:
        """A stage ended well; ``note`` is its result in a few words."""

    def unchanged(self, name: str, title: str, note: str) -> None:
        """A stage need not run: its input is the same and its output is whole."""

    def failed(self, name: str, reason: str) -> None:
        """A stage failed for one artifact; the others go on."""


def find_run(folder: Path) -> Path:
    """``folder``, if it is one that ``edgestill run`` wrote; else :class:`UsageError`."""
    if not (folder / RUN_FILE).is_file():
        raise UsageError(f"{folder} is not a run folder", hint="pass a folder that `edgestill run` wrote")
    return folder


Intact = Callable[[Mapping[str, Any]], bool]


class RunFolder:
    """A run folder, locked for this process while the context is open."""

    def __init__(self, path: Path, observer: Observer | None = None) -> None:
        self.path = path
        self.observer = observer or Observer()
        self.skipped: list[str] = []
        self._records: dict[str, StageRecord] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunFolder]:
        """Hold the folder's lock; a second run at once is a :class:`UsageError`."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK_FILE).open("a+") as stream:
            try:
                import fcntl

                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:
                pass  # no advisory locks on this system: nothing to hold
            except OSError:
                raise UsageError(
                    f"another run is working in {self.path}", hint="wait for it, or pass --runs another/folder"
                ) from None
            self._records = self._read()
            yield self

    def _read(self) -> dict[str, StageRecord]:
        if not (self.path / RUN_FILE).exists():
            return {}
        raw = read_json(self.path / RUN_FILE)
        if not isinstance(raw, dict) or raw.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(
                f"{self.path / RUN_FILE} was written by another version of edgestill",
                hint="use another --runs folder, or remove this one",
            )
        return {name: StageRecord(**{**row, "outputs": tuple(row["outputs"])}) for name, row in raw["stages"].items()}

    def _write(self) -> None:
        rows = {name: dataclasses.asdict(record) for name, record in self._records.items()}
        document = {"schema_version": SCHEMA_VERSION, "versions": package_versions(), "stages": rows}
        atomic_write(self.path / RUN_FILE, json.dumps(document, indent=1) + "\n")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def records(self) -> dict[str, StageRecord]:
        """What is known of each stage, in the order in which they ended."""
        return dict(self._records)

    def is_done(self, name: str, inputs: Mapping[str, Any], intact: Intact | None = None) -> bool:
        """Whether ``name`` need not run: same input, and its outputs still hash right (and are ``intact``)."""
        record = self._records.get(name)
        return (
            record is not None
            and record.input_hash == _input_hash(inputs)
            and record.output_hash == self._output_hash(record.outputs)
            and (intact is None or intact(record.facts))
        )

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        action: Callable[[], Mapping[str, Any] | None],
        outputs: Sequence[str] = (),
        title: str = "",
        *,
        always: bool = False,
        intact: Intact | None = None,
    ) -> Mapping[str, Any]:
        """Run ``action`` unless :meth:`is_done`, record it, and return its facts.

        ``inputs`` is everything that decides the outcome, JSON-able; ``outputs`` are paths relative to the folder.
        ``intact`` takes the facts of the last time and says whether what they speak of is still whole, for outputs
        that move. ``always`` is for what keeps its own cache. A fact called ``note`` is shown to the user.
        """
        title = title or name
        if not always and self.is_done(name, inputs, intact):
            self.skipped.append(name)
            record = self._records[name]
            self.observer.unchanged(name, title, str(record.facts.get("note", "")))
            return record.facts
        self.observer.started(name, title)
        began = time.monotonic()
        facts = action() or {}
        self._records.pop(name, None)  # the order of the file is the order of work
        self._records[name] = record = StageRecord(
            input_hash=_input_hash(inputs),
            output_hash=self._output_hash(outputs),
            seconds=round(time.monotonic() - began, 3),
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            outputs=tuple(outputs),
            facts=facts,
        )
        self._write()
        self.observer.finished(name, record.seconds, str(facts.get("note", "")))
        return facts

    def _output_hash(self, outputs: Sequence[str]) -> str:
        hashes = {name: hash_tree(self.path / name) if (self.path / name).exists() else None for name in outputs}
        return hash_json(hashes)


def _input_hash(inputs: Mapping[str, Any]) -> str:
    return hash_json({"inputs": inputs, "versions": package_versions()})
