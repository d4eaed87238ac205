"""Multiple choice and cloze: files, how text is cut, and what is counted, against plain loops."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from edgestill.bench.completions import completion_estimates, encode_pairs, read_completions
from edgestill.bench.likelihood import Likelihood, likelihoods
from edgestill.bench.metrics import METRICS
from edgestill.bench.task_files import load_tokenizer_file
from edgestill.errors import BadInput

CHOICE = {"context": "the film was", "choices": ["good", "very bad"], "answer": 1}
CLOZE = {"context": "the film was", "target": "good"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_reads_both_kinds(tmp_path):
    choice = read_completions(write(tmp_path / "a.jsonl", CHOICE, "", {**CHOICE, "answer": "good", "join": ""}))
    assert (choice.name, choice.kind, [e.answer for e in choice.examples]) == ("a", "choice", [1, 0])
    assert [e.continuations for e in choice.examples] == [(" good", " very bad"), ("good", "very bad")]
    assert choice.examples[0].texts == ("good", "very bad")
    cloze = read_completions(
        write(tmp_path / "b.jsonl", CLOZE, {"context": "a ", "target": "b"}, {"context": "", "target": "b"})
    )
    assert (cloze.kind, [e.continuations for e in cloze.examples]) == ("cloze", [(" good",), ("b",), ("b",)])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "1: "),
        ([1], "not an object"),
        ({"context": "a"}, "neither"),
        ({"choices": ["a", "b"], "answer": 0}, "`context`"),
        ({**CHOICE, "choices": ["a"]}, "two or more"),
        ({**CHOICE, "choices": ["a", ""]}, "two or more"),
        ({**CHOICE, "answer": 2}, "0 to 1"),
        ({**CHOICE, "answer": True}, "0 to 1"),
        ({**CHOICE, "answer": "no"}, "not one of the choices"),
        ({**CLOZE, "answer": 0}, "belongs to"),
        ({**CHOICE, "target": "a"}, "beside"),
        ({**CHOICE, "asnwer": 1}, "unknown field 'asnwer'"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, row, says):
    with pytest.raises(BadInput, match=says) as caught:
        read_completions(write(tmp_path / "x.jsonl", row))
    assert f"{tmp_path / 'x.jsonl'}:1" in str(caught.value)


def test_files_that_are_no_set_are_refused(tmp_path):
    with pytest.raises(BadInput, match="mixes"):
        read_completions(write(tmp_path / "x.jsonl", CHOICE, CLOZE))
    with pytest.raises(BadInput, match="no example"):
        read_completions(write(tmp_path / "y.jsonl", ""))
    with pytest.raises(BadInput, match="does not exist"):
        read_completions(tmp_path / "none.jsonl")
    (tmp_path / "z.jsonl").write_bytes(b'{"context": "\xff"}')
    with pytest.raises(BadInput, match="UTF-8"):
        read_completions(tmp_path / "z.jsonl")


def test_what_is_counted_by_a_plain_loop(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {
            "context": "a",
            "choices": ["x" * n for n in rng.integers(1, 9, size=3).cumsum().tolist()],
            "answer": int(rng.integers(3)),
        }
        for _ in range(40)
    ]
    data = read_completions(write(tmp_path / "x.jsonl", *rows))
    found = [Likelihood(float(value), 2, False) for value in rng.normal(-9, 3, 120)]
    teacher = [Likelihood(float(value), 2, False) for value in rng.normal(-9, 3, 120)]
    got = {e.metric: e for e in completion_estimates(data, found, teacher=teacher)}
    byte = raw = theirs = 0
    for index, row in enumerate(rows):
        mine = [one.logprob for one in found[3 * index : 3 * index + 3]]
        per = [value / len(text) for value, text in zip(mine, row["choices"], strict=True)]
        other = [
            one.logprob / len(t) for one, t in zip(teacher[3 * index : 3 * index + 3], row["choices"], strict=True)
        ]
        byte += per.index(max(per)) == row["answer"]
        raw += mine.index(max(mine)) == row["answer"]
        theirs += other.index(max(other)) == row["answer"]
    assert byte != raw
    assert got["accuracy"].summary.value == byte / 40
    assert got["accuracy_raw"].summary.value == raw / 40
    assert got["accuracy_ratio"].summary.value == pytest.approx(byte / theirs)
    assert got["accuracy"].summary.low < byte / 40 < got["accuracy"].summary.high
    assert all("text-generation" in METRICS[name].tasks for name in got)


def test_bytes_and_not_letters_are_counted(tmp_path):
    data = read_completions(write(tmp_path / "x.jsonl", {"context": "a", "choices": ["ab", "éé"], "answer": 1}))
    found = [Likelihood(-4.0, 1, False), Likelihood(-6.0, 1, False)]
    got = {e.metric: e.summary.value for e in completion_estimates(data, found)}
    assert got == {"accuracy": 1.0, "accuracy_raw": 0.0}


def test_cloze_counts_greedy_hits_and_whole_targets(tmp_path):
    data = read_completions(write(tmp_path / "x.jsonl", *[CLOZE] * 4))
    found = [
        Likelihood(-1.0, 2, True),
        Likelihood(-2.0, 1, True),
        Likelihood(-3.0, 1, False),
        Likelihood(-6.0, 3, False),
    ]
    got = {e.metric: e.summary.value for e in completion_estimates(data, found)}
    assert got == {"accuracy": 0.5, "target_perplexity": pytest.approx(math.exp(3))}
    with pytest.raises(BadInput, match="3 likelihoods"):
        completion_estimates(data, found[:3])


def test_ids_are_cut_as_lm_eval_cuts_them(tiny_llama):
    tokenizer = load_tokenizer_file(tiny_llama)
    pairs = encode_pairs(tokenizer, [("the film ", "good"), ("the film", " good"), ("", "good"), (" ", "good")], 0)
    whole = tokenizer.encode("the film good").ids
    for context, continuation in pairs[:2]:
        assert context == tokenizer.encode("the film").ids
        assert context + continuation == whole
    assert pairs[2] == ([0], tokenizer.encode("good").ids)
    assert pairs[3] == ([0], tokenizer.encode(" good").ids)
    with pytest.raises(BadInput, match="no BOS"):
        encode_pairs(tokenizer, [("", "good")], None)


def test_likelihoods_come_in_the_order_asked_and_context_is_cut_on_the_left(tiny_llama):
    from edgestill.runtimes.scoring import score
    from edgestill.runtimes.session import SessionOptions
    from edgestill.runtimes.torch_session import TorchSession

    session = TorchSession(tiny_llama, SessionOptions(1))

    class Here:
        def info(self):
            return session.info()

        def score(self, reference, batch_size=8):
            return score(session, reference, batch_size=batch_size)

    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(3, 300, a).tolist(), rng.integers(3, 300, b).tolist())
        for a, b in ((4, 3), (200, 5), (1, 1), (60, 128))
    ]
    got = likelihoods(Here(), pairs, batch_size=2)
    for (context, continuation), mine in zip(pairs, got, strict=True):
        fed = np.array([[*context, *continuation][-129:][:-1]])  # the model takes 128
        logits = session.forward(fed, np.ones_like(fed))[0, -len(continuation) :].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        wanted = logp[np.arange(len(continuation)), continuation]
        assert mine.logprob == pytest.approx(wanted.sum(), rel=1e-5)
        assert mine.tokens == len(continuation)
        assert mine.greedy == (logits.argmax(axis=1) == continuation).all()
    with pytest.raises(BadInput, match="continuation of 129"):
        likelihoods(Here(), [([1], [1] * 129)])
    with pytest.raises(BadInput, match="0 context"):
        likelihoods(Here(), [([], [1])])
