"""Students of other widths leave the house: what is cut must open, and run in every runtime, as the torch student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgestill.checkpoints import load_tokenizer, load_torch, open_model
from edgestill.data import DataSets, TextSet
from edgestill.distill import distill
from edgestill.distill.planning import Calibration, plan_student
from edgestill.distill.student import make_student
from edgestill.errors import Unsupported
from edgestill.export import export
from edgestill.recipe import ExportConfig, StudentConfig
from edgestill.runtimes.session import SessionOptions, open_session

SHAPES: dict[str, dict[str, Any]] = {
    "ffn": {"ffn": 96},
    "groups": {"kv_heads": 1},
    "queries": {"heads": 2},
    "all": {"layers": 2, "ffn": 0.5, "kv_heads": 1, "heads": 1, "choose": "block_influence"},
}
IDS = np.arange(5, 25)[None]
MASK = np.ones_like(IDS)


@pytest.fixture(scope="module")
def data(sentences: list[str]) -> DataSets:
    return DataSets((TextSet("words", tuple(sentences[:20]), (), (), (), "0" * 64),), ())


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def teacher(request: Any, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, hidden 64, four heads of 16 over two groups, FFN 128, tied embeddings."""
    import transformers

    folder = tmp_path_factory.mktemp("teachers") / request.param
    shutil.copytree(tiny_llama, folder)
    known = json.loads((tiny_llama / "config.json").read_text())
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[request.param]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=known["vocab_size"], hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.1, **({"head_dim": 16} if name == "Qwen3" else {}),
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        if key.endswith(("norm.weight", ".bias")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    return folder


def _cut(teacher: Path, shape: str, out: Path, data: DataSets) -> tuple[Path, np.ndarray]:
    """The student's folder and the logits of the student that never left memory."""
    config = StudentConfig.model_validate(SHAPES[shape])
    distill(teacher, out, student=config, config=None, data=data, max_length=32, work=out.with_name("work"))
    folder = open_model(teacher)
    student = make_student(folder, plan_student(folder, config, Calibration.of(data, 32)))
    with torch.no_grad():
        return out, student(input_ids=torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_narrow_student_opens_with_identical_outputs(teacher: Path, shape: str, tmp_path: Path, data: DataSets):
    folder, want = _cut(teacher, shape, tmp_path / "student", data)
    again = load_torch(folder)
    with torch.no_grad():
        assert np.array_equal(again(input_ids=torch.tensor(IDS)).logits.numpy(), want)
    assert again.get_input_embeddings().weight.data_ptr() == again.get_output_embeddings().weight.data_ptr()
    whole, cut = open_model(teacher), open_model(folder)
    assert cut.parameters < whole.parameters
    assert cut.config["head_dim"] == 16 if shape != "ffn" else True
    assert len(load_tokenizer(folder)) == len(load_tokenizer(teacher))


@pytest.mark.whole
@pytest.mark.parametrize(
    ("to", "tolerance"),
    [("onnx:fp32", 2e-4), ("gguf:f32", 2e-3), ("coreml:fp16", 2e-2)],
    ids=["onnx", "gguf", "coreml"],
)
@pytest.mark.parametrize("shape", ["all", "queries"])
def test_a_narrow_student_runs_in_every_runtime(teacher, shape, to, tolerance, tmp_path, data: DataSets):
    folder, want = _cut(teacher, shape, tmp_path / "student", data)
    config = ExportConfig(to=to, context_length=64)
    if teacher.name == "qwen2" and to == "gguf:f32":
        with pytest.raises(Unsupported, match="32 wide together" if shape == "queries" else "16 wide together"):
            export(folder, tmp_path / "artifact", config)
        return
    export(folder, tmp_path / "artifact", config)
    session = open_session(tmp_path / "artifact", SessionOptions(threads=1))
    got = session.forward(IDS, MASK)
    session.close()
    assert np.abs(got - want).max() < tolerance * np.abs(want).max()
    whole = load_torch(teacher)
    with torch.no_grad():
        theirs = whole(input_ids=torch.tensor(IDS)).logits.numpy()
    assert np.abs(theirs - want).max() > 0.1 * np.abs(want).max()  # the cut is felt, so the comparison means something


@pytest.mark.whole
@pytest.mark.parametrize("to", ["onnx:fp32", "gguf:f32", "coreml:fp16"])
def test_a_narrow_encoder_runs_in_every_runtime(tiny_bert: Path, to: str, tmp_path: Path, data: DataSets):
    student = StudentConfig(ffn=32, layers=2)
    distill(
        tiny_bert, tmp_path / "student", student=student, config=None, data=data, max_length=32, work=tmp_path / "w"
    )
    assert open_model(tmp_path / "student").config["intermediate_size"] == 32
    with torch.no_grad():
        want = load_torch(tmp_path / "student")(torch.tensor(IDS), torch.tensor(MASK)).numpy()
    export(tmp_path / "student", tmp_path / "artifact", ExportConfig(to=to))
    session = open_session(tmp_path / "artifact", SessionOptions(threads=1))
    got = session.forward(IDS, MASK)
    session.close()
    assert np.abs(got - want).max() < (1e-2 if to == "coreml:fp16" else 1e-4)
