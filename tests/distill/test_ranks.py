"""Two gloo processes on this machine against one: the same run, whoever shares the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = r'''
import json, os, signal, sys, traceback
from pathlib import Path

place, jobs, texts = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])

import torch
import edgestill.distill.run
from edgestill.data import DataSets, TextSet
from edgestill.distill import distill, ranks
from edgestill.files import hash_tree
from edgestill.recipe import DistillConfig, StudentConfig

data = DataSets((TextSet("words", tuple(texts[:120]), (), tuple(texts[120:]), (), "0" * 64),), ())


def train(job, rank):
    told = []

    def progress(text, part=None):
        told.append(text)
        if rank == 0 and job.get("stop") and text.startswith(f"step {job['stop']} of"):
            os.kill(os.getpid(), signal.SIGINT)

    result = distill(Path(job["teacher"]), place / job["name"] / "out", student=StudentConfig(layers=2), data=data,
                     max_length=32, config=DistillConfig(threads=1, learning_rate=2e-3, max_steps=6, **job["config"]),
                     work=place / job["name"] / "work", progress=progress)
    return {"hash": hash_tree(result.path), "cost": dict(result.cost), "told": len(told),
            "curves": [dict(row) for row in result.curves], "after": dict(result.dev_after)}


def talk(job, rank):
    """The small things: sums, gathered rows with their gradient, what the first one says, its errors."""
    ranks.start()
    rows = torch.full((2, 3), float(rank + 1), requires_grad=True)
    gathered = ranks.gather_rows(rows)
    (gathered * torch.arange(1.0, 5.0)[:, None]).sum().backward()
    try:
        ranks.from_first(lambda: 1 / 0)
        error = ""
    except ZeroDivisionError as found:
        error = str(found)
    with ranks.first_goes_ahead():
        there = (place / "mark").exists()
        if ranks.is_first():
            (place / "mark").write_text("x")
    return {"world": ranks.world(), "rank": ranks.rank(), "counts": ranks.add_counts({"a": rank + 1, "b": 10}),
            "gathered": gathered[:, 0].tolist(), "grad": rows.grad[:, 0].tolist(), "there": there, "error": error,
            "told": ranks.from_first(lambda: f"from {ranks.rank()}"), "threads": ranks.threads_each(8)}


def process(job, rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]),
                      LOCAL_WORLD_SIZE=str(job["world"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if job["world"] == 1:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                os.environ.pop(name)
        answer = (train if "config" in job else talk)(job, rank)
        (place / f"{job['name']}-{rank}.json").write_text(json.dumps(answer))
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


for job in jobs:
    for pid in [process(job, rank) for rank in range(job["world"])]:
        if os.waitpid(pid, 0)[1] and not job.get("fails"):
            sys.exit(f"a process of {job['name']} failed")
'''


def _port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _processes(place: Path, jobs: list[dict], sentences: list[str]) -> subprocess.CompletedProcess[str]:
    jobs = [{"port": _port(), "teacher": "", **job} for job in jobs]
    return subprocess.run(
        [sys.executable, "-c", HELPER, str(place), json.dumps(jobs), json.dumps(sentences[:150])],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip


def _answers(place: Path, name: str, world: int) -> list[dict]:
    return [json.loads((place / f"{name}-{rank}.json").read_text()) for rank in range(world)]


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.mark.whole
def test_processes_tell_each_other_what_they_need(encoder: Path, tmp_path: Path, sentences: list[str]):
    config = {"loss": {"embedding_cosine": 1.0}, "batch_size": 3}
    odd = {"name": "odd", "world": 2, "teacher": str(encoder), "config": config, "fails": True}
    done = _processes(tmp_path, [{"name": "talk", "world": 2}, odd], sentences)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("batch_size = 3 can't be shared by 2 processes") == 2
    first, second = _answers(tmp_path, "talk", 2)
    for rank, answer in enumerate((first, second)):
        assert (answer["world"], answer["rank"], answer["threads"]) == (2, rank, 4)
        assert answer["counts"] == {"a": 3, "b": 20}
        assert answer["gathered"] == [1.0, 1.0, 2.0, 2.0]
        assert answer["error"] == "division by zero"
        assert answer["told"] == "from 0"
    # Both processes used every row: twice the slope, for the rows of each its own.
    assert (first["grad"], second["grad"]) == ([2.0, 4.0], [6.0, 8.0])
    assert (first["there"], second["there"]) == (False, True)


@pytest.mark.whole
def test_two_processes_have_the_loss_curve_of_one(
    encoder: Path, tiny_llama: Path, tmp_path: Path, sentences: list[str]
):
    embedding = {
        "loss": {"embedding_cosine": 1.0, "embedding_gram": 5.0}, "batch_size": 8, "evaluate_every": 3, "patience": 9,
    }  # fmt: skip
    generation = {
        "loss": {"forward_kl": 0.9, "cross_entropy": 0.1, "hidden_states": 0.2}, "batch_size": 4,
        "gradient_accumulation": 2, "ema": 0.9, "save_every": 2, "gradient_checkpointing": True,
    }  # fmt: skip
    jobs = [
        {"name": f"{name}-{world}", "world": world, "teacher": str(teacher), "config": config}
        for name, teacher, config in (("encoder", encoder, embedding), ("decoder", tiny_llama, generation))
        for world in (1, 2)
    ]
    done = _processes(tmp_path, jobs, sentences)
    assert done.returncode == 0, done.stderr
    for name in ("encoder", "decoder"):
        (alone,) = _answers(tmp_path, f"{name}-1", 1)
        first, second = _answers(tmp_path, f"{name}-2", 2)
        assert first["curves"] == second["curves"]  # both know the whole result
        assert first["told"] >= 6
        assert second["told"] == 0  # one tells
        assert len(alone["curves"]) == len(first["curves"])
        for ours, theirs in zip(alone["curves"], first["curves"], strict=True):
            assert (ours["step"], ours["tokens"]) == (theirs["step"], theirs["tokens"])
            for key in set(ours) - {"dev"}:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-4), (name, ours["step"], key)
        for key, value in alone["after"].items():
            assert first["after"][key] == pytest.approx(value, rel=1e-3)
        left = [sorted(path.name for path in (tmp_path / f"{name}-{world}" / "work").iterdir()) for world in (1, 2)]
        assert left[0] == left[1]


@pytest.mark.whole
def test_two_processes_write_what_one_would_have_written(tiny_llama: Path, tmp_path: Path, sentences: list[str]):
    """On-policy: each writes its share of the step's texts, and which they are depends on neither."""
    config = {
        "loss": {"reverse_kl": 1.0}, "batch_size": 4, "gradient_accumulation": 2, "save_every": 2,
        "on_policy": {"ratio": 0.7, "prompt_tokens": 3, "new_tokens": 6, "replay": 0},
    }  # fmt: skip
    jobs = [{"name": f"own-{n}", "world": n, "teacher": str(tiny_llama), "config": config} for n in (1, 2)]
    done = _processes(tmp_path, jobs, sentences)
    assert done.returncode == 0, done.stderr
    (alone,), (first, second) = _answers(tmp_path, "own-1", 1), _answers(tmp_path, "own-2", 2)
    assert first["curves"] == second["curves"]
    assert first["cost"] == second["cost"] == alone["cost"]
    assert {row.get("words") for row in alone["curves"]} >= {"text", "student"}
    for ours, theirs in zip(alone["curves"], first["curves"], strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["step"], ours["tokens"], ours.get("words")) == (
            theirs["step"], theirs["tokens"], theirs.get("words"))  # fmt: skip
        for key in set(ours) - {"dev", "words"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4), (ours["step"], key)


@pytest.mark.whole
def test_each_process_finds_its_own_texts_again(tiny_llama: Path, tmp_path: Path, sentences: list[str]):
    config = {
        "loss": {"reverse_kl": 1.0}, "batch_size": 4, "save_every": 2,
        "on_policy": {"ratio": 1.0, "prompt_tokens": 3, "new_tokens": 6, "replay": 12, "replay_ratio": 0.9,
                      "adapt_every": 2},
    }  # fmt: skip
    job = {"world": 2, "teacher": str(tiny_llama), "config": config}
    cut = {**job, "name": "cut", "stop": 3, "fails": True}
    done = _processes(tmp_path, [{**job, "name": "whole"}, cut], sentences)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cut-0.json").exists()
    (checkpoint,) = (tmp_path / "cut" / "work").glob("checkpoint-*")
    states = json.loads((checkpoint / "rollout.json").read_text())
    assert [len(state["kept"]) for state in states] == [len(states[0]["kept"])] * 2
    assert states[0]["kept"] != states[1]["kept"]
    done = _processes(tmp_path, [{**job, "name": "cut"}], sentences)
    assert done.returncode == 0, done.stderr
    whole, again = (_answers(tmp_path, name, 2)[0] for name in ("whole", "cut"))
    words = {row["step"]: row["words"] for row in whole["curves"] if "words" in row}
    assert (words[1], words[4], words[6]) == ("student", "replay", "replay")  # before the cut, and behind it
    assert again["curves"] == whole["curves"]
    assert (again["hash"], again["cost"]) == (whole["hash"], whole["cost"])
