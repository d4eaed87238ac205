"""One distillation from start to end, resumable: cut, teacher's answers, training, measuring, writing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..artifact import TOKEN_TASKS
from ..checkpoints import ModelFolder, load_tokenizer, open_model, save_model
from ..errors import ResourceExhausted, UsageError
from ..files import atomic_directory, atomic_write, hash_json, hash_tree, read_json
from ..model_origin import student_origin
from ..progress import Progress, silent
from ..recipe import DistillConfig, StudentConfig
from ..recipe_teaching import SequenceConfig
from ..torch_models import quiet
from . import ranks
from .anatomy import base_model, blocks
from .batches import Examples
from .cache_use import check_cache
from .checkpoint import find_checkpoint, sweep_checkpoints
from .correction import check_something_to_learn, correction_config
from .cost import Cost
from .ensemble import MixedTeacher, normalised
from .evaluate import HeldOut
from .fake_quantise import FakeGrid
from .foreign import ForeignTeacher, PairedExamples, check_foreign, held_out_of, is_foreign
from .job import NOT_IDENTITY, Job, prepare
from .journal import Journal, Row
from .layer_maps import learn_layer_map
from .limits import limited_threads, memory_errors
from .lora import add_lora, merge_lora
from .objective import Objective
from .planning import Calibration, PlanCost, find_plan
from .precision import check_precision, suit_attention
from .quantized import QuantisedWeights, Ship, check_shipped, shipped_grids
from .recompute import recompute_blocks
from .result import DistillResult
from .rollout import Rollouts
from .rounds import run_rounds
from .sampling import Writer
from .sequence import write_texts
from .start import Start, check_start
from .stream import stream_of
from .student import StudentPlan, make_student
from .teacher import Teacher
from .trackers import check_trackers, trackers_write_into
from .trainer import CLOCK_FILE, DistillTrainer, training_arguments
from .vocabulary_tokenizer import FittedVocabulary, fit_vocabulary

if TYPE_CHECKING:
    from ..data import DataSets

__all__ = ["run", "run_job"]

CARD_FILE, JOURNAL_FILE, RESULT_FILE, IDENTITY_FILE = (
    "distillation.json", "training.jsonl", "result.json", "identity.json",
)  # fmt: skip
SHIPPED_FROM = "shipped-from"  # inside the work folder, for a moment
CORRECTED = "teacher"  # inside the work folder


def run(
    teacher: Path,
    out: Path,
    *,
    student: StudentConfig,
    config: DistillConfig | None,
    data: DataSets,
    max_length: int,
    work: Path,
    signal: Path | None = None,
    start: Path | None = None,
    cost: PlanCost | None = None,
    progress: Progress = silent,
    others: Sequence[Path] = (),
    ship: Ship | None = None,
) -> DistillResult:
    """See :func:`edgestill.distill.distill`."""
    original = folder = open_model(teacher)
    if config is not None:
        if config.quantized is not None and ship is None:
            raise UsageError(
                f"[distill.quantized] trains for {config.quantized.to}, but nothing here exports",
                hint="pass `ship` to edgestill.distill.distill(), or run the recipe",
            )
        check_cache(config, folder)
        check_trackers(config.report_to)
        ranks.start()
        if config.correct_teacher is not None:
            # Where students share what the teacher says, those of one seed share the teacher that it was corrected to.
            place = work / CORRECTED if signal is None else signal / f"{CORRECTED}-{config.seed}"
            folder = _corrected(folder, config, data, max_length, place, progress)
    begin = Start.of(folder, start)
    check_start(folder, begin.folder, config)
    foreign = is_foreign(folder, begin.folder)
    if foreign and config is not None:
        check_foreign(folder, begin.folder, config, student, data.split("train"))
    if foreign:
        vocabulary = FittedVocabulary((), load_tokenizer(begin.folder.path))
    else:
        vocabulary = fit_vocabulary(folder, student.vocabulary, data)
    text = Calibration.of(data, max_length)
    with quiet(), limited_threads(config.threads if config else None), memory_errors():
        plan = ranks.from_first(lambda: find_plan(begin.folder, student, text, cost, work, vocabulary.keep))
    if config is None:
        with quiet():
            card = _card(folder, begin, plan, vocabulary)
            _write(make_student(begin.folder, plan), vocabulary.tokenizer, out, begin, folder, card)
        return DistillResult(out, begin.origins(plan), folder.layers)
    progress = progress if ranks.is_first() else silent
    further = tuple(open_model(path) for path in others)
    job = prepare(folder, begin, plan, config, data, max_length, vocabulary, further, foreign)
    job = dataclasses.replace(job, shelf=signal, original=None if folder is original else original, ship=ship)
    if student.steps > 1:
        return run_rounds(job, student, out, work, text, progress, run_job)
    return run_job(job, out, work, progress)


def run_job(job: Job, out: Path, work: Path, progress: Progress = silent) -> DistillResult:
    """One cut and one training; finished ones are given back, interrupted ones go on."""
    if (use := job.cache()) is not None:
        progress(use.line)
    identity = job.identity()
    done = ranks.from_first(lambda: _finished(out, work, identity))
    if done is not None:
        return done
    ranks.from_first(lambda: _claim(work, identity))
    with quiet(), limited_threads(job.config.threads), memory_errors(), trackers_write_into(work):
        return _train(job, out, work, identity, progress)


def _corrected(
    folder: ModelFolder, config: DistillConfig, data: DataSets, max_length: int, work: Path, progress: Progress
) -> ModelFolder:
    """The teacher after it has learned the transfer text: a run of its own, resumable, made once."""

    def tell(message: str, fraction: float | None = None) -> None:
        progress(f"teacher correction: {message}", fraction)

    run(
        folder.path, work / "model", student=StudentConfig(), config=correction_config(folder, config), data=data,
        max_length=max_length, work=work, progress=tell,
    )  # fmt: skip
    return open_model(work / "model")


def _train(job: Job, out: Path, work: Path, identity: str, progress: Progress) -> DistillResult:
    began = time.monotonic()
    config, folder = job.config, job.teacher
    arguments = training_arguments(config, job.steps, work)
    check_precision(config.precision, arguments.device)
    check_precision(config.teacher_precision, arguments.device, "teacher_precision")
    teacher = _teacher(job, arguments.device)
    if config.cache is None:
        teacher.load()
    if config.sequence is not None:
        with ranks.first_goes_ahead():
            job = dataclasses.replace(job, train=_written(job, config.sequence, teacher, job.shelf or work, progress))
    model = make_student(job.start.folder, job.plan).to(arguments.device)
    dev = job.dev if ranks.is_first() else Examples((), ())
    judged_by = {"": teacher}
    if job.original is not None:
        uncorrected = _teacher(dataclasses.replace(job, teacher=job.original), arguments.device)
        judged_by = {"": uncorrected, "corrected_": teacher}
    judges: dict[str, Any] = {
        prefix: held_out_of(dev, judge, job.vocab_size, job.tokenizer) for prefix, judge in judged_by.items()
    }
    held_out = judges[""]
    if config.lora is not None:
        add_lora(model, config.lora, config.seed)
    quantised = _quantised(job, model, work, progress) if config.quantized is not None else None
    suit_attention(base_model(model), config.precision, arguments.device)
    objective = Objective(
        model, folder.task, job.weights, temperature=config.temperature, vocab_size=job.vocab_size,
        teacher_width=teacher.width, seed=config.seed, foreign=job.foreign,
    )  # fmt: skip
    mapped = _layer_map(job, model, teacher) if objective.inside else ()
    teacher.listen(mapped, objective.inside)
    if objective.needs_teacher and not job.foreign and len(blocks(model)) == folder.layers:
        check_something_to_learn(model, teacher.model)
    if config.gradient_checkpointing:
        recompute_blocks(model)
    cache = job.cache(mapped)
    if objective.needs_teacher and cache is not None:
        place = cache.place or job.shelf or work
        with ranks.first_goes_ahead():
            teacher.remember_tokens(job.train, place, cache.form, cache.temperature, progress)
        for judge in judged_by.values():
            judge.release()  # of those only the heads are still needed
    elif objective.needs_teacher and not mapped and folder.task not in TOKEN_TASKS:
        with ranks.first_goes_ahead():
            teacher.remember(job.train, job.shelf or work, progress)

    def measure() -> dict[str, float]:
        return ranks.from_first(lambda: _measure(model, judges))

    journal = Journal(work / JOURNAL_FILE if ranks.is_first() else None)
    checkpoint, journal.rows = ranks.from_first(lambda: _resume(work, journal, objective, config))
    if not journal.rows:
        journal.append({"step": 0, "tokens": 0, "dev": measure()})
    before_kill = float((checkpoint / CLOCK_FILE).read_text(encoding="utf-8")) if checkpoint else 0.0
    rollouts = _rollouts(job, held_out, journal.rows[0]["dev"].get("kl"))
    trainer = DistillTrainer(
        objective, teacher if objective.needs_teacher else None, job.train, config, arguments,
        pad_id=job.pad_id, journal=journal, measure=measure, seconds=before_kill + time.monotonic() - began,
        progress=progress, rollouts=rollouts, quantised=quantised,
        stream=stream_of(job.texts, job.tokenizer, job.length, folder.prompt_prefix),
    )  # fmt: skip
    trainer.learn(checkpoint)
    steps, tokens = int(trainer.state.global_step), int(trainer.state.num_input_tokens_seen)
    if config.lora is not None:
        merge_lora(model)
    before, after = journal.rows[0]["dev"], measure()
    journal.append({"step": steps, "tokens": tokens, "dev": after})
    cost = dataclasses.asdict(_cost(job, teacher if objective.needs_teacher else None, tokens, rollouts))
    result = DistillResult(
        path=out, keep=job.start.origins(job.plan), teacher_layers=folder.layers, steps=steps, tokens_seen=tokens,
        seconds=round(trainer.seconds, 3), dev_before=before, dev_after=after, curves=tuple(journal.rows),
        cost=cost,
    )  # fmt: skip

    def write() -> DistillResult:
        card = {**_card(folder, job.start, job.plan, job.vocabulary, job, result, trainer.best_step, mapped)}
        card["cost"] = cost
        if job.original is not None:
            card |= {"teacher_id": job.original.model_id, "corrected_teacher": _correction_facts(folder)}
        if job.others:
            card["teachers"] = job.teachers
        if config.sequence is not None:
            card["sequence"] = {"texts": sum(map(bool, job.train.prompts)), "sha256": job.train.digest()}
        if quantised is not None:
            card["grids"] = quantised.counts
            _check_shipped(job, model.to("cpu"), work, progress)
        _write(model.to("cpu"), job.tokenizer, out, job.start, job.original or folder, card, journal, job.others)
        facts = {**dataclasses.asdict(result), "path": None}
        record = {"identity": identity, "output": hash_tree(out), "result": facts}
        atomic_write(work / RESULT_FILE, json.dumps(record) + "\n")
        sweep_checkpoints(work, keep=None)
        return result

    return ranks.from_first(write)


def _quantised(job: Job, model: nn.Module, work: Path, progress: Progress) -> QuantisedWeights:
    """``model`` on the grid that ships, and the proof that the exporter finds its weights there again."""
    assert job.ship is not None  # run() asked for it
    assert job.config.quantized is not None
    ship, to = job.ship, job.config.quantized.to

    def find() -> dict[str, FakeGrid]:
        progress(f"asking the exporter which weight gets which grid of {to}")
        return shipped_grids(model, _as_folder(job, model, work), work, ship)

    quantised = QuantisedWeights(model, ranks.from_first(find))
    ranks.from_first(lambda: _check_shipped(job, model, work, progress))
    return quantised


def _check_shipped(job: Job, model: nn.Module, work: Path, progress: Progress) -> None:
    assert job.ship is not None
    progress("checking that the exporter stores exactly these weights")
    check_shipped(model, _as_folder(job, model, work), work, job.ship)
    shutil.rmtree(work / SHIPPED_FROM)


def _as_folder(job: Job, model: nn.Module, work: Path) -> Path:
    prefix = job.teacher.prompt_prefix
    return save_model(model, job.tokenizer, work / SHIPPED_FROM, job.start.folder, prompt_prefix=prefix).path


def _measure(student: nn.Module, judges: dict[str, Any]) -> dict[str, float]:
    return {f"{who}{name}": value for who, judge in judges.items() for name, value in judge.measure(student).items()}


def _correction_facts(folder: ModelFolder) -> dict[str, Any]:
    """What the card says of the teacher that was corrected."""
    card = read_json(folder.path / CARD_FILE)
    return {"id": folder.model_id, **{key: card[key] for key in ("steps", "tokens_seen", "dev_before", "dev_after")}}


def _resume(work: Path, journal: Journal, objective: Objective, config: DistillConfig) -> tuple[Path | None, list[Row]]:
    """The checkpoint to go on from, and the journal up to it; what was done later is forgotten."""
    _check_room(work, objective, config)
    checkpoint, step = find_checkpoint(work) or (None, 0)
    sweep_checkpoints(work, keep=checkpoint)
    journal.rewind(step)
    if not journal.rows or "dev" not in journal.rows[0]:
        journal.rewind(-1)
    return checkpoint, journal.rows


def _teacher(job: Job, device: torch.device) -> Teacher:
    shared = ((), job.pad_id, device, job.vocabulary.keep, job.config.teacher_precision)
    if job.foreign:
        return ForeignTeacher(job.teacher, job.pad_id, device)
    if not job.others:
        return Teacher(job.teacher, *shared)
    folders, weights = (job.teacher, *job.others), normalised(job.config)
    return MixedTeacher(folders, weights, job.config.temperature, job.vocab_size, *shared)


def _written(job: Job, settings: SequenceConfig, teacher: Teacher, work: Path, progress: Progress) -> Examples:
    """The training examples after the teacher has continued its share of them."""
    stop = job.stop
    mixed: Any = teacher.model
    writer = Writer(
        mixed.members if job.others else [mixed], settings, vocab_size=job.vocab_size, stop=stop, pad_id=job.pad_id,
        weights=normalised(job.config), whose="teacher",
    )  # fmt: skip
    key: dict[str, Any] = {"teachers": job.teachers, "stop": sorted(stop), "vocab_size": job.vocab_size}
    if job.vocabulary.keep:  # the same numbers would be other words
        key["vocabulary"] = hash_json(job.vocabulary.keep)
    return write_texts(job.train, settings, writer, seed=job.config.seed, key=key, work=work, progress=progress)


def _rollouts(job: Job, held_out: HeldOut, held_out_kl: float | None) -> Rollouts | None:
    settings = job.config.on_policy
    if settings is None:
        return None
    return Rollouts(
        settings, steps=job.steps, seed=job.config.seed, vocab_size=job.vocab_size,
        stop=job.stop, pad_id=job.pad_id,
        measure=lambda student: ranks.from_first(lambda: held_out.measure(student)["kl"]), held_out_kl=held_out_kl,
    )  # fmt: skip


def _cost(job: Job, teacher: Teacher | None, tokens: int, rollouts: Rollouts | None) -> Cost:
    """``tokens``: those that the student was trained on; a live teacher reads the same ones."""
    asked = 0
    if teacher is not None:
        asked = tokens if teacher.live else int(job.train.lengths.sum())
        if isinstance(job.train, PairedExamples):  # its own tokens of the same text, by their share in the whole corpus
            asked = round(tokens * sum(map(len, job.train.their_ids)) / int(job.train.lengths.sum()))
    own = {"read": rollouts.prompt_tokens_read, "written": rollouts.tokens_written} if rollouts else {}
    if own:  # each process wrote its share
        own = ranks.add_counts(own)
    # What a teacher wrote is in the examples: tokens after a prompt.
    written = [
        (prompt, len(ids) - prompt) for ids, prompt in zip(job.train.ids, job.train.prompts, strict=False) if prompt
    ]
    return Cost(
        teacher_forward_tokens=(asked + sum(prompt for prompt, _ in written)) * len(job.teachers),
        teacher_generated_tokens=sum(count for _, count in written),
        student_forward_tokens=tokens + own.get("read", 0),
        student_generated_tokens=own.get("written", 0),
    )


def _layer_map(job: Job, student: nn.Module, teacher: Teacher) -> tuple[int, ...]:
    """Which teacher layer each layer of the student imitates; the student is still untrained."""
    if job.config.layer_map == "cka":
        return learn_layer_map(student, teacher.inside, job.train, job.pad_id)
    return job.start.taught(job.config.layer_map, job.plan, job.teacher.layers)


def _write(
    model: nn.Module,
    tokenizer: Any,
    out: Path,
    start: Start,
    teacher: ModelFolder,
    card: dict[str, Any],
    journal: Journal | None = None,
    others: Sequence[ModelFolder] = (),
) -> None:
    """The student's folder with its card and journal, whole or not at all."""
    with atomic_directory(out) as temporary:
        # It pools as what it was cut from, and reads its texts as the teacher did.
        prefix = teacher.prompt_prefix
        origin = student_origin(teacher, start.folder, others)
        saved = save_model(model, tokenizer, temporary / "model", start.folder, prompt_prefix=prefix, origin=origin)
        for path in saved.path.iterdir():
            path.replace(temporary / path.name)
        saved.path.rmdir()
        atomic_write(temporary / CARD_FILE, json.dumps(card, indent=2, sort_keys=True) + "\n")
        if journal is not None:
            atomic_write(temporary / JOURNAL_FILE, journal.text())


def _card(
    folder: ModelFolder,
    start: Start,
    plan: StudentPlan,
    vocabulary: FittedVocabulary,
    job: Job | None = None,
    result: DistillResult | None = None,
    best_step: int | None = None,
    mapped: tuple[int, ...] = (),
) -> dict[str, Any]:
    """What was done, without times and paths: equal runs write equal cards."""
    card: dict[str, Any] = {
        "schema_version": 1,
        "teacher_id": folder.model_id,
        "task": folder.task,
        "teacher_layers": folder.layers,
        "keep": list(start.origins(plan)),
        "trained": job is not None,
        "plan": plan.facts(),
    }
    if vocabulary.facts is not None:
        card["vocabulary"] = vocabulary.facts
    if not start.of_teacher:
        card["start_id"] = start.folder.model_id
    if start.history:
        card["rounds"] = list(start.history)
    if job is None or result is None:
        return card
    config, use = job.config, job.cache(mapped)
    losses = {
        name: {"weight": weight, "effective_weight": weight * config.temperature ** job.losses[name].temperature_power}
        for name, weight in job.weights.items()
    }
    return {
        **card,
        "losses": losses,
        "teacher_signal": {"source": "live"} if use is None else use.facts,
        **({"layer_map": list(mapped)} if mapped else {}),
        "config": config.model_dump(mode="json", exclude=NOT_IDENTITY),
        "steps": result.steps,
        **({} if best_step is None else {"best_step": best_step}),
        "examples": len(job.train) or len(job.texts),
        "tokens_seen": result.tokens_seen,
        "dev_before": dict(result.dev_before),
        "dev_after": dict(result.dev_after),
    }


def _finished(out: Path, work: Path, identity: str) -> DistillResult | None:
    """The result of an earlier call with the same input, if the student still stands there unchanged."""
    if not (work / RESULT_FILE).exists() or not out.is_dir():
        return None
    record = read_json(work / RESULT_FILE)
    if record.get("identity") != identity or record.get("output") != hash_tree(out):
        return None
    facts = record["result"]
    return DistillResult(**{**facts, "path": out, "keep": tuple(facts["keep"]), "curves": tuple(facts["curves"])})


def _claim(work: Path, identity: str) -> None:
    """Make ``work`` this job's: checkpoints of another one are removed (cached vectors know whose they are)."""
    path = work / IDENTITY_FILE
    if path.exists() and read_json(path).get("identity") == identity:
        return
    sweep_checkpoints(work, keep=None)
    for name in (JOURNAL_FILE, RESULT_FILE):
        (work / name).unlink(missing_ok=True)
    atomic_write(path, json.dumps({"identity": identity}) + "\n")


def _check_room(work: Path, objective: Objective, config: DistillConfig) -> None:
    """Two checkpoints are on disk while one takes the other's place.

    Each holds the weights, two moments of those that are trained, and what ``ema``, ``patience`` and ``quantized``
    remember.
    """
    weights = sum(p.numel() * p.element_size() for p in objective.parameters())
    trained = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    copies = 2 + sum(item is not None for item in (config.ema, config.patience, config.quantized))
    needed, free = 2 * (weights + copies * trained), shutil.disk_usage(work).free
    if needed > free:
        raise ResourceExhausted(
            f"checkpoints need {needed / 1e6:.0f} MB in {work}, {free / 1e6:.0f} MB are free",
            hint="free some room, then run the same command again",
        )
