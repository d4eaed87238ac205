"""What an artifact reads and computes for a token, against closed forms of the model that it was exported from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import open_artifact
from edgestill.bench.traffic import Traffic, count_traffic
from edgestill.errors import BadInput
from edgestill.export import export
from edgestill.recipe import ExportConfig

# tiny_llama of tests/conftest.py
WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD, VOCABULARY = 64, 128, 4, 4, 2, 16, 320
LAYER = WIDTH * HEADS * HEAD * 2 + 2 * WIDTH * KV_HEADS * HEAD + 3 * WIDTH * INNER
BODY, HEAD_FLOPS = 2 * LAYERS * LAYER, 2 * WIDTH * VOCABULARY
PAIRS = 4 * LAYERS * HEADS * HEAD
NORMS = (2 * LAYERS + 1) * WIDTH


@pytest.fixture(scope="module")
def counted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    def count(to: str) -> Traffic:
        out = tmp_path_factory.mktemp("traffic") / "artifact"
        export(tiny_llama, out, ExportConfig(to=to))
        return count_traffic(open_artifact(out))

    return count


@pytest.mark.parametrize(
    ("to", "bytes_a_weight", "key_value_bytes", "arithmetic"),
    [
        ("gguf:f32", 4, 2, "float"),
        ("gguf:q8_0", 34 / 32, 2, "int8"),
        ("onnx:fp32", 4, 4, "float"),
        ("onnx:int8", 1, 4, "int8"),
        pytest.param("coreml:fp16", 2, 2, "float", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_is_the_closed_form(counted, to, bytes_a_weight, key_value_bytes, arithmetic):
    traffic = counted(to)
    assert (traffic.body_flops, traffic.head_flops) == (BODY, HEAD_FLOPS)
    assert traffic.pair_flops == PAIRS
    matrices = (BODY + HEAD_FLOPS) / 2
    # norms in float32, scales, rotary tables, constants of the graph: little, and never less than the matrices
    assert 0 <= traffic.weight_bytes - matrices * bytes_a_weight < 4 * NORMS + 0.12 * matrices * bytes_a_weight + 20_000
    assert 0 < traffic.row_bytes <= 4 * (WIDTH + 2 * HEAD)
    assert traffic.kv_bytes == 2 * LAYERS * KV_HEADS * HEAD * key_value_bytes
    assert traffic.arithmetic == arithmetic


def test_gguf_in_float32_to_the_byte(counted):
    """Tied embeddings are read once, as the head; the norms are all there is beside matrices."""
    traffic = counted("gguf:f32")
    assert traffic.weight_bytes == 4 * ((BODY + HEAD_FLOPS) // 2 + NORMS)
    assert traffic.row_bytes == 4 * WIDTH


def test_a_pass_moves_and_computes(counted):
    traffic = counted("gguf:f32")
    assert traffic.bytes_of(1, past=9) - traffic.bytes_of(1, past=8) == traffic.kv_bytes
    assert traffic.flops_of(1, past=7) == BODY + HEAD_FLOPS + 8 * PAIRS
    assert traffic.flops_of(8, answers=1) == 8 * BODY + HEAD_FLOPS + 64 * PAIRS
    assert traffic.flops_of(8, batch=3) == 3 * traffic.flops_of(8)


@pytest.mark.parametrize("to", ["onnx:fp32", "gguf:f16"])
def test_an_encoder(tiny_bert, tmp_path, to):
    export(tiny_bert, tmp_path / "out", ExportConfig(to=to))
    traffic = count_traffic(open_artifact(tmp_path / "out"))
    assert traffic.body_flops == 2 * 4 * (4 * 32 * 32 + 2 * 32 * 64)
    assert traffic.pair_flops == 4 * 4 * 32
    assert (traffic.head_flops, traffic.kv_bytes) == (0, 0)
    assert traffic.weight_bytes < open_artifact(tmp_path / "out").model_bytes


def test_of_a_matmul_it_is_two_times_the_weights(tmp_path):
    """A graph of another tool: a float16 matrix behind a Cast and a Transpose."""
    from onnx import TensorProto, helper, numpy_helper, save

    from edgestill.bench.traffic_onnx import onnx_traffic

    weight = numpy_helper.from_array(np.zeros((7, 48), np.float16), "w")
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", k]) for n, k in (("x", 48), ("y", 7)))
    save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight])), tmp_path / "model.onnx")

    class Given:
        entry = tmp_path / "model.onnx"

        class manifest:  # noqa: N801
            task, vocab_size, kv_cache_bytes_per_token = "text-classification", 7, None

    traffic = onnx_traffic(Given())
    assert (traffic.body_flops, traffic.head_flops) == (2 * 7 * 48, 0)
    assert traffic.weight_bytes == 7 * 48 * 2
    assert "widens" in traffic.note


def test_a_damaged_file_is_one_line(tiny_llama, tmp_path):
    export(tiny_llama, tmp_path / "out", ExportConfig(to="gguf:f32"))
    artifact = open_artifact(tmp_path / "out")
    artifact.entry.write_bytes(artifact.entry.read_bytes()[:5000])
    with pytest.raises(BadInput, match="damaged"):
        count_traffic(artifact)
