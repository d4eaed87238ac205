"""The command in several processes, as `torchrun` and `accelerate launch` start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgestill import company

RECIPE = """name = "shared"
[teacher]
source = "{teacher}"
[student]
layers = 2
[data]
max_length = 32
[[data.text]]
name = "words"
source = "{text}"
train = 100
dev = 40
[distill]
loss = {{ forward_kl = 1.0 }}
batch_size = 4
max_steps = 4
threads = 1
"""


def test_a_single_process_is_no_company():
    assert not company.follows()
    with company.company():
        assert company.together(divmod)(7, 2) == (3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_launched_processes_make_one_student(launcher: str, tiny_llama: Path, tmp_path: Path, sentences: list[str]):
    text = tmp_path / "words.txt"
    text.write_text("\n".join(sentences))
    recipe = tmp_path / "shared.toml"
    recipe.write_text(RECIPE.format(teacher=tiny_llama, text=text))
    two = ["--nproc-per-node", "2"] if launcher.startswith("torch") else ["--cpu", "--num_processes", "2"]
    steps: list[list[float]] = []
    for name, start in (("one", []), ("two", ["-m", launcher, *two])):
        command = ["-m", "edgestill", "distill", str(recipe), "--runs", str(tmp_path / name), "--json"]
        done = subprocess.run(
            [sys.executable, *start, *command],
            capture_output=True, text=True, timeout=500,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)  # one process speaks: one document
        lines = (tmp_path / name / "shared" / "student" / "training.jsonl").read_text().splitlines()
        steps.append([json.loads(line)["loss"] for line in lines if "loss" in line])
    assert len(steps[0]) == 4
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)
