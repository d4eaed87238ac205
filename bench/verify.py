"""An artifact against the model folder that it came from: the verdict.

Three questions, kept apart. *Integrity*: is it what it says (hashes, types, every weight on its grid, tokenizer)?
*Faithful*: in its runtime, does it compute what its own stored weights mean? The limit is tight, so a defect can't hide
behind the loss of quantisation. *Loss*: what does it cost against the float student and the teacher? An artifact that
crashes its runtime gets a failed verdict like any other; only a runtime that is not installed is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import TOKEN_TASKS, Artifact, Manifest, open_artifact
from ..errors import BadInput, EdgestillError, MissingDependency, ResourceExhausted
from ..progress import Progress, silent
from ..runtimes.precision import scoring_options
from ..runtimes.scoring import open_reference
from ..runtimes.session import SessionInfo, SessionOptions
from . import behaviour, integrity
from .chat import check_chat_template
from .limits import Activation, Faithful, activation_of, ceiling_for, faithful_for, half_cache
from .records import Check, Verdict
from .reference import inputs_of, read_facts, torch_forward, write_reference

__all__ = ["Verification", "VerifyOptions", "examine", "verify"]

Array = npt.NDArray[Any]
OpenWorker = Callable[[Path, SessionOptions], AbstractContextManager[Any]]
INTERPRETER = "mil-interpreter"
# The longest context is tried up to here: SmolLM2 takes some seconds for it in torch, and logits take 100 MB.
LONGEST_TOKENS = 512
# Inner values of a graph that is not faithful: a row this long shows a defect of a layer as well as a longer one.
LOOKED_INTO_TOKENS = 64
_RUNTIMES = {"onnx": "onnxruntime", "gguf": "llama.cpp", "coreml": "coreml", "torch": "torch"}


@dataclass(frozen=True)
class VerifyOptions:
    """How to verify. ``faithful_rows``: examples compared with the dequantised student (default: 64, or 4 windows of
    text generation); ``decode_tokens`` decoded for the parity check; ``ceilings`` maps a metric to a limit that takes
    the place of the default loss ceiling; ``device`` is how the verdict names this machine."""

    threads: int = 2
    backend: str | None = None
    batch_size: int = 8
    faithful_rows: int | None = None
    decode_tokens: int = 16
    ceilings: Mapping[str, float] = field(default_factory=dict)
    device: str = f"{platform.system()} {platform.machine()}"
    timeout: float = 1800


@dataclass(frozen=True)
class Verification:
    """A verdict with what it was reached on: ``scores[data, "student" | "teacher"]`` are the arrays of ``score()``
    (embeddings with ``reference_embeddings``), so that fidelity is not measured a second time; ``info`` is ``None``
    when the artifact did not open."""

    verdict: Verdict
    info: SessionInfo | None
    scores: Mapping[tuple[str, str], Mapping[str, Array]]


def verify(artifact: Path, **arguments: Any) -> Verdict:
    """The verdict of :func:`examine`, which takes the same arguments."""
    return examine(artifact, **arguments).verdict


def examine(
    artifact: Path,
    *,
    student: Path,
    references: Mapping[str, Path],
    teacher_references: Mapping[str, Path] | None = None,
    work: Path,
    subject: str | None = None,
    options: VerifyOptions | None = None,
    open_worker: OpenWorker | None = None,
    progress: Progress = silent,
) -> Verification:
    """Judge the artifact folder ``artifact``, exported from the model folder ``student``.

    ``references`` maps the name of each held-out text to the float student's reference (``make_reference``),
    ``teacher_references`` to the teacher's on the same ids. The first text also serves the comparison with the
    dequantised student, which is written below ``work`` and removed. Artifacts of other tools have no weight map: the
    checks that need one are recorded as not applicable.

    Raises :class:`MissingDependency` when the runtime is not installed, :class:`BadInput` when ``artifact`` has no
    readable ``artifact.json`` or a reference is damaged, :class:`ResourceExhausted`; everything else that goes wrong
    with the artifact is in the verdict.
    """
    if not references:
        raise BadInput("no reference to verify against", hint="give the recipe a [[data.text]] with `test` examples")
    options = options or VerifyOptions()
    if open_worker is None:
        from ..runtimes.transports.local import LocalWorker

        open_worker = _local(LocalWorker, options.timeout)
    described = open_artifact(artifact, check=False)
    for reference in (*references.values(), *(teacher_references or {}).values()):
        read_facts(reference)
    run = _Run(described, student, dict(references), dict(teacher_references or {}), work, options, progress)
    with run.catching("payload_hashes", "integrity"):
        open_artifact(artifact)
        run.checks.append(Check("payload_hashes", "integrity", True, reason="every file matches its sha256"))
    if not run.failed:
        run.look_inside()
        chosen = scoring_options(artifact, options.threads, options.backend)
        with run.catching("runs", "integrity"), open_worker(artifact, chosen) as worker:
            run.info = worker.info()
            run.behave(worker)
        if run.limits is not None and described.manifest.format == "coreml" and run.info.backend != INTERPRETER:
            run.compare_units(lambda backend: open_worker(artifact, dataclasses.replace(chosen, backend=backend)))
    return Verification(run.verdict(subject or artifact.name), run.info, run.scores)


class _Run:
    """One examination in progress."""

    def __init__(
        self, artifact: Artifact, student: Path, references: dict[str, Path], teachers: dict[str, Path], work: Path,
        options: VerifyOptions, progress: Progress,
    ) -> None:  # fmt: skip
        self.artifact = artifact
        self.manifest: Manifest = artifact.manifest
        self.student = student
        self.references = references
        self.teachers = teachers
        self.work = work
        self.options = options
        self.progress = progress
        self.checks: list[Check] = []
        self.info: SessionInfo | None = None
        self.scores: dict[tuple[str, str], Mapping[str, Array]] = {}
        self.mapped = False
        self.limits: Faithful | None = None

    @property
    def failed(self) -> bool:
        return any(not check.passed for check in self.checks)

    @contextlib.contextmanager
    def catching(self, name: str, question: Any) -> Iterator[None]:
        """An error in the block is a failed check, except for what is not the artifact's fault."""
        try:
            yield
        except (MissingDependency, ResourceExhausted):
            raise
        except (EdgestillError, ValueError, KeyError, IndexError) as error:
            reason = error.message if isinstance(error, EdgestillError) else f"{type(error).__name__}: {error}"
            self.checks.append(Check(name, question, False, reason=" ".join(reason.split())))

    def look_inside(self) -> None:
        """The checks that need no runtime."""
        from ..runtimes.payload import open_payload

        self.progress("reading the weights back", 0.05)
        with self.catching("payload", "integrity"):
            payload = open_payload(self.artifact)
            self.checks.append(integrity.check_histogram(self.artifact, payload))
            if self.artifact.tensors():
                self.mapped = True
                self.checks += integrity.check_weights(
                    self.artifact, payload, self.student, complete="foreign" not in self.manifest.lineage
                )
            else:
                reason = "not applicable: an artifact of another tool has no tensors.json"
                self.checks += [Check(name, "integrity", True, reason=reason) for name in _NEED_MAP]
        with self.catching("size_bytes", "integrity"):
            self.checks += integrity.check_sizes(self.artifact, self.options.ceilings)
        with self.catching("tokenizer", "integrity"):
            if self._ships("tokenizer.json"):
                self.checks.append(integrity.check_tokenizer(self.artifact, self.student))
            else:
                reason = "not applicable: no tokenizer came with the file"
                self.checks.append(Check("tokenizer", "integrity", True, reason=reason))
        if self.manifest.task == "text-generation" and self._ships("tokenizer_config.json"):
            with self.catching("chat_template", "integrity"):
                self.checks.append(check_chat_template(self.artifact, self.student))

    def _ships(self, name: str) -> bool:
        """Whether there is something to check: what another tool left out of its folder is not held against it."""
        bare = "foreign" in self.manifest.lineage and self.manifest.format != "gguf"
        return not bare or (self.artifact.path / name).is_file()

    def behave(self, worker: Any) -> None:
        """The checks that run it."""
        described = _Describe(self.student, next(iter(self.references.values())))
        task = self.manifest.task
        first = True
        for data, reference in self.references.items():
            self.progress(f"comparing with the student ({data})", 0.2)
            scores = dict(worker.score(reference, self.options.batch_size))
            describe = described if first else _Describe(self.student, reference)
            finite = behaviour.check_finite(scores, describe)
            if first or not finite.passed:
                self.checks.append(finite)
            if not finite.passed:
                return
            if task == "feature-extraction":
                scores["reference_embeddings"] = np.asarray(open_reference(reference).said)
            self.scores[data, "student"] = scores
            if data in self.teachers:
                self._teacher(worker, data, scores)
            first = False
        limits = faithful_for(self.manifest, self._activations())
        with self.catching("faithful", "faithful"):
            limits = self._faithful(worker, limits, described)
        self.limits = limits
        if self.manifest.format == "onnx":
            with self.catching("int16_saturation", "faithful"):
                inputs = inputs_of(next(iter(self.references.values())), 8)
                self._saturation(inputs.ids, inputs.mask)
        ids = described.longest()
        with self.catching("padding_parity", "faithful"):
            self.checks.append(behaviour.check_padding(worker, task, ids, limits))
        if task == "text-generation":
            with self.catching("decode_parity", "faithful"):
                room = self.manifest.max_length - self.options.decode_tokens
                prompt = ids[: max(1, min(len(ids) // 2, room))].tolist()
                count = min(self.options.decode_tokens, self.manifest.max_length - len(prompt))
                self.checks.append(behaviour.check_decode(worker, prompt, count, limits))
        self._loss()

    def compare_units(self, open_on: Callable[[str], AbstractContextManager[Any]]) -> None:
        """On a Mac: each compute unit against the interpreter."""
        from .coreml_units import compare_units

        self.progress("comparing the compute units with the interpreter", 0.9)
        assert self.limits is not None
        with self.catching("compute_units", "faithful"):
            ids = _Describe(self.student, next(iter(self.references.values()))).longest()[:LOOKED_INTO_TOKENS]
            self.checks += compare_units(self.manifest.task, ids.astype(np.int64), self.limits, open_on)

    def _teacher(self, worker: Any, data: str, scores: Mapping[str, Array]) -> None:
        self.progress(f"comparing with the teacher ({data})", 0.4)
        reference = self.teachers[data]
        if self.manifest.task == "text-generation":
            found: Mapping[str, Array] = worker.score(reference, self.options.batch_size)
        else:
            found = behaviour.against_other_reference(self.manifest.task, scores, reference)
        self.scores[data, "teacher"] = found

    def _activations(self) -> frozenset[Activation]:
        return frozenset(activation_of(self.manifest.format, tensor) for tensor in self.artifact.tensors())

    def _faithful(self, worker: Any, limits: Faithful, describe: _Describe) -> Faithful:
        """Against the dequantised student; returns the limits for this model."""
        task = self.manifest.task
        if not self.mapped:
            reason = "not applicable: an artifact of another tool has no tensors.json"
            self.checks.append(Check("faithful", "faithful", True, reason=reason))
            return limits
        from .dequantised import HALF_NOISE, JITTER, dequantised_model, jitter, noise_of

        self.progress("comparing with its own weights in torch", 0.6)
        model, kinds = dequantised_model(self.artifact, self.student)
        reference = next(iter(self.references.values()))
        rows = self.options.faithful_rows or (4 if task == "text-generation" else 64)
        inputs = inputs_of(reference, rows)
        # One range a batch: the same batches on both sides, and the smallest ones.
        batch = 1 if "uint8-tensor" in kinds else self.options.batch_size
        out = self.work / "dequantised"
        try:
            with torch_forward(model, self.options.threads) as forward:
                write_reference(out, task, inputs, forward, facts={}, batch_size=batch)
                longest = np.resize(describe.longest(), min(self.manifest.max_length, LONGEST_TOKENS))
                said = forward(longest[None].astype(np.int64), np.ones((1, len(longest)), np.int64))
                said = said[0, -8:].copy() if task in TOKEN_TASKS else said
                jitter(
                    model,
                    inputs=HALF_NOISE if "float16-maybe" in kinds else JITTER,
                    attention=HALF_NOISE if half_cache(self.manifest) else 0.0,
                )
                limits = limits.for_noise(noise_of(forward, out, batch))
            del model, forward
            scores = worker.score(out, batch)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        finite = behaviour.check_finite(scores, describe)
        found = behaviour.check_faithful(task, scores, limits, describe) if finite.passed else [finite]
        self.checks += self._located([self._judged(check) for check in found], longest)
        with self.catching("longest_context", "faithful"):
            check = behaviour.check_longest(worker, task, longest, said, limits)
            if len(longest) < self.manifest.max_length:
                reason = f"{check.reason}; of {self.manifest.max_length}, more would take too long"
                check = dataclasses.replace(check, reason=reason)
            self.checks.append(self._judged(check))
        return limits

    def _located(self, checks: list[Check], ids: npt.NDArray[np.int64]) -> list[Check]:
        """With the first part of the graph that diverges, in the checks that failed (of ONNX; others keep their inner
        values to themselves)."""
        if self.manifest.format != "onnx" or all(check.passed for check in checks):
            return checks
        from .divergence import first_divergence

        self.progress("looking for the first layer that diverges", 0.7)
        try:
            found = first_divergence(self.artifact, self.student, ids[:LOOKED_INTO_TOKENS])
        except (EdgestillError, ValueError, KeyError) as error:
            found, told = None, f"where it diverges was not found: {' '.join(str(error).split())[:300]}"
        else:
            told = "every block of layers agrees by itself: look at what follows the last one"
        if found is not None:
            after = f"after {found.before} agrees" if found.before else "no block before it"
            told = f"{found.name} is {found.error:.2g} away, noise explains {found.limit:.2g} ({after})"
        name = found.name if found is not None else None
        return [
            check if check.passed else dataclasses.replace(check, reason=f"{check.reason}; {told}", first_tensor=name)
            for check in checks
        ]

    def _judged(self, check: Check) -> Check:
        """With weights that were not found in a file of another tool, a distance is no proof of a defect."""
        map_check = next((c for c in self.checks if c.name == "weight_map"), None)
        if check.passed or map_check is None or "not applicable to" not in map_check.reason:
            return check
        reason = f"stated, not judged, since not all weights were found; {check.reason}"
        return dataclasses.replace(check, passed=True, limit=None, reason=reason)

    def _saturation(self, ids: Array, mask: Array) -> None:
        """16-bit overflow in u8·s8 products depends on the host's instructions; it is looked for on any host."""
        from ..runtimes.saturation import saturation

        found = saturation(self.artifact, ids, mask)
        if found is None:
            return
        reason = "no pair of u8*s8 products overflows 16 bits, on any processor"
        if found.fraction:
            reason = (
                f"u8*s8 products overflow 16 bits on x86 without VNNI, a relative error of {found.relative_error:.3g} "
                f"in {found.worst_node}"
            )
        worst = found.worst_node if found.fraction else None
        self.checks.append(
            Check("int16_saturation", "faithful", found.fraction == 0, float(found.fraction), 0.0,
                  unit="fraction of pairs", reason=reason, first_tensor=worst)
        )  # fmt: skip

    def _loss(self) -> None:
        ceiling = ceiling_for(self.manifest.quantisation)
        for (data, against), scores in self.scores.items():
            reference = (self.references if against == "student" else self.teachers)[data]
            label = against if len(self.references) == 1 else f"{against} ({data})"
            with self.catching(f"loss_to_{label}", "loss"):
                self.checks += behaviour.loss_checks(
                    self.manifest.task, scores, read_facts(reference)["documents"], label,
                    ceiling if against == "student" else None,
                    self.options.ceilings if against == "teacher" or data not in self.teachers else {},
                )  # fmt: skip

    def verdict(self, subject: str) -> Verdict:
        level: Any = "device_verified"
        if self.info is not None and self.info.backend == INTERPRETER:
            level = "program_verified"
        note = "" if level == "device_verified" else "the program was executed by edgestill's interpreter, not on a Mac"
        if self.failed or self.info is None:
            level = "failed"
            broken = next((check for check in self.checks if not check.passed), None)
            note = f"{broken.name}: {broken.reason}" if broken else "it did not run"
        info = self.info
        return Verdict(
            artifact_id=self.manifest.artifact_id, subject=subject, level=level,
            checks=tuple(_plain(check) for check in self.checks),
            runtime=info.runtime if info else _RUNTIMES.get(self.manifest.format, self.manifest.format),
            runtime_version=info.version if info else "", backend=info.backend if info else "",
            device=self.options.device, note=note,
        )  # fmt: skip


_NEED_MAP = ("weight_map", "weights_on_grid")


def _plain(check: Check) -> Check:
    """Plain Python numbers; JSON has no NaN or infinity, so those become ``None`` and are told in the reason."""
    numbers: dict[str, Any] = {}
    reason = check.reason
    for name in ("value", "limit", "low", "high"):
        value = getattr(check, name)
        numbers[name] = None if value is None or not math.isfinite(value) else float(value)
        if value is not None and numbers[name] is None:
            reason += f"; {name} is {float(value)}"
    return dataclasses.replace(check, passed=bool(check.passed), reason=reason, **numbers)


class _Describe:
    """Turns the row of a reference into text that a human recognises."""

    def __init__(self, student: Path, reference: Path) -> None:
        self._opened = open_reference(reference)
        self._student = student

    def __call__(self, row: int) -> str:
        ids = self._ids(row)
        if "tokenizers" not in sys.modules:
            return f"row {row}: ids {ids[:12].tolist()}"
        from tokenizers import Tokenizer

        text = Tokenizer.from_file(str(self._student / "tokenizer.json")).decode(ids.tolist())
        return f"row {row}: {text[:80]!r}"

    def longest(self) -> npt.NDArray[np.int64]:
        """The ids of the longest row."""
        return self._ids(int(np.asarray(self._opened.mask).sum(axis=1).argmax()))

    def _ids(self, row: int) -> npt.NDArray[np.int64]:
        return np.array(self._opened.ids[row, : int(self._opened.mask[row].sum())])


def _local(worker: Any, timeout: float) -> OpenWorker:
    def start(folder: Path, options: SessionOptions) -> AbstractContextManager[Any]:
        opened: AbstractContextManager[Any] = worker(folder, options, timeout=timeout)
        return opened

    return start
