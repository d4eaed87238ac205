"""Single steps of the main job as commands of their own: fetch, export, verify."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .artifact import open_artifact
from .bench.records import Verdict
from .bench.sample_text import SAMPLE_TEXT
from .delivery import RunResult
from .errors import BadInput, UsageError
from .fetch import Fetched, fetch, parse_address
from .pipeline import Run
from .recipe import BenchConfig, DataConfig, ExportConfig, Recipe, TeacherConfig, TextConfig, find_recipe, load_recipe
from .stages import Observer, RunFolder

if TYPE_CHECKING:
    from .checkpoints import ModelFolder
    from .data import Split

__all__ = [
    "ExportRequest",
    "ExportResult",
    "VerifyRequest",
    "VerifyResult",
    "export_verified",
    "fetch_all",
    "judged_texts",
    "model_folder",
    "text_config",
    "verify_artifact",
]

# Examples that a text given on the command line is judged on.
_EXAMPLES = 64


@dataclass(frozen=True)
class ExportRequest:
    """Export ``model`` to each of ``to`` (``FORMAT:QUANTISATION``) into ``out/artifacts``, judged on ``text``.

    ``app``: languages (``python``, ``kotlin``, ``swift``) to write a sample in for each artifact that passes, into
    ``out/app/VARIANT/LANGUAGE`` (or below ``app_out``). ``ort``: ONNX artifacts with a ``model.ort``, others as ever.
    """

    model: Path
    to: tuple[str, ...]
    out: Path = Path("artifacts")
    text: Path | None = None
    context_length: int | None = None
    threads: int = 2
    app: tuple[str, ...] = ()
    app_out: Path | None = None
    ort: bool = False


@dataclass(frozen=True)
class ExportResult:
    """The run behind an export: its artifacts with their verdicts."""

    run: RunResult
    exit_code: int
    schema_version: int = 1


@dataclass(frozen=True)
class VerifyRequest:
    """Judge ``artifact`` against the model that it was made from."""

    artifact: Path
    against: Path
    teacher: Path | None = None
    text: Path | None = None
    threads: int = 2


@dataclass(frozen=True)
class VerifyResult:
    """A verdict; ``exit_code`` is 1 when a check failed."""

    verdict: Verdict
    exit_code: int
    schema_version: int = 1


def fetch_all(name: str, sha256: str | None, observer: Observer) -> list[Fetched]:
    """Fetch an address, or everything that a recipe names."""
    if not name.endswith(".toml") and ":" in name and parse_address(name).scheme != "file":
        return [fetch(name, sha256=sha256, progress=observer.advanced)]
    path = find_recipe(name)
    recipe = load_recipe(path)
    further = recipe.distill.teacher if recipe.distill else ()
    sources = [recipe.teacher, *further, *recipe.student.sources, *recipe.data.text, *recipe.data.task]
    found = []
    for source in {source.source: source for source in sources}.values():
        observer.started(source.source, source.source)
        found.append(fetch(source.source, sha256=source.sha256, base=path.resolve().parent, progress=observer.advanced))
        observer.finished(source.source, 0.0, str(found[-1].path))
    return found


def text_config(path: Path, **counts: int) -> TextConfig:
    """A ``[[data.text]]`` for a file given on the command line."""
    if not path.is_file():
        raise BadInput(f"{path} does not exist", hint="pass a jsonl, csv, parquet or txt file")
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in path.stem).strip("._-")[:64] or "text"
    return TextConfig.model_validate({"name": name, "source": str(path.resolve()), **counts})


def export_verified(request: ExportRequest, observer: Observer) -> ExportResult:
    """Export a model as it is; every artifact is verified in the runtime that loads it, a bad one quarantined."""
    if not request.to:
        raise UsageError("nothing to export to", hint="--to onnx:int8,gguf:q4_k_m,coreml:int8")
    if not request.model.exists():
        raise BadInput(f"{request.model} does not exist", hint="pass a Transformers folder or a GGUF file")
    asked = [_variant(to, request) for to in request.to]
    variants = tuple({config.variant: config for config in asked}.values())  # asked for twice, made once
    recipe = Recipe(
        name="export",
        teacher=TeacherConfig(source=str(request.model.resolve())),
        data=DataConfig(text=(_fitting(request.text, _splits(variants)),) if request.text else ()),
        export=variants,
        bench=BenchConfig(threads=request.threads, tokens=1024, examples=_EXAMPLES),
    )
    with RunFolder(request.out, observer).locked() as folder:
        result = Run(recipe, request.out / "recipe.toml", folder, app_out=request.app_out).until("verify")
    return ExportResult(result, result.exit_code)


def _variant(to: str, request: ExportRequest) -> ExportConfig:
    from pydantic import ValidationError

    from .export.app import check_app

    for language in request.app:
        check_app(language, to.partition(":")[0])
    try:
        return ExportConfig.model_validate(
            {
                "to": to,
                "context_length": request.context_length,
                "app": request.app,
                "ort": request.ort and to.startswith("onnx:"),
            }
        )
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"--to {to}: {message}", hint="for example --to onnx:int8,gguf:q4_k_m,coreml:int8") from None


def verify_artifact(request: VerifyRequest, observer: Observer) -> VerifyResult:
    """Judge one artifact, of this tool or (then without the checks that need our weight map) of another."""
    from .bench.foreign import find_payload, wrap_foreign
    from .bench.reference import make_reference, vocabulary_columns
    from .bench.verify import VerifyOptions, verify

    payload = find_payload(request.artifact)
    artifact = None if payload else open_artifact(request.artifact, check=False)
    name, texts = judged_texts(request.text)
    with tempfile.TemporaryDirectory(prefix="edgestill-") as scratch:
        work = Path(scratch)
        observer.started("verify", f"verify {request.artifact.name}")
        student = model_folder(request.against, work / "student", observer)
        teacher = model_folder(request.teacher, work / "teacher", observer) if request.teacher else None
        if artifact is None:
            assert payload is not None
            artifact = wrap_foreign(payload, student, work / payload.stem)
        length = min(128, student.max_length, artifact.manifest.max_length)
        limit = 1024 if student.task == "text-generation" else _EXAMPLES
        own = make_reference(
            student.path, work / "reference", texts=texts, max_length=length, window=length, limit=limit,
            threads=request.threads, progress=observer.advanced,
        )  # fmt: skip
        theirs = None
        if teacher is not None:
            theirs = make_reference(
                teacher.path, work / "teacher-reference", ids_from=own, columns=vocabulary_columns(teacher, student),
                threads=request.threads, progress=observer.advanced,
            )  # fmt: skip
        verdict = verify(
            artifact.path, student=student.path, references={name: own}, subject=request.artifact.name,
            teacher_references={name: theirs} if theirs else None, work=work / "verify",
            options=VerifyOptions(threads=request.threads), progress=observer.advanced,
        )  # fmt: skip
    return VerifyResult(verdict, 0 if verdict.passed else 1)


def judged_texts(path: Path | None, *, most: int = _EXAMPLES) -> tuple[str, tuple[str, ...]]:
    """The name and (``most``, or as many as there are) examples of a text given on the command line, or the sample
    that is built in."""
    from .data import load_data

    if path is None:
        return "sample", SAMPLE_TEXT
    config = _fitting(path, most=most)
    return config.name, load_data(DataConfig(text=(config,)), base=Path.cwd()).text[0].test


def _splits(variants: tuple[ExportConfig, ...]) -> tuple[Split, ...]:
    """What is chosen by measurement needs text of its own, beside that which the result is judged on."""
    return ("test", "calibration", "dev") if any(one.parsed.reads_text for one in variants) else ("test",)


def _fitting(path: Path, splits: tuple[Split, ...] = ("test",), *, most: int = _EXAMPLES) -> TextConfig:
    """``most`` of a text given on the command line, or as many as it has: a short file is better than none."""
    from .data import load_data

    counts = [most >> step for step in range(most.bit_length())]  # halves of it, down to one
    for count in counts:
        config = text_config(path, **dict.fromkeys(splits, count))
        try:
            load_data(DataConfig(text=(config,)), base=Path.cwd())
        except BadInput:
            if count == counts[-1]:
                raise
            continue
        return config
    raise AssertionError


def model_folder(source: Path, out: Path, observer: Observer) -> ModelFolder:
    """``source`` as a model folder: itself, or prepared in ``out``."""
    from .checkpoints import FACTS_FILE, open_model, prepare_model

    if (source / FACTS_FILE).is_file():
        return open_model(source)
    return prepare_model(source, out, progress=observer.advanced)
