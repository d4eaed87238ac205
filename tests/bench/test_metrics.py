import pytest

from edgestill.bench.metrics import METRICS, find_metric
from edgestill.errors import RecipeError


def test_names_are_keys_and_every_metric_can_be_shown():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.description
        assert metric.tasks
        assert metric.show(0.5)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("size_bytes", 91_300_000, "91.3 MB"),
        ("size_bytes", 1_640_000_000, "1.64 GB"),
        ("latency_ms", 12.345, "12.35 ms"),
        ("top1_agreement", 0.987, "98.7%"),
        ("kl", 0.00123456, "0.001235 nats/token"),
        ("perplexity_ratio", 1.02, "1.0200"),
    ],
)
def test_shows_units(name, value, shown):
    assert METRICS[name].show(value) == shown


def test_direction():
    assert METRICS["kl"].is_better(0.1, than=0.2)
    assert METRICS["cosine"].is_better(0.9, than=0.2)
    assert not METRICS["cosine"].is_better(0.9, than=0.9)


def test_unknown_metric_names_the_nearest():
    with pytest.raises(RecipeError, match="latency_ms") as caught:
        find_metric("latencyms")
    assert caught.value.exit_code == 2
