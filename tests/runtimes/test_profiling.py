"""Profiles against references of their own: wall time, closed forms, llama.cpp's counters, and what damage does."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from edgestill.errors import WorkerError
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes.mil.cost import operation_flops
from edgestill.runtimes.ort_profile import OrtRecorder, node_flops
from edgestill.runtimes.profiling import RowTable, profile_session
from edgestill.runtimes.session import DecodedToken, SessionOptions, open_session
from edgestill.runtimes.torch_session import TorchSession

ONE = SessionOptions(threads=1)


@pytest.fixture(scope="module")
def matmul(tmp_path_factory):
    """A graph of one large product, as an opened artifact would be: ``y [64, 512] = x [64, 512] @ w``."""
    from onnx import TensorProto, helper, numpy_helper, save

    path = tmp_path_factory.mktemp("matmul") / 'a file\'s "name" with spaces.onnx'
    weight = numpy_helper.from_array(np.random.default_rng(0).random((512, 512), np.float32), "w")
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT, name="wide"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    x = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", 512])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 512])
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    manifest = SimpleNamespace(
        outputs=(), task="text-classification", vocab_size=512, max_length=512, kv_cache_bytes_per_token=None
    )
    return SimpleNamespace(entry=path, manifest=manifest)


def test_onnxruntime_gives_closed_form_and_the_walls_time(matmul):
    """2 x 64 x 512 x 512 operations a pass; kernels fill the run, the run fills our own wall time."""
    from edgestill.runtimes.ort_session import OrtSession

    ids = np.ones((64, 512), np.int64)
    found = profile_session(OrtSession(matmul, ONE), ids=ids, mask=ids, repeats=4)
    [phase] = found.phases
    rows = {row.op: row for row in phase.rows}
    assert set(rows) == {"Cast", "MatMul"}
    assert (rows["MatMul"].calls, rows["MatMul"].flops) == (4, 4 * 2 * 64 * 512 * 512)
    assert rows["MatMul"].bytes is rows["Cast"].flops is None
    own = found.engine["model_run_s"]["forward"]
    assert len(own) == 4
    kernels = sum(row.seconds for row in phase.rows)
    assert 0.3 * sum(own) < kernels <= sum(own)
    assert all(theirs <= ours for ours, theirs in zip(phase.profiled_seconds, own, strict=True))
    assert len(phase.plain_seconds) == 4


def test_warm_up_belongs_to_no_phase():
    table = RowTable()
    table.add("", "n", "op", seconds=9.0)
    table.add("forward", "n", "op", seconds=1.0, flops=2)
    table.add("forward", "n", "op", seconds=None, flops=3)
    assert [(r.calls, r.seconds, r.flops, r.bytes) for r in table.rows()["forward"]] == [(2, None, 5, None)]
    assert set(table.rows()) == {"forward"}


@pytest.mark.parametrize(("content", "message"), [("[{", "not whole"), ("[]", "holds 0 runs instead of 1")])
def test_a_profile_that_is_not_whole_is_an_error(tmp_path, content, message):
    recorder = OrtRecorder()
    recorder.begin("forward")
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(WorkerError, match=message):
        recorder.read(tmp_path / "p.json")


def test_nodes_go_to_the_run_that_they_belong_to(tmp_path):
    def node(name, dur):
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": "Add", "provider": "P"}}

    run = {"cat": "Session", "name": "model_run", "dur": 10}
    recorder = OrtRecorder()
    for phase in ("", "prefill", "decode"):
        recorder.begin(phase)
    events = [{"cat": "Session", "name": "session_initialization", "dur": 5}, node("a", 9), run, node("a", 3), run,
              node("a", 1), node("b", 1), run]  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(events))
    recorder.read(tmp_path / "p.json")
    assert {phase: [(r.name, r.seconds) for r in rows] for phase, rows in recorder.rows().items()} == {
        "prefill": [("a", 3e-6)], "decode": [("a", 1e-6), ("b", 1e-6)]
    }  # fmt: skip
    assert recorder.engine() == {"model_run_s": {"prefill": [1e-5], "decode": [1e-5]}}


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "expected"),
    [
        ("MatMul", [(2, 7, 16), (16, 5)], [(2, 7, 5)], 2 * 2 * 7 * 16 * 5),
        ("MatMul", [(2, 4, 7, 16), (2, 4, 16, 7)], [(2, 4, 7, 7)], 2 * 2 * 4 * 7 * 16 * 7),
        ("FusedMatMul", [(16, 7), (16, 5)], [(7, 5)], 2 * 7 * 16 * 5),  # the first one transposed
        ("MatMulNBits", [(1, 3, 64), (10, 2, 16), (20,)], [(1, 3, 10)], 2 * 3 * 64 * 10),
        ("Softmax", [(1, 3, 64)], [(1, 3, 64)], None),
    ],
)
def test_operations_of_a_node(op, inputs, outputs, expected):
    assert node_flops(op, inputs, outputs) == expected


def test_operations_of_mil():
    x, w = np.zeros((1, 7, 16)), np.zeros((5, 16))
    assert operation_flops("linear", {"x": x, "weight": w, "bias": w[:, 0]}, np.zeros((1, 7, 5))) == 2 * 7 * 16 * 5 + 35
    heads = np.zeros((1, 4, 7, 16))
    assert operation_flops("matmul", {"x": heads, "y": heads, "transpose_y": True}, np.zeros((1, 4, 7, 7))) == (
        2 * 4 * 7 * 7 * 16
    )
    whole = {"query": heads, "key": heads, "value": heads}
    assert operation_flops("scaled_dot_product_attention", whole, heads) == 4 * 4 * 7 * 7 * 16 + 5 * 4 * 49
    einsum = {"equation": "bhqd,bhkd->bhqk", "values": [heads, heads]}
    assert operation_flops("einsum", einsum, np.zeros((1, 4, 7, 7))) == 2 * 4 * 7 * 7 * 16
    assert operation_flops("reshape", {"x": x}, x) == operation_flops("gather", {"x": x}, x) == 0
    assert operation_flops("add", {"x": x}, x) == x.size


def test_llamacpp_nodes_are_inside_the_wall_time_and_its_counters_count_tokens(tiny_llama, tmp_path):
    export(tiny_llama, tmp_path / "out", ExportConfig(to="gguf:f32"))
    session = open_session(tmp_path / "out", ONE)
    found = profile_session(session, prompt_ids=[5, 6, 7, 8, 9], new_tokens=4, repeats=3)
    prefill, decode = found.phases
    assert (len(prefill.plain_seconds), len(decode.profiled_seconds)) == (3, 9)
    assert (found.engine["n_p_eval"], found.engine["n_eval"]) == (3 * 5, 3 * 3)  # warm-ups are not counted
    assert found.engine["t_eval_ms"] / 1e3 < sum(decode.plain_seconds)
    for phase, passes in ((prefill, 3), (decode, 9)):
        kinds = {row.op for row in phase.rows}
        assert {"MUL_MAT", "RMS_NORM", "ROPE"} <= kinds
        assert not kinds & {"VIEW", "RESHAPE", "PERMUTE"}
        products = sum(row.calls for row in phase.rows if row.op == "MUL_MAT") / passes
        assert products >= 4 * 7 + 1  # q, k, v, o, gate, up, down of each layer, and the head
        assert 0 < sum(row.seconds for row in phase.rows) < sum(phase.profiled_seconds)
    with_profiler_off = [token.id for token in session.decode([5, 6, 7], 4)]
    assert with_profiler_off == [token.id for token in open_session(tmp_path / "out", ONE).decode([5, 6, 7], 4)]


def test_torch_counts_the_products(tiny_bert):
    ids = np.full((1, 6), 50, np.int64)
    found = profile_session(TorchSession(tiny_bert, ONE), ids=ids, mask=np.ones_like(ids), repeats=1)
    rows = {row.op: row for row in found.phases[0].rows}
    layers, width, inner = 4, 32, 64
    assert rows["aten::addmm"].flops == 2 * 6 * layers * (4 * width * width + 2 * width * inner)
    assert sum(row.seconds for row in rows.values()) <= found.phases[0].profiled_seconds[0]


class _Plain:
    """A session without a profiler that takes a second a call by its clock."""

    def __init__(self, tokens=3):
        self.now, self.tokens = 0.0, tokens

    def info(self):
        return SimpleNamespace(capabilities=("forward", "latency"), runtime="toy", backend="cpu")

    def forward(self, ids, mask):
        self.now += 1

    def decode(self, prompt, count):
        for _ in range(self.tokens):
            self.now += 1
            yield DecodedToken(0, 1.0)


def test_without_a_profiler_there_is_a_reason():
    session = _Plain()
    found = profile_session(session, prompt_ids=[1, 2], new_tokens=3, repeats=2, clock=lambda: session.now)
    assert "toy (cpu) tells no time by operation" in found.reason
    prefill, decode = found.phases
    assert (prefill.plain_seconds, decode.plain_seconds) == ([1.0] * 2, [1.0] * 4)
    assert (prefill.rows, decode.past, decode.passes_a_run) == ([], 2, 2)


@pytest.mark.parametrize(("tokens", "message"), [(2, "ended too early"), (4, "more than 3")])
def test_a_session_that_breaks_its_contract_is_named(tokens, message):
    with pytest.raises(WorkerError, match=message):
        profile_session(_Plain(tokens), prompt_ids=[1], new_tokens=3, repeats=1)
