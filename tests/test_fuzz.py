"""Damaged files give a clear error each: a short run of the fuzzer, and proof that it sees what goes wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgestill.errors import BadInput
from tests.fuzz import runner
from tests.fuzz.mutations import mutate
from tests.fuzz.runner import Limits, Tally, make_case, run_case
from tests.fuzz.seeds import Seed

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the fuzzer forks")


@pytest.mark.whole
@pytest.mark.parametrize("part", ["model gguf", "onnx coreml"])
def test_damaged_files_give_clear_errors(part: str) -> None:
    """`python -m tests.fuzz --count 10000 --seed 0` is the long run."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--count", "120", "--seed", "7", "--kinds", part],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    assert "120 damaged files, 0 findings" in ended.stdout
    assert "refused" in ended.stdout


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", b'{"a": [1, 2, {"b": "c"}], "d": null}'), ("a.gguf", b"GGUF" + bytes(200)),
        ("a.onnx", b"\x08\x07" * 9),
        ("weight.bin", bytes(range(256)) * 9), ("empty", b""), ("a.safetensors", b"\x02" + bytes(7) + b"{}"),
    ],
)  # fmt: skip
def test_every_mutation_changes_the_file_and_repeats(name: str, data: bytes) -> None:
    for seed in range(200):
        label, changed = mutate(name, data, random.Random(seed))
        assert changed != data, label
        assert mutate(name, data, random.Random(seed)) == (label, changed)


@pytest.fixture
def seed(tmp_path: Path) -> Seed:
    folder = tmp_path / "seed"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    return Seed("model", folder, folder, "config.json")


def refuse(message: str, hint: str = "a hint") -> None:
    error = BadInput("", hint=hint)
    error.message = message
    raise error


def waste() -> None:
    kept = bytearray(64 << 20)
    for at in range(0, len(kept), 4096):
        kept[at] = 1


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (lambda stage: None, ""), (lambda stage: refuse("a line"), ""),
        (lambda stage: refuse("two\nlines"), "not one line"),
        (lambda stage: refuse("a line", ""), "no hint"), (lambda stage: {}["a"], "KeyError: 'a'"),
        (lambda stage: os.kill(os.getpid(), signal.SIGSEGV), "died with status 11"), (lambda stage: waste(), "it took"),
        (lambda stage: spin(), "over 1 s"), (lambda stage: time.sleep(60), "over 1 s"),
        (lambda stage: refuse("x" * 2000), "over 1,000 characters"),
    ],
)  # fmt: skip
def test_the_fuzzer_sees_what_goes_wrong(
    behaviour: object, expected: str, seed: Seed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "drive", lambda kind, folder, student, stage: behaviour(stage))  # type: ignore[operator]
    tally = Tally()
    limits = Limits(cpu_s=1, wall_s=4, memory_bytes=40 << 20)
    run_case(make_case(0, [seed], tmp_path, 0), limits, tally)
    found = [finding.what for finding in tally.findings]
    assert (expected in found[0]) if expected else not found
    assert len(found) <= 1


def test_cases_repeat_and_leave_the_healthy_files_alone(seed: Seed, tmp_path: Path) -> None:
    one, other = make_case(3, [seed], tmp_path, 5), make_case(3, [seed], tmp_path / "again", 5)
    assert (one.folder / "config.json").read_bytes() == (other.folder / "config.json").read_bytes()
    assert (seed.folder / "config.json").read_text() == '{"a": 1}'
    assert (one.folder / "config.json").read_text() != '{"a": 1}'
