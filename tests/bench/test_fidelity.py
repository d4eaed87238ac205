import math
import statistics

import numpy as np
import pytest
from scipy.stats import spearmanr

from edgestill.bench.fidelity import (
    expected_calibration_error,
    fidelity,
    mean_estimate,
    own_estimates,
    pairwise_spearman,
    softmax,
)
from edgestill.bench.metrics import METRICS
from edgestill.bench.records import Summary
from edgestill.errors import UsageError
from edgestill.runtimes.session import SessionInfo


def generation_scores(rng, windows=12, tokens=30):
    kl = rng.exponential(0.1, windows * tokens)
    reference = -rng.exponential(2, windows * tokens)
    return {
        "kl": kl,
        "top1": rng.random(windows * tokens) < 0.9,
        "top5": rng.random(windows * tokens) < 0.99,
        "logprob": reference - kl,
        "reference_logprob": reference,
        "confidence": rng.uniform(0.05, 1, windows * tokens),
        "right": rng.random(windows * tokens) < 0.5,
        "window": np.repeat(np.arange(windows), tokens),
    }


def test_generation_metrics_are_what_their_names_say():
    scores = generation_scores(np.random.default_rng(0))
    found = {e.metric: e for e in fidelity("text-generation", scores, documents=np.arange(12))}
    assert set(found) == {
        "kl", "kl_median", "kl_p99", "kl_max", "top1_agreement", "top5_agreement", "delta_p", "delta_p_rms",
        "perplexity", "perplexity_ratio", "next_token_accuracy", "ece",
    }  # fmt: skip
    assert found["kl"].summary.value == pytest.approx(scores["kl"].mean())
    assert found["kl_p99"].summary.value == pytest.approx(np.quantile(scores["kl"], 0.99))
    assert found["top1_agreement"].summary.value == pytest.approx(scores["top1"].mean())
    ratio = np.exp(-scores["logprob"].mean()) / np.exp(-scores["reference_logprob"].mean())
    assert found["perplexity_ratio"].summary.value == pytest.approx(ratio)
    own, accuracy, ece = own_estimates(scores, documents=np.arange(12))
    assert accuracy.summary.value == pytest.approx(scores["right"].mean())
    assert ece == found["ece"]
    assert found["perplexity"].summary.value / own.summary.value == pytest.approx(ratio)
    for name, estimate in found.items():
        assert "text-generation" in METRICS[name].tasks
        if name == "kl_max":
            assert estimate.summary == Summary(scores["kl"].max(), "max", 360)
        else:
            assert estimate.summary.low < estimate.summary.value < estimate.summary.high


def test_change_of_the_true_tokens_probability_by_a_plain_loop():
    scores = generation_scores(np.random.default_rng(4))
    found = {e.metric: e.summary for e in fidelity("text-generation", scores, documents=np.arange(12))}
    changes = sorted(
        math.exp(a) - math.exp(b) for a, b in zip(scores["logprob"], scores["reference_logprob"], strict=True)
    )
    assert found["delta_p"].value == pytest.approx(sum(changes) / 360)
    assert found["delta_p_rms"].value == pytest.approx(math.sqrt(sum(c * c for c in changes) / 360))
    assert list(found["delta_p"].percentiles) == "p1 p5 p10 p25 p50 p75 p90 p95 p99".split()
    for name, value in found["delta_p"].percentiles.items():
        at = int(name[1:]) / 100 * 359
        low, part = int(at), at - int(at)
        assert value == pytest.approx(changes[low] * (1 - part) + changes[min(low + 1, 359)] * part, abs=1e-12)
    assert found["kl_median"].value == pytest.approx(statistics.median(scores["kl"]))


def test_few_tokens_give_no_far_tails():
    scores = generation_scores(np.random.default_rng(4), windows=4, tokens=5)
    found = {e.metric: e.summary for e in fidelity("text-generation", scores, documents=np.arange(4))}
    assert list(found["delta_p"].percentiles) == ["p25", "p50", "p75"]
    assert "kl_p99" not in found


def test_samples_give_the_value_back():
    scores = generation_scores(np.random.default_rng(1))
    for estimate in fidelity("text-generation", scores, documents=np.arange(12)):
        if estimate.summary.statistic == "mean":
            assert np.mean(estimate.samples) == pytest.approx(estimate.summary.value, rel=1e-5)
        elif estimate.summary.statistic == "geometric_mean":
            assert np.exp(np.log(estimate.samples).mean()) == pytest.approx(estimate.summary.value, rel=1e-5)
        else:
            of = {"ece": "confidence of the first choice", "delta_p_rms": "delta_p"}.get(estimate.metric, "kl")
            assert estimate.protocol["derived_from"] == of


def test_p99_only_where_the_number_of_tokens_supports_it():
    scores = generation_scores(np.random.default_rng(0), windows=9, tokens=30)
    assert "kl_p99" not in {e.metric for e in fidelity("text-generation", scores, documents=np.arange(9))}


def test_intervals_resample_documents_not_tokens():
    """Tokens that repeat their document's value must not make the interval narrower."""
    values = np.random.default_rng(0).normal(size=10)
    once = mean_estimate("kl", values).summary
    repeated = mean_estimate("kl", np.repeat(values, 50), groups=np.repeat(np.arange(10), 50)).summary
    assert repeated.n == 500
    assert repeated.high - repeated.low == pytest.approx(once.high - once.low, rel=0.1)


def test_perfect_agreement_still_has_an_interval():
    summary = mean_estimate("top1_agreement", np.ones(20)).summary
    assert summary.high == 1
    assert summary.low == pytest.approx(0.025 ** (1 / 20))


def test_one_document_has_no_interval():
    scores = generation_scores(np.random.default_rng(0), windows=1)
    for estimate in fidelity("text-generation", scores, documents=[0]):
        if estimate.metric in ("kl", "perplexity"):
            assert estimate.summary.low is None


def test_spearman_equals_scipy_over_all_pairs():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(40, 8))
    b = a @ rng.normal(size=(8, 5)) + rng.normal(size=(40, 5))
    upper = np.triu_indices(40, 1)

    def cosines(x):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        return (unit @ unit.T)[upper]

    estimate = pairwise_spearman(a, b)
    assert estimate.summary.value == pytest.approx(spearmanr(cosines(a), cosines(b)).statistic, abs=1e-12)
    assert estimate.summary.low < estimate.summary.value < estimate.summary.high
    assert estimate.protocol["pairs"] == 780


def test_spearman_interval_agrees_with_resampling_sentences_the_slow_way():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(30, 6))
    b = a + rng.normal(size=(30, 6))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    first, second = (x @ x.T for x in unit)
    drawn = []
    for _ in range(300):
        chosen = rng.integers(30, size=30)
        i, j = np.triu_indices(30, 1)
        i, j = chosen[i], chosen[j]
        different = i != j
        drawn.append(spearmanr(first[i, j][different], second[i, j][different]).statistic)
    summary = pairwise_spearman(a, b).summary
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert summary.low == pytest.approx(low, abs=0.05)
    assert summary.high == pytest.approx(high, abs=0.05)


def test_spearman_of_few_sentences_survives_a_resample_of_one_alone():
    """Warnings are errors here: a resample of one sentence three times has no pair to divide by."""
    x = np.random.default_rng(0).normal(size=(3, 4))
    summary = pairwise_spearman(x, x + 0.01).summary
    assert np.isfinite([summary.value, summary.low, summary.high]).all()


def test_spearman_of_itself_is_one_and_of_too_few_is_refused():
    x = np.random.default_rng(0).normal(size=(10, 4))
    assert pairwise_spearman(x, 3 * x).summary.value == pytest.approx(1)
    with pytest.raises(UsageError):
        pairwise_spearman(x[:2], x[:2])


def test_ece_of_a_hand_made_case():
    # four examples of confidence 0.7 in one bin, three right: |0.75 - 0.7|
    estimate = expected_calibration_error(np.full(4, 0.7), np.array([1, 1, 1, 0]))
    assert estimate.summary.value == pytest.approx(0.05)
    assert estimate.protocol["reliability"]["accuracy"] == (0.75,)


def test_ece_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 3)) * 2, rng.integers(3, size=200)
    p = softmax(logits)
    confidence, right = p.max(1), p.argmax(1) == labels
    total = 0.0
    for b in range(15):
        inside = (confidence >= b / 15) & (confidence < (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    estimate = expected_calibration_error(confidence, right)
    assert estimate.summary.value == pytest.approx(total)
    assert estimate.summary.low < estimate.summary.high
    assert estimate.protocol["reliability"]["counts"] == (20,) * 10  # no bin of the curve has fewer than 20
    np.testing.assert_allclose(estimate.samples, confidence, rtol=1e-5)


def test_embeddings_and_classes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 4))
    scores = {"cosine": np.full(20, 0.99), "embeddings": x, "reference_embeddings": x + 0.01}
    found = {e.metric for e in fidelity("feature-extraction", scores, documents=np.arange(20))}
    assert found == {"cosine", "spearman"}
    scores = {"kl": rng.exponential(size=20), "top1": np.ones(20, bool), "logits": x}
    found = {e.metric for e in fidelity("text-classification", scores, documents=np.arange(20))}
    assert found == {"kl", "kl_median", "kl_max", "top1_agreement"}


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(UsageError, match="NaN"):
        fidelity("text-classification", {"kl": np.array([np.nan]), "top1": np.ones(1)}, documents=[0])


def test_measurement_carries_unit_and_runtime():
    info = SessionInfo("onnxruntime", "1.32.0", "CPUExecutionProvider", "text-generation", ("forward",), 10, 64)
    row = mean_estimate("kl", [0.1, 0.3]).measurement(
        subject="onnx-int4", artifact_id="0" * 64, info=info, device="here", threads=1, environment={},
        against="teacher", data="reviews", protocol={"text_sha256": "1" * 64},
    )  # fmt: skip
    assert (row.unit, row.samples, row.against) == ("nats/token", ((0.1, 0.3),), "teacher")
    assert row.protocol["text_sha256"] == "1" * 64
