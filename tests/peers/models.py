"""The models that figures are taken on: the teachers of the shipped recipes, or tiny random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgestill.checkpoints import ModelFolder, open_model, prepare_model
from edgestill.errors import EdgestillError
from edgestill.fetch import fetch, find_cached
from edgestill.progress import Progress, silent
from edgestill.recipe import load_recipe

from .registry import Unavailable

__all__ = ["Kind", "real_model", "tiny_model"]

Kind = Literal["encoder", "decoder"]
_RECIPES: dict[Kind, str] = {"encoder": "minilm", "decoder": "smollm2"}
_MAX_LENGTH = 128


def real_model(kind: Kind, out: Path, progress: Progress = silent) -> ModelFolder:
    """The teacher of the recipe for ``kind``, as a model folder; :class:`Unavailable` when it is not here."""
    teacher = load_recipe(_RECIPES[kind]).teacher
    if find_cached(teacher.source) is None:
        raise Unavailable(f"{teacher.source} is not in the cache: `edgestill fetch {_RECIPES[kind]}`, or --tiny")
    try:
        source = fetch(teacher.source, sha256=teacher.sha256, progress=progress).path
    except EdgestillError as error:
        raise Unavailable(str(error)) from error
    return prepare_model(source, out, license=teacher.license, progress=progress)


def tiny_model(kind: Kind, out: Path) -> ModelFolder:
    """Two layers, random weights: enough to see that a figure works, never a figure to quote."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from ..conftest import _byte_bpe, _describe, _wordpiece

    disable_progress_bar()
    torch.manual_seed(0)
    if kind == "encoder":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": _MAX_LENGTH}
        bert = BertConfig(vocab_size=_wordpiece(out), num_hidden_layers=2, num_attention_heads=4, **sizes)
        BertModel(bert, add_pooling_layer=False).save_pretrained(out)
        _describe(out, task="feature-extraction", pooling="mean", normalize=True, max_length=_MAX_LENGTH)
    else:
        llama = LlamaConfig(
            vocab_size=_byte_bpe(out), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=128, max_position_embeddings=_MAX_LENGTH,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=2, pad_token_id=2, initializer_range=0.2,
        )  # fmt: skip
        LlamaForCausalLM(llama).save_pretrained(out)
        _describe(out, task="text-generation", max_length=_MAX_LENGTH)
    return open_model(out)
