"""Tokenizers on the way to llama.cpp: the pre-tokenizer is proven, not guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgestill.checkpoints import open_model
from edgestill.errors import BadInput, Unsupported
from edgestill.export.gguf_metadata import model_metadata
from edgestill.export.gguf_tokenizer import tokenizer_metadata

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _with_tokenizer(model: Path, target: Path, **parts: object) -> Path:
    """A copy of the model folder whose tokenizer.json has other parts."""
    folder = shutil.copytree(model, target)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))
    return folder


def _pre(folder: Path, scratch: Path) -> str:
    model = open_model(folder)
    found = tokenizer_metadata(model, model_metadata(model, 64, 0), scratch)
    assert not list(scratch.glob(".*.gguf"))
    return str(found.metadata["tokenizer.ggml.pre"])


def _split(pattern: str) -> dict[str, object]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def test_digits_one_by_one_is_smollm(tiny_llama: Path, tmp_path: Path) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    parts = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    assert _pre(_with_tokenizer(tiny_llama, tmp_path / "m", pre_tokenizer=parts), tmp_path) == "smollm"


def test_the_pattern_of_qwen2_is_recognised(tiny_llama: Path, tmp_path: Path) -> None:
    assert _pre(_with_tokenizer(tiny_llama, tmp_path / "m", pre_tokenizer=_split(_QWEN)), tmp_path) == "qwen2"


def test_a_pre_tokenizer_that_llama_cpp_has_not_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Letters one by one: no merge ever applies, which no built-in pre-tokenizer does."""
    folder = _with_tokenizer(tiny_llama, tmp_path / "m", pre_tokenizer=_split(r"\p{L}"))
    with pytest.raises(Unsupported, match="in Transformers and"):
        _pre(folder, tmp_path)
    assert not list(tmp_path.glob(".*.gguf"))


def test_a_framed_text_sets_the_flags(tiny_llama: Path, tmp_path: Path) -> None:
    frame = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    model = open_model(_with_tokenizer(tiny_llama, tmp_path / "m", post_processor=frame))
    found = tokenizer_metadata(model, model_metadata(model, 64, 0), tmp_path).metadata
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.bos_token_id"] == 1
    assert "tokenizer.ggml.add_eos_token" not in found  # what llama.cpp assumes


def test_a_cased_wordpiece_keeps_its_case(tiny_bert: Path, tmp_path: Path) -> None:
    normal = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
              "lowercase": False}  # fmt: skip
    model = open_model(_with_tokenizer(tiny_bert, tmp_path / "m", normalizer=normal))
    found = tokenizer_metadata(model, model_metadata(model, 64, 0), tmp_path).metadata
    assert found["tokenizer.ggml.normalizer.lowercase"] is False
    assert found["tokenizer.ggml.tokens"][:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert "\u2581movie" in found["tokenizer.ggml.tokens"]


def test_a_tokenizer_of_another_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    added = json.loads((tiny_llama / "tokenizer.json").read_text())["added_tokens"]
    more = [*added, {**added[0], "id": 5000, "content": "<|extra|>"}]
    folder = _with_tokenizer(tiny_llama, tmp_path / "m", added_tokens=more)
    with pytest.raises(BadInput, match="the tokenizer has id"):
        _pre(folder, tmp_path)
