"""Labelled words: reading them, and which token carries which label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgestill.checkpoints import load_tokenizer
from edgestill.data import DataSets, LabelledSet, TaggedSet, load_data
from edgestill.data_labels import NO_LABEL, in_labels_of, label_places, tag_tokens
from edgestill.errors import BadInput, RecipeError
from edgestill.recipe import DataConfig

ROWS = [
    (["Anna", "met", "Mr.", "O'Neil", "in", "Paris"], ["B-PER", "O", "O", "B-PER", "O", "B-LOC"]),
    (["Rain", "fell"], ["O", "O"]),
    (["New", "York", "sleeps"], ["B-LOC", "I-LOC", "O"]),
]


def _load(path: Path, **task: Any) -> DataSets:
    settings = {"name": "ner", "source": path.name, "train": 1, "test": 2, **task}
    return load_data(DataConfig(task=(settings,)), base=path.parent)  # type: ignore[arg-type]


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_formats_give_the_same_set(tmp_path: Path) -> None:
    lines = ["-DOCSTART- -X- O", ""]
    for words, tags in ROWS:
        lines += [f"{word} NN {tag}" for word, tag in zip(words, tags, strict=True)] + [""]
    (tmp_path / "a.conll").write_text("\n".join(lines[:-1]))
    rows = [{"tokens": words, "ner": tags} for words, tags in ROWS]
    first = _load(tmp_path / "a.conll")
    second = _load(_jsonl(tmp_path / "a.jsonl", rows[::-1]), text="tokens", tags="ner")
    assert first == second
    (found,) = first.tagged
    assert (found.labels, len(found.train), len(found.test)) == (("B-LOC", "B-PER", "I-LOC", "O"), 1, 2)
    assert first.labelled == (found,)
    named = {" ".join(words): [found.labels[tag] for tag in tags] for words, tags in (*found.train, *found.test)}
    assert named == {" ".join(words): tags for words, tags in ROWS}


def test_sentences_that_are_judged_are_not_trained_on(tmp_path: Path) -> None:
    tags = ["O"] * 6 + ["X"]
    rows = [{"words": [*f"sentence number {n} is about rain".split(), "sun"], "tags": tags} for n in range(20)]
    _jsonl(tmp_path / "a.jsonl", rows)
    texts = "\n".join(" ".join(row["words"]) for row in rows)
    (tmp_path / "plain.txt").write_text(texts)
    task = {"name": "t", "source": "a.jsonl", "text": "words", "tags": "tags", "train": 5, "test": 8}
    text = {"name": "p", "source": "plain.txt", "train": 12}
    data = load_data(DataConfig(text=(text,), task=(task,)), base=tmp_path)  # type: ignore[arg-type]
    judged = {" ".join(words) for words, _ in data.tagged[0].test}
    assert len(judged) == 8
    assert not judged & set(data.split("train"))
    assert not judged & {" ".join(words) for words, _ in data.tagged[0].train}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"words": ["a", "b"], "tags": ["O"]}, "1 labels for the 2 words of 'a b'"),
        ({"words": "a b", "tags": ["O", "O"]}, "holds str, not a list"),
        ({"words": ["a", " "], "tags": ["O", "O"]}, "an empty word in 'a '"),
        ({"words": ["a", "b"], "tags": ["O", None]}, "no label for 'b'"),
        ({"words": ["a", 3], "tags": ["O", "O"]}, "holds int, not text"),
        ({"word": ["a"], "tags": ["O"]}, "no field 'words'"),
    ],
)
def test_bad_rows_are_one_clear_line(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        _load(_jsonl(tmp_path / "a.jsonl", [row]), text="words", tags="tags")


def test_a_line_without_a_label_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("Anna B-PER\nmet\n")
    with pytest.raises(BadInput, match=r"a\.conll:2: a word without a label"):
        _load(tmp_path / "a.conll")


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
@pytest.mark.parametrize("prefix", ["", "query: "])
def test_the_first_token_of_a_word_carries_its_label(model: str, prefix: str, request: pytest.FixtureRequest) -> None:
    """WordPiece and byte-level BPE (whose tokens hold the space before them), against each word read by hand."""
    tokenizer = load_tokenizer(request.getfixturevalue(model))
    for words, _ in ROWS:
        labels = tuple(range(len(words)))
        (row,) = tag_tokens(tokenizer, [(tuple(words), labels)], 128, prefix)
        ids = tokenizer(prefix + " ".join(words))["input_ids"]
        assert len(row) == len(ids)
        assert [label for label in row if label != NO_LABEL] == list(labels)
        offsets = tokenizer(prefix + " ".join(words), return_offsets_mapping=True)["offset_mapping"]
        text = prefix + " ".join(words)
        for label, (begin, end) in zip(row, offsets, strict=True):
            if label != NO_LABEL:
                assert words[label].startswith(text[begin:end].strip())


def test_words_behind_the_cut_have_no_label(tiny_bert: Path) -> None:
    tokenizer = load_tokenizer(tiny_bert)
    (row,) = tag_tokens(tokenizer, [(("good", "film", "plot", "scene"), (0, 1, 2, 3))], 4)
    assert row == (NO_LABEL, 0, 1, NO_LABEL)


def test_labels_are_the_models_by_name_or_by_number() -> None:
    assert label_places(["bad", "odd"], ["good", "bad"]) is None
    assert label_places(["0", "7"], ["good", "bad"]) is None
    data = LabelledSet("mood", ("bad", "good"), (), (("fine", 1), ("dull", 0)), "0" * 64)
    assert in_labels_of(data, ["good", "fair", "bad"]).test == (("fine", 0), ("dull", 2))
    words = TaggedSet("ner", ("0", "1"), (), ((("a", "b"), (1, 0)),), "0" * 64)
    assert in_labels_of(words, ["O", "X"]).test == ((("a", "b"), (1, 0)),)
    with pytest.raises(RecipeError, match="mood has the labels bad, good, which the model does not know") as error:
        in_labels_of(data, ["spam", "ham"])
    assert "spam, ham" in str(error.value.hint)
