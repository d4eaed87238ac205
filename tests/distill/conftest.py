"""Tiny models whose layers really do something, and data sets to train them on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgestill.data import DataSets, TextSet


@pytest.fixture(scope="session")
def data(sentences: list[str]) -> DataSets:
    """150 sentences to train on, 50 held out."""
    return DataSets(
        text=(TextSet("words", tuple(sentences[:150]), (), tuple(sentences[150:]), (), "0" * 64),), tasks=()
    )


def _enliven(folder: Path, copy: Path) -> Path:
    """The same model with larger random weights: with the usual 0.02 every layer is close to the identity."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    torch.manual_seed(1)
    state = load_file(copy / "model.safetensors")
    for tensor in state.values():
        if tensor.dim() == 2:
            tensor.normal_(0, tensor.shape[1] ** -0.5)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="session")
def encoder(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_bert (4 layers) with lively weights."""
    return _enliven(tiny_bert, tmp_path_factory.mktemp("lively") / "encoder")


@pytest.fixture(scope="session")
def classifier(tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_classifier (2 layers, labels bad, fair, good) with lively weights."""
    return _enliven(tiny_classifier, tmp_path_factory.mktemp("lively") / "classifier")


@pytest.fixture(scope="session")
def tagger(tiny_tagger: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_tagger (3 layers, labels O, B-PER, I-PER) with lively weights."""
    return _enliven(tiny_tagger, tmp_path_factory.mktemp("lively") / "tagger")


def _bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=40, hidden_size=32, num_attention_heads=4, intermediate_size=48,
                                num_hidden_layers=4, initializer_range=0.2), add_pooling_layer=False)  # fmt: skip


def _roberta() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(
        RobertaConfig(vocab_size=40, hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=4,
                      initializer_range=0.2, max_position_embeddings=40))  # fmt: skip


def _distilbert() -> Any:
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(DistilBertConfig(vocab_size=40, dim=32, n_heads=4, hidden_dim=48, n_layers=4,
                                            initializer_range=0.2))  # fmt: skip


def _decoder(name: str) -> Any:
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "num_hidden_layers": 4, "initializer_range": 0.2, "head_dim": 8,
             "tie_word_embeddings": True, "max_position_embeddings": 64}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=40, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
        num_hidden_layers=4, initializer_range=0.2, max_position_embeddings=64, sliding_window=3, pad_token_id=2,
        query_pre_attn_scalar=8, sliding_window_pattern=2,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_head=4, n_inner=48, n_layer=4, n_positions=64,
                                      initializer_range=0.2))  # fmt: skip


BUILDERS: dict[str, Callable[[], Any]] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "llama": lambda: _decoder("Llama"),
    "qwen2": lambda: _decoder("Qwen2"),
    "qwen3": lambda: _decoder("Qwen3"),
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
}


@pytest.fixture(params=sorted(BUILDERS))
def model(request: pytest.FixtureRequest) -> Any:
    """Four random layers of each family, in eval()."""
    import torch

    torch.manual_seed(0)
    return BUILDERS[request.param]().eval()


@pytest.fixture
def build() -> Callable[[str], Any]:
    """Build one family by name."""

    def make(name: str) -> Any:
        import torch

        torch.manual_seed(0)
        return BUILDERS[name]().eval()

    return make
