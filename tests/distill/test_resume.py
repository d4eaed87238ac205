"""kill -9 at any moment, call again: the student is bit-identical to that of an undisturbed run.

One helper process imports torch once and forks a child for each life of a run; a child ends itself with SIGKILL at
the place that it is told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = r'''
import json, os, signal, sys
from pathlib import Path

teacher, place, jobs = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

import edgestill.distill.run
from edgestill.data import DataSets, TextSet
from edgestill.distill import checkpoint, distill, run, token_cache, trainer
from edgestill.files import hash_tree
from edgestill.recipe import DistillConfig, StudentConfig

PLAIN = {"threads": 1, "batch_size": 4, "gradient_accumulation": 2, "max_steps": 14}
texts = json.loads(sys.argv[4])
token_cache.SHARD_TOKENS = 300
data = DataSets((TextSet("words", tuple(texts[:120]), (), tuple(texts[120:]), (), "0" * 64),), ())


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill):
    """Have this process killed: at a step, in the middle of a file of a checkpoint, or while the student is written."""
    where, _, value = kill.partition(":")
    real_save, real_write = trainer.save_torch_state, run.atomic_write
    if where == "file":
        name, _, step = value.partition("@")

        def half(state, path):
            real_save(state, path)
            if path.name == name and f"checkpoint-{step}." in path.parent.name:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                die()

        trainer.save_torch_state = half
    if where == "swept":
        trainer.sweep_checkpoints = lambda work, keep: die()
    if where == "card":
        run.atomic_write = lambda path, text: die() if path.name == "distillation.json" else real_write(path, text)
    if where == "result":
        run.atomic_write = lambda path, text: die() if path.name == "result.json" else real_write(path, text)

    def progress(message, fraction=None):
        if where == "step" and message.startswith(f"step {value} "):
            die()
        if where == "teacher" and message.startswith("teacher") and (fraction or 0) > 0.4:
            die()

    return progress


def ship(config):
    """The exporter that a quantised student is trained for."""
    from edgestill.export import export
    from edgestill.recipe import ExportConfig

    to = (config.get("quantized") or {}).get("to")
    return to and (lambda model, out: export(model, out, ExportConfig(to=to)))


def live(job, kill):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        distill(teacher, place / job["name"] / "out", student=StudentConfig(layers=2), data=data, max_length=32,
                config=DistillConfig(**{**PLAIN, **job["config"]}),
                work=place / job["name"] / "work", progress=arm(kill), ship=ship(job["config"]))
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    os._exit(code)


report = {}
for job in jobs:
    states = [live(job, kill) for kill in job["kills"]]
    end = live(job, "never")
    out, work = place / job["name"] / "out", place / job["name"] / "work"
    report[job["name"]] = {"killed": states, "end": end, "hash": hash_tree(out) if out.exists() else None,
                           "left": sorted(path.name for path in work.iterdir())}
print(json.dumps(report))
'''


def _lives(teacher: Path, place: Path, jobs: list[dict[str, object]], sentences: list[str]) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, "-c", HELPER, str(teacher), str(place), json.dumps(jobs), json.dumps(sentences[:150])],
        capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for name, job in report.items():
        assert job["end"] == 0, (name, done.stderr)
    return report


@pytest.mark.whole
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_encoder_run_ends_with_the_same_bytes(encoder: Path, tmp_path: Path, sentences: list[str]):
    config = {"loss": {"embedding_cosine": 1.0, "embedding_gram": 1.0}, "save_every": 4}
    kills = [
        "teacher:", "step:2", "file:weights.pt@4", "file:optimizer.pt@4", "step:6", "swept:", "step:11",
        "file:scheduler.pt@14", "card:", "result:",
    ]  # fmt: skip
    jobs = [
        {"name": "whole", "config": config, "kills": []},
        {"name": "killed", "config": config, "kills": kills},
        {"name": "never-saved", "config": {**config, "save_every": 1000}, "kills": ["step:13"]},
        {"name": "each-step", "config": {**config, "save_every": 1}, "kills": ["step:1", "step:9", "step:14"]},
    ]
    report = _lives(encoder, tmp_path, jobs, sentences)
    assert report["killed"]["killed"] == [9] * len(kills)  # each life ended by SIGKILL where it was told to
    for name in ("killed", "never-saved", "each-step"):
        assert report[name]["hash"] == report["whole"]["hash"], name
        assert report[name]["left"] == report["whole"]["left"], name


@pytest.mark.whole
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_decoder_run_ends_with_the_same_bytes(tiny_llama: Path, tmp_path: Path, sentences: list[str]):
    config = {"loss": {"forward_kl": 0.9, "cross_entropy": 0.1, "hidden_states": 0.1}, "save_every": 3}
    kills = ["step:1", "step:5", "file:optimizer.pt@6", "step:10"]
    jobs = [
        {"name": "whole", "config": config, "kills": []},
        {"name": "killed", "config": config, "kills": kills},
    ]
    report = _lives(tiny_llama, tmp_path, jobs, sentences)
    assert report["killed"]["killed"] == [9] * len(kills)
    assert report["killed"]["hash"] == report["whole"]["hash"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.slow
def test_killed_at_every_step_with_everything_that_has_a_state(tiny_llama: Path, tmp_path: Path, sentences: list[str]):
    config = {
        "loss": {"forward_kl": 1.0}, "max_steps": 6, "save_every": 1, "ema": 0.9, "evaluate_every": 1, "patience": 2,
        "learning_rate": 1e-3, "lora": {"rank": 4}, "gradient_checkpointing": True,
    }  # fmt: skip
    # A rate that runs away: stopped early, after a best step that is not the last one.
    stopped = {**config, "max_steps": 12, "learning_rate": 0.3, "schedule": "constant", "warmup_ratio": 0.0,
               "lora": None, "ema": None}  # fmt: skip
    steps = [f"step:{step}" for step in range(1, 7)]
    jobs = [
        {"name": "whole", "config": config, "kills": []},
        {"name": "killed", "config": config, "kills": [*steps, "card:", "result:"]},
        {"name": "seldom-saved", "config": {**config, "save_every": 4}, "kills": ["step:3", "step:6"]},
        {"name": "stopped", "config": stopped, "kills": []},
        {"name": "stopped-killed", "config": stopped, "kills": ["step:2", "file:extra.pt@3", "card:", "result:"]},
    ]
    report = _lives(tiny_llama, tmp_path, jobs, sentences)
    for job in jobs:
        assert report[job["name"]]["killed"] == [9] * len(job["kills"]), job["name"]
    assert report["killed"]["hash"] == report["seldom-saved"]["hash"] == report["whole"]["hash"]
    assert report["stopped-killed"]["hash"] == report["stopped"]["hash"] != report["whole"]["hash"]
    card = json.loads((tmp_path / "stopped-killed" / "out" / "distillation.json").read_text())
    assert card["best_step"] == card["steps"] - 2
    assert card["steps"] < 12


@pytest.mark.whole
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_run_with_a_teacher_cache_ends_with_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, sentences: list[str]
):
    cache = {"top_k": 16, "tail_samples": 4}
    config = {"loss": {"forward_kl": 0.9, "jsd": 0.1, "hidden_states": 0.1}, "temperature": 2.0, "save_every": 3}
    kills = ["teacher:", "teacher:", "step:5", "step:10"]
    jobs = [
        {"name": "whole", "config": {**config, "cache": cache}, "kills": []},
        {"name": "killed", "config": {**config, "cache": cache}, "kills": kills},
        {"name": "shared", "config": {**config, "cache": {**cache, "path": str(tmp_path / "whole" / "work"),
                                                          "temperatures": [2.0]}}, "kills": ["step:8"]},
        {"name": "live", "config": config, "kills": []},
    ]  # fmt: skip
    report = _lives(tiny_llama, tmp_path, jobs, sentences)
    assert report["killed"]["killed"] == [9, 9, 9, 9]
    assert report["killed"]["hash"] == report["shared"]["hash"] == report["whole"]["hash"] != report["live"]["hash"]
    assert not any(name.startswith("tokens-") for name in report["shared"]["left"])


@pytest.mark.whole
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_run_on_the_grid_ends_with_the_same_bytes(tiny_llama: Path, tmp_path: Path, sentences: list[str]):
    pytest.importorskip("onnxruntime")
    config = {
        "loss": {"forward_kl": 1.0}, "max_steps": 6, "save_every": 2, "ema": 0.9, "evaluate_every": 2, "patience": 3,
        "learning_rate": 1e-3, "quantized": {"to": "onnx:int4"},
    }  # fmt: skip
    kills = ["step:1", "step:3", "file:extra.pt@4", "step:5", "card:", "result:"]
    jobs = [
        {"name": "whole", "config": config, "kills": []},
        {"name": "killed", "config": config, "kills": kills},
        {"name": "float", "config": {**config, "quantized": None}, "kills": []},
    ]
    report = _lives(tiny_llama, tmp_path, jobs, sentences)
    assert report["killed"]["killed"] == [9] * len(kills)
    assert report["killed"]["hash"] == report["whole"]["hash"] != report["float"]["hash"]
    assert report["killed"]["left"] == report["whole"]["left"]
