"""``general.*`` keys: what we write is what gguf's own writer writes, and is read back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from edgestill.checkpoints import prepare_model
from edgestill.export import export
from edgestill.gguf_origin import origin_from_gguf
from edgestill.model_origin import Named, Origin
from edgestill.recipe import ExportConfig

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

CARD = """---
language: [en, fr]
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M
datasets: [HuggingFaceTB/smoltalk]
tags: [chat]
model_name: Tiny
---
"""


def _general(path: Path) -> dict[str, tuple[list[Any], Any]]:
    fields = gguf.GGUFReader(path).fields
    return {key: (field.types, field.contents()) for key, field in fields.items() if key.startswith("general.")}


def test_keys_types_and_order_are_those_of_llama_cpps_converter(tiny_llama: Path, tmp_path: Path) -> None:
    """Its converter reads the folder by ``Metadata.load`` and writes with ``set_gguf_meta_model``: so do we here."""
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    (source / "edgestill.json").unlink()
    (source / "README.md").write_text(CARD)
    (source / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    model = prepare_model(source, tmp_path / "model")
    made = export(model.path, tmp_path / "out", ExportConfig(to="gguf:f16"))
    ours = _general(made.entry)

    metadata = gguf.Metadata.load(None, source)
    metadata.size_label = "169K"
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_type("model")
    metadata.set_gguf_meta_model(writer)
    writer.add_quantization_version(2)
    writer.add_file_type(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    theirs = _general(tmp_path / "theirs.gguf")

    named = {"general.base_model.0.name", "general.dataset.0.name", "general.dataset.0.repo_url", "general.tags"}
    heuristic = {key for key in theirs if key in ("general.basename", "general.finetune", "general.version")}
    assert theirs.keys() - heuristic == ours.keys()  # those three are guessed from the name's parts
    assert {key: ours[key] for key in ours.keys() - named} == {key: theirs[key] for key in ours.keys() - named}
    assert {key: ours[key][0] for key in named} == {key: theirs[key][0] for key in named}
    assert ours["general.base_model.0.name"][1] == "SmolLM2-135M"
    assert ours["general.tags"][1] == ["text-generation", "chat"]

    again = prepare_model(made.entry, tmp_path / "again")
    assert again.origin.base_models == model.origin.base_models
    assert again.origin.datasets == model.origin.datasets
    assert (again.origin.languages, again.origin.sampling) == (("en", "fr"), {"temp": 0.6, "top_k": 20})
    assert again.named == Named("Tiny")


def test_keys_of_another_type_are_passed_over() -> None:
    odd = {"general.name": 3, "general.languages": "en", "general.base_model.count": 1 << 40, "general.tags": [1, "a"],
           "general.base_model.0.name": "", "general.sampling.temp": "x", "general.license.name": ["a"]}  # fmt: skip
    assert origin_from_gguf(odd) == Origin(tags=("a",))
