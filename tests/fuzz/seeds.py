"""The healthy files that the fuzzer damages: two tiny models and an artifact of each kind made from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import _byte_bpe, _wordpiece

__all__ = ["Seed", "make_seeds"]

_EXPORTS = (
    ("encoder", "gguf:q8_0"), ("decoder", "gguf:q4_0"), ("encoder", "onnx:int8-dynamic"), ("decoder", "onnx:int4"),
    ("encoder", "coreml:int8"), ("decoder", "coreml:fp16"),
)  # fmt: skip
_MODEL_FILES = ("model.safetensors", "tokenizer.json", "config.json", "edgestill.json", "tokenizer_config.json")
_ARTIFACT_FILES = ("artifact.json", "tensors.json", "tokenizer.json")


@dataclass(frozen=True)
class Seed:
    """A healthy ``folder`` (a model folder, or an artifact made of the model folder ``student``) and the ``file`` in it
    that is damaged."""

    kind: str
    folder: Path
    student: Path
    file: str


def make_seeds(root: Path, kinds: frozenset[str] | None = None) -> list[Seed]:
    """Build everything below ``root``; ``kinds`` (``model gguf onnx coreml``) leaves the others out."""
    from edgestill.export import export
    from edgestill.recipe import ExportConfig

    models = {"encoder": _encoder(root / "encoder"), "decoder": _decoder(root / "decoder")}
    found: list[Seed] = []
    if kinds is None or "model" in kinds:
        for folder in models.values():
            found += [Seed("model", folder, folder, name) for name in _MODEL_FILES]
    for name, to in _EXPORTS:
        kind = to.partition(":")[0]
        if kinds is not None and kind not in kinds:
            continue
        artifact = export(models[name], root / f"{name}-{to.replace(':', '-')}", ExportConfig(to=to))
        payload = list(_payload(artifact.path, artifact.manifest.entry))
        found += [Seed(kind, artifact.path, models[name], file) for file in (*payload * 3, *_ARTIFACT_FILES)]
    return found


def _payload(folder: Path, entry: str) -> Iterator[str]:
    """The files that the format itself defines."""
    for path in sorted((folder / entry).rglob("*")) if (folder / entry).is_dir() else [folder / entry]:
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _encoder(folder: Path) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=_wordpiece(folder), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    facts = {"task": "feature-extraction", "pooling": "mean", "normalize": True, "max_length": 32}
    return _described(folder, facts)


def _decoder(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_byte_bpe(folder), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return _described(folder, {"task": "text-generation", "max_length": 64})


def _described(folder: Path, facts: dict[str, object]) -> Path:
    (folder / "edgestill.json").write_text(json.dumps({"schema_version": 1, "license": "MIT", **facts}))
    return folder
