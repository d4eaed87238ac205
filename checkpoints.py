"""Model folders: a plain Transformers folder (config, safetensors, tokenizer) plus ``edgestill.json``.

Here stands what needs no torch: the description of a folder and the checks of its files. The table of architectures
(``architectures.py``) is importable from here, too.
``prepare_model`` (``model_import.py``), ``load_torch``, ``load_tokenizer``, ``save_model`` and ``SentenceEncoder``
(``torch_models.py``) are importable from here and bring torch in only when they are used::

    teacher = prepare_model(Path("downloads/all-MiniLM-L6-v2"), Path("runs/demo/teacher"))
    teacher.task, teacher.pooling, teacher.layers      # 'feature-extraction', 'mean', 6
    model = load_torch(teacher.path)                   # SentenceEncoder, fp32, eval()
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from .architectures import (
    ARCHITECTURES,
    DECODER_TASKS,
    ENCODER_TASKS,
    Architecture,
    complete_config,
    find_architecture,
)
from .artifact import CLASS_TASKS, Pooling, Task
from .errors import BadInput
from .files import check_links, hash_tree, read_json
from .model_origin import Named, Origin, origin_from_json, size_label

if TYPE_CHECKING:
    from .model_import import prepare_model
    from .torch_models import SentenceEncoder, load_tokenizer, load_torch, save_model

__all__ = [
    "ARCHITECTURES",
    "DECODER_TASKS",
    "ENCODER_TASKS",
    "FACTS_FILE",
    "WEIGHTS_FILE",
    "Architecture",
    "ModelFolder",
    "SentenceEncoder",
    "TensorHeader",
    "find_architecture",
    "load_tokenizer",
    "load_torch",
    "open_model",
    "prepare_model",
    "read_safetensors_header",
    "save_model",
]

FACTS_FILE = "edgestill.json"
WEIGHTS_FILE = "model.safetensors"
SCHEMA_VERSION = 1
_DERIVED_SIZES = ("num_key_value_heads", "head_dim")

# Bytes of one element, for every dtype that safetensors can hold.
_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class ModelFolder:
    """The checked description of a model folder.

    ``max_length`` is in tokens; ``parameters`` counts stored weights (tied ones once); ``size_bytes`` is the weight
    file. ``labels`` are the class names in the order of the logits. ``prompt_prefix`` stands before each text.
    ``origin`` is what its source says of it.
    """

    path: Path
    config: dict[str, Any]
    architecture: str
    task: Task
    pooling: Pooling | None
    normalize: bool
    max_length: int
    vocab_size: int
    layers: int
    hidden_size: int
    license: str | None
    labels: tuple[str, ...]
    parameters: int
    size_bytes: int
    prompt_prefix: str = ""
    origin: Origin = field(default_factory=Origin)

    @cached_property
    def model_id(self) -> str:
        """sha256 over the (path, sha256) of its files: names the content, wherever the folder lies."""
        return hash_tree(self.path)

    @property
    def named(self) -> Named:
        """What it is called; a model that nobody named goes by architecture and size (``"bert 23M"``)."""
        return self.origin.itself or Named(f"{self.architecture} {size_label(self.parameters)}")

    @property
    def layers_path(self) -> str:
        """State dict path of the list of layers, e.g. ``"encoder.layer"`` or ``"model.layers"``."""
        return self._below_base(ARCHITECTURES[self.architecture].layers)

    @property
    def embeddings_path(self) -> str:
        """State dict name of the token embeddings ``[vocab_size, hidden_size]``."""
        return self._below_base(ARCHITECTURES[self.architecture].embeddings)

    @property
    def turned(self) -> frozenset[str]:
        """State dict names of the matrices that are stored ``[in, out]`` (Conv1D) instead of ``[out, in]``."""
        modules = ARCHITECTURES[self.architecture].turned
        return frozenset(
            f"{self.layers_path}.{layer}.{name}.weight" for layer in range(self.layers) for name in modules
        )

    def _below_base(self, path: str) -> str:
        return path if self.task == "feature-extraction" else f"{ARCHITECTURES[self.architecture].base}.{path}"


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file: dtype as the format calls it (``"F32"``) and shape."""

    dtype: str
    shape: tuple[int, ...]


def read_safetensors_header(path: Path) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes in a safetensors file, after checking that its sizes add up; reads no weight.

    Raises :class:`BadInput` for a truncated, overlapping or otherwise damaged file, naming it.
    """
    hint = "fetch or copy the file again"
    if not path.is_file():
        raise BadInput(f"{path} does not exist", hint="check the path")
    total = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if total < 8 or length > min(total - 8, _MOST_HEADER_BYTES):
            raise BadInput(f"{path} is truncated or not a safetensors file", hint=hint)
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans, found = [], {}
        for name, row in header.items():
            shape = tuple(row["shape"])
            begin, end = row["data_offsets"]
            numbers = [*shape, begin, end]
            if any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError(f"bad numbers for {name}")
            if end - begin != math.prod(shape) * _ITEM_BYTES[row["dtype"]]:
                raise ValueError(f"size of {name} does not fit its shape")
            spans.append((begin, end))
            found[name] = TensorHeader(row["dtype"], shape)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} has a damaged safetensors header: {error}", hint=hint) from None
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise BadInput(f"{path} has a damaged safetensors header: gap or overlap at byte {begin}", hint=hint)
        position = end
    if position != total - 8 - length:
        raise BadInput(
            f"{path} is truncated: header promises {position} bytes of weights, {total - 8 - length} are there",
            hint=hint,
        )
    return found


def open_model(folder: Path) -> ModelFolder:
    """Read and check a model folder without loading weights.

    Raises :class:`BadInput` for missing or damaged files and numbers that contradict each other, and
    :class:`Unsupported` for an architecture or task that is not in the table.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a model folder", hint="pass a folder with config.json and model.safetensors")
    check_links(folder)
    config = read_config(folder)
    if not (folder / FACTS_FILE).is_file():
        raise BadInput(f"{folder} has no {FACTS_FILE}", hint="turn it into a model folder first (prepare_model)")
    facts = read_json(folder / FACTS_FILE)
    if not isinstance(facts, dict) or facts.get("schema_version") != SCHEMA_VERSION:
        raise BadInput(f"{folder / FACTS_FILE}: schema_version must be {SCHEMA_VERSION}", hint="prepare it again")
    task: Any = facts.get("task")
    row = find_architecture(config, folder, str(task))
    header = read_safetensors_header(folder / WEIGHTS_FILE)
    check_sizes(config, row, header, folder)
    strange = next((name for name, tensor in header.items() if tensor.dtype != "F32"), None)
    if strange is not None:
        raise BadInput(
            f"{folder / WEIGHTS_FILE}: {strange} is {header[strange].dtype}, a model folder is float32",
            hint="prepare it again",
        )
    if not (folder / "tokenizer.json").is_file():
        raise BadInput(f"{folder} has no tokenizer.json", hint="save the model's fast tokenizer beside it")
    pooling = facts.get("pooling")
    if (task == "feature-extraction") != (pooling in get_args(Pooling)):
        raise BadInput(
            f"{folder / FACTS_FILE}: pooling {pooling!r} does not fit {task}", hint="mean, cls or last, for embeddings"
        )
    return ModelFolder(
        path=folder,
        config=config,
        architecture=config["model_type"],
        task=task,
        pooling=pooling,
        normalize=bool(facts.get("normalize", False)),
        max_length=_max_length(facts, config, row, folder),
        vocab_size=config["vocab_size"],
        layers=config[row.layers_key],
        hidden_size=config[row.hidden_key],
        license=facts.get("license"),
        labels=_labels(config) if task in CLASS_TASKS else (),
        parameters=sum(math.prod(tensor.shape) for tensor in header.values()),
        size_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        prompt_prefix=str(facts.get("prompt_prefix", "")),
        origin=origin_from_json(facts.get("origin"), folder / FACTS_FILE),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder, which must be an object, with what its class takes for granted written out."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise BadInput(f"{folder / 'config.json'} is not an object", hint="it is not a Transformers config")
    return complete_config(config)


def check_numbers(config: Mapping[str, Any], row: Architecture, where: Path) -> None:
    """Every size of the architecture is in the config, a positive whole number: else :class:`BadInput`. The sizes that
    follow from others may be absent or null."""
    for key in (*row.size_keys, *_DERIVED_SIZES):
        value = config.get(key)
        if value is None and key not in row.size_keys:
            continue
        if type(value) is not int or not 0 < value < 1 << 31:
            shown = repr(value)[:80]
            raise BadInput(f"{where / 'config.json'}: {key} is {shown}", hint="expected a positive whole number")


def check_sizes(config: Mapping[str, Any], row: Architecture, tensors: Mapping[str, TensorHeader], where: Path) -> None:
    """Compare the config's numbers with the stored tensors, so that a forged one can't make us allocate."""
    check_numbers(config, row, where)
    suffix = re.compile(rf"(?:^|\.){re.escape(row.layers)}\.(\d+)\.")
    layers = {int(match[1]) for name in tensors if (match := suffix.search(name))}
    if layers != set(range(min(config[row.layers_key], len(layers) + 1))):
        raise BadInput(
            f"{where}: config.json says {config[row.layers_key]} layers, the weights hold {len(layers)}",
            hint="config and weights are not of the same model",
        )
    words = next((t for name, t in tensors.items() if f".{name}".endswith(f".{row.embeddings}")), None)
    if words is None:
        raise BadInput(f"{where}: the weights hold no {row.embeddings}", hint="is it a full checkpoint of this model?")
    # ELECTRA's embeddings may be narrower than its layers.
    width = config.get("embedding_size") or config[row.hidden_key]
    if words.shape != (config["vocab_size"], width):
        raise BadInput(
            f"{where}: embeddings are {list(words.shape)}, config.json says {[config['vocab_size'], width]}",
            hint="config and weights are not of the same model",
        )


def positions(config: Mapping[str, Any], row: Architecture) -> int:
    """The longest input, in tokens, that the model has positions for."""
    return int(config[row.positions_key]) - row.position_offset


def _max_length(facts: Mapping[str, Any], config: Mapping[str, Any], row: Architecture, folder: Path) -> int:
    value = facts.get("max_length", positions(config, row))
    if type(value) is not int or not 0 < value <= positions(config, row):
        raise BadInput(
            f"{folder / FACTS_FILE}: max_length is {value!r}, the model has {positions(config, row)} positions",
            hint="write a positive number of tokens that the model can take",
        )
    return value


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def __getattr__(name: str) -> Any:
    """Bring in what needs torch only when it is asked for."""
    if name == "load_tokenizer":
        return importlib.import_module(".model_tokenizer", __package__).load_tokenizer
    if name in ("SentenceEncoder", "load_torch", "save_model"):
        return getattr(importlib.import_module(".torch_models", __package__), name)
    if name == "prepare_model":
        return importlib.import_module(".model_import", __package__).prepare_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
