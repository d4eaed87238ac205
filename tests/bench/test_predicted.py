from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Histogram, Manifest, seal_artifact
from edgestill.bench.measure import Subject
from edgestill.bench.predicted import predicted_rows
from edgestill.bench.records import read_measurements, write_measurements
from edgestill.errors import UsageError


def decoder(folder: Path, form: str = "gguf", max_length: int = 4096) -> Path:
    """A sealed artifact around a real GGUF file of known size."""
    import gguf

    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for name, shape in {"token_embd.weight": (256, 64), "blk.0.ffn_up.weight": (128, 64)}.items():
        writer.add_tensor(name, np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    manifest = Manifest(
        format=form, quantisation="f16", task="text-generation", entry="model.gguf", inputs=(), outputs=(),  # type: ignore[arg-type]
        shapes="dynamic", max_length=max_length, vocab_size=256, contents="f16", minimum_runtime={}, lineage={},
        dtype_histogram={"f16": Histogram(2, 24576, 49152)}, kv_cache_bytes_per_token=128,
    )  # fmt: skip
    seal_artifact(folder, manifest)
    return folder


def test_rows_are_marked_predicted_and_survive_the_file(tmp_path: Path) -> None:
    subject = Subject("a 'b'", decoder(tmp_path / "art"))
    rows = predicted_rows([subject], "raspberry-pi-5-4gb", length=64, new_tokens=8)
    assert {row.source for row in rows} == {"predicted"}
    assert {row.target for row in rows} == {"profile:raspberry-pi-5-4gb"}
    decode = next(row for row in rows if row.metric == "decode_tokens_per_s")
    assert decode.summary is not None
    assert decode.samples == ()
    assert decode.summary.level == 0.9
    assert decode.summary.low < decode.summary.value < decode.summary.high  # type: ignore[operator]
    assert decode.protocol["method"]["bytes_per_token"] == 49152 + 68 * 128
    assert decode.protocol["method"]["extrapolated"] is True  # 58 kB a token: nothing so small was ever published
    write_measurements(tmp_path / "rows.jsonl", rows)
    assert read_measurements(tmp_path / "rows.jsonl") == rows


def test_what_can_not_be_predicted_is_null_with_a_reason(tmp_path: Path) -> None:
    coreml = Subject("coreml", decoder(tmp_path / "a", "coreml"))
    short = Subject("short", decoder(tmp_path / "b", max_length=32))
    torch = Subject("teacher", tmp_path, kind="model")
    rows = predicted_rows([coreml, short, torch], "oneplus-12", length=64, new_tokens=8)
    assert all(row.summary is None and row.reason for row in rows)
    told = {row.subject: row.reason or "" for row in rows}
    assert "coreml" in told["coreml"]
    assert "takes at most 32 tokens" in told["short"]
    assert "torch" in told["teacher"]


def test_an_unknown_device_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no device profile"):
        predicted_rows([], "pixel-99", length=64, new_tokens=8)
