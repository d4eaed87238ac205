"""``edgestill init``: a commented recipe for any model folder, ready to run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from .artifact import Task
from .errors import RecipeError, UsageError
from .files import atomic_write, check_place
from .inspection import Inspection, inspect_model
from .recipe import parse_recipe

__all__ = ["InitConfig", "init_recipe"]

# What most people want to compare, for each task; what a runtime can't do for a task is left out.
_ONNX = ("onnx:fp32", "onnx:int8", "onnx:int4")
_COREML = ("coreml:fp16", "coreml:int8")
DEFAULT_VARIANTS: dict[Task, tuple[str, ...]] = {
    "feature-extraction": (*_ONNX, "gguf:f16", "gguf:q8_0", *_COREML),
    "text-classification": (*_ONNX, *_COREML),
    "token-classification": _ONNX,
    "text-generation": (*_ONNX, "gguf:q8_0", "gguf:q4_k_m", *_COREML),
}  # fmt: skip
_LOSS: dict[Task, str] = {
    "feature-extraction": "{ embedding_cosine = 1.0, embedding_gram = 1.0 }",
    "text-classification": "{ forward_kl = 1.0 }",
    "token-classification": "{ forward_kl = 1.0 }",
    "text-generation": "{ forward_kl = 1.0 }",
}
_RATE: dict[Task, str] = {
    "feature-extraction": "5e-4",
    "text-classification": "1e-4",
    "token-classification": "1e-4",
    "text-generation": "2e-4",
}


@dataclass(frozen=True)
class InitConfig:
    """Which ``model`` to ship, as which variants (``to``, default by task), written to ``out`` (default
    ``NAME.toml`` here). ``distill``: layers that a student keeps; ``text``: a file to learn from and be judged on."""

    model: Path
    to: tuple[str, ...] = ()
    out: Path | None = None
    distill: int | None = None
    text: Path | None = None


def init_recipe(config: InitConfig) -> Path:
    """Write the recipe and return its path.

    Raises :class:`UsageError` when the file exists or the request does not fit the model, and what
    :func:`edgestill.inspection.inspect_model` raises for a model that can't be used.
    """
    found = inspect_model(config.model)
    name = _name(config.model)
    out = config.out or Path(f"{name}.toml")
    if out.exists():
        raise UsageError(f"{out} exists", hint="pass --out with another name, or remove it")
    check_place(out)
    if config.distill is not None and not 0 < config.distill <= found.layers:
        raise UsageError(
            f"--distill {config.distill}: the model has {found.layers} layers", hint="keep 1 to all of them"
        )
    if config.distill is not None and config.text is None:
        raise UsageError("--distill needs text to learn from", hint="--text file.txt (or jsonl, csv, parquet)")
    text = _render(name, config, found)
    try:
        parse_recipe(text, out)
    except RecipeError as error:
        # our own template is right, so this is what the caller put into it (--to)
        raise UsageError(error.message.partition(": ")[2], hint="for example --to onnx:int8,gguf:q4_k_m") from None
    atomic_write(out, text)
    return out


def _name(model: Path) -> str:
    stem = model.resolve().stem if model.is_file() else model.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:64] or "model"


def _render(name: str, config: InitConfig, found: Inspection) -> str:
    variants = config.to or DEFAULT_VARIANTS[found.task]
    parts = [_head(name, config.model, found)]
    parts.append(_student(config, found))
    parts.append(_data(config, found))
    if config.distill is not None:
        parts.append(_distill(found.task))
    parts.append("# One artifact each: FORMAT:QUANTISATION. Each is verified in the runtime that loads it.")
    parts.append("\n\n".join(f"[[export]]\nto = {json.dumps(variant)}" for variant in variants))
    parts.append(_bench(found))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(name: str, model: Path, found: Inspection) -> str:
    size = f"{found.layers} layers, {found.parameters / 1e6:.1f} M parameters"
    licence = f"license = {json.dumps(found.license)}" if found.license else '# license = "Apache-2.0" # SPDX id'
    return f"""# {found.architecture}, {size}, up to {found.max_length} tokens.
# Next: `edgestill plan FILE` says what it costs, `edgestill run FILE` does it.
schema_version = 1
name = {json.dumps(name)}
task = {json.dumps(found.task)} # inferred; also: {", ".join(get_args(Task))}

[teacher]
source = {json.dumps(str(model.resolve()))}
{licence}"""


def _student(config: InitConfig, found: Inspection) -> str:
    if config.distill is not None:
        return f"[student]\nlayers = {config.distill} # of {found.layers}, spread evenly"
    half = max(1, found.layers // 2)
    return f"""# A smaller student: uncomment, add a [distill] section, and give [[data.text]] some `train` examples.
# [student]
# layers = {half} # of {found.layers}"""


def _data(config: InitConfig, found: Inspection) -> str:
    length = min(128, found.max_length)
    lines = ["[data]", f"max_length = {length} # tokens; longer examples are cut"]
    if config.text is None:
        lines += [
            "",
            "# Without text of your own, artifacts are judged on a few built-in sentences: enough to find defects,",
            "# too little to compare quantisations. Any jsonl, csv, parquet or txt (a document a line) will do:",
            "# [[data.text]]",
            '# name = "mine"',
            '# source = "mine.jsonl"',
            '# field = "text"',
            "# test = 200",
        ]
        return "\n".join(lines)
    train = "\ntrain = 1000\ndev = 50" if config.distill is not None else ""
    return (
        "\n".join(lines)
        + f"""

[[data.text]]
name = {json.dumps(_name(config.text))}
source = {json.dumps(str(config.text.resolve()))}
field = "text" # key or column that holds the text (not used for txt){train}
test = 100"""
    )


def _distill(task: Task) -> str:
    return f"""[distill]
loss = {_LOSS[task]}
epochs = 1
batch_size = {32 if task == "feature-extraction" else 4}
learning_rate = {_RATE[task]}"""


def _bench(found: Inspection) -> str:
    gate = {"feature-extraction": "spearman = { min = 0.95 }", "text-classification": "top1_agreement = { min = 0.95 }",
            "token-classification": "top1_agreement = { min = 0.95 }",
            "text-generation": "kl = { max = 0.1 }"}[found.task]  # fmt: skip
    return f"""[bench]
threads = 2
launches = 3 # fresh processes per artifact
length = {min(128, found.max_length)} # tokens of the timed input

# A limit that every artifact must keep, or the run ends with exit code 1:
# [gates]
# {gate}"""
