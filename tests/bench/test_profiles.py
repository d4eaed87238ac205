from __future__ import annotations

from pathlib import Path

import pytest

from edgestill.bench.profiles import find_profile, load_profile, profile_names
from edgestill.errors import BadInput, UsageError

GOOD = """
title = "A board"
kind = "board"
processor = "cpu"
soc = "x1"
[memory]
value = 4
unit = "GB"
source = "https://example.org/board"
[bandwidth]
value = 12.8
unit = "GB/s"
source = "32 bit at 3200 MT/s: https://example.org/board"
[[prefill]]
model = "m"
parameters = 1e9
format = "Q4_0"
prompt_tokens = 128
tokens_per_s = 20
source = "https://example.org/speeds"
"""


def test_every_shipped_profile_loads_and_every_number_has_a_source() -> None:
    names = profile_names()
    assert len(names) >= 20
    for name in names:
        profile = find_profile(name)
        facts = [fact for fact in (profile.memory, profile.process_memory, profile.bandwidth) if fact]
        assert all(fact.source.strip() for fact in [*facts, *profile.prefill])
        assert facts, f"{name} says nothing"
        assert profile.fitted_as in names


def test_units_are_bytes_inside() -> None:
    profile = load_profile("board", GOOD, where="board.toml")
    assert profile.memory is not None
    assert profile.bandwidth is not None
    assert (profile.memory.value, profile.memory.unit, profile.memory.shown) == (4e9, "bytes", "4 GB")
    assert (profile.bandwidth.value, profile.bandwidth.unit) == (12.8e9, "bytes/s")
    assert load_profile("b", GOOD.replace('"GB"', '"GiB"'), where="b").memory.value == 4 * 2**30  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('unit = "GB"\nsource = "https://example.org/board"', 'unit = "GB"', "memory has no source"),
        ('source = "https://example.org/speeds"', "", "prefill.0 has no source"),
        ('source = "https://example.org/board"', 'source = "  "', "a source names a page"),
        ('source = "https://example.org/board"', 'source = "guess"', "a source names a page"),
        ("value = 4", "value = -4", "memory.value"),
        ("value = 4", "value = nan", "memory.value"),
        ("value = 4", 'value = "much"', "memory.value"),
        ('unit = "GB/s"', 'unit = "Gbit"', "unknown unit 'Gbit'"),
        ("[bandwidth]", "[bandwith]", "did you mean 'bandwidth'"),
        ("value = 12.8", "value = 12.8\nvalues = 3", "did you mean 'value'"),
        ('processor = "cpu"', 'processor = "tpu"', "processor"),
        ("[memory]", "[memory", "not valid TOML"),
        ("prompt_tokens = 128\n", "", "prefill.0.prompt_tokens"),
    ],
)
def test_what_is_wrong_is_named(before: str, after: str, told: str) -> None:
    assert before in GOOD
    with pytest.raises(BadInput, match=r"board\.toml") as caught:
        load_profile("board", GOOD.replace(before, after), where="board.toml")
    assert told in caught.value.message


def test_a_profile_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "my 'board'.toml"
    path.write_text(GOOD)
    assert find_profile(str(path)).name == "my 'board'"
    with pytest.raises(BadInput, match="does not exist"):
        find_profile(str(tmp_path / "none.toml"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="can't be read"):
        find_profile(str(path))
    path.write_text("#" * (2 << 20))
    with pytest.raises(BadInput, match="no device profile"):
        find_profile(str(path))
    with pytest.raises(BadInput, match="not valid TOML"):
        load_profile("deep", "a = " + "[" * 20_000, where="deep.toml")


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        find_profile("raspbery-pi-5-4gb")
    assert "raspberry-pi-5-4gb" in caught.value.hint
    with pytest.raises(UsageError, match="no device profile ''"):
        find_profile("")
