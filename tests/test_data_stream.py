"""Training text that is read while it is learnt from, against the same recipe with all text in memory."""

from __future__ import annotations

import itertools
import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from edgestill.data import DataSets, load_data
from edgestill.distill.stream import TokenStream
from edgestill.errors import BadInput
from edgestill.recipe import DataConfig

WORDS = "rain sun wind snow fog storm calm heat frost hail dew thaw".split()


def _texts(count: int, seed: int = 0) -> list[str]:
    chooser = random.Random(seed)
    return [
        f"Report {seed}-{n}: {' '.join(chooser.choices(WORDS, k=20))}. And then there was {n} again."
        for n in range(count)
    ]


def _write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _load(base: Path, *texts: dict[str, Any], stream: bool = True, **more: Any) -> DataSets:
    return load_data(DataConfig(text=texts, **more), base=base, stream=stream)  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", ["document", "sentence"])
def test_held_out_splits_are_those_of_the_text_in_memory(tmp_path: Path, unit: str) -> None:
    _write(tmp_path / "a.jsonl", _texts(900))
    _write(tmp_path / "b.jsonl", _texts(40, seed=1) + _texts(900)[:300])  # 300 are in both
    sets = [
        {"name": "a", "source": "a.jsonl", "unit": unit, "train": 500, "dev": 9, "test": 20, "calibration": 4},
        {"name": "b", "source": "b.jsonl", "unit": unit, "train": 100, "test": 15},
    ]
    plain, streamed = (_load(tmp_path, *sets, stream=stream) for stream in (False, True))
    assert plain.stream is None
    for ours, theirs in zip(streamed.text, plain.text, strict=True):
        assert (ours.test, ours.dev, ours.calibration) == (theirs.test, theirs.dev, theirs.calibration)
        assert ours.train == ()
    stream = streamed.stream
    assert stream is not None
    learnt = list(stream)
    assert len(learnt) == len(stream) == 600
    held_out = {text for name in ("test", "dev", "calibration") for text in plain.split(name)}  # type: ignore[arg-type]
    assert not held_out & set(learnt)
    assert list(stream) == learnt  # every pass is the same
    assert _load(tmp_path, *sets).sha256 == streamed.sha256
    assert learnt != list(_load(tmp_path, *sets, seed=1).stream or ())


def test_whole_file_is_learnt_but_for_what_is_held_out(tmp_path: Path) -> None:
    texts = _texts(700)
    _write(tmp_path / "a.jsonl", texts)
    data = _load(tmp_path, {"name": "a", "source": "a.jsonl", "train": 680, "test": 20})
    learnt = list(data.stream or ())
    assert sorted([*learnt, *data.split("test")]) == sorted(texts)
    assert learnt != [text for text in texts if text in set(learnt)]  # shuffled
    blocks = [{texts.index(text) // 256 for text in learnt[begin : begin + 200]} for begin in (0, 480)]
    assert blocks[0] == {0}  # but inside of blocks
    with pytest.raises(BadInput, match="680 documents left for train"):
        _load(tmp_path, {"name": "a", "source": "a.jsonl", "train": 681, "test": 20})


def test_memory_follows_a_block_and_not_the_file(tmp_path: Path) -> None:
    filler, peaks = " ".join(WORDS * 15), []
    for count in (300, 1200, 4800):  # the first time something is imported
        path = tmp_path / f"{count}.jsonl"
        _write(path, [f"{number} {filler} {number}" for number in range(count)])
        tracemalloc.start()
        data = _load(tmp_path, {"name": "a", "source": path.name, "train": count - 10, "dev": 5, "test": 5})
        assert sum(1 for _ in data.stream or ()) == count - 10
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 4_000_000
    assert peaks[2] < 1.05 * peaks[1], peaks


def test_a_cursor_goes_on_in_the_file(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", _texts(300))
    data = _load(tmp_path, {"name": "a", "source": "a.jsonl", "train": 290, "test": 10})
    assert data.stream is not None
    stream = data.stream

    def tokens() -> TokenStream:
        return TokenStream(lambda: iter(stream), lambda text: [len(word) for word in text.split()], 50, 0)

    whole = list(itertools.islice(tokens(), 250))  # more than a pass
    for cut in (0, 1, 77, 160):
        first = tokens()
        begin = list(itertools.islice(first, cut))
        second = tokens()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begin + list(itertools.islice(second, 250 - cut)) == whole


def test_a_file_that_changes_while_it_is_learnt_is_one_line(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", _texts(50))
    stream = _load(tmp_path, {"name": "a", "source": "a.jsonl", "train": 40, "test": 5}).stream
    assert stream is not None
    list(stream)
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadInput, match=r"a\.jsonl has changed since its text was split"):
        list(stream)
