"""Control flow against plain Python, MIL's own value inference, and torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgestill.errors import BadInput
from edgestill.runtimes.mil import interpreter as interpreter_module
from edgestill.runtimes.mil.cost import CostRecorder
from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.mil.program import walk
from edgestill.runtimes.milproto import import_coremltools, load_program


def _loop(mb: Any, x: Any, limit: Any) -> Any:
    """x doubled, and 3 added, until its sum passes ``limit``; with the number of turns."""

    def condition(x: Any, count: Any) -> Any:
        return mb.less(x=mb.reduce_sum(x=x, axes=[0], keep_dims=False), y=mb.squeeze(x=limit, axes=[0]))

    def body(x: Any, count: Any) -> Any:
        return mb.add(x=mb.mul(x=x, y=np.float32(2)), y=np.float32(3)), mb.add(x=count, y=1)

    x, count = mb.while_loop(_cond=condition, _body=body, loop_vars=(x, mb.const(val=0)))
    return mb.mul(x=x, y=mb.cast(x=count, dtype="fp32"), name="out")


@pytest.mark.parametrize("limit", [-1, 10, 1000, 1e6])
def test_while_like_a_loop(interpret: Any, limit: float) -> None:
    x = np.array([1, 2, -0.5], np.float32)
    run = interpret(_loop, ((3,), "float32"), ((1,), "float32"))
    want, turns = x.copy(), 0
    while want.sum() < limit:
        want, turns = want * 2 + 3, turns + 1
    for _ in range(2):  # nothing is left over
        got = run.run({"input0": x, "input1": [limit]})["out"]
        np.testing.assert_array_equal(got, want * turns)


def _nested(mb: Any, x: Any) -> Any:
    """The Collatz sequence's length: a cond in a while."""

    def body(n: Any, count: Any) -> Any:
        even = mb.equal(x=mb.mod(x=n, y=2), y=0)
        step = mb.cond(
            pred=mb.squeeze(x=even, axes=[0]),
            _true_fn=lambda: mb.floor_div(x=n, y=2),
            _false_fn=lambda: mb.add(x=mb.mul(x=n, y=3), y=1),
        )
        return step, mb.add(x=count, y=1)

    def condition(n: Any, count: Any) -> Any:
        return mb.squeeze(x=mb.greater(x=n, y=1), axes=[0])

    _, count = mb.while_loop(_cond=condition, _body=body, loop_vars=(x, mb.const(val=0)))
    return mb.cast(x=count, dtype="fp32", name="out")


def test_cond_in_while(interpret: Any) -> None:
    run = interpret(_nested, ((1,), "int32"))
    recorder = CostRecorder(run.program, {})
    recorder.begin("pass")
    run.watch = recorder.watch
    for start in (1, 2, 7, 27):
        n, count = start, 0
        while n > 1:
            n, count = n // 2 if n % 2 == 0 else 3 * n + 1, count + 1
        assert run.run({"input0": [start]})["out"] == count
    assert {"mul", "floor_div"} <= {one.kind for one in walk(run.program.operations)}
    rows = {row.op: row for row in recorder.rows()["pass"]}
    assert rows["while_loop"].flops == 0  # what is inside counts, each time


def test_values_around_a_block_and_overflow_inside(interpret: Any) -> None:
    """Both branches use what stands around them; what one of them makes infinite is named, and where it goes known."""

    def body(mb: Any, x: Any, y: Any) -> Any:
        doubled = mb.mul(x=x, y=np.float16(2), name="doubled")
        chosen = mb.cond(
            pred=mb.greater(x=mb.reduce_sum(x=y, axes=[0], keep_dims=False), y=np.float16(0)),
            _true_fn=lambda: mb.mul(x=doubled, y=np.float16(1000), name="thousandfold"),
            _false_fn=lambda: mb.identity(x=doubled, name="plain"),
        )
        return mb.sub(x=chosen, y=doubled, name="out")

    run = interpret(body, ((2,), "float16"), ((1,), "float16"))
    np.testing.assert_array_equal(run.run({"input0": [1, 2], "input1": [-1]})["out"], [0, 0])
    np.testing.assert_array_equal(run.run({"input0": [1, 2], "input1": [1]})["out"], [1998, 3996])
    assert run.first_overflow is None
    assert run.run({"input0": [1, 40], "input1": [1]})["out"].tolist() == [1998, np.inf]
    assert run.first_overflow is not None
    assert run.first_overflow.name == "thousandfold"
    assert {row.name: row.overflowed for row in run.ranges} == {
        "doubled": 0, "thousandfold": 1, "out": 0, **{r.name: 0 for r in run.ranges if r.kind == "reduce_sum"}
    }  # fmt: skip


def test_state_in_a_program_with_a_loop(interpret: Any) -> None:
    def body(mb: Any, x: Any, state: Any) -> Any:
        old = mb.read_state(input=state)
        new = mb.slice_update(x=old, update=x, begin=[1, 0], end=[2, 3])
        mb.coreml_update_state(state=state, value=new)
        total, _ = mb.while_loop(
            _cond=lambda t, n: mb.less(x=n, y=3),
            _body=lambda t, n: (mb.add(x=t, y=mb.reduce_sum(x=old, axes=[0])), mb.add(x=n, y=1)),
            loop_vars=(mb.reduce_sum(x=new, axes=[0]), mb.const(val=0)),
        )
        return mb.cast(x=total, dtype="fp32", name="out")

    run = interpret(body, ((1, 3), "float16"), states=(((4, 3), "float16"),))
    state = run.new_state()
    np.testing.assert_array_equal(run.run({"input0": [[1, 2, 3]]}, state)["out"], [1, 2, 3])  # old is still empty
    np.testing.assert_array_equal(run.run({"input0": [[1, 1, 1]]}, state)["out"], [1 + 3, 1 + 6, 1 + 9])


def test_a_loop_that_does_not_end(interpret: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter_module, "_MOST_TURNS", 50)
    run = interpret(_loop, ((3,), "float32"), ((1,), "float32"))
    with pytest.raises(BadInput, match=r"while_loop .* failed: .*more than 50 turns"):
        run.run({"input0": [-3, -3, -3], "input1": [1]})  # x = 2x + 3 stays where it is


def test_an_operation_without_its_blocks(program: Any) -> None:
    read = program(_loop, ((3,), "float32"), ((1,), "float32"))
    bare = tuple(dataclasses.replace(one, blocks=()) for one in read.operations)
    with pytest.raises(BadInput, match=r"while_loop .* has 0 blocks"):
        Interpreter(dataclasses.replace(read, operations=bare))


class _Scripted(torch.nn.Module):
    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for _ in range(int(turns)):
            total = total + torch.tanh(x + total) if bool(total.sum() < 2.0) else total * 0.5 - x
        return total


def test_like_a_scripted_torch_model(tmp_path: Path) -> None:
    ct = import_coremltools()
    module = torch.jit.script(_Scripted().eval())
    model = ct.convert(
        module, convert_to="mlprogram", skip_model_load=True, compute_precision=ct.precision.FLOAT32,
        inputs=[ct.TensorType("x", (1, 4)), ct.TensorType("turns", (1,), np.int32)],
        outputs=[ct.TensorType("out")], minimum_deployment_target=ct.target.iOS16,
    )  # fmt: skip
    model.save(str(tmp_path / "m.mlpackage"))
    read = load_program(tmp_path / "m.mlpackage")
    assert {"while_loop", "cond"} <= {one.kind for one in walk(read.operations)}
    run = Interpreter(read)
    x = torch.tensor([[0.3, -1.0, 2.0, 0.1]])
    for turns in (0, 1, 2, 7):
        want = module(x, torch.tensor([turns])).numpy()
        np.testing.assert_allclose(run.run({"x": x.numpy(), "turns": [turns]})["out"], want, atol=1e-6)
