from __future__ import annotations

import math

import pytest

from edgestill.bench.points import load_points, parse_points
from edgestill.errors import BadInput

HEAD = "device,model,bytes_per_token_gb,decode_tok_s,source\n"


def test_the_points_given_and_the_anchors_stay_apart() -> None:
    points = load_points()
    assert sum(point.given for point in points) == 22
    assert len({point.device for point in points if point.given}) == 5
    assert len({point.device for point in points}) == 20
    assert all(point.source and 0 < math.exp(point.log_efficiency) < 1 for point in points)


def test_efficiency_is_the_share_of_the_documented_bandwidth() -> None:
    [point] = parse_points(HEAD + "apple-m1-pro,llama 7B F16,13.48,12.75,s\n", where="x.csv")
    assert math.exp(point.log_efficiency) == pytest.approx(13.48 * 12.75 / 200)
    assert (point.bits, point.processor, point.soc) == (16, "gpu", "apple-m1-pro")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("apple-m1,llama 7B F16,13.48,12.75,\n", "no source"),
        ("apple-m1,llama 7B F99,13.48,12.75,s\n", "F99"),
        ("apple-m1,llama 7B F16,0,12.75,s\n", "not a positive number"),
        ("apple-m1,llama 7B F16,nan,12.75,s\n", "not a positive number"),
        ("apple-m1,llama 7B F16,13.48,fast,s\n", "fast"),
        ("apple-m1,,13.48,1,s\n", "x.csv:2"),
        ("raspberry-pi-4-4gb,llama 7B F16,13.48,1,s\n", "has no bandwidth"),
    ],
)
def test_a_bad_row_is_named(row: str, told: str) -> None:
    with pytest.raises(BadInput, match=r"x\.csv:2") as caught:
        parse_points(HEAD + row, where="x.csv")
    assert told in caught.value.message


def test_other_columns_are_refused() -> None:
    with pytest.raises(BadInput, match="columns"):
        parse_points("device,tok_s\n", where="x.csv")
