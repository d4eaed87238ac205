"""The .ort format: equal bytes, the same numbers, the operators that it needs, and a verdict like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import open_artifact
from edgestill.commands import ExportRequest, export_verified
from edgestill.errors import Unsupported
from edgestill.export import export, onnx_ort
from edgestill.recipe import ExportConfig
from edgestill.runtimes.session import SessionOptions, open_session
from edgestill.stages import Observer


@pytest.mark.parametrize("quantisation", ["fp32", "fp16", "int4"])
def test_equal_bytes_and_equal_numbers(quantisation: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The writer of ONNX Runtime gives other bytes each time; ours are sorted, and read by the same runtime."""
    config = ExportConfig(to=f"onnx:{quantisation}", ort=True)
    other = shutil.copytree(tiny_llama, tmp_path / "elsewhere/model")
    first, second = export(tiny_llama, tmp_path / "a", config), export(other, tmp_path / "deeper/b", config)
    assert first.manifest.artifact_id == second.manifest.artifact_id
    assert first.manifest.entry == "model.ort"
    assert first.entry.read_bytes()[4:8] == b"ORTM"
    plain = export(tiny_llama, tmp_path / "plain", ExportConfig(to=f"onnx:{quantisation}"))
    ids = np.arange(5, 30)[None]
    sessions = [open_session(artifact.path, SessionOptions(threads=1)) for artifact in (first, plain)]
    np.testing.assert_allclose(*(s.forward(ids, np.ones_like(ids)) for s in sessions), rtol=1e-5, atol=1e-5)
    said = [[token.id for token in session.decode([5, 6, 7], 8)] for session in sessions]
    assert said[0] == said[1]


def test_the_table_is_sorted_and_the_model_untouched(tiny_bert: Path, tmp_path: Path) -> None:
    export(tiny_bert, tmp_path / "a", ExportConfig(to="onnx:int8"))
    raw = _by_onnxruntime(tmp_path / "a/model.onnx", tmp_path / "raw.ort")
    onnx_ort.canonical(tmp_path / "raw.ort")
    once = (tmp_path / "raw.ort").read_bytes()
    assert once != raw
    assert once[-1000:] == raw[-1000:]
    assert sorted(_operators(once)) == sorted(_operators(raw))
    assert _operators(once) == sorted(_operators(once))
    onnx_ort.canonical(tmp_path / "raw.ort")
    assert (tmp_path / "raw.ort").read_bytes() == once


def _by_onnxruntime(source: Path, target: Path) -> bytes:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return target.read_bytes()


def _operators(raw: bytes) -> list[bytes]:
    import onnxruntime.tools.ort_format_model  # noqa: F401
    from ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    resolver = InferenceSession.GetRootAs(raw, 0).KernelTypeStrResolver()
    return [resolver.OpKernelTypeStrArgs(i).OpId() for i in range(resolver.OpKernelTypeStrArgsLength())]


def test_required_operators(tiny_bert: Path, tmp_path: Path) -> None:
    """Read back by the parser of ONNX Runtime's own build script; each operator of the graph stands in it."""
    import onnx
    from onnxruntime.tools.reduced_build_config_parser import parse_config

    artifact = export(tiny_bert, tmp_path / "a", ExportConfig(to="onnx:int8", ort=True))
    text = (artifact.path / "required_operators.config").read_text()
    assert str(tmp_path) not in text
    required, types = parse_config(str(artifact.path / "required_operators.config"), True)
    named = {operator for sets in required.values() for operators in sets.values() for operator in operators}
    kinds = {node.op_type for node in onnx.load(artifact.path / "model.onnx").graph.node}
    assert {"MatMulNBits", "MultiHeadAttention", "Gelu", "GatherBlockQuantized"} <= named
    assert named <= kinds | {"ConstantOfShape"}
    assert types is not None


def test_verified_and_measured(tiny_bert: Path, tmp_path: Path) -> None:
    request = ExportRequest(tiny_bert, ("onnx:int8",), tmp_path / "out", threads=1, app=("python",), ort=True)
    result = export_verified(request, Observer())
    assert result.exit_code == 0
    [row] = result.run.artifacts
    assert (row.name, row.level) == ("onnx-int8-ort", "device_verified")
    artifact = open_artifact(tmp_path / "out/artifacts/onnx-int8-ort")
    assert artifact.model_bytes == artifact.entry.stat().st_size
    shipped = {file.path for file in artifact.shipped}
    assert {"model.ort", "tokenizer.json", "required_operators.config"} <= shipped
    assert not {"model.onnx", "tensors.json"} & shipped
    total = sum(file.size_bytes for file in artifact.shipped)
    assert 0.2 * total < artifact.download_bytes() < total
    assert '"model.ort"' in (tmp_path / "out/app/onnx-int8-ort/python/sample.py").read_text()


def test_download_size_is_that_of_a_zip_file(tiny_bert: Path, tmp_path: Path) -> None:
    import zipfile

    artifact = export(tiny_bert, tmp_path / "a", ExportConfig(to="gguf:q8_0"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for file in artifact.shipped:
            archive.write(artifact.path / file.path, file.path)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        packed = sum(row.compress_size for row in archive.infolist())
    assert artifact.download_bytes() == pytest.approx(packed, rel=0.001)


def test_what_it_is_not_for(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ort = true is for onnx, not for gguf"):
        ExportConfig(to="gguf:f16", ort=True)
    monkeypatch.setattr(onnx_ort, "_MOST_BYTES", 1000)
    with pytest.raises(Unsupported, match="holds 2 GB at most"):
        export(tiny_bert, tmp_path / "a", ExportConfig(to="onnx:fp32", ort=True))
    assert not (tmp_path / "a").exists()
