"""What all exporters share: the draft of a manifest, reading weights, room on disk, files that travel along."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..artifact import Histogram, StoredTensor, TensorSpec
from ..errors import BadInput, MissingDependency, ResourceExhausted, UsageError
from ..files import read_json, safe_join
from .safetensors_rows import RowReader

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder
    from ..recipe import ExportConfig

__all__ = ["PIECE_VALUES", "Draft", "Weights", "check_model", "check_room", "context_length", "copy_companions",
           "has_chat_template", "versions"]  # fmt: skip

Floats = npt.NDArray[np.float32]

PIECE_VALUES = 1 << 18
"""What a writer holds of a large table at a time: the copies that quantising makes stay in the processor's cache."""

# What an app needs beside the model, where the model folder has it.
COMPANIONS = (
    "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json", "LICENSE", "LICENSE.txt",
    "LICENSE.md", "NOTICE", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


@dataclass
class Draft:
    """What a writer knows about the artifact that it wrote, see :class:`edgestill.artifact.Manifest`.

    ``tensors`` is the weight map for ``tensors.json``; ``quantisation`` and ``format`` come from the recipe, task,
    pooling, labels and licence from the model folder.
    """

    entry: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shapes: Literal["dynamic", "fixed", "enumerated"]
    max_length: int
    contents: str
    dtype_histogram: Mapping[str, Histogram]
    minimum_runtime: Mapping[str, str]
    kv_cache_bytes_per_token: int | None = None
    pooling_in_graph: bool = False
    tensors: list[StoredTensor] = field(default_factory=list)


class Weights:
    """The parameters of a model folder, read one at a time from its safetensors (sharded or not).

    Raises :class:`BadInput` for a missing, truncated or foreign file, :class:`MissingDependency` without safetensors.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import safetensors
        except ImportError:
            raise MissingDependency.package("safetensors", "export") from None
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._readers: dict[Path, RowReader] = {}
        index = folder / "model.safetensors.index.json"
        names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
        for name in names:
            path = safe_join(folder, name)
            if not path.is_file():
                raise BadInput(f"{path} does not exist", hint="prepare the model folder again")
            try:
                opened = safetensors.safe_open(path, framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise BadInput(f"{path} is not a whole safetensors file: {error}", hint="fetch it again") from None
            self._files |= dict.fromkeys(opened.keys(), (path, opened))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, without reading it."""
        return tuple(self._slice(name).get_shape())

    def __getitem__(self, name: str) -> Floats:
        """The parameter as float32, contiguous."""
        return self.rows(name)

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Floats:
        """Rows ``begin:end`` of the parameter as float32, contiguous: memory follows them, not the file.

        Raises :class:`BadInput` for NaN and infinity.
        """
        path, _ = self._find(name)
        if path not in self._readers:
            self._readers[path] = RowReader(path)
        values = self._readers[path].rows(name, begin, end)
        if values.size and not np.isfinite([values.min(), values.max()]).all():  # NaN comes through both
            raise BadInput(f"{name} holds NaN or infinite weights", hint="train or convert the model again")
        return values

    def pieces(self, name: str, values: int = PIECE_VALUES) -> Iterator[Floats]:
        """The parameter's rows from the first to the last, as many at a time as hold about ``values`` numbers."""
        rows, *rest = self.shape(name) or (1,)
        step = max(1, values // max(1, math.prod(rest)))
        for begin in range(0, rows, step):
            yield self.rows(name, begin, begin + step)

    def _slice(self, name: str) -> Any:
        return self._find(name)[1].get_slice(name)

    def _find(self, name: str) -> Any:
        if name not in self._files:
            raise BadInput(f"{self._folder} has no parameter {name!r}", hint="prepare the model folder again")
        return self._files[name]


def context_length(model: ModelFolder, config: ExportConfig, most: int | None = None) -> int:
    """Tokens that the artifact takes: what the recipe asks, else what the model allows (but not over ``most``)."""
    if config.context_length is not None and config.context_length > model.max_length:
        raise UsageError(
            f"{config.variant}: context_length {config.context_length} is more than the model's {model.max_length}",
            hint=f"set context_length = {model.max_length} or less, or leave it out",
        )
    return config.context_length or min(model.max_length, most or model.max_length)


def check_model(model: ModelFolder) -> None:
    """Before anything is written: every weight is finite, and the tokenizer makes no id that the model has no row for.

    Fewer tokens than rows are fine: tables are often filled up. Raises :class:`BadInput`, naming the parameter or id.
    """
    weights = Weights(model.path)
    for name in weights:
        for _ in weights.pieces(name):  # refuses what is not finite
            pass
    largest = _largest_id(model.path / "tokenizer.json")
    if largest >= model.vocab_size:
        raise BadInput(
            f"{model.path}: the tokenizer has id {largest}, the model {model.vocab_size} tokens",
            hint="tokenizer and weights are not of the same model",
        )


def _largest_id(path: Path) -> int:
    """The largest id in a ``tokenizer.json``, added tokens included."""
    spec = read_json(path)
    try:
        vocabulary, added = spec["model"]["vocab"], spec.get("added_tokens") or []
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))  # Unigram: a list
        return max(max(ids, default=-1), *(int(token["id"]) for token in added), -1)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise BadInput(f"{path} is not a tokenizer", hint="save the model's fast tokenizer again") from None


def has_chat_template(model: ModelFolder) -> bool:
    """Whether an app can render a conversation for this model."""
    config = model.path / "tokenizer_config.json"
    inside = read_json(config) if config.is_file() else {}
    return (model.path / "chat_template.jinja").is_file() or bool(
        isinstance(inside, dict) and inside.get("chat_template")
    )


def check_room(out: Path, need_bytes: int) -> None:
    """:class:`ResourceExhausted` before the work starts, when the disk under ``out`` can't hold ``need_bytes``."""
    folder = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise ResourceExhausted(
            f"{out} needs about {need_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free", hint="free some room"
        )


def copy_companions(model: ModelFolder, folder: Path) -> None:
    """Copy tokenizer, chat template, config and licence text beside the payload."""
    for name in COMPANIONS:
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, folder / name)


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of ``packages`` (those that are there), for the lineage."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
