"""The recipe: what a run does, as one typed, frozen value read from TOML.

Every key has a type, a default where one makes sense and a description (the reference page is generated from them).
An unknown key, a wrong type or a bad value is a :class:`RecipeError` that names the file, the line, the key and the
nearest valid one.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from .errors import BadInput, RecipeError, nearest
from .loss_names import LOSS_NAMES, parse_loss
from .recipe_base import Name, Positive, PositiveFloat, Source, Strict, TeacherConfig, Weight
from .recipe_cache import CacheConfig
from .recipe_export import ExportConfig
from .recipe_student import StudentConfig
from .recipe_teaching import ExtraTeacherConfig, OnPolicyConfig, SequenceConfig
from .recipe_training import CorrectionConfig, LoraConfig, QuantizedConfig

__all__ = [
    "BenchConfig",
    "CacheConfig",
    "DataConfig",
    "DistillConfig",
    "ExportConfig",
    "GateConfig",
    "Recipe",
    "StudentConfig",
    "TaskConfig",
    "TeacherConfig",
    "TextConfig",
    "find_recipe",
    "load_recipe",
    "parse_recipe",
]

RECIPES = Path(__file__).parent / "recipes"

TaskName = Literal["feature-extraction", "text-classification", "token-classification", "text-generation"]


def _full_loss_name(text: str) -> str:
    """``jsd`` as ``jsd:0.5``: one loss has one name in everything that is written down."""
    try:
        return parse_loss(text).text
    except RecipeError as error:
        raise ValueError(error.message) from None


WeightedLoss = Annotated[str, AfterValidator(_full_loss_name)]

LAYER_MAPS = ("last", "skip", "kept", "cka")


class TextConfig(Source):
    """`[[data.text]]`: plain text. Documents are shuffled by hash and split so that no text is in two splits."""

    name: Name
    """how reports call it."""
    format: Literal["jsonl", "csv", "parquet", "txt"] | None = None
    """by default, from the file's suffix."""
    field: str = "text"
    """column or key that holds the text (not used for txt: a document a line)."""
    unit: Literal["document", "sentence"] = "document"
    """`sentence` strips HTML tags and cuts documents into sentences of 20-300 characters."""
    encoding: str = "utf-8"
    """of txt, csv and jsonl."""
    train: Annotated[int, Field(ge=0)] = 0
    """how many examples go to each split."""
    calibration: Annotated[int, Field(ge=0)] = 0
    dev: Annotated[int, Field(ge=0)] = 0
    test: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not (self.train or self.calibration or self.dev or self.test):
            raise ValueError("takes no example: set train, calibration, dev or test")
        return self


class TaskConfig(Source):
    """`[[data.task]]`: labelled text, to learn from with `cross_entropy` and to measure accuracy on (embeddings: by a
    linear probe). With `tags` every word has a label (token-classification); labels are the model's names for them, or
    numbers from 0 in its order."""

    name: Name
    format: Literal["jsonl", "csv", "parquet", "conll"] | None = None
    """by default, from the file's suffix; `conll`: a word a line, its label in the last column, an empty line between
    sentences."""
    text: str = "text"
    """column or key that holds the text; with `tags`, the list of its words."""
    label: str = "label"
    """column or key that holds the label."""
    tags: str | None = None
    """column or key that holds a list with a label for each word (conll: needs no name)."""
    encoding: str = "utf-8"
    where: dict[str, str] = Field(default_factory=dict)
    """keep only the rows whose columns have these values."""
    train: Annotated[int, Field(ge=0)] = 500
    """labelled examples that the probe is fitted on, or that classifiers learn from (`cross_entropy`)."""
    test: Positive = 400
    """labelled examples that accuracy is taken on."""

    @property
    def tagged(self) -> bool:
        """Whether its words have labels, and not its texts."""
        return self.tags is not None or self._conll

    @property
    def columns(self) -> tuple[str, str]:
        """Where the words stand, and where their labels."""
        return ("words", "tags") if self._conll else (self.text, self.tags or "")

    @property
    def _conll(self) -> bool:
        return self.format == "conll" or (self.format is None and self.source.endswith(".conll"))


class DataConfig(Strict):
    """`[data]`: the text that the student learns from and is judged on."""

    max_length: Positive = 128
    """tokens; longer examples are cut."""
    seed: int = 0
    """of the split."""
    text: tuple[TextConfig, ...] = ()
    task: tuple[TaskConfig, ...] = ()

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [text.name for text in self.text] + [task.name for task in self.task]
        if len(names) != len(set(names)):
            raise ValueError("two data sets have the same name")
        return self


class DistillConfig(Strict):
    """`[distill]`: how the student learns from the teacher. Leave the section out to ship a model as it is."""

    loss: dict[WeightedLoss, Weight] = Field(
        json_schema_extra={"propertyNames": {"pattern": f"^({'|'.join(LOSS_NAMES)})(:[0-9.eE+-]+)*$"}}
    )
    """weighted sum, e.g. `{ embedding_cosine = 1.0, embedding_gram = 1.0 }`, or with parameters in the name,
    `{ "jsd:0.5" = 0.9, cross_entropy = 0.1 }`; the names are listed below."""
    temperature: PositiveFloat = 1.0
    """softens both distributions in the losses between probabilities, whose value is multiplied by its square
    (total_variation: by itself), so that gradients keep their size."""
    layer_map: Literal["last", "skip", "kept", "cka"] | tuple[Annotated[int, Field(ge=0)], ...] = "kept"
    """which teacher layer each student layer imitates (hidden_states, attention_maps; attention_relations: the last
    one): `kept` the one it was copied from, `skip` evenly spread, `last` the last ones, `cka` those with the most alike
    states on training texts, in order; or a list, counted from 0."""
    epochs: PositiveFloat = 1.0
    max_steps: Positive | None = None
    """stop after so many optimiser steps, whatever `epochs` says."""
    batch_size: Positive = 32
    """examples in one forward pass."""
    gradient_accumulation: Positive = 1
    """forward passes in one optimiser step; the result does not depend on it, only memory does."""
    learning_rate: PositiveFloat = 5e-4
    weight_decay: Weight = 0.01
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: PositiveFloat = 1.0
    save_every: Positive = 100
    """optimiser steps between two checkpoints; a killed run goes on from the last one."""
    seed: int = 0
    threads: Positive | None = None
    """CPU threads; by default all that this process may use."""
    on_policy: OnPolicyConfig | None = None
    """the student writes, the teacher scores what was written (text generation)."""
    sequence: SequenceConfig | None = None
    """the teacher writes first, and the student learns from its texts (text generation)."""
    teacher: tuple[ExtraTeacherConfig, ...] = ()
    """further teachers: the student learns from the weighted mean of the distributions of all of them."""
    teacher_weight: PositiveFloat = 1.0
    """weight of the recipe's `[teacher]` beside further ones; all weights are divided by their sum."""
    cache: CacheConfig | None = None
    """the teacher is asked once for each token, and its answers are kept on disk (text generation)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the student's layers while it trains (`bf16`: autocast). Weights, losses and what is saved are fp32."""
    teacher_precision: Literal["fp32", "bf16"] = "fp32"
    """of the teacher's layers while it teaches (`bf16`: autocast). Its head over a vocabulary, and the teacher that
    held-out metrics compare with, are fp32."""
    gradient_checkpointing: bool = False
    """compute each layer again in the backward pass: much less memory, about a third more time, the same result."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """decay of an exponential moving average of the weights, e.g. 0.999; the average is what is measured and saved."""
    lora: LoraConfig | None = None
    quantized: QuantizedConfig | None = None
    evaluate_every: Positive | None = None
    """optimiser steps between two measurements on the dev split; by default only before and after."""
    patience: Positive | None = None
    """stop after so many measurements (`evaluate_every`) without a better one (KL, or Spearman for embeddings); the
    best weights are the student."""
    report_to: tuple[Literal["tensorboard", "mlflow", "trackio"], ...] = ()
    """trackers that get every step's losses; they write into the run's work folder."""
    correct_teacher: CorrectionConfig | None = None
    streaming: bool = False
    """read and tokenise the training text as it is needed, into windows that follow each other without a gap (text
    generation; needs `max_steps`): for corpora that don't fit into memory. Then `train` is how many texts of a file are
    read at most in a pass, in the file's order but for blocks of 256 shuffled documents, doubles included; vocabulary
    and importance are chosen by the calibration split."""

    @model_validator(mode="after")
    def _patience(self) -> Self:
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("`patience` counts measurements: set `evaluate_every` too")
        return self

    @model_validator(mode="after")
    def _whole_weights_are_quantised(self) -> Self:
        if self.quantized is not None and self.lora is not None:
            raise ValueError("`lora` trains matrices beside the weights, `quantized` the weights: leave one out")
        return self

    @field_validator("layer_map", mode="before")
    @classmethod
    def _known_map(cls, value: Any) -> Any:
        # Here and not by the type: of two possible types both would complain.
        if isinstance(value, str) and value not in LAYER_MAPS:
            raise ValueError(f"unknown map {value[:40]!r}; {nearest(value, LAYER_MAPS)}, or a list of layers")
        if not isinstance(value, str):
            if not isinstance(value, (list, tuple)) or any(type(layer) is not int or layer < 0 for layer in value):
                raise ValueError("neither a name nor a list of layers counted from 0")
            if not value:
                raise ValueError("names no layer")
        return value

    @field_validator("loss", mode="before")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        if isinstance(value, dict):
            seen: dict[str, Any] = {}
            for text in value:
                try:
                    full = parse_loss(text).text
                except (RecipeError, AttributeError):
                    continue  # the key's own check tells it with its place
                if full in seen:
                    raise ValueError(f"`{seen[full]}` and `{text}` are the same loss")
                seen[full] = text
        return value

    @field_validator("loss")
    @classmethod
    def _some_loss(cls, value: dict[str, float]) -> dict[str, float]:
        if not any(value.values()):
            raise ValueError("needs at least one loss with a weight above 0")
        return value


class BenchConfig(Strict):
    """`[bench]`: how artifacts are measured."""

    launches: Positive = 3
    """fresh processes per artifact."""
    threads: Positive = 2
    batch_size: Positive = 1
    length: Positive = 128
    """tokens of the timed input (prefill, for text generation)."""
    new_tokens: Positive = 32
    """tokens decoded in a timed generation."""
    repeats: Positive = 30
    """timed inferences per launch, after a warm-up."""
    max_seconds: PositiveFloat = 10.0
    """time limit of the timed inferences of one launch."""
    most_launches: Positive | None = None
    """go on up to so many launches while the noise is larger than half of `resolution`; by default, never."""
    resolution: PositiveFloat = 0.05
    """the smallest difference of speed that matters, as a fraction: what can't be told from it is inconclusive."""
    percentiles: tuple[Literal[90, 95, 99], ...] = ()
    """percentiles of latency to state with a bound; 90 needs 64 samples in all launches together, 99 needs 662."""
    depths: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = ()
    """tokens that stand before the decoded ones (text generation): decode speed at each of these depths."""
    sustained_seconds: Annotated[float, Field(ge=0)] = 0.0
    """run for so long in one go, and compare the last quarter's speed with the first quarter's; 0: don't."""
    examples: Positive = 600
    """held-out examples (embeddings, classification) that accuracy is taken on, per text."""
    tokens: Positive = 2048
    """held-out tokens (text generation) that accuracy is taken on, per text."""
    window: Positive = 128
    """tokens that are predicted together (text generation)."""
    seed: int = 0


class GateConfig(Strict):
    """`[gates]`: a limit that every artifact must keep, or the run ends with exit code 1."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("needs `min` or `max`")
        return self


class Recipe(Strict):
    """A whole recipe."""

    schema_version: Literal[1] = 1
    name: Name
    """names the run folder: `runs/NAME`."""
    description: str = ""
    task: TaskName | None = None
    """by default, inferred from the teacher's folder."""
    teacher: TeacherConfig
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    distill: DistillConfig | None = None
    export: tuple[ExportConfig, ...] = ()
    bench: BenchConfig = BenchConfig()
    gates: dict[str, GateConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        variants = [item.variant for item in self.export]
        twice = sorted({name for name in variants if variants.count(name) > 1})
        if twice:
            raise ValueError(f"two [[export]] entries write the artifact {twice[0]!r}; give one of them a `name`")
        if self.distill is not None and not any(text.train for text in self.data.text):
            raise ValueError("[distill] needs text to learn from: set `train` in a [[data.text]]")
        quantized = self.distill.quantized if self.distill else None
        shipped = {item.to for item in self.export if item.of == "student"}
        if quantized is not None and self.export and quantized.to not in shipped:
            raise ValueError(f"[distill.quantized] trains for {quantized.to}, but no [[export]] ships the student so")
        if self.distill is None and self.student.steps > 1:
            raise ValueError("[student] steps prunes and distils in rounds: add a [distill]")
        return self


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that is shipped (``"minilm"``)."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = RECIPES / f"{path.name.removesuffix('.toml')}.toml"
    if shipped.is_file() and path.parent in (Path(), Path("recipes")):
        return shipped
    names = sorted(p.stem for p in RECIPES.glob("*.toml"))
    raise BadInput(f"no recipe at {name}", hint=f"pass a .toml file, or one of {', '.join(names)}")


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe from a file or by the name of a shipped one; see :func:`parse_recipe`."""
    path = find_recipe(name)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}", hint="save the recipe as UTF-8") from None
    return parse_recipe(text, path)


def parse_recipe(text: str, origin: Path) -> Recipe:
    """Parse and validate the TOML ``text``; ``origin`` is named in errors.

    Raises :class:`RecipeError` naming file, line, key and what would be valid.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{origin}: not valid TOML: {error}", hint="see https://toml.io") from None
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, text, origin) from None


def _explain(error: ValidationError, text: str, origin: Path) -> RecipeError:
    """The first problem as one line with its place, the number of further ones, and a hint."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = first["loc"]
    line = _line_of(text, location)
    where = f"{origin}:{line}" if line else str(origin)
    key = ".".join(str(part) for part in location if part != "[key]") or "recipe"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = list(_fields_at(location[:-1]))
        return RecipeError(f"{where}: unknown key `{key}`{more}", hint=nearest(str(location[-1]), known))
    if location and location[-1] == "[key]":
        return _explain_loss(str(location[-2]), f"{where}: ", key, more)
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] in ("missing", "value_error") else f", got {str(first['input'])[:60]!r}"
    return RecipeError(f"{where}: `{key}`: {message}{got}{more}", hint="`edgestill init` writes a commented recipe")


def _explain_loss(text: str, where: str, key: str, more: str) -> RecipeError:
    """What is wrong with the name of a loss."""
    try:
        parse_loss(text)
    except RecipeError as error:
        if text.partition(":")[0] in LOSS_NAMES:
            return RecipeError(f"{where}`{key}`: {error.message}{more}", hint=error.hint)
        return RecipeError(f"{where}unknown key `{key}`{more}", hint=error.hint)
    return RecipeError(f"{where}`{key}` is not a text{more}", hint="write names of losses")


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at ``location``, for "did you mean"."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        while annotation is not None and not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            arguments = [a for a in getattr(annotation, "__args__", ()) if a not in (type(None), str, Ellipsis)]
            annotation = arguments[-1] if arguments else None
        if annotation is None:
            return []
        model = annotation
    return list(model.model_fields)


# A part of a TOML key; a quoted one may hold dots and colons.
_KEY = r"""(?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+)"""


def _line_of(text: str, location: tuple[int | str, ...]) -> int | None:
    """Best line number for a validation error: the key in its table, else the table's header, else ``None``."""
    names = [part for part in location if isinstance(part, str) and part != "[key]"]
    index = next((part for part in location if isinstance(part, int)), 0)
    current: list[str] = []
    seen: dict[str, int] = {}
    header_line: int | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?$", line):
            path = header[2]
            seen[path] = seen.get(path, -1) + 1
            current = [part.strip().strip("\"'") for part in path.split(".")]
            if current == names[: len(current)] and (header[1] == "[" or seen[path] == index):
                header_line = number
            elif header[1] == "[[":
                current = ["\0"]
            continue
        if key := re.match(rf"\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*=", line):
            full = [*current, *[part.strip("\"'") for part in re.findall(_KEY, key[1])]]
            if full == names[: len(full)]:
                return number
    return header_line
