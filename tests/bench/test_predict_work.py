"""Bytes a token, against sums written down by hand for files of known tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.bench.predict_work import Work, gguf_work, onnx_work
from edgestill.runtimes.gguf_file import GgufFile
from edgestill.runtimes.onnx_reader import OnnxFile

VOCAB, HIDDEN, FFN = 96, 32, 64


def gguf_file(path: Path, tensors: dict[str, tuple[int, ...]], architecture: str = "llama", **keys: int) -> GgufFile:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float16 if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


LAYER = {
    "blk.0.ffn_up.weight": (FFN, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, FFN),
    "blk.0.attn_norm.weight": (HIDDEN,),
}
LAYER_BYTES = 2 * FFN * HIDDEN * 2 + HIDDEN * 4


def test_a_tied_head_is_read_once(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "m.gguf", {"token_embd.weight": (VOCAB, HIDDEN), **LAYER})
    assert gguf_work(file) == (LAYER_BYTES + VOCAB * HIDDEN * 2, 2 * FFN * HIDDEN + VOCAB * HIDDEN)


def test_a_table_beside_a_head_of_its_own_is_only_looked_up(tmp_path: Path) -> None:
    both = {"token_embd.weight": (VOCAB, HIDDEN), "output.weight": (VOCAB, HIDDEN), **LAYER}
    assert gguf_work(gguf_file(tmp_path / "m.gguf", both)) == (
        LAYER_BYTES + VOCAB * HIDDEN * 2, 2 * FFN * HIDDEN + VOCAB * HIDDEN,
    )  # fmt: skip


def test_an_encoder_has_no_head_and_positions_are_looked_up(tmp_path: Path) -> None:
    tables = {"token_embd.weight": (VOCAB, HIDDEN), "position_embd.weight": (16, HIDDEN), **LAYER}
    assert gguf_work(gguf_file(tmp_path / "m.gguf", tables, "bert")) == (LAYER_BYTES, 2 * FFN * HIDDEN)


def test_of_experts_only_those_in_use_are_read(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": (VOCAB, HIDDEN), "output.weight": (VOCAB, HIDDEN),
               "blk.0.ffn_up_exps.weight": (8, FFN, HIDDEN)}  # fmt: skip
    file = gguf_file(tmp_path / "m.gguf", tensors, "qwen2moe", expert_count=8, expert_used_count=2)
    assert gguf_work(file) == ((2 * FFN * HIDDEN + VOCAB * HIDDEN) * 2, 2 * FFN * HIDDEN + VOCAB * HIDDEN)


def onnx_file(path: Path, nodes: list[Any], tensors: dict[str, np.ndarray[Any, Any]]) -> OnnxFile:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return OnnxFile(path)


def test_onnx_tied_through_a_transpose_counts_once_and_a_plain_table_not_at_all(tmp_path: Path) -> None:
    from onnx.helper import make_node

    table, weight = np.zeros((VOCAB, HIDDEN), np.float32), np.zeros((HIDDEN, HIDDEN), np.float32)
    body = [make_node("Gather", ["table", "ids"], ["x"]), make_node("MatMul", ["x", "w"], ["h"])]
    untied = onnx_file(tmp_path / "a.onnx", [*body, make_node("Relu", ["h"], ["out"])], {"table": table, "w": weight})
    assert onnx_work(untied) == (weight.nbytes, weight.size)
    head = [make_node("Transpose", ["table"], ["t"], perm=[1, 0]), make_node("MatMul", ["h", "t"], ["out"])]
    tied = onnx_file(tmp_path / "b.onnx", [*body, *head], {"table": table, "w": weight})
    assert onnx_work(tied) == (weight.nbytes + table.nbytes, weight.size + table.size)


def test_onnx_blocks_count_with_their_scales_and_rotary_tables_do_not(tmp_path: Path) -> None:
    from onnx.helper import make_node

    codes, scales = np.zeros((FFN, 1, 16), np.uint8), np.zeros((FFN, 1), np.float32)
    cos = np.zeros((128, 16), np.float32)
    nodes = [
        make_node("MatMulNBits", ["ids", "codes", "scales"], ["q"], domain="com.microsoft", N=FFN, K=HIDDEN, bits=4,
                  block_size=32),
        make_node("GroupQueryAttention", ["q", "", "", "", "", "", "", "cos", "cos"], ["out"], domain="com.microsoft"),
    ]  # fmt: skip
    file = onnx_file(tmp_path / "m.onnx", nodes, {"codes": codes, "scales": scales, "cos": cos})
    assert onnx_work(file) == (codes.nbytes + scales.nbytes, FFN * HIDDEN)


def test_the_cache_behind_a_token_is_read_too() -> None:
    work = Work("llama.cpp", "text-generation", 1000, 1000, 10, 1200, 64)
    assert (work.bytes_per_token(0), work.bytes_per_token(20), work.bits) == (1000, 1200, 8)
    assert Work("llama.cpp", "feature-extraction", 1000, 500, None, 1200, 64).bytes_per_token(20) == pytest.approx(1000)
