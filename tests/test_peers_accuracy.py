"""The imitation of llama-perplexity's store and statistics, by plain loops; the figures on tiny models (slow)."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest

from edgestill.errors import BadInput
from tests.peers import registry
from tests.peers.llama_perplexity import Statistics, parse_output, read_base, scored, store

PRINTED = """
====== Perplexity statistics ======
Mean PPL(Q)                   :  12.345678 ±   0.123456
Cor(ln(PPL(Q)), ln(PPL(base))):  99.98%
Mean ln(PPL(Q)/PPL(base))     :  -0.001234 ±   0.000100
====== KL divergence statistics ======
Mean    KLD:   0.001234 ±   0.000012
Maximum KLD:   0.123456
99.0%   KLD:   0.012345
====== Token probability statistics ======
Mean    Δp: -0.012 ± 0.003 %
 1.0%   Δp: -1.234%
RMS Δp    :  0.321 ± 0.012 %
Same top p: 98.765 ± 0.123 %
"""


def test_reads_what_the_tool_prints() -> None:
    found = parse_output(PRINTED)
    assert found["Mean KLD"] == (0.001234, 1e-6)
    assert found["Mean PPL(Q)"] == (12.345678, 1e-6)
    assert found["Mean ln(PPL(Q)/PPL(base))"] == (-0.001234, 1e-6)
    assert found["Mean Δp"] == (-0.012, 1e-3)
    assert found["1.0% Δp"] == (-1.234, 1e-3)
    assert found["RMS Δp"] == (0.321, 1e-3)
    assert found["Same top p"] == (98.765, 1e-3)
    assert found["99.0% KLD"] == (0.012345, 1e-6)


def test_store_keeps_log_probabilities_to_half_a_step_above_its_floor() -> None:
    logits = np.random.default_rng(0).normal(size=1001).astype(np.float32) * 6
    row = store(logits)
    kept = row.scale * row.codes.astype(np.float32) + row.minimum
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    high = logits > logits.max() - 16
    assert 0 < (~high).sum() < 1001
    assert row.scale == np.float32(16) / np.float32(65535)
    assert row.codes.max() == 65535
    assert np.abs(kept - exact)[high].max() <= row.scale / 2 + 4e-6
    assert (row.codes[~high] == 0).all()


def test_a_flat_row_has_no_step() -> None:
    row = store(np.full(8, 3.0, np.float32))
    assert (row.scale, row.codes.max()) == (0, 0)
    assert row.minimum == pytest.approx(-math.log(8))


def test_statistics_are_those_of_a_plain_loop_but_for_the_store() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=(50, 64)).astype(np.float32) * 3
    other = base + rng.normal(size=base.shape).astype(np.float32) * 0.3
    targets = rng.integers(0, 64, 50)
    found = Statistics()
    changes, kls = [], []
    for a, b, target in zip(base, other, targets.tolist(), strict=True):
        found.add(store(a), b, target)
        p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (a, b))
        kls.append(float((p * np.log(p / q)).sum()))
        changes.append(float(q[target] - p[target]))
    printed = found.printed()
    assert printed["Mean KLD"] == pytest.approx(np.mean(kls), abs=2e-4)
    assert printed["Mean KLD"] != pytest.approx(np.mean(kls), abs=1e-12)
    assert printed["Mean Δp"] == pytest.approx(100 * np.mean(changes), abs=2e-2)
    assert printed["RMS Δp"] == pytest.approx(100 * math.sqrt(np.mean(np.square(changes))), rel=1e-3)
    assert printed["Same top p"] == 100 * np.mean(base.argmax(1) == other.argmax(1))


def test_a_base_file_is_read_as_it_is_laid_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(2, 3, 7)).astype(np.float32)  # an odd vocabulary: rows are padded to an even length
    tokens = rng.integers(0, 7, (2, 8)).astype("<i4")
    rows = [store(row) for row in logits.reshape(6, 7)]
    data = b"_logits_" + struct.pack("<iii", 8, 7, 2) + tokens.tobytes()
    for row in rows:
        data += struct.pack("<ff", row.scale, row.minimum) + row.codes.astype("<u2").tobytes() + b"\0\0"
    path = tmp_path / "base.kld"
    path.write_bytes(data)
    base = read_base(path)
    assert (base.first, base.vocab_size) == (4, 7)
    assert (base.tokens == tokens).all()
    for window in (0, 1):
        for got, wanted in zip(base.rows(window), rows[3 * window : 3 * window + 3], strict=True):
            assert (got.scale, got.minimum) == (wanted.scale, wanted.minimum)
            assert (got.codes == wanted.codes).all()
    assert len(scored(base, list(logits)).kl) == 6
    path.write_bytes(b"something else" * 9)
    with pytest.raises(BadInput):
        read_base(path)


def test_figures_are_there_with_their_limits() -> None:
    registry.load_groups()
    assert (registry.FIGURES["kl_peer"].limit, registry.FIGURES["kl_peer"].group) == (1.0, "measure")
    assert registry.FIGURES["kl_self"].limit == 0.0


@pytest.mark.slow
def test_the_figures_on_tiny_models(tmp_path: Path) -> None:
    from tests.peers.__main__ import measure
    from tests.peers.context import Context
    from tests.peers.registry import select

    registry.load_groups()
    context = Context(tmp_path, tiny=True, repeats=1, threads=1)
    for subject in select(["kl_peer", "kl_self"]):
        row = measure(subject, context)
        if row.status == "unavailable":
            pytest.skip(row.how)
        assert row.holds is True, row.how
