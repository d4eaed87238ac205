"""The table of architectures: which models are known, where their parts lie, and what their configs leave unsaid.

Everything that depends on a ``model_type`` and needs no torch starts here. A model type that is not in
:data:`ARCHITECTURES` is refused in one line that lists those that are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .artifact import Task
from .errors import Unsupported

__all__ = [
    "ARCHITECTURES",
    "DECODER_TASKS",
    "ENCODER_TASKS",
    "FULL_ATTENTION",
    "SLIDING_ATTENTION",
    "Architecture",
    "complete_config",
    "find_architecture",
    "supported",
]

ENCODER_TASKS: tuple[Task, ...] = ("feature-extraction", "text-classification", "token-classification")
DECODER_TASKS: tuple[Task, ...] = ("text-generation",)

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
"""What an entry of a config's ``layer_types`` may be."""


@dataclass(frozen=True)
class Architecture:
    """What has to be known about one ``model_type``: where things lie, and how its config calls them.

    ``layers`` and ``embeddings`` are state dict paths below the base model (``AutoModel``); a model with a head has
    the base model under ``base``. ``position_offset`` is how many of ``positions_key`` no token can use (RoBERTa counts
    positions from ``padding_idx + 1``). ``has_pooler``: ``AutoModel`` takes ``add_pooling_layer``.

    ``head_size_from_hidden``: its config can't say the size of a head, which is hidden size / heads.
    ``heads_divide_hidden``: its config is refused unless heads divide the hidden size. ``gated``: an FFN of three
    matrices. ``defaults`` are what its config class means by a missing key, where exporters read it; ``refused`` are
    config entries (key -> what it is) that must be absent or false. ``turned`` are modules inside a layer whose weights
    are stored ``[in, out]`` (Conv1D).
    """

    family: Literal["encoder", "decoder"]
    tasks: tuple[Task, ...]
    base: str
    layers: str
    embeddings: str
    layers_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    heads_key: str = "num_attention_heads"
    ffn_key: str = "intermediate_size"
    positions_key: str = "max_position_embeddings"
    position_offset: int = 0
    has_pooler: bool = False
    head_size_from_hidden: bool = False
    heads_divide_hidden: bool = False
    gated: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    turned: tuple[str, ...] = ()

    @property
    def size_keys(self) -> tuple[str, ...]:
        """The config entries that say how large the model is."""
        return (
            "vocab_size", self.layers_key, self.hidden_key, self.heads_key, self.ffn_key, self.positions_key,
        )  # fmt: skip


def _encoder(base: str, **changes: Any) -> Architecture:
    own = {"layers": "encoder.layer", "embeddings": _WORDS, "head_size_from_hidden": True, **changes}
    return Architecture("encoder", ENCODER_TASKS, base, **own)


def _decoder(base: str, layers: str, embeddings: str, **changes: Any) -> Architecture:
    return Architecture("decoder", DECODER_TASKS, base, layers, embeddings, **changes)


_WORDS = "embeddings.word_embeddings.weight"
_LLAMA = _decoder("model", "layers", "embed_tokens.weight", gated=True)
_DISTILBERT = {"layers_key": "n_layers", "hidden_key": "dim", "heads_key": "n_heads", "ffn_key": "hidden_dim"}
_GEMMA3 = _decoder(
    "model", "layers", "embed_tokens.weight", gated=True, heads_divide_hidden=True,
    defaults={
        "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True,
    },
    refused={
        "use_bidirectional_attention": "bidirectional attention", "final_logit_softcapping": "capped logits",
        "attn_logit_softcapping": "capped attention scores",
    },
)  # fmt: skip
_GPT2 = _decoder(
    "transformer", "h", "wte.weight", layers_key="n_layer", hidden_key="n_embd", heads_key="n_head", ffn_key="n_inner",
    positions_key="n_positions", head_size_from_hidden=True,
    defaults={
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    refused={"add_cross_attention": "cross attention"},
    turned=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
)  # fmt: skip

ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": _encoder("bert", has_pooler=True),
    "distilbert": _encoder("distilbert", layers="transformer.layer", **_DISTILBERT),
    "electra": _encoder("electra"),
    "mpnet": _encoder("mpnet", position_offset=2, has_pooler=True),
    "roberta": _encoder("roberta", position_offset=2, has_pooler=True),
    "xlm-roberta": _encoder("roberta", position_offset=2, has_pooler=True),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _GEMMA3,
    "gpt2": _GPT2,
}
"""Every supported ``model_type``; what is not here is :class:`Unsupported`."""


def supported(family: Literal["encoder", "decoder"] | None = None) -> str:
    """The model types of the table (of one family), for an error's hint.

    >>> supported("decoder")
    'gemma3_text, gpt2, llama, qwen2, qwen3'
    """
    return ", ".join(sorted(name for name, row in ARCHITECTURES.items() if family in (None, row.family)))


def find_architecture(config: Mapping[str, Any], where: Path, task: str | None = None) -> Architecture:
    """The table's row for a config; :class:`Unsupported` when the model type or its ``task`` is not in it."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        own_code = " (it brings its own Python code, which is never run)" if config.get("auto_map") else ""
        raise Unsupported(
            f"{where}: unsupported architecture {model_type!r}{own_code}", hint=f"supported: {supported()}"
        )
    row = ARCHITECTURES[model_type]
    if task is not None and task not in row.tasks:
        able = sorted(name for name, other in ARCHITECTURES.items() if task in other.tasks)
        hint = f"{task} works with {', '.join(able)}" if able else f"tasks: {', '.join(get_args(Task))}"
        raise Unsupported(f"{where}: task {task!r} is not supported for {model_type}", hint=hint)
    if config.get("quantization_config"):
        raise Unsupported(f"{where}: the checkpoint is quantised", hint="use the float checkpoint it was made from")
    if config.get("use_sliding_window"):
        raise Unsupported(f"{where}: sliding-window attention", hint="use a model with full attention")
    for key, what in row.refused.items():
        if config.get(key):
            raise Unsupported(f"{where}: {model_type} with {what} ({key} = {config[key]!r})", hint="use one without it")
    return row


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what its class takes for granted written out, as far as exporters read it.

    Transformers leaves out of a config.json what equals the class's default. Here: the row's ``defaults``; GPT-2's FFN
    of four times its width; Gemma 3's list of layer types (every sixth, or ``sliding_window_pattern``-th, sees all)
    and its two sets of rotary parameters, in the old and the new spelling. Unknown model types come back as they are.
    """
    found = dict(config)
    row = ARCHITECTURES.get(str(config.get("model_type")))
    if row is None:
        return found
    for key, value in row.defaults.items():
        if found.get(key) is None:
            found[key] = value
    if found["model_type"] == "gpt2" and found.get("n_inner") is None and type(found.get("n_embd")) is int:
        found["n_inner"] = 4 * found["n_embd"]
    if found["model_type"] == "gemma3_text":
        _complete_gemma3(found)
    return found


def _complete_gemma3(config: dict[str, Any]) -> None:
    layers = config.get("num_hidden_layers")
    if not config.get("layer_types") and type(layers) is int and 0 < layers < 1 << 16:
        every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        config["layer_types"] = [
            FULL_ATTENTION if (index + 1) % int(every) == 0 else SLIDING_ATTENTION for index in range(layers)
        ]
    given = config.get("rope_parameters") or {}
    old = {FULL_ATTENTION: config.pop("rope_scaling", None) or {}, SLIDING_ATTENTION: {}}
    bases = {
        FULL_ATTENTION: config.pop("rope_theta", None) or 1_000_000.0,
        SLIDING_ATTENTION: config.pop("rope_local_base_freq", None) or 10_000.0,
    }
    config["rope_parameters"] = {
        kind: {"rope_type": "default", "rope_theta": bases[kind], **old[kind], **(given.get(kind) or {})}
        for kind in (FULL_ATTENTION, SLIDING_ATTENTION)
    }
