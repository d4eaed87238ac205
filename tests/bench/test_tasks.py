import numpy as np
import pytest

from edgestill.bench.fidelity import softmax
from edgestill.bench.tasks import (
    accuracy_ratio,
    fit_probe,
    make_task_reference,
    predict_probe,
    task_estimates,
)
from edgestill.data import LabelledSet
from edgestill.errors import BadInput
from edgestill.runtimes.scoring import open_reference


@pytest.mark.parametrize("classes", [2, 4])
def test_probe_equals_scikit_learn(classes):
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(classes, 12))
    y = rng.integers(classes, size=150)
    x = centres[y] + 1.5 * rng.normal(size=(150, 12))
    weight, bias = fit_probe(x, y, classes)
    theirs = LogisticRegression(C=1.0, max_iter=2000, tol=1e-9).fit(x, y)
    np.testing.assert_allclose(weight, theirs.coef_, atol=2e-3)
    if classes == 2:
        np.testing.assert_allclose(bias, theirs.intercept_, atol=2e-3)
    else:  # softmax does not fix the common part of the intercepts
        np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=2e-3)
    np.testing.assert_array_equal(predict_probe(x, (weight, bias)), theirs.predict(x))


def test_probe_is_the_same_every_time():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), rng.integers(2, size=40)
    first, second = fit_probe(x, y, 2), fit_probe(x, y, 2)
    np.testing.assert_array_equal(first[0], second[0])


def labelled(sentences):
    rows = tuple((text, int("good" in text or "love" in text)) for text in sentences)
    return LabelledSet("mood", ("no", "yes"), rows[:60], rows[60:100], "0" * 64)


def test_embeddings_are_probed(tiny_bert, sentences, tmp_path):
    data = labelled(sentences)
    reference = make_task_reference(tiny_bert, tmp_path / "r", data, threads=1)
    said = np.asarray(open_reference(reference).said)
    assert len(said) == 100
    labels = np.array([label for _, label in (*data.train, *data.test)])
    accuracy, ratio, ece = task_estimates(said, reference, teacher_outputs=said)
    expected = predict_probe(said[60:], fit_probe(said[:60], labels[:60], 2)) == labels[60:]
    assert accuracy.metric == "accuracy"
    assert accuracy.summary.value == pytest.approx(expected.mean())
    assert accuracy.summary.n == 40
    weight, bias = fit_probe(said[:60], labels[:60], 2)
    sure = 1 / (1 + np.exp(-np.abs(said[60:].astype(np.float64) @ weight[0] + bias[0])))  # the sigmoid's larger side
    np.testing.assert_allclose(ece.samples, sure, rtol=1e-5)
    assert (ratio.metric, ratio.summary.value, ratio.summary.low, ratio.summary.high) == ("accuracy_ratio", 1, 1, 1)
    # what a probe may see is the label itself: then nothing is wrong
    marked = np.stack([labels * 20.0 - 10, np.ones(100)], axis=1)
    assert task_estimates(marked, reference)[0].summary.value == 1


def test_a_classifier_is_asked_directly(tiny_classifier, sentences, tmp_path):
    rows = tuple((text, index % 3) for index, text in enumerate(sentences[:30]))
    data = LabelledSet("three", ("bad", "fair", "good"), (), rows, "0" * 64)
    reference = make_task_reference(tiny_classifier, tmp_path / "r", data, threads=1)
    said = np.asarray(open_reference(reference).said)
    labels = np.array([label for _, label in rows])
    accuracy, ece = task_estimates(said, reference)
    assert accuracy.summary.value == pytest.approx((said.argmax(1) == labels).mean())
    confidence = softmax(said).max(1)
    assert ece.metric == "ece"
    assert 0 <= ece.summary.value <= 1
    assert ece.summary.value >= abs(confidence.mean() - accuracy.summary.value) - 1e-9


def test_ratio_is_paired():
    """Two models that are right on the same examples differ for certain; drawn apart they would not."""
    rng = np.random.default_rng(0)
    teacher = rng.random(300) < 0.8
    student = teacher.copy()
    student[np.flatnonzero(teacher)[:12]] = False
    summary = accuracy_ratio(student, teacher).summary
    assert summary.value == pytest.approx(student.mean() / teacher.mean())
    assert summary.high < 1
    assert summary.high - summary.low < 0.06


def test_bad_input_is_named(tiny_bert, sentences, tmp_path):
    with pytest.raises(BadInput, match="no example right"):
        accuracy_ratio(np.ones(3, bool), np.zeros(3, bool))
    nothing = LabelledSet("mood", ("no", "yes"), (), (("x", 0),), "0" * 64)
    with pytest.raises(BadInput, match="training examples"):
        make_task_reference(tiny_bert, tmp_path / "r", nothing)
    reference = make_task_reference(tiny_bert, tmp_path / "r", labelled(sentences), threads=1)
    with pytest.raises(BadInput, match="3 outputs for 100 labels"):
        task_estimates(np.zeros((3, 4)), reference)
