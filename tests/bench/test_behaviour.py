"""The checks on a toy model whose every answer is known."""

import numpy as np
import pytest

from edgestill.bench.behaviour import (
    against_other_reference,
    check_decode,
    check_faithful,
    check_padding,
    distance,
    loss_checks,
)
from edgestill.bench.limits import Ceiling, Faithful
from edgestill.runtimes.session import DecodedToken, SessionInfo

LIMITS = Faithful(1e-3, 0.9, 1e-3, 1e-2, "because")


class Toy:
    """Logits are a table's row for the sum of the ids so far; faults are switched on by name."""

    def __init__(self, fault=""):
        self.fault = fault
        self.table = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)

    def info(self):
        capabilities = ("forward", "score") if self.fault == "no decode" else ("forward", "decode", "score")
        return SessionInfo("toy", "1", "cpu", "text-generation", capabilities, 12, 64)

    def forward(self, ids, mask):
        states = np.cumsum(ids * mask, axis=1) % 50
        if self.fault == "padding" and len(ids) > 1 and not mask.all():
            states = np.cumsum(ids, axis=1)[:, -1:] % 50 + 0 * states  # padding leaks into every position
        return self.table[states]

    def decode(self, prompt_ids, n, logits=False):
        ids, steps = list(prompt_ids), []
        for step in range(n):
            state = sum(ids) % 50
            if self.fault == "cache" and step > 2:
                state = (state + 1) % 50
            row = self.table[state]
            steps.append(DecodedToken(int(row.argmax()), 0.0, row if logits else None))
            ids.append(steps[-1].id)
        return steps


@pytest.mark.parametrize(("fault", "passed"), [("", True), ("cache", False)])
def test_decode_parity(fault, passed):
    check = check_decode(Toy(fault), [1, 2, 3], 6, LIMITS)
    assert check.passed == passed
    if passed:
        assert check.value == pytest.approx(0, abs=1e-12)
    else:
        assert check.value > 1e-3
        assert check.worst_input in {f"decoded token {i}" for i in (3, 4, 5)}


def test_decode_parity_of_what_can_not_decode_is_said_so():
    check = check_decode(Toy("no decode"), [1], 2, LIMITS)
    assert check.passed
    assert check.reason.startswith("not applicable")


@pytest.mark.parametrize(("fault", "passed"), [("", True), ("padding", False)])
def test_padding_parity(fault, passed):
    check = check_padding(Toy(fault), "text-generation", np.array([3, 1, 4, 1, 5, 9]), LIMITS)
    assert check.passed == passed


def describe(row):
    return f"row {row}"


def test_faithful_by_mean_kl_names_the_worst_row():
    kl = np.array([1e-5, 1e-5, 9e-4, 1e-5])
    scores = {"kl": kl, "top1": np.array([True, True, False, True]), "window": np.array([0, 0, 1, 1])}
    mean, agreement = check_faithful("text-generation", scores, LIMITS, describe)
    assert mean.passed
    assert mean.value == pytest.approx(kl.mean())
    assert mean.worst_input == "row 1"
    assert agreement.passed  # one of four is not told from noise
    scores["top1"] = np.array([True, False, False, True])
    assert not check_faithful("text-generation", scores, LIMITS, describe)[1].passed


def test_faithful_embeddings_by_the_worst_one():
    (check,) = check_faithful("feature-extraction", {"cosine": np.array([1, 1 - 2e-3, 1])}, LIMITS, describe)
    assert not check.passed
    assert check.worst_input == "row 1"


def test_distance_is_kl_or_one_minus_cosine():
    a = np.log(np.array([[0.5, 0.5]])).astype(np.float32)
    b = np.log(np.array([[0.9, 0.1]])).astype(np.float32)
    assert distance("text-classification", a, b)[0] == pytest.approx(
        0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(5), rel=1e-6
    )
    assert distance("feature-extraction", np.eye(2)[:1], np.eye(2)[1:])[0] == 1
    assert distance("feature-extraction", np.ones((1, 3)), 2 * np.ones((1, 3)))[0] == pytest.approx(0, abs=1e-15)


def test_loss_is_judged_by_ceiling_or_gate_or_only_stated():
    rng = np.random.default_rng(0)
    scores = {"kl": rng.exponential(0.2, 40), "top1": rng.random(40) < 0.9}
    ceiling = Ceiling(0.1, 2, 0.1, "a ceiling")
    by_ceiling = loss_checks("text-classification", scores, range(40), "student", ceiling, {})
    assert [(c.name, c.passed, c.limit) for c in by_ceiling] == [
        ("kl_to_student", False, 0.1),
        ("top1_agreement_to_student", True, None),
    ]
    by_gate = loss_checks(
        "text-classification", scores, range(40), "teacher", None, {"kl": 9.0, "top1_agreement": 0.99}
    )
    assert [(c.passed, c.limit, c.sense) for c in by_gate] == [(True, 9.0, "at_most"), (False, 0.99, "at_least")]
    stated = loss_checks("text-classification", scores, range(40), "teacher", None, {})
    assert all(c.passed and c.limit is None and c.low < c.value < c.high for c in stated)


def test_kept_outputs_give_what_a_second_score_would(tmp_path):
    rng = np.random.default_rng(0)
    said = rng.normal(size=(5, 3)).astype(np.float32)
    ids = np.ones((5, 2), np.int64)
    for name, array in {"ids": ids, "mask": ids, "logits": said, "embeddings": said}.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "reference.json").write_text('{"task": "text-classification"}')
    found = against_other_reference("text-classification", {"logits": said[::-1]}, tmp_path)
    np.testing.assert_allclose(found["kl"], distance("text-classification", said, said[::-1]))
    (tmp_path / "reference.json").write_text('{"task": "feature-extraction"}')
    found = against_other_reference("feature-extraction", {"embeddings": 2 * said}, tmp_path)
    np.testing.assert_allclose(found["cosine"], 1, atol=1e-6)
    other_size = against_other_reference("feature-extraction", {"embeddings": said[:, :2]}, tmp_path)
    assert "cosine" not in other_size
    assert other_size["reference_embeddings"].shape == (5, 3)
