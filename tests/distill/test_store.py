from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgestill.distill import store
from edgestill.distill.store import ShardStore, header_differences
from edgestill.errors import BadInput, ResourceExhausted

DTYPE = np.dtype([("a", "<u2", (3,)), ("b", "<f4")])
SIZES = (4, 0, 5, 2)


def _records(number: int) -> np.ndarray:
    found = np.zeros(SIZES[number], dtype=DTYPE)
    found["a"] = np.arange(SIZES[number] * 3).reshape(-1, 3) + 100 * number
    found["b"] = number + np.arange(SIZES[number]) / 8
    return found


ALL = np.concatenate([_records(number) for number in range(4)])


def _store(root: Path, **header: object) -> ShardStore:
    return ShardStore(root, "things", {"teacher": "a", **header}, DTYPE, SIZES, unit="token")


def _filled(root: Path) -> ShardStore:
    found = _store(root)
    found.fill(_records)
    return found


def test_rows_come_back_in_any_order_and_twice(tmp_path: Path):
    rows = np.array([10, 0, 3, 4, 8, 8, 9])
    found = _filled(tmp_path).take(rows)
    assert found.tobytes() == ALL[rows].tobytes()
    assert not isinstance(found, np.memmap)


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "OPEN_MAPS", 1)
    found = _filled(tmp_path)
    for row in (0, 10, 4, 1, 9):
        assert found.take(np.array([row])).tobytes() == ALL[row : row + 1].tobytes()


def test_the_plan_says_sizes_before_anything_is_there(tmp_path: Path):
    plan = _store(tmp_path / "not" / "yet").plan()
    assert (plan.rows, plan.row_bytes, plan.size_bytes, plan.missing_bytes) == (11, 10, 110, 110)
    assert plan.free_bytes > 0
    assert list(tmp_path.iterdir()) == []
    told: list[str] = []
    _store(tmp_path).fill(lambda number: (told.append(f"shard {number}"), _records(number))[1],
                          lambda text, fraction=None: told.append(text))  # fmt: skip
    assert "11 tokens of 10 bytes" in told[0]
    assert told[1] == "shard 0"
    assert _store(tmp_path).plan().missing_bytes == 0


def test_what_is_there_is_not_computed_again_and_may_be_read_only(tmp_path: Path):
    whole = _filled(tmp_path)
    for path in [whole.folder, *whole.folder.iterdir()]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        before = {path: path.stat().st_mtime_ns for path in whole.folder.iterdir()}
        again = _store(tmp_path)
        again.fill(lambda number: pytest.fail("computed"))
        assert again.take(np.arange(11)).tobytes() == ALL.tobytes()
        assert {path: path.stat().st_mtime_ns for path in whole.folder.iterdir()} == before
    finally:
        whole.folder.chmod(0o755)


@pytest.mark.parametrize("damage", ["cut", "flipped", "longer", "empty"])
def test_a_damaged_shard_is_told_and_computed_again(tmp_path: Path, damage: str):
    shard = _filled(tmp_path).path(2)
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes({"cut": content[:-3], "flipped": content, "longer": content + b"x", "empty": b""}[damage])
    with pytest.raises(BadInput, match=r"shard-00002\.bin is missing or damaged"):
        _store(tmp_path).take(np.array([5]))
    asked, told = [], []
    again = _store(tmp_path)
    again.fill(lambda number: (asked.append(number), _records(number))[1], lambda text, _=None: told.append(text))
    assert asked == [2]
    assert sum("shard-00002.bin is damaged" in text for text in told) == 1
    assert again.take(np.arange(11)).tobytes() == ALL.tobytes()


def test_a_header_names_what_differs(tmp_path: Path):
    here = _filled(tmp_path)
    other = _store(tmp_path, teacher="b")
    assert other.folder != here.folder
    assert header_differences(here.folder, here.header) == []
    assert header_differences(here.folder, other.header) == ["teacher"]
    assert json.loads((here.folder / "cache.json").read_text())["teacher"] == "a"


def test_no_room_is_said_before_the_first_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 50}))
    with pytest.raises(ResourceExhausted, match="answers need") as caught:
        _store(tmp_path).fill(lambda number: pytest.fail("ran"))
    assert "free some room" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


HELPER = """
import os, sys, time
from pathlib import Path
import numpy as np
from edgestill.distill.store import ShardStore

root, name, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def compute(number):
    with (root / "asked").open("a") as stream:
        stream.write(f"{name} {number}\\n")
    time.sleep(pause)
    return np.full(4, number, dtype=[("a", "<i8")])

store = ShardStore(root, "things", {}, [("a", "<i8")], [4] * 6, unit="token")
store.fill(compute)
assert store.take(np.arange(24))["a"].tolist() == [n for n in range(6) for _ in range(4)]
"""


def _process(root: Path, name: str, pause: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", HELPER, str(root), name, str(pause)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def _asked(root: Path) -> list[list[str]]:
    path = root / "asked"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def _wait(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_kill_9_loses_one_shard(tmp_path: Path):
    first = _process(tmp_path, "first", 0.2)
    _wait(lambda: len(_asked(tmp_path)) == 3)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert _process(tmp_path, "second", 0).wait() == 0
    # A shard that was written just before the kill is not asked for again.
    done = [int(number) for name, number in _asked(tmp_path) if name == "second"]
    assert done in ([2, 3, 4, 5], [3, 4, 5])


def test_two_at_once_share_the_work(tmp_path: Path):
    both = [_process(tmp_path, name, 0.3) for name in ("first", "second")]
    assert [process.wait() for process in both] == [0, 0]
    assert sorted(number for _, number in _asked(tmp_path)) == list("012345")  # nobody did anything twice


BIG = """
import resource, sys
from pathlib import Path
import numpy as np
from edgestill.distill.store import ShardStore

store = ShardStore(Path(sys.argv[1]), "things", {}, [("a", "<u1", (256,))], [400_000], unit="token")
assert store.plan().missing_bytes == 0
used = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
limit = int(used.split()[1]) * 1024 + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
rows = np.random.default_rng(0).integers(0, 400_000, 1000)
assert store.take(rows)["a"].shape == (1000, 256)
try:
    store.take(np.arange(400_000))
except MemoryError:
    print("the limit holds")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_thousand_rows_of_a_large_shard_take_the_memory_of_a_thousand_rows(tmp_path: Path):
    big = ShardStore(tmp_path, "things", {}, [("a", "<u1", (256,))], [400_000], unit="token")
    payload = bytes(400_000 * 256)  # 102 MB
    big.folder.mkdir()
    big.path(0).write_bytes(payload + hashlib.sha256(payload).digest())
    # 16 MB of memory of its own, beside the pages of the file that the kernel may drop at any time.
    done = subprocess.run(
        [sys.executable, "-c", BIG, str(tmp_path), str(16 << 20)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "the limit holds\n"
