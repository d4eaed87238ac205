"""Tiny models, built here, offline, in a second: what every fast test stands on."""

from __future__ import annotations

import json
import os
from pathlib import Path

# Tiny models gain nothing from threads, and threads of several test processes get in each other's way. Set before
# torch or numpy is imported; tests of threads set their own.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import pytest  # noqa: E402


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked ``whole`` is ``slow``, too."""
    for item in items:
        if item.get_closest_marker("whole"):
            item.add_marker(pytest.mark.slow)


WORDS = (
    "the a of and to in is it was that film movie story actor plot scene good bad great awful funny dull moving "
    "slow bright dark love hate war peace ship phone board model small large fast quiet loud red blue green one two "
    "three never always often perhaps"
).split()


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """200 different sentences of 4 to 12 known words."""
    import random

    chooser = random.Random(0)
    return sorted({" ".join(chooser.choices(WORDS, k=chooser.randint(4, 12))) for _ in range(220)})[:200]


def _wordpiece(folder: Path) -> int:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *[f"##{c}" for c in letters], *WORDS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return len(vocabulary)


def _byte_bpe(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        model_max_length=128,
    )  # fmt: skip
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    return len(fast)


def _no_layer_is_idle(model: object) -> None:
    """Norms and biases away from 1 and 0, where a forgotten one would not be seen."""
    import torch

    for name, parameter in model.named_parameters():  # type: ignore[attr-defined]
        if "norm" in name or ".ln_" in name or name.endswith(".bias"):
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith(".bias") else 0.7, std=0.2)


def _describe(folder: Path, **facts: object) -> Path:
    """Write edgestill.json, the facts that a plain Transformers folder has no place for."""
    (folder / "edgestill.json").write_text(json.dumps({"schema_version": 1, "license": "Apache-2.0", **facts}))
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT sentence encoder: 4 layers, hidden 32, 4 heads, mean pooling, normalised."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=_wordpiece(folder), hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return _describe(folder, task="feature-extraction", pooling="mean", normalize=True, max_length=64)


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT classifier with three labels: 2 layers, hidden 32."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "tiny-classifier"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=_wordpiece(folder), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, id2label={0: "bad", 1: "fair", 2: "good"},
        label2id={"bad": 0, "fair": 1, "good": 2},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)  # else all classes look alike
    model.save_pretrained(folder)
    return _describe(folder, task="text-classification", max_length=64, labels=["bad", "fair", "good"])


@pytest.fixture(scope="session")
def tiny_tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that labels tokens with three labels: 3 layers, hidden 32."""
    import torch
    from transformers import BertConfig, BertForTokenClassification

    folder = tmp_path_factory.mktemp("models") / "tiny-tagger"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=_wordpiece(folder), hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, id2label={0: "O", 1: "B-PER", 2: "I-PER"},
        label2id={"O": 0, "B-PER": 1, "I-PER": 2},
    )  # fmt: skip
    model = BertForTokenClassification(config)
    _no_layer_is_idle(model)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)  # else all labels look alike
    model.save_pretrained(folder)
    return _describe(folder, task="token-classification", max_length=64, labels=["O", "B-PER", "I-PER"])


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama decoder: 4 layers, hidden 64, 4 heads over 2 KV heads, tied embeddings, byte-level BPE."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_byte_bpe(folder), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=2, pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return _describe(folder, task="text-generation", max_length=128)


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 decoder: 7 layers, of which the sixth sees all and the others 8 tokens, hidden 64, 4 heads of 16 over 2
    KV heads, tied, byte-level BPE."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder = tmp_path_factory.mktemp("models") / "tiny-gemma3"
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=_byte_bpe(folder), hidden_size=64, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, intermediate_size=128,
        max_position_embeddings=128, sliding_window=8, bos_token_id=0, eos_token_id=2, pad_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    _no_layer_is_idle(model)
    model.save_pretrained(folder)
    return _describe(folder, task="text-generation", max_length=128)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 decoder: 4 layers, hidden 64, 4 heads, learned positions, tied, byte-level BPE."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=_byte_bpe(folder), n_embd=64, n_layer=4, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=2,
        pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    _no_layer_is_idle(model)
    model.transformer.ln_f.weight.data.mul_(2)  # else its choices are so close that rounding decides
    model.save_pretrained(folder)
    return _describe(folder, task="text-generation", max_length=128)
