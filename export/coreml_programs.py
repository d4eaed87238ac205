"""What is traced for Core ML: a model folder's torch model, wrapped so that the program holds in float16.

The wrappers change what a trace would otherwise write badly, in a twin of the model that shares its weights:

* attention adds a finite mask (−10⁴ for what is hidden; −∞ times 0 is NaN in float16), scales the query before the
  product, and lets grouped heads share their keys by broadcasting;
* positions, rotary tables and MPNet's distance buckets are constants made in float32: computed in float16 an angle of
  position 500 is off by 0.06 rad;
* the KV cache is two buffers, written and read by slices, which Core ML turns into states (iOS 18).

All take one sequence (batch 1).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependency, Unsupported

try:
    import torch
    from torch import Tensor, nn
    from transformers.cache_utils import Cache
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ModuleNotFoundError as missing:
    raise MissingDependency.package(missing.name or "torch", "export") from None

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder

__all__ = ["HIDDEN", "DecoderProgram", "EncoderProgram", "StateCache", "twin"]

HIDDEN = -1e4
"""What the mask adds to a score that must not count: e to it is 0 in float32, and it is finite in float16."""

_ATTENTION = "edgestill_coreml"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of one sequence: query [1, H, q, D], key and value [1, K, e, D], mask [1, 1, q or 1, e]."""
    heads, groups = query.shape[1], key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = query * scale
    if heads != groups:
        query = query.reshape(groups, heads // groups, -1, query.shape[-1])
        key, value = key.transpose(0, 1), value.transpose(0, 1)
    scores = query @ key.transpose(-1, -2) + attention_mask
    mixed = torch.softmax(scores, dim=-1) @ value
    if heads != groups:
        mixed = mixed.reshape(1, heads, -1, mixed.shape[-1])
    return mixed.transpose(1, 2).contiguous(), None


def _use_our_attention(model: Any) -> None:
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
    model.config._attn_implementation = _ATTENTION
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config._attn_implementation = _ATTENTION


def twin(model: nn.Module) -> Any:
    """Modules like those of ``model`` on the very same weights: what changes about them leaves ``model`` as it is."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class EncoderProgram(nn.Module):
    """A sentence encoder with its pooling, or a classifier: (input_ids, attention_mask) [1, T] -> [1, D] or [1, C]."""

    def __init__(self, folder: ModelFolder, model: nn.Module, context: int) -> None:
        super().__init__()
        from ..checkpoints import ARCHITECTURES

        self.pooling, self.normalize = folder.pooling, folder.normalize
        model = twin(model)
        self.model: Any = model.encoder if folder.pooling is not None else model
        row = ARCHITECTURES[folder.architecture]
        base = self.model if folder.pooling is not None else getattr(self.model, row.base)
        _use_our_attention(self.model)
        first = row.position_offset
        self.register_buffer("positions", torch.arange(first, first + context, dtype=torch.int32)[None])
        self.has_token_types = hasattr(base.embeddings, "token_type_embeddings")
        if folder.architecture == "mpnet":
            places = torch.arange(context)
            buckets = base.encoder.relative_position_bucket(places[None] - places[:, None])
            self.register_buffer("buckets", buckets.to(torch.int32))
            base.encoder.compute_position_bias = self._position_bias
            self._bias_table = base.encoder.relative_attention_bias

    def _position_bias(self, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        return self._bias_table(self.buckets[:length, :length]).permute(2, 0, 1)[None]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See the class."""
        real = attention_mask.to(torch.float32)
        arguments = {
            "input_ids": input_ids,
            "attention_mask": (1.0 - real[:, None, None, :]) * HIDDEN,
            "position_ids": self.positions[:, : input_ids.shape[1]],
        }
        if self.has_token_types:
            arguments["token_type_ids"] = torch.zeros_like(input_ids)
        first = self.model(**arguments, return_dict=False)[0]
        return first if self.pooling is None else self._pool(first, real)

    def _pool(self, hidden: Tensor, real: Tensor) -> Tensor:
        if self.pooling == "mean":
            pooled = (hidden * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)
        elif self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            last = (real.sum(1) - 1).to(torch.int32)
            pooled = torch.index_select(hidden, 1, last)[:, 0]
        if not self.normalize:
            return pooled
        return pooled / pooled.pow(2).sum(1, keepdim=True).sqrt().clamp(min=1e-12)


class StateCache(Cache):
    """A KV cache in two buffers [layers, 1, groups, context, D]; positions ``begin`` to ``end`` are being written."""

    def __init__(self, keys: Tensor, values: Tensor, begin: Any, end: Any) -> None:
        super().__init__(layers=[])
        self._keys, self._values, self._begin, self._end = keys, values, begin, end

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of one layer; returns all up to ``end``."""
        self._keys[layer_idx, :, :, self._begin : self._end, :] = key_states
        self._values[layer_idx, :, :, self._begin : self._end, :] = value_states
        return self._keys[layer_idx, :, :, : self._end, :], self._values[layer_idx, :, :, : self._end, :]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens that were there before."""
        return self._begin


class _RotaryTable(nn.Module):
    """Cosines and sines [context, D], made once by the model's own rotary module in float32."""

    def __init__(self, rotary: Any, context: int) -> None:
        super().__init__()
        kind = getattr(rotary, "rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise Unsupported(f"rotary scaling {kind!r} has no fixed table", hint="export to ONNX or GGUF")
        cos, sin = rotary(torch.zeros(1), torch.arange(context)[None])
        self.register_buffer("cos", cos[0].clone())
        self.register_buffer("sin", sin[0].clone())
        self.span: tuple[Any, Any] = (0, context)

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        begin, end = self.span
        return self.cos[begin:end][None], self.sin[begin:end][None]


class DecoderProgram(nn.Module):
    """A decoder with its cache: input_ids [1, q] and causal_mask [1, 1, q, e] -> logits [1, q, V].

    ``e`` counts the tokens in the cache after this call, so the new ones stand at ``e - q`` to ``e``.
    """

    def __init__(self, folder: ModelFolder, model: Any, context: int) -> None:
        super().__init__()
        self.model = model = twin(model)
        _use_our_attention(model)
        config = model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache_shape = (folder.layers, 1, config.num_key_value_heads, context, size)
        self.register_buffer("key_cache", torch.zeros(self.cache_shape))
        self.register_buffer("value_cache", torch.zeros(self.cache_shape))
        model.model.rotary_emb = _RotaryTable(model.model.rotary_emb, context)

    def forward(self, input_ids: Tensor, causal_mask: Tensor) -> Tensor:
        """See the class."""
        end = causal_mask.shape[-1]
        begin = end - input_ids.shape[1]
        self.model.model.rotary_emb.span = (begin, end)
        cache = StateCache(self.key_cache, self.value_cache, begin, end)
        hidden = self.model.model(
            input_ids=input_ids,
            attention_mask=causal_mask,
            position_ids=torch.zeros_like(input_ids),  # read by nobody: the table above knows the places
            past_key_values=cache,
            use_cache=True,
            return_dict=False,
        )[0]
        return self.model.lm_head(hidden)
