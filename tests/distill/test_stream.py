from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgestill.data import DataSets, load_data
from edgestill.distill import DistillResult, distill
from edgestill.distill.stream import TokenStream
from edgestill.errors import BadInput, RecipeError, Unsupported
from edgestill.files import hash_tree
from edgestill.recipe import DataConfig, DistillConfig, StudentConfig

TEXTS = ["one two three four five", "", "six", "seven eight nine ten eleven twelve thirteen", "fourteen"]


def _ids(text: str) -> list[int]:
    return [len(word) * 100 + ord(word[0]) for word in text.split()]


def _stream(texts: list[str] = TEXTS, length: int = 4, end: int | None = 0) -> TokenStream:
    return TokenStream(lambda: iter(texts), _ids, length, end)


def _expected(passes: int) -> list[int]:
    one = [token for text in TEXTS if text for token in [*_ids(text), 0]]
    return one * passes


def test_windows_follow_each_other_without_a_gap_pass_after_pass():
    stream = _stream()
    windows = list(itertools.islice(stream, 10))
    assert [token for window in windows for token in window] == _expected(3)[:40]
    assert stream.passes == 2
    assert next(_stream(end=None)) == tuple(_ids(TEXTS[0])[:4])


@pytest.mark.parametrize("length", [1, 4, 11, 40])
def test_any_cursor_goes_on_with_the_same_windows(length: int):
    whole = list(itertools.islice(_stream(length=length), 12))
    for cut in range(12):
        first = _stream(length=length)
        begin = list(itertools.islice(first, cut))
        cursor = json.loads(json.dumps(first.state_dict()))
        second = _stream(length=length)
        second.load_state_dict(cursor)
        assert begin + list(itertools.islice(second, 12 - cut)) == whole


def test_what_was_read_is_not_tokenised_again():
    first = _stream()
    list(itertools.islice(first, 4))
    seen: list[str] = []
    second = TokenStream(lambda: iter(TEXTS), lambda text: seen.append(text) or _ids(text), 4, 0)
    second.load_state_dict(first.state_dict())
    next(second)
    assert seen == ["fourteen", TEXTS[0]]


def test_memory_follows_a_document_and_not_the_corpus():
    def documents() -> Iterator[str]:
        for number in range(3_000):
            yield " ".join(f"w{number}x{word}" for word in range(200))

    stream = TokenStream(documents, lambda text: [len(word) for word in text.split()], 64, 0)
    next(stream)
    tracemalloc.start()
    for _ in itertools.islice(stream, 9_000):
        assert len(stream.state_dict()["carry"]) < 64 + 201
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stream.passes == 0
    assert peak < 200_000  # the corpus has 5 MB of text


def test_an_empty_corpus_and_one_that_shrank_are_one_line():
    with pytest.raises(BadInput, match="no text"):
        next(_stream(["", ""]))
    first = _stream()
    list(itertools.islice(first, 4))
    second = _stream(TEXTS[:2])
    second.load_state_dict(first.state_dict())
    with pytest.raises(BadInput, match="has 2 documents, and document 4 was read"):
        next(second)


class _Cut(Exception):
    pass


def _run(teacher: Path, place: Path, data: DataSets, cut: int = 0, **changes: Any) -> DistillResult:
    def progress(text: str, part: float | None = None) -> None:
        if cut and text.startswith(f"step {cut} "):
            raise _Cut

    settings = {"batch_size": 4, "gradient_accumulation": 2, "max_steps": 6, "threads": 1, "save_every": 2,
                "loss": {"forward_kl": 1.0}, "streaming": True, **changes}  # fmt: skip
    return distill(
        teacher, place / "out", config=DistillConfig(**settings), student=StudentConfig(layers=2), data=data,
        max_length=16, work=place / "work", progress=progress,
    )  # fmt: skip


@pytest.mark.whole
def test_a_streamed_run_that_was_cut_sees_the_same_windows(
    tiny_llama: Path, tmp_path: Path, sentences: list[str], data: DataSets
):
    (tmp_path / "words.txt").write_text("\n".join(sentences))
    text = {"name": "words", "source": "words.txt", "train": 150, "dev": 50}
    in_memory, data = data, load_data(DataConfig(text=(text,)), base=tmp_path, stream=True)  # type: ignore[arg-type]
    assert data.stream is not None
    whole = _run(tiny_llama, tmp_path / "whole", data)
    for cut in (1, 3, 4, 6):
        with pytest.raises(_Cut):
            _run(tiny_llama, tmp_path / "cut", data, cut=cut)
    again = _run(tiny_llama, tmp_path / "cut", data)
    assert hash_tree(again.path) == hash_tree(whole.path)
    assert again.tokens_seen == 6 * 8 * 16  # every window is full: nothing is padded, nothing is left out
    assert whole.dev_after["kl"] < whole.dev_before["kl"]
    assert hash_tree(_run(tiny_llama, tmp_path / "cut", in_memory).path) != hash_tree(whole.path)


def test_what_cannot_be_streamed_is_one_line(tiny_llama: Path, encoder: Path, tmp_path: Path, data: DataSets):
    with pytest.raises(RecipeError, match="max_steps"):
        _run(tiny_llama, tmp_path, data, max_steps=None)
    with pytest.raises(Unsupported, match="streaming"):
        _run(encoder, tmp_path, data, loss={"embedding_cosine": 1.0})
