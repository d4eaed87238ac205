"""Float32 islands by measurement: programs made for one reason each, and the same choice twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.artifact import ISLANDS_FILE
from edgestill.checkpoints import open_model
from edgestill.export import export
from edgestill.export.coreml_feeds import BUILT_IN, feeds_of
from edgestill.export.coreml_islands import HEADROOM, Islands, as_json, choose
from edgestill.export.coreml_roles import roles
from edgestill.export.source import Source
from edgestill.recipe import ExportConfig
from edgestill.runtimes.mil.program import Constant, Operation, Program, ValueType

RNG = np.random.default_rng(0)
WIDTH = 64


class _Builder:
    """A float32 program on ``input_ids`` [1, T], operation by operation."""

    def __init__(self) -> None:
        self.constants: dict[str, Constant] = {}
        self.operations: list[Operation] = []

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        array = np.asarray(value)
        self.constants[name] = Constant(ValueType(str(array.dtype), array.shape), array)
        return name

    def do(self, kind: str, name: str, size: tuple[int | None, ...] = (1, None, WIDTH), **inputs: str) -> str:
        arguments: dict[str, tuple[str | Constant, ...]] = {parameter: (value,) for parameter, value in inputs.items()}
        self.operations.append(Operation(kind, name, arguments, ((name, ValueType("float32", size)),)))
        return name

    def embedded(self, scale: float = 1.0) -> str:
        table = (RNG.normal(size=(300, WIDTH)) * scale).astype(np.float32)
        return self.do("gather", "embedded", x=self.constant(table), indices="input_ids", axis=self.constant(0))

    def program(self, output: str) -> Program:
        inputs = {"input_ids": ValueType("int32", (1, None))}
        return Program(inputs, {}, self.constants, tuple(self.operations), (output,))


def _choose(program: Program, **options: Any) -> Islands:
    feeds = [{"input_ids": RNG.integers(0, 300, (1, 12)).astype(np.int32)} for _ in range(2)]
    return choose(program, "text-generation", feeds, **options)


def _product(b: _Builder, x: str, scale: float = 0.1) -> str:
    weight = (RNG.normal(size=(300, WIDTH)) * scale).astype(np.float32)
    return b.do("linear", "logits", (1, None, 300), x=x, weight=b.constant(weight))


def _why(islands: Islands) -> dict[str, str]:
    return {name: island.reason for island in islands.found for name in island.operations}


def test_what_leaves_float16_and_what_comes_near() -> None:
    b = _Builder()
    x = b.embedded()
    x = b.do("mul", "large", x=x, y=b.constant(np.float32(3e4)))  # normal numbers: some reach 100,000
    moved = b.do("reshape", "moved", x=x, shape=b.constant(np.array([1, -1, WIDTH], np.int32)))
    x = b.do("mul", "near", x=moved, y=b.constant(np.float32(65504 / HEADROOM / 3e4 / 2)))  # 3 sigma: over a quarter
    x = b.do("mul", "small", x=x, y=b.constant(np.float32(1e-4)))
    found = _choose(b.program(_product(b, x)))
    why = _why(found)
    assert {name: why.get(name) for name in ("large", "moved", "near")} == dict.fromkeys(
        ("large", "moved", "near"), "range"
    )
    assert found.rest <= found.everything
    assert max(island.value for island in found.found) > 65504
    assert "embedded" not in why
    assert "logits" not in why


def test_products_with_weights_only_when_they_do_leave() -> None:
    for scale, reason in ((1e3, None), (1e4, "range")):  # sums of 64 products reach about 35,000, and ten times that
        b = _Builder()
        x = b.embedded()
        found = _choose(b.program(_product(b, x, scale)))
        assert _why(found).get("logits") == reason


def test_flushing_to_zero_is_damage() -> None:
    b = _Builder()
    x = b.embedded(1e-5)
    squared = b.do("mul", "squared", x=x, y=x)  # 1e-10: nothing to float16
    root = b.do("sqrt", "root", x=squared)
    x = b.do("real_div", "unit", x=x, y=root)
    why = _why(_choose(b.program(_product(b, x))))
    assert (why["squared"], why["root"]) == ("damage", "damage")


def test_cancellation_is_found() -> None:
    """(x + 1000) - 1000 in float16 leaves 0.5 in steps of 0.5."""
    b = _Builder()
    x = b.embedded()
    up = b.do("add", "up", x=x, y=b.constant(np.float32(1000)))
    down = b.do("sub", "down", x=up, y=b.constant(np.float32(1000)))
    found = _choose(b.program(_product(b, down)))
    assert set(_why(found)) == {"up", "down"}
    assert found.rest < 0.01 * found.everything or "damage" in _why(found).values()


def test_nothing_when_float16_holds() -> None:
    b = _Builder()
    x = b.do("tanh", "bent", x=b.embedded())
    found = _choose(b.program(_product(b, x, 0.01)))
    assert found.found == ()
    assert found.rest == found.everything
    assert 0 < found.products <= found.everything


def test_longest_rows_count_for_the_range_alone() -> None:
    """A sum over tokens that only a long row lets overflow."""
    b = _Builder()
    x = b.do("mul", "scaled", x=b.do("abs", "size", x=b.embedded()), y=b.constant(np.float32(50)))
    total = b.do(
        "reduce_sum", "total", (1, 1, WIDTH), x=x, axes=b.constant(np.array([1], np.int32)),
        keep_dims=b.constant(np.bool_(True)),
    )  # fmt: skip
    program = b.program(_product(b, b.do("mul", "down", (1, 1, WIDTH), x=total, y=b.constant(np.float32(1e-3)))))
    assert _why(_choose(program)).get("total") != "range"
    longest = [{"input_ids": RNG.integers(0, 300, (1, 500)).astype(np.int32)}]
    assert _why(_choose(program, longest=longest))["total"] == "range"


def test_roles_are_the_same_part_in_every_layer() -> None:
    b = _Builder()
    x = b.embedded()
    for layer in range(9):
        inner = b.do("linear", f"inner{layer}", x=x, weight=b.constant(np.zeros((WIDTH, WIDTH), np.float32)))
        bent = b.do("silu", f"bent{layer}", x=inner)
        x = b.do("add", f"sum{layer}", x=x, y=bent)
    groups = roles(b.program(x), {o.name for o in b.operations} - {"embedded"})
    assert tuple(f"bent{layer}" for layer in range(2, 9)) in groups  # the first ones see the embedding behind them
    assert ("sum8",) in groups  # nothing takes it
    assert sum(len(group) for group in groups) == 27


def test_the_artifact_says_which_and_why(tiny_bert: Path, tmp_path: Path) -> None:
    made = export(tiny_bert, tmp_path / "a b", ExportConfig(to="coreml:fp16"), calibration=["a good film", "the plot"])
    facts = json.loads((made.path / ISLANDS_FILE).read_text())
    assert facts["source"] == "2 calibration texts"
    assert facts["rest"] <= facts["everything"]
    kinds = {row["kind"]: row["reason"] for row in facts["islands"]}
    assert kinds["real_div"] == "rounding"  # the division by the length: a dot product shows it
    assert f"{sum(len(row['operations']) for row in facts['islands'] if row['kind'] == 'real_div')} real_div" in (
        made.manifest.contents
    )
    assert ISLANDS_FILE not in {file.path for file in made.shipped}


def test_feeds(tiny_bert: Path) -> None:
    source = Source(open_model(tiny_bert))
    built_in = feeds_of(source, ["", "  "], (64,))
    assert (built_in.source, len(built_in.rows)) == ("built-in lines", len(BUILT_IN))
    assert all(feed["input_ids"].shape == feed["attention_mask"].shape for feed in built_in.rows)
    fixed = feeds_of(source, ["a film", "a good film of the war and of a ship"], (8, 32), fixed=True)
    assert [feed["input_ids"].shape[1] for feed in fixed.rows] == [8, 32]
    assert fixed.rows[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_numbers_of_the_file_are_short() -> None:
    islands = Islands((), "KL", 1.23456e-7, float("nan"), 2.0, 3)
    assert as_json(islands)["products"] == pytest.approx(1.2e-7)
    assert as_json(islands)["everything"] is None
