"""What is around the operations: states, constants, overflow reports, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgestill.errors import BadInput, Unsupported
from edgestill.runtimes.mil.inplace import in_place_updates
from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.mil.program import Operation, Program, ValueType


def _cache(mb: Any, x: Any, state: Any) -> Any:
    old = mb.read_state(input=state)
    new = mb.slice_update(x=old, update=x, begin=[1, 0], end=[2, 3])
    kept = mb.coreml_update_state(state=state, value=new)
    return mb.reduce_sum(x=mb.cast(x=kept, dtype="fp32"), axes=[0], name="out")


def _cache_read_after(mb: Any, x: Any, state: Any) -> Any:
    """As above, but the old content is needed after the update: writing in place would be wrong."""
    old = mb.read_state(input=state)
    new = mb.slice_update(x=old, update=x, begin=[1, 0], end=[2, 3])
    mb.coreml_update_state(state=state, value=new)
    return mb.cast(x=mb.identity(x=old), dtype="fp32", name="out")


def test_state_lives_between_runs_and_is_updated_in_place(interpret: Any) -> None:
    interpreter = interpret(_cache, ((1, 3), "float16"), states=(((4, 3), "float16"),))
    operations = interpreter.program.operations
    assert len(in_place_updates(operations, list(interpreter.program.states), interpreter.program.outputs)) == 1
    (name,) = interpreter.program.states
    state = interpreter.new_state()
    state[name][3] = 10
    first = interpreter.run({"input0": [[1, 2, 3]]}, state)["out"]
    np.testing.assert_array_equal(first, [11, 12, 13])
    np.testing.assert_array_equal(state[name], [[0, 0, 0], [1, 2, 3], [0, 0, 0], [10, 10, 10]])
    second = interpreter.run({"input0": [[4, 4, 4]]}, state)["out"]
    np.testing.assert_array_equal(second, [14, 14, 14])
    np.testing.assert_array_equal(interpreter.run({"input0": [[4, 4, 4]]}, interpreter.new_state())["out"], [4, 4, 4])


def test_no_update_in_place_when_the_old_state_is_still_needed(interpret: Any) -> None:
    interpreter = interpret(_cache_read_after, ((1, 3), "float16"), states=(((4, 3), "float16"),))
    program = interpreter.program
    assert not in_place_updates(program.operations, list(program.states), program.outputs)
    state = interpreter.new_state()
    out = interpreter.run({"input0": [[1, 2, 3]]}, state)["out"]
    assert not out.any()
    assert next(iter(state.values())).sum() == 6


def test_float16_is_accumulated_in_float32_and_rounded_once(interpret: Any) -> None:
    interpreter = interpret(
        lambda mb, x, y: mb.matmul(x=x, y=y, transpose_y=True, name="out"),
        ((1, 4096), "float16"), ((1, 4096), "float16"),
    )  # fmt: skip
    ones = np.ones((1, 4096), np.float32)
    assert interpreter.run({"input0": ones, "input1": ones})["out"].item() == 4096  # float16 sums stop at 2048
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(1, 4096)).astype(np.float16).astype(np.float32) for _ in range(2))
    got = interpreter.run({"input0": x, "input1": y})["out"].item()
    assert got == pytest.approx(float(np.sum(x.astype(np.float64) * y)), rel=2**-10)
    assert got == float(np.float16(got))


def test_the_first_overflow_is_named(interpret: Any) -> None:
    def body(mb: Any, x: Any) -> Any:
        scaled = mb.mul(x=x, y=np.float16(2), name="doubled")
        squared = mb.mul(x=scaled, y=scaled, name="squared")
        halved = mb.mul(x=squared, y=np.float16(0.5), name="halved")
        return mb.sub(x=halved, y=halved, name="out")

    interpreter = interpret(body, ((3,), "float16"))
    interpreter.run({"input0": [1, 2, 3]})
    assert not any(row.non_finite for row in interpreter.ranges)
    out = interpreter.run({"input0": [1, 2, 200]})["out"]
    assert np.isnan(out[2])
    assert out[:2].tolist() == [0, 0]
    row = interpreter.first_overflow
    assert row is not None
    assert (row.name, row.kind, row.dtype, row.overflowed) == ("squared", "mul", "float16", 1)
    rows = {r.name: r for r in interpreter.ranges}
    assert rows["doubled"].peak == 400
    assert rows["squared"].peak == 36  # of the run that stayed finite
    assert (rows["halved"].non_finite, rows["halved"].overflowed) == (1, 0)  # it only passed the infinity on
    assert rows["out"].non_finite == 1


def test_float32_operations_are_not_rounded(interpret: Any) -> None:
    interpreter = interpret(lambda mb, x: mb.mul(x=x, y=np.float32(3), name="out"), ((1,), "float32"))
    assert interpreter.run({"input0": [100000.1]})["out"].item() == np.float32(100000.1) * np.float32(3)


def test_operations_on_constants_run_once(interpret: Any) -> None:
    def body(mb: Any, x: Any) -> Any:
        table = mb.mul(x=mb.const(val=np.arange(6, dtype=np.float32)), y=np.float32(2))
        return mb.add(x=x, y=table, name="out")

    interpreter = interpret(body, ((6,), "float32"))
    assert [row.kind for row in interpreter.ranges] == ["add"]
    np.testing.assert_array_equal(interpreter.run({"input0": np.zeros(6)})["out"], np.arange(6) * 2)


def test_wrong_inputs_and_unknown_operations(interpret: Any) -> None:
    interpreter = interpret(lambda mb, x: mb.relu(x=x, name="out"), ((2, 3), "float32"))
    with pytest.raises(BadInput, match="'input0' is missing"):
        interpreter.run({})
    with pytest.raises(BadInput, match="has shape 2x2, the program takes 2x3"):
        interpreter.run({"input0": np.zeros((2, 2))})
    half = ValueType("float32", (1,))
    strange = Operation("made_up", "thing", {"x": ("a",)}, (("b", half),))
    with pytest.raises(Unsupported, match=r"made_up \(thing\) is not known"):
        Interpreter(Program({"a": half}, {}, {}, (strange,), ("b",)))


def test_an_operation_that_fails_is_named(interpret: Any) -> None:
    interpreter = interpret(
        lambda mb, x, i: mb.gather(x=x, indices=i, axis=0, name="out"), ((2,), "float32"), ((1,), "int32")
    )
    with pytest.raises(BadInput, match=r"gather 'out' failed: .*out of bounds"):
        interpreter.run({"input0": [1, 2], "input1": [5]})
