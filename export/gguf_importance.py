"""The importance matrix: how large the inputs of each weight are on calibration texts.

The error of a quantised weight reaches the output multiplied by its input, so GGML's quantisers take the mean square
of each input channel as the weight of its squared error (llama.cpp's ``imatrix``). Measured in Transformers, in
float32, on the model that is exported; kept in the cache folder, so that several artifacts share one pass.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import MissingDependency, Unsupported
from ..fetch import cache_folder
from ..files import atomic_write, hash_json
from ..progress import Progress, silent

if TYPE_CHECKING:
    from .source import Source

__all__ = ["Importance", "importance_matrix", "measure_importance"]

Floats = npt.NDArray[np.float32]

_VERSION = 1
_MOST_TOKENS = 512  # of one text; llama.cpp's tool cuts its text into pieces of as many
# A channel that the texts never reached still weighs a little: GGML's searches divide by sums of weights.
_LEAST = 1e-6


@dataclass(frozen=True)
class Importance:
    """Mean squared inputs of each matrix, ``[columns]`` by the parameter's name; how many texts and tokens they are
    of; ``sha256`` over model, texts and method."""

    values: Mapping[str, Floats]
    texts: int
    tokens: int
    sha256: str

    def weights(self, name: str) -> Floats | None:
        """What the quantiser takes for the parameter ``name``; ``None`` for one that is not multiplied by anything."""
        if name not in self.values:
            return None
        found = self.values[name]
        mean = float(found.mean())
        return np.maximum(found, np.float32(_LEAST * mean)) if mean > 0 else np.ones_like(found)


def importance_matrix(source: Source, texts: Sequence[str], progress: Progress = silent) -> Importance:
    """:func:`measure_importance`, or what it gave for the same model and texts before.

    Raises :class:`Unsupported` when there are no texts.
    """
    if not texts:
        raise Unsupported(
            "an importance matrix needs calibration texts, and there are none",
            hint="give a [[data.text]] of the recipe calibration = 200, or take a type without one, like q4_k_m",
        )
    key = hash_json({"version": _VERSION, "model": source.model_id, "texts": list(texts)})
    path = cache_folder() / "importance" / f"{key}.npz"
    known = _load(path, key)
    if known is not None:
        return known
    measured = measure_importance(source, texts, progress)
    found = Importance(measured.values, measured.texts, measured.tokens, key)
    buffer = io.BytesIO()
    np.savez(buffer, **{"texts:count": found.texts, "tokens:count": found.tokens}, **found.values)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue())
    return found


def measure_importance(source: Source, texts: Sequence[str], progress: Progress = silent) -> Importance:
    """Run ``texts`` (each cut at 512 tokens) through the model and average the squared inputs of every matrix product.

    One text at a time, so that no padding is counted. Memory: the model in float32. An output head that is tied to the
    embedding counts under the embedding's name.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise MissingDependency.package("torch", "distill") from None

    model = source.folder
    _model, root = source.torch()
    tokenizer = source.tokenizer
    length = min(model.max_length, _MOST_TOKENS)
    sums: dict[str, Any] = {}
    rows: dict[str, int] = {}
    count = 0

    def adder(name: str) -> Callable[..., None]:
        def add(_: Any, inputs: tuple[Any, ...]) -> None:
            seen = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            squares = seen.square().sum(0, dtype=torch.float64)
            sums[name] = sums[name] + squares if name in sums else squares
            rows[name] = rows.get(name, 0) + len(seen)

        return add

    hooks = [module.register_forward_pre_hook(adder(name)) for name, module in _products(root)]
    try:
        with torch.inference_mode():
            for index, text in enumerate(texts):
                progress(f"importance matrix: text {index + 1} of {len(texts)}", index / len(texts))
                encoded = tokenizer(
                    model.prompt_prefix + text, truncation=True, max_length=length, return_tensors="pt"
                )  # fmt: skip
                if encoded["input_ids"].shape[1]:
                    root(**encoded)
                    count += encoded["input_ids"].shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise Unsupported("the calibration texts hold no token", hint="give texts with words in them")
    values = {name: np.asarray((total / rows[name]).numpy(), np.float32) for name, total in sums.items()}
    return Importance(values, len(texts), count, "")


def _products(root: Any) -> list[tuple[str, Any]]:
    """Parameter name and module of each matrix product: ``nn.Linear``, and GPT-2's ``Conv1D``."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    names = {id(parameter): name for name, parameter in root.named_parameters()}  # a tied one under its first name
    return [
        (names[id(module.weight)], module)
        for _, module in root.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]


def _load(path: Path, key: str) -> Importance | None:
    """A cached matrix; ``None`` when there is none that can be read."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            values = {name: stored[name] for name in stored.files if not name.endswith(":count")}
            return Importance(values, int(stored["texts:count"]), int(stored["tokens:count"]), key)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
