"""Which parameter of a Transformers model becomes which tensor of a GGUF file, and how its rows lie there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..architectures import FULL_ATTENTION, SLIDING_ATTENTION
from ..errors import Unsupported
from ..gguf_names import CLASS_HEADS, gguf_names

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder

__all__ = ["GGUF_ARCHITECTURES", "Placed", "place", "rope_factors", "rope_parameters", "rope_permute"]

Floats = npt.NDArray[np.float32]

GGUF_ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3", "gpt2": "gpt2",
    "bert": "bert", "distilbert": "bert", "electra": "bert", "roberta": "bert", "xlm-roberta": "bert",
}  # fmt: skip
"""``model_type`` of Transformers -> ``general.architecture`` of llama.cpp."""

_GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python")
# Kept float32 at any quantisation, as llama.cpp's converter and quantiser do.
_ALWAYS_FLOAT = ("position_embd.weight", "token_types.weight")


@dataclass(frozen=True)
class Placed:
    """A parameter ``name`` (shape ``shape`` in the model) that is stored as ``stored``.

    ``skip_rows`` leading rows are left out; ``rope_heads`` heads are permuted by :func:`rope_permute`; a ``turned``
    matrix is transposed; ``shift`` is added (a norm that multiplies by 1 + w is stored as that). ``is_matrix`` tensors
    take the file's float type, the others stay float32.
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    skip_rows: int = 0
    rope_heads: int | None = None
    turned: bool = False
    shift: int = 0

    @property
    def is_matrix(self) -> bool:
        """Whether the quantisation applies: a weight of two dimensions that isn't a norm or a small table."""
        return len(self.shape) > 1 and self.stored not in _ALWAYS_FLOAT

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file, rows first."""
        return self.shape[::-1] if self.turned else (self.shape[0] - self.skip_rows, *self.shape[1:])

    @property
    def layout(self) -> tuple[tuple[Any, ...], ...]:
        """Steps from the stored array to the parameter, for ``tensors.json``."""
        if self.turned:
            return (("transpose",),)
        if self.shift:
            return (("add", -self.shift),)
        return (("rope_unpermute", self.rope_heads),) if self.rope_heads else ()

    def pieces(self, read: Callable[[str, int, int], Floats], most: int) -> Iterator[Floats]:
        """The parameter as it is stored, in pieces of whole rows, each of about ``most`` values.

        ``read(name, begin, end)`` gives rows of the parameter in the model's own order.
        """
        if len(self.shape) < 2:
            values = read(self.name, self.skip_rows, self.shape[0])
            yield values + np.float32(self.shift) if self.shift else values
            return
        if self.turned:  # its rows are the file's columns, so it is held whole
            whole = read(self.name, 0, self.shape[0])
            rows_each = max(1, most // self.shape[0])
            for begin in range(0, self.shape[1], rows_each):
                yield np.ascontiguousarray(whole[:, begin : begin + rows_each].T)
            return
        unit = self.shape[0] // self.rope_heads if self.rope_heads else 1  # rows move within a head
        units = max(1, most // (unit * math.prod(self.shape[1:])))
        for begin in range(self.skip_rows, self.shape[0], units * unit):
            rows = read(self.name, begin, min(begin + units * unit, self.shape[0]))
            yield rope_permute(rows, len(rows) // unit) if self.rope_heads else rows


def rope_permute(weight: Floats, heads: int) -> Floats:
    """Rows of a query or key projection from Transformers' order to llama.cpp's.

    Transformers rotates row ``i`` of a head with row ``i + half``; llama.cpp's ``llama`` rotates neighbours ``2 i`` and
    ``2 i + 1``. So within each of ``heads`` heads of ``2 * half`` rows, old row ``part * half + i`` becomes new row
    ``2 * i + part``. The layout step ``["rope_unpermute", heads]`` is the inverse.
    """
    half = weight.shape[0] // heads // 2
    split = weight.reshape(heads, 2, half, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def place(model: ModelFolder, shapes: dict[str, tuple[int, ...]]) -> list[Placed]:
    """Where each parameter of ``shapes`` goes, in file order.

    Raises :class:`Unsupported` for an architecture, task, activation or parameter that llama.cpp has no place for:
    nothing is left out silently.
    """
    _check(model)
    placed = [
        _placed(model, f"{name}.{kind}", f"{stored}.{kind}", shapes[f"{name}.{kind}"])
        for name, stored in gguf_names(model).items()
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in shapes
    ]
    left = set(shapes) - {item.name for item in placed} - _unused(model, shapes)
    if left:
        raise Unsupported(
            f"llama.cpp's {GGUF_ARCHITECTURES[model.architecture]} has no place for {sorted(left)[0]}",
            hint="export this model to onnx or coreml",
        )
    return placed


def _placed(model: ModelFolder, name: str, stored: str, shape: tuple[int, ...]) -> Placed:
    config = model.config
    if model.architecture == "llama" and ".q_proj." in name:
        return Placed(name, stored, shape, rope_heads=config["num_attention_heads"])
    if model.architecture == "llama" and ".k_proj." in name:
        return Placed(
            name, stored, shape, rope_heads=config.get("num_key_value_heads") or config["num_attention_heads"]
        )
    if stored == "position_embd.weight" and model.architecture in ("roberta", "xlm-roberta"):
        return Placed(name, stored, shape, skip_rows=config["pad_token_id"] + 1)  # positions count from padding_idx + 1
    if name in model.turned:
        return Placed(name, stored, shape, turned=True)
    if model.architecture == "gemma3_text" and stored.endswith("norm.weight"):
        return Placed(name, stored, shape, shift=1)
    return Placed(name, stored, shape)


def _unused(model: ModelFolder, shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Parameters that the task doesn't use: a pooler under embeddings, an output layer that is the input layer."""
    unused = {name for name in shapes if name.endswith(("position_ids", "rotary_emb.inv_freq"))}
    if model.task == "feature-extraction":
        unused |= {name for name in shapes if name.startswith("pooler.")}
    return unused


def _check(model: ModelFolder) -> None:
    hint = "export it to onnx or coreml"
    if model.task == "token-classification":
        raise Unsupported("llama.cpp has no head that labels tokens (token-classification)", hint="export it to onnx")
    if model.architecture not in GGUF_ARCHITECTURES:
        raise Unsupported(f"llama.cpp can't run {model.architecture} as we know it", hint=hint)
    if model.task == "text-classification" and model.architecture not in CLASS_HEADS:
        raise Unsupported(f"llama.cpp has no classification head like that of {model.architecture}", hint=hint)
    config = model.config
    if model.architecture == "gpt2":
        _expect(config["activation_function"] in _GELU, "activation", config["activation_function"])
        for key, wanted in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
            _expect(bool(config.get(key, wanted)) == wanted, key, config.get(key))
        return
    if model.architecture == "gemma3_text":
        _check_gemma3(model)
        return
    if model.task == "text-generation":
        _expect(config.get("hidden_act", "silu") == "silu", "activation", config.get("hidden_act"))
        _expect(not config.get("mlp_bias"), "mlp_bias", config.get("mlp_bias"))
        rope_parameters(model)
        if model.architecture == "qwen2":
            size = config.get("head_dim") or model.hidden_size // config["num_attention_heads"]
            width = size * config["num_attention_heads"]
            if width != model.hidden_size:  # its loader takes the query matrix to be square
                raise Unsupported(
                    f"llama.cpp can't load a qwen2 whose heads are {width} wide together and whose hidden size is "
                    f"{model.hidden_size}",
                    hint="export it to onnx or coreml, or cut FFN neurons or layers instead of heads",
                )
        return
    activation = config.get("hidden_act", config.get("activation", "gelu"))
    _expect(activation in _GELU, "activation", activation)
    kind = config.get("position_embedding_type", "absolute")
    _expect(kind == "absolute", "position_embedding_type", kind)
    _expect(not config.get("sinusoidal_pos_embds"), "sinusoidal_pos_embds", True)
    width = config.get("embedding_size", model.hidden_size)
    _expect(width == model.hidden_size, "embedding_size", width)
    _expect(not config.get("is_decoder"), "is_decoder", True)


def _check_gemma3(model: ModelFolder) -> None:
    """What llama.cpp's gemma3 takes for granted; its attention scale is not in the file but follows from sizes."""
    config = model.config
    activation = config["hidden_activation"]
    _expect(activation in ("gelu_pytorch_tanh", "gelu_new"), "activation", activation)
    heads, scalar = config["num_attention_heads"], config["query_pre_attn_scalar"]
    implied = model.hidden_size // heads if model.layers == 62 else config["head_dim"]  # 62 layers: the 27B model
    if scalar != implied:
        raise Unsupported(
            f"llama.cpp scales the attention of this gemma3 by 1 / sqrt({implied}), its config says "
            f"query_pre_attn_scalar = {scalar}",
            hint="export it to onnx or coreml",
        )
    local = config["rope_parameters"][SLIDING_ATTENTION]
    _expect(local["rope_type"] == "default", "a rope_type of sliding layers", local["rope_type"])
    rope_parameters(model)


def _expect(fine: bool, key: str, value: object) -> None:
    if not fine:
        raise Unsupported(f"llama.cpp can't run a model with {key} = {value!r}", hint="export it to onnx or coreml")


def rope_parameters(model: ModelFolder) -> dict[str, Any]:
    """Rotary parameters of a config, in Transformers' old and new spelling: ``rope_theta``, ``rope_type``, …

    Raises :class:`Unsupported` for scalings other than linear, yarn and llama3.
    """
    config = model.config
    given = config.get("rope_parameters") or {}
    found = {**(config.get("rope_scaling") or {}), **given.get(FULL_ATTENTION, given)}
    kind = found.pop("type", None) or "default"
    found.setdefault("rope_type", kind)
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    known = found["rope_type"] in ("default", "linear", "yarn", *(["llama3"] if model.architecture == "llama" else []))
    _expect(known, "rope_type", found["rope_type"])
    share = found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    _expect(share in (None, 1.0), "partial_rotary_factor", share)
    return found


def rope_factors(model: ModelFolder) -> Floats | None:
    """What each rotary frequency is divided by in Llama 3's scaling ``[head_dim / 2]``, or ``None`` without it.

    Low frequencies are divided by ``factor``, high ones kept, those between interpolated (Llama 3.1 reference code).
    """
    rope = rope_parameters(model)
    if rope["rope_type"] != "llama3":
        return None
    size = model.config.get("head_dim") or model.hidden_size // model.config["num_attention_heads"]
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    return np.fromiter(
        (
            _llama3_factor(float(rope["rope_theta"]) ** (at / size), factor, low, high, context)
            for at in range(0, size, 2)
        ),
        np.float32,
    )


def _llama3_factor(period: float, factor: float, low: float, high: float, context: float) -> float:
    turns = context / (2 * math.pi * period)  # rotations within the context of the original training
    if turns > high:
        return 1.0
    if turns < low:
        return factor
    share = (turns - low) / (high - low)
    return 1 / ((1 - share) / factor + share)
