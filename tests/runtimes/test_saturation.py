"""The 16-bit saturation check against a double loop, and on artifacts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes.saturation import pair_saturation, saturation


@pytest.mark.parametrize(("rows", "width", "columns"), [(3, 10, 4), (2, 7, 5)])
def test_pairs_against_a_double_loop(rows: int, width: int, columns: int) -> None:
    random = np.random.default_rng(0)
    levels = random.integers(100, 256, (rows, width), dtype=np.uint8)
    codes = random.choice(np.array([-128, -90, 60, 127], np.int8), (width, columns))
    count, lost, exact = 0, np.zeros((rows, columns)), np.zeros((rows, columns))
    for m in range(rows):
        for n in range(columns):
            products = [int(levels[m, k]) * int(codes[k, n]) for k in range(width)] + [0] * (width % 2)
            exact[m, n] = sum((int(levels[m, k]) - 120) * int(codes[k, n]) for k in range(width))
            for k in range(0, len(products), 2):
                pair = products[k] + products[k + 1]
                kept = max(-32768, min(32767, pair))
                count += kept != pair
                lost[m, n] += kept - pair
    got = pair_saturation(levels, 120, codes)
    assert got[:2] == (count, rows * -(-width // 2) * columns)
    assert count > 0
    assert got[2] == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(exact), rel=1e-6)


def test_seven_bits_never_saturate() -> None:
    levels = np.full((2, 6), 255, np.uint8)
    for code in (-64, 63):
        assert pair_saturation(levels, 0, np.full((6, 3), code, np.int8)) == (0, 18, 0.0)
    assert pair_saturation(levels, 0, np.full((6, 3), -65, np.int8))[0] == 18


def test_the_notorious_setting_is_caught_and_the_shipped_one_is_not(tiny_llama: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 300, (2, 16))
    mask = (np.arange(16) < np.array([[16], [9]])).astype(np.int64)
    found = {
        name: saturation(export(tiny_llama, tmp_path / name, ExportConfig(to=f"onnx:{name}")), ids, mask)
        for name in ("int8-dynamic", "int8-dynamic-per-channel", "int8-static", "int8")
    }
    assert found["int8"] is None
    safe, bad = found["int8-dynamic"], found["int8-dynamic-per-channel"]
    assert safe is not None
    assert bad is not None
    assert safe.fraction == 0.0
    assert found["int8-static"] is not None
    assert found["int8-static"].fraction == 0.0
    assert bad.fraction > 0.0
    assert bad.relative_error > 0.0
    assert "matmul" in bad.worst_node
