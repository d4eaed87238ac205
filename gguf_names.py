"""What llama.cpp calls the modules of a Transformers model: one table for writing, importing and judging GGUF files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoints import ModelFolder

__all__ = ["CLASS_HEADS", "LLAMA_LIKE", "gguf_names"]

_DECODER_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_DECODER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_GEMMA3_LAYER = {
    **_DECODER_LAYER, "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_GPT2_LAYER = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_GPT2 = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output",
}  # fmt: skip
# model type -> names outside of the layers, names inside
_DECODERS = {"gemma3_text": (_DECODER, _GEMMA3_LAYER), "gpt2": (_GPT2, _GPT2_LAYER)}
LLAMA_LIKE = (_DECODER, _DECODER_LAYER)

_BERT_LAYER = {
    "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
}  # fmt: skip
_DISTILBERT_LAYER = {
    "attention.q_lin": "attn_q", "attention.k_lin": "attn_k", "attention.v_lin": "attn_v",
    "attention.out_lin": "attn_output", "sa_layer_norm": "attn_output_norm",
    "ffn.lin1": "ffn_up", "ffn.lin2": "ffn_down", "output_layer_norm": "layer_output_norm",
}  # fmt: skip
_BERT = {
    "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
}  # fmt: skip
# llama.cpp computes cls.output(tanh(cls(first token))): the heads of these, and of no other encoder.
CLASS_HEADS = {
    "bert": {"bert.pooler.dense": "cls", "classifier": "cls.output"},
    "roberta": {"classifier.dense": "cls", "classifier.out_proj": "cls.output"},
    "xlm-roberta": {"classifier.dense": "cls", "classifier.out_proj": "cls.output"},
}


def gguf_names(model: ModelFolder) -> dict[str, str]:
    """Module -> tensor of the file, both without ``.weight`` and ``.bias``, for everything that ``model`` may have."""
    if model.task == "text-generation":
        outside, layer = _DECODERS.get(model.architecture, LLAMA_LIKE)
        names = dict(outside)
    else:
        base = model.embeddings_path.partition("embeddings.")[0]
        names = {base + name: stored for name, stored in _BERT.items()}
        names |= CLASS_HEADS.get(model.architecture, {}) if model.task == "text-classification" else {}
        layer = _DISTILBERT_LAYER if model.architecture == "distilbert" else _BERT_LAYER
    for index in range(model.layers):
        names |= {f"{model.layers_path}.{index}.{name}": f"blk.{index}.{stored}" for name, stored in layer.items()}
    return names
