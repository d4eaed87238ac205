from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.data import DataSets, load_data, normalise, split_sentences
from edgestill.errors import BadInput
from edgestill.recipe import DataConfig

Load = Callable[..., DataSets]
SPLITS = ("train", "calibration", "dev", "test")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def run(**config: Any) -> DataSets:
        return load_data(DataConfig.model_validate(config), base=tmp_path, cache=tmp_path / "cache")

    return run


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def documents(count: int, seed: int = 0) -> list[str]:
    """Reviews of 1 to 6 sentences, some sentences shared by several reviews, with tags."""
    chooser = random.Random(seed)
    shared = [f"Everybody says sentence number {n} about films." for n in range(15)]
    found = []
    for number in range(count):
        own = [
            f"Review {number} of seed {seed} has a remark {part} of its own." for part in range(chooser.randint(1, 5))
        ]
        found.append("<br /><br />".join([*own, chooser.choice(shared)]))
    return found


def all_keys(data: DataSets) -> dict[str, set[str]]:
    return {split: {normalise(text) for text in data.split(split)} for split in SPLITS}  # type: ignore[arg-type]


def test_splits_share_no_text_whatever_the_order_of_the_file(tmp_path: Path, load: Load) -> None:
    rows = [{"0": text} for text in documents(300)]
    config = {"source": "a.jsonl", "field": "0", "unit": "sentence", "name": "a"}
    counts = {"train": 200, "calibration": 20, "dev": 30, "test": 40}
    results = []
    for seed in (1, 2):
        random.Random(seed).shuffle(rows)
        write_jsonl(tmp_path / "a.jsonl", rows)
        results.append(load(text=[{**config, **counts}]))
    assert results[0] == results[1]
    assert results[0].sha256 == results[1].sha256
    keys = all_keys(results[0])
    assert {split: len(found) for split, found in keys.items()} == counts
    assert sum(map(len, keys.values())) == len(set.union(*keys.values()))


def test_test_sentences_come_from_documents_that_training_never_sees(tmp_path: Path, load: Load) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents(200)])
    data = load(text=[{"name": "a", "source": "a.jsonl", "unit": "sentence", "train": 300, "test": 30, "dev": 20}])

    def reviews(split: str) -> set[str]:
        return {text.split()[1] for text in getattr(data.text[0], split) if text.startswith("Review")}

    assert reviews("test")
    assert not reviews("test") & reviews("train")
    assert not reviews("test") & reviews("dev")


def test_the_test_split_does_not_depend_on_how_much_is_trained_on(tmp_path: Path, load: Load) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents(200)])
    config = {"name": "a", "source": "a.jsonl", "unit": "sentence", "test": 30}
    small, large = (load(text=[{**config, "train": train}]) for train in (10, 300))
    assert small.text[0].test == large.text[0].test
    assert small.text[0].sha256 != large.text[0].sha256
    assert small.text[0].train == large.text[0].train[:10]


def test_another_seed_gives_another_split(tmp_path: Path, load: Load) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents(200)])
    text = [{"name": "a", "source": "a.jsonl", "test": 30}]
    assert load(text=text, seed=1).text[0].test != load(text=text, seed=2).text[0].test


def test_sets_made_of_the_same_documents_stay_apart(tmp_path: Path, load: Load) -> None:
    rows = documents(120)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in rows])
    write_jsonl(tmp_path / "b.jsonl", [{"text": text.upper().replace(" ", "  ")} for text in reversed(rows)])
    data = load(
        text=[
            {"name": "a", "source": "a.jsonl", "unit": "sentence", "train": 100, "test": 20},
            {"name": "b", "source": "b.jsonl", "unit": "sentence", "train": 100, "test": 20},
        ]
    )
    keys = all_keys(data)
    assert not keys["train"] & keys["test"]
    tests = {key.split()[1] for key in keys["test"] if key.startswith("review")}
    assert not tests & {key.split()[1] for key in keys["train"] if key.startswith("review")}


def test_texts_that_a_task_is_judged_on_are_not_trained_on(tmp_path: Path, load: Load) -> None:
    rows = [{"text": text, "label": number % 3} for number, text in enumerate(documents(150))]
    write_jsonl(tmp_path / "a.jsonl", rows)
    data = load(
        text=[{"name": "a", "source": "a.jsonl", "unit": "sentence", "train": 150, "test": 10}],
        task=[{"name": "kinds", "source": "a.jsonl", "train": 40, "test": 50}],
    )
    task = data.tasks[0]
    judged = {sentence for text, _ in task.test for sentence in map(normalise, split_sentences(text))}
    assert judged
    assert not judged & all_keys(data)["train"]
    assert not {text for text, _ in task.test} & {text for text, _ in task.train}
    assert (len(task.train), len(task.test), task.labels) == (40, 50, ("0", "1", "2"))
    truth = {row["text"]: row["label"] for row in rows}
    assert all(task.labels[index] == str(truth[text]) for text, index in (*task.train, *task.test))


def test_a_text_with_two_labels_is_left_out_and_where_filters(tmp_path: Path, load: Load) -> None:
    rows = [{"t": f"text {n}", "l": "xy"[n % 2], "source": "good"} for n in range(20)]
    rows += [{"t": "TEXT  0", "l": "y", "source": "good"}, {"t": "text 99", "l": "x", "source": "bad"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    task = {"name": "a", "source": "a.jsonl", "text": "t", "label": "l", "where": {"source": "good"}}
    data = load(task=[{**task, "train": 9, "test": 10}])
    texts = {text for text, _ in (*data.tasks[0].train, *data.tasks[0].test)}
    assert texts == {f"text {n}" for n in range(1, 20)}
    with pytest.raises(BadInput, match="19 labelled texts, asked for test 10 and train 10"):
        load(task=[{**task, "train": 10, "test": 10}])


def test_all_formats_give_the_same_texts(tmp_path: Path, load: Load) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = ["plain words", 'with "quotes", a comma', "naïve café 日本語 🙂"]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\r\n", encoding="utf-8-sig")
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    (tmp_path / "a.csv").write_text("number,text\n" + "".join(f"1,{cell}\n" for cell in quoted), encoding="utf-8")
    (tmp_path / "b.dat").write_text("number,text\n" + "".join(f"1,{c}\n" for c in quoted), encoding="utf-16")
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    sets = [load(text=[{"name": "a", "source": f"a.{kind}", "test": 3}]) for kind in ("jsonl", "txt", "csv", "parquet")]
    sets.append(load(text=[{"name": "a", "source": "b.dat", "test": 3, "format": "csv", "encoding": "utf-16"}]))
    assert sorted(sets[0].text[0].test) == sorted(texts)
    assert all(one == sets[0] for one in sets)


@pytest.mark.parametrize(
    ("name", "content", "config", "message"),
    [
        ("a.txt", b"", {}, "holds no text"),
        ("a.txt", b"\n  \n", {}, "holds no text"),
        ("a.txt", b"good line\nbad \xe9 line\n", {}, r"byte 14 does not fit.*set `encoding`"),
        ("a.txt", b"x" * 3_000_000 + b"\xff", {}, "byte 3000000 does not fit"),
        ("a.txt", b"text", {"encoding": "utf-99"}, "unknown encoding 'utf-99'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'["text"]\n', {}, "not a JSON object"),
        ("a.jsonl", b"[" * 100_000 + b"\n", {}, "not valid JSON"),
        ("a.jsonl", b'{"txet": "a", "b": 1}\n', {}, r"no field 'text' in line 1; there are 'txet', 'b'.*did you mean"),
        ("a.jsonl", b'{"text": 5}\n', {}, "holds int, not text"),
        ("a.csv", b"text,label\na\n", {}, "not as many columns"),
        ("a.csv", b'text\n"open\n', {}, "not valid csv"),
        ("a.csv", b"label\n1\n", {}, "no field 'text'"),
        ("a.parquet", b"PAR1 no", {}, "not valid parquet"),
        ("a.xyz", b"text", {}, "unknown kind of file '.xyz'"),
        ("a.txt", b"one\ntwo\nONE\n", {}, r"2 documents left for test; the set holds 2 different ones, asked for"),
    ],
)
def test_bad_files_give_one_line(
    tmp_path: Path, load: Load, name: str, content: bytes, config: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        load(text=[{"name": "a", "source": name, "test": 3, **config}])
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_hostile_text_is_kept_as_text(tmp_path: Path, load: Load) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "lone \\ud800 surrogate"}\n{"text": "a \\u0000 null"}\n{"text": null}\n'
    )
    data = load(text=[{"name": "a", "source": "a.jsonl", "test": 2}])
    assert sorted(data.text[0].test) == ["a   null", "lone � surrogate"]
    assert len(data.sha256) == 64


def test_too_few_sentences_take_more_from_each_document_first(tmp_path: Path, load: Load) -> None:
    texts = ["A single sentence that stands alone here."] + [
        " ".join(f"Document {d} has its sentence {n} here." for n in range(9)) for d in range(3)
    ]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    config = {"name": "a", "source": "a.txt", "unit": "sentence"}
    assert len(load(text=[{**config, "test": 28}]).text[0].test) == 28
    with pytest.raises(BadInput, match="28 sentences left for test; the set holds 28 different ones"):
        load(text=[{**config, "test": 29}])
    with pytest.raises(BadInput, match="left for train"):
        load(text=[{**config, "test": 3, "train": 20}])


@pytest.mark.parametrize(
    ("document", "sentences"),
    [
        ("I saw it twice last year! Was it worth the money? Yes...",
         ["I saw it twice last year!", "Was it worth the money?"]),
        ("No tags < here and a > there, only signs.", ["No tags < here and a > there, only signs."]),
        ("Tom &amp; Jerry are still very funny.", ["Tom & Jerry are still very funny."]),
        ('He said "never again in my life." Then he left the theatre.',
         ['He said "never again in my life."', "Then he left the theatre."]),
        ("The price was 3.50 at the box office. Mr. T. was there too.",
         ["The price was 3.50 at the box office.", "Mr. T. was there too."]),
        ("A heading without a full stop<br/>and a paragraph\nthat wraps around.",
         ["A heading without a full stop", "and a paragraph that wraps around."]),
        ("short. " + "x" * 301, []),
    ],
)  # fmt: skip
def test_sentences(document: str, sentences: list[str]) -> None:
    assert split_sentences(document) == sentences


@given(st.text(max_size=400))
def test_sentences_are_short_clean_and_survive_a_second_cut(text: str) -> None:
    for sentence in split_sentences(text):
        assert 20 <= len(sentence) <= 300
        assert sentence == " ".join(sentence.replace("\0", " ").split())


@given(st.text(max_size=60))
def test_normalising_is_idempotent_enough_to_compare(text: str) -> None:
    once = normalise(text)
    assert normalise(f"  {text}\t\n") == once
    assert "  " not in once
