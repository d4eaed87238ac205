"""``edgestill plan``: what a run would do, cost and lack, all at once. Nothing is fetched, written or trained.

Sizes come from headers where the model is at hand; times are estimates from floating-point operations and the speed of
one short matrix product on this machine, so they are right within a factor of two or so on an idle one.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bench.environment import usable_threads
from .bench.metrics import find_metric
from .doctor import doctor
from .errors import EdgestillError
from .fetch import find_cached
from .grids import ggml_grid
from .inspection import Inspection, inspect_model
from .loss_names import LOSS_NAMES, parse_loss
from .quantisation import Budget
from .quantisation_coreml import CoremlQuantisation
from .quantisation_gguf import FILE_TYPES
from .recipe import DistillConfig, ExportConfig, Recipe, find_recipe, load_recipe
from .recipe_teaching import ExtraTeacherConfig
from .recipe_text import dump_recipe

__all__ = ["Plan", "PlanProblem", "PlanStep", "PlanVariant", "plan_recipe"]

# Bytes of a weight in each variant, scales included; embeddings count like the rest.
BYTES_PER_WEIGHT: Mapping[str, float] = {
    "onnx:fp32": 4, "onnx:fp16": 2, "onnx:int8": 1.13, "onnx:int4": 0.7, "onnx:int8-dynamic": 1.5,
    "onnx:int8-dynamic-per-channel": 1.5, "onnx:int8-static": 1.1,
    "gguf:f32": 4, "gguf:f16": 2, "gguf:q8_0": 1.07, "gguf:q4_k_m": 0.75,
    "gguf:q4_0": 0.65, "coreml:fp16": 2, "coreml:int8": 1.01,
}  # fmt: skip
_RUNTIME = {"onnx": "onnxruntime", "gguf": "llama-cpp-python", "coreml": "coremltools"}
_WRITER = {"onnx": ("onnx",), "gguf": ("gguf", "llama-cpp-python"), "coreml": ("coremltools",)}
_SENTENCE_TOKENS = 28  # of an English sentence of 20-300 characters, measured on movie reviews
_TRAINING_PASSES = 3.0  # a step costs a forward pass and about two more for the gradients
_WRITING_SLOWNESS = 3.0  # a token written costs about so many times one that is read among others
# What a whole model reaches of one big matrix product's speed: 0.77 training MiniLM, 0.51 SmolLM2, 0.59 reading MiniLM.
_EFFICIENCY = 0.5
_EXPORT_SECONDS = {"onnx": 6.0, "gguf": 4.0, "coreml": 12.0}
_BASE_MEMORY = 1.2e9  # Python with torch and an exporter loaded, bytes


def _bytes_per_weight(config: ExportConfig) -> float:
    """Of a variant with options, what its format can tell, else that of its family."""
    parsed = config.parsed
    if isinstance(parsed, CoremlQuantisation) and config.to not in BYTES_PER_WEIGHT:
        return parsed.bytes_per_weight
    if parsed.format == "gguf" and f"gguf:{parsed.base}" not in BYTES_PER_WEIGHT and parsed.base in FILE_TYPES:
        kind = ggml_grid(FILE_TYPES[parsed.base].grid)
        return 1.1 * kind.size_bytes / kind.elements  # a tenth more for what is kept finer
    return BYTES_PER_WEIGHT.get(config.to) or BYTES_PER_WEIGHT.get(f"{parsed.format}:{parsed.base}", 2)


@dataclass(frozen=True)
class PlanStep:
    """One stage with an estimate of its time (``null`` when the model is not at hand yet)."""

    name: str
    note: str
    seconds: float | None


@dataclass(frozen=True)
class PlanVariant:
    """One artifact to come, and about how big it will be."""

    name: str
    kind: str
    size_bytes: float | None


@dataclass(frozen=True)
class PlanProblem:
    """Something that would stop the run, and what to do about it."""

    message: str
    hint: str
    exit_code: int = 2


@dataclass(frozen=True)
class Plan:
    """The resolved recipe with its costs; ``problems`` holds everything that is missing, not only the first."""

    recipe: str
    recipe_text: str
    run: str
    facts: Mapping[str, str]
    variants: tuple[PlanVariant, ...]
    steps: tuple[PlanStep, ...]
    disk_bytes: float | None
    disk_free_bytes: float
    memory_bytes: float | None
    memory_free_bytes: float
    seconds: float | None
    time_note: str
    problems: tuple[PlanProblem, ...]
    exit_code: int
    schema_version: int = 1


def plan_recipe(name: str | Path, runs: Path = Path("runs")) -> Plan:
    """Resolve a recipe and say what it will take. Raises :class:`edgestill.errors.RecipeError` for a wrong one."""
    path = find_recipe(name)
    recipe = load_recipe(path)
    draft = _Draft(recipe, path.resolve().parent, runs)
    return draft.plan()


class _Draft:
    def __init__(self, recipe: Recipe, base: Path, runs: Path) -> None:
        self.recipe = recipe
        self.base = base
        self.runs = runs
        self.problems: list[PlanProblem] = []
        self.model: Inspection | None = None
        self.others: list[Inspection] = []  # further teachers that are at hand

    def plan(self) -> Plan:
        import psutil

        recipe = self.recipe
        to_fetch = self._sources()
        self._packages()
        for metric in recipe.gates:
            with self._collecting():
                find_metric(metric)
        facts = self._facts()
        variants = self._variants()
        steps = self._steps(to_fetch)
        disk, memory = self._disk(variants), self._memory()
        place = next(p for p in (self.runs.resolve(), *self.runs.resolve().parents) if p.exists())
        free = float(shutil.disk_usage(place).free)
        if disk is not None and disk > free:
            self._add(f"{place} has {free / 1e9:.1f} GB free, the run needs {disk / 1e9:.1f} GB", "free some room", 5)
        room = float(psutil.virtual_memory().available)
        if memory is not None and memory > room:
            self._add(
                f"{room / 1e9:.1f} GB of memory are free, the run needs {memory / 1e9:.1f} GB", "close programs", 5
            )
        known = [step.seconds for step in steps if step.seconds is not None]
        unknown = len(steps) - len(known)
        return Plan(
            recipe=recipe.name,
            recipe_text=dump_recipe(recipe),
            run=str(self.runs / recipe.name),
            facts=facts,
            variants=variants,
            steps=steps,
            disk_bytes=disk,
            disk_free_bytes=free,
            memory_bytes=memory,
            memory_free_bytes=room,
            seconds=sum(known) if self.model else None,
            time_note=f"on {usable_threads()} idle threads" + (f", {unknown} steps unknown" if unknown else ""),
            problems=tuple(self.problems),
            exit_code=max((problem.exit_code for problem in self.problems), default=0),
        )

    def _add(self, message: str, hint: str, exit_code: int = 2) -> None:
        problem = PlanProblem(message, hint, exit_code)
        if problem not in self.problems:
            self.problems.append(problem)

    @contextlib.contextmanager
    def _collecting(self) -> Iterator[None]:
        """An error is a problem of the plan, and the next thing is looked at."""
        try:
            yield
        except EdgestillError as error:
            self._add(error.message, error.hint, error.exit_code)

    def _sources(self) -> list[str]:
        """Look for every source; returns what has to be downloaded."""
        missing = []
        recipe = self.recipe
        student = recipe.student.sources
        sources = (recipe.teacher, *self._further(), *student, *recipe.data.text, *recipe.data.task)
        for source in dict.fromkeys(s.source for s in sources):
            with self._collecting():
                if find_cached(source, base=self.base) is None:
                    missing.append(source)
        with self._collecting():
            found = None if recipe.teacher.source in missing else find_cached(recipe.teacher.source, base=self.base)
            if found is not None:
                self.model = inspect_model(found, task=recipe.task)
        for config in self._further():
            with self._collecting():
                found = None if config.source in missing else find_cached(config.source, base=self.base)
                if found is not None:
                    self.others.append(inspect_model(found, task=recipe.task))
        return missing

    def _further(self) -> tuple[ExtraTeacherConfig, ...]:
        return self.recipe.distill.teacher if self.recipe.distill else ()

    def _packages(self) -> None:
        """Each package that this recipe needs and that is not installed."""
        needed = {"torch", "transformers"}
        if self.recipe.distill:
            needed |= {"accelerate"}
        for config in self.recipe.export:
            needed |= {*_WRITER[config.format], _RUNTIME[config.format]}
        for finding in doctor().findings:
            if finding.name in needed and not finding.available:
                self._add(f"{finding.name} is not installed ({finding.purpose})", finding.install or "", 4)

    def _facts(self) -> dict[str, str]:
        model, recipe = self.model, self.recipe
        facts = {"teacher": recipe.teacher.source}
        if model is None:
            return {**facts, "": "not fetched yet: sizes are known after `edgestill fetch`"}
        facts["teacher is"] = (
            f"{model.architecture}, {model.layers} layers, {model.parameters / 1e6:.1f} M parameters, {model.task}"
        )
        for number, other in enumerate(self.others, start=2):
            facts[f"teacher {number} is"] = (
                f"{other.architecture}, {other.layers} layers, {other.parameters / 1e6:.1f} M parameters"
            )
        student, kept = recipe.student, self._kept()
        size = self._parameters()[1]
        about = f"{size / 1e6:.1f} M parameters ({size / model.parameters:.0%})"
        if student.config or student.source:
            facts["student"] = f"starts from {student.config or student.source}; `edgestill distill --plan` shows it"
        elif student.target is not None and student.target.latency_ms is not None:
            facts["student"] = f"planned to {student.target.latency_ms:g} ms; `edgestill distill --plan` measures it"
        elif student.cuts:
            facts["student"] = about if kept is None else f"{kept} layers, {about}"
        if kept is not None and kept > model.layers:
            self._add(f"[student] keeps {kept} layers, the teacher has {model.layers}", "keep fewer")
        return facts

    def _kept(self) -> int | None:
        student = self.recipe.student
        return len(student.keep) if student.keep is not None else student.layers

    def _parameters(self) -> tuple[int, int]:
        """Of teacher and student; of one whose size is only known when it is planned, the teacher's."""
        assert self.model is not None
        model, student = self.model, self.recipe.student
        size = model.student_parameters(
            self._kept() or model.layers, ffn=student.ffn, heads=student.heads, kv_heads=student.kv_heads
        )
        if student.target is not None:
            limit = student.target.most_parameters(model.parameters)
            size = size if limit is None else min(size, limit)
        return model.parameters, size

    def _variants(self) -> tuple[PlanVariant, ...]:
        rows = []
        for config in self.recipe.export:
            size = None
            if self.model is not None:
                teacher, student = self._parameters()
                weights = teacher if config.of == "teacher" else student
                parsed = config.parsed
                if isinstance(parsed, Budget):
                    size = min(float(parsed.budget_bytes), 4.0 * weights)
                else:
                    size = _bytes_per_weight(config) * weights
            rows.append(PlanVariant(config.variant, config.of, size))
        return tuple(rows)

    def _steps(self, to_fetch: list[str]) -> tuple[PlanStep, ...]:
        recipe, model = self.recipe, self.model
        steps = [
            PlanStep("fetch", f"to download: {' '.join(to_fetch)}" if to_fetch else "cached", None if to_fetch else 0.5)
        ]
        if model is None:
            return (*steps, PlanStep("all others", "once the teacher is here", None))
        teacher, student = self._parameters()
        rate = _speed() * _EFFICIENCY
        # A token costs two operations a weight; an embedding is only looked up (a tied one is also the output layer).
        looked_up = model.embedding if model.task != "text-generation" else 0
        cost = {"teacher": 2.0 * (teacher - looked_up), "student": 2.0 * (student - looked_up)}
        steps.append(PlanStep("teacher", "convert and check", 2 + teacher * 4 / 4e8))
        if recipe.distill is not None:
            steps.append(self._distill_step(cost, rate))
        held_out = recipe.bench.tokens if model.task == "text-generation" else recipe.bench.examples * _SENTENCE_TOKENS
        texts = max(1, sum(1 for text in recipe.data.text if text.test))
        ask = held_out * texts * (cost["teacher"] + 2 * cost["student"]) / rate
        steps.append(PlanStep("references", f"{held_out * texts} held-out tokens", 3 + ask))
        labelled = sum(task.train + task.test for task in recipe.data.task) * recipe.data.max_length
        for config in recipe.export:
            slow = 4.0 if config.format == "coreml" else 1.0  # our interpreter, in fp16 steps
            verify = 4 + 3 * held_out * texts * cost[config.of] / rate * slow
            probe = labelled * cost[config.of] / rate * slow
            write = _EXPORT_SECONDS[config.format] + (teacher if config.of == "teacher" else student) * 1e-7
            steps.append(PlanStep(config.variant, "export, verify, accuracy", write + verify + probe))
        per_launch = 3 + min(
            recipe.bench.max_seconds, recipe.bench.repeats * recipe.bench.length * cost["student"] / rate
        )
        timed = [config for config in recipe.export if config.format != "coreml"]
        launches = (len(timed) + 2) * (recipe.bench.launches + 1)
        steps.append(PlanStep("speed", f"{launches} fresh processes, interleaved", launches * per_launch))
        return tuple(steps)

    def _distill_step(self, cost: Mapping[str, float], rate: float) -> PlanStep:
        recipe = self.recipe
        assert recipe.distill is not None
        corpus = self._corpus_tokens()
        tokens = corpus * recipe.distill.epochs
        if recipe.distill.max_steps:
            per_step = recipe.distill.batch_size * recipe.distill.gradient_accumulation
            examples = sum(text.train for text in recipe.data.text) or 1
            tokens = min(tokens, corpus / examples * per_step * recipe.distill.max_steps)
        read = {LOSS_NAMES[parse_loss(name).name].reads for name, weight in recipe.distill.loss.items() if weight}
        live = read & {"logits", "blocks"} and recipe.distill.cache is None
        of_teacher = tokens if live else corpus  # what is kept is asked once
        teachers = cost["teacher"] + sum(2.0 * other.parameters for other in self.others)
        seconds = (tokens * _TRAINING_PASSES * cost["student"] + of_teacher * teachers) / rate
        note = f"{tokens:,.0f} tokens"
        by_student, by_teacher = self._written(recipe.distill)
        if by_student or by_teacher:
            # Token by token, each weight is read for every one of them, for a batch at once.
            seconds += _WRITING_SLOWNESS * (by_student * cost["student"] + by_teacher * teachers) / rate
            written = {"student": by_student, "teacher": by_teacher}
            note += "".join(f", {count:,.0f} written by the {who}" for who, count in written.items() if count)
        return PlanStep("student", note, seconds)

    def _written(self, config: DistillConfig) -> tuple[float, float]:
        """Most tokens that student and teacher will write."""
        examples = sum(text.train for text in self.recipe.data.text)
        group = config.batch_size * config.gradient_accumulation
        steps = config.max_steps or max(1, round(config.epochs * examples / group))
        by_student = by_teacher = 0.0
        if (own := config.on_policy) is not None:
            again = 0.0 if not own.replay else 0.5 if own.replay_ratio == "linear" else own.replay_ratio
            by_student = own.ratio * (1 - again) * steps * group * own.new_tokens
        if (sequence := config.sequence) is not None:
            by_teacher = sequence.share * examples * sequence.new_tokens
        return by_student, by_teacher

    def _corpus_tokens(self) -> float:
        """Tokens to train on, at most: texts may be shorter."""
        data = self.recipe.data
        return float(
            sum(text.train * (_SENTENCE_TOKENS if text.unit == "sentence" else data.max_length) for text in data.text)
        )

    def _disk(self, variants: tuple[PlanVariant, ...]) -> float | None:
        if self.model is None:
            return None
        teacher, student = self._parameters()
        # teacher, student, untrained cut and two training checkpoints (weights and two optimiser moments each)
        further = sum(other.parameters for other in self.others)
        models = 4.0 * (teacher + further + student * (2 + (2 * 3 if self.recipe.distill else 0)))
        artifacts = sum(variant.size_bytes or 0 for variant in variants)
        texts = max(1, sum(1 for text in self.recipe.data.text if text.test))
        rows = self.recipe.bench.tokens if self.model.task == "text-generation" else 0
        references = 4.0 * rows * self.model.vocab_size * (2 * texts + 1)
        distill, kept = self.recipe.distill, 0.0
        if distill is not None and distill.cache is not None:
            kept = self._corpus_tokens() * distill.cache.row_bytes(self.model.vocab_size, distill.temperature)
        return models + artifacts + references + kept + 1e8

    def _memory(self) -> float | None:
        if self.model is None:
            return None
        teacher, student = self._parameters()
        further = sum(other.parameters for other in self.others)
        training = 4.0 * (teacher + further + 4 * student) if self.recipe.distill else 0.0
        return _BASE_MEMORY + max(training, 4.0 * 3 * teacher)


def _speed() -> float:
    """Floating-point operations a second of one fp32 matrix product on this machine, the best of many, so that what
    others take at the moment counts less."""
    import numpy as np

    size = 768
    a: Any = np.ones((size, size), np.float32)
    best = float("inf")
    end = time.perf_counter() + 0.3
    while (began := time.perf_counter()) < end:
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
