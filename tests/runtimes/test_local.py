"""A local worker through crash, hang, flood and the death of its parent: one clear error, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgestill.errors import BadInput, ResourceExhausted, WorkerError
from edgestill.runtimes.protocol import exchange_root
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports import local
from edgestill.runtimes.transports.local import LocalWorker

ONE = SessionOptions(threads=1)
IDS = np.array([[1, 2, 3], [4, 5, 0]])
MASK = np.array([[1, 1, 1], [1, 1, 0]])


def exchanges(pid: int | None = None) -> list[Path]:
    return sorted(exchange_root().glob(f"edgestill-{pid or os.getpid()}-*"))


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends within ``seconds``; a zombie counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def group_gone(group: int, seconds: float = 10) -> bool:
    """Whether nobody is left in a process group."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert exchanges() == []


@pytest.fixture
def start(toy, toy_command):
    def run(behaviour: str = "well", **options) -> LocalWorker:
        return LocalWorker(toy(behaviour), ONE, command=toy_command, **options)

    return run


def test_everything_a_worker_gives(start):
    with start() as worker:
        assert worker.info().runtime == "toy"
        assert worker.info().capabilities == ("forward", "decode", "score", "latency")
        assert worker.capabilities["protocol"] == 1
        assert worker.load_seconds >= 0
        assert worker.cold_load_seconds is None
        assert "not evicted" in worker.cold_reason
        output = worker.forward(IDS, MASK)
        assert output.dtype == np.float32
        np.testing.assert_array_equal(output.argmax(-1)[0], [1, 3, 5])
        plain, full = worker.decode([1, 2], 3), worker.decode([1, 2], 3, logits=True)
        assert [token.id for token in plain] == [token.id for token in full] == [3, 5, 8]
        assert plain[0].logits is None
        assert [int(token.logits.argmax()) for token in full] == [3, 5, 8]
        assert len(worker.time_forward(IDS, MASK, repeats=3, warmup=1, max_seconds=5)) == 3
        samples = worker.time_decode([1], 4, repeats=2, warmup=0, max_seconds=5)
        assert [len(sample["tokens_s"]) for sample in samples] == [3, 3]
        assert worker.memory()["peak_rss"] > 0
        assert list(worker.exchange.folder.iterdir()) == []
        pid = worker.pid
    assert gone(pid)


def test_score_is_reduced_on_the_other_side(start, tmp_path, toy_command):
    from edgestill.runtimes.scoring import score

    sys.path.insert(0, str(Path(toy_command[1]).parent))
    try:
        import toy_worker
    finally:
        sys.path.pop(0)
    folder = tmp_path / "reference"
    folder.mkdir()
    (folder / "reference.json").write_text('{"task": "text-generation"}')
    np.save(folder / "ids.npy", IDS)
    np.save(folder / "mask.npy", MASK)
    np.save(folder / "logits.npy", np.random.default_rng(0).normal(size=(2, 3, 11)).astype(np.float32))
    with start() as worker:
        got = worker.score(folder, batch_size=1)
        wanted = score(toy_worker.Toy(tmp_path / "toy", None), folder)
    assert set(got) == set(wanted)
    for name, values in wanted.items():
        assert got[name].dtype == values.dtype
        np.testing.assert_array_equal(got[name], values)


def test_errors_arrive_as_they_were_raised_and_the_worker_goes_on(start):
    with start("input@decode") as worker:
        with pytest.raises(BadInput, match="the weights are torn") as caught:
            worker.decode([1], 1)
        assert caught.value.hint == "export it again"
        assert any("toy_worker.py" in note for note in caught.value.__notes__)
        assert worker.forward(IDS, MASK).shape == (2, 3, 11)
    with start("raise@decode") as worker, pytest.raises(WorkerError, match="ZeroDivisionError: division by zero"):
        worker.decode([1], 1)
    with start("memory@decode") as worker, pytest.raises(ResourceExhausted, match="out of memory"):
        worker.decode([1], 1)
    with pytest.raises(BadInput, match="the weights are torn"):
        start("input@load")


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        (
            "abort@forward",
            r"the worker of toy died of SIGABRT during forward; last lines: .*GGML_ASSERT\(ne == 1\) failed",
        ),
        ("kill@forward", "died of SIGKILL during forward"),
        ("exit@forward", "ended with status 3 during forward"),
    ],
)
def test_a_crash_is_one_error_that_names_signal_and_last_words(start, behaviour, text):
    worker = start(behaviour)
    with pytest.raises(WorkerError, match=text) as caught:
        worker.forward(IDS, MASK)
    assert "\n" not in str(caught.value)
    assert exchanges() == []  # at once, not only at close
    with pytest.raises(WorkerError, match="is closed"):
        worker.forward(IDS, MASK)
    worker.close()
    worker.close()  # twice is no error


def test_a_crash_while_opening(start):
    with pytest.raises(WorkerError, match="SIGABRT during open"):
        start("abort@load")


def test_a_hang_is_killed_with_all_that_it_started(start, toy):
    worker = start("child@forward", timeout=20)
    worker.timeout = 0.5
    before = time.monotonic()
    with pytest.raises(WorkerError, match=r"did not answer forward within 0.5 s and was killed"):
        worker.forward(IDS, MASK)
    assert time.monotonic() - before < 5
    assert gone(worker.pid)
    assert group_gone(worker.pid)  # the `sleep` that it started, too
    worker.close()


def test_close_does_not_wait_for_ever(start, monkeypatch):
    monkeypatch.setattr(local, "_CLOSE_SECONDS", 0.3)
    worker = start("hang@close")
    before = time.monotonic()
    worker.close()
    assert time.monotonic() - before < 3
    assert gone(worker.pid)


def test_close_does_not_wait_for_one_that_says_yes_and_stays(start, monkeypatch):
    worker = start()
    monkeypatch.setattr(local, "_CLOSE_SECONDS", 0.01)
    monkeypatch.setattr(worker, "request", lambda _op: None)  # as if the answer had come and the process lingered
    worker.close()
    assert gone(worker.pid)


def test_a_worker_that_is_no_worker(toy, tmp_path):
    folder = toy()
    with pytest.raises(WorkerError, match="ended with status 1 during hello"):
        LocalWorker(folder, command=["false"])
    with pytest.raises(WorkerError, match="can't start the worker /no/such: No such file"):
        LocalWorker(folder, command=["/no/such"])
    with pytest.raises(WorkerError, match="not a protocol message: b'usage'"):
        LocalWorker(folder, command=["sh", "-c", "echo usage; cat"])
    with pytest.raises(WorkerError, match="answered request 7 instead of 1"):
        LocalWorker(folder, command=["sh", "-c", """echo '{"id": 7, "ok": true, "result": {}}'; cat"""])
    with pytest.raises(WorkerError, match="speaks protocol 2, this edgestill 1"):
        LocalWorker(folder, command=["sh", "-c", """echo '{"id": 1, "ok": true, "result": {"protocol": 2}}'; cat"""])
    with pytest.raises(WorkerError, match="sent more than 16777216 bytes"):
        LocalWorker(folder, command=["sh", "-c", "head -c 20000000 /dev/zero; cat"])
    with pytest.raises(WorkerError, match="a reply without an error object"):
        LocalWorker(folder, command=["sh", "-c", "exec cat"])  # it echoes: no reply


def test_the_environment_is_handed_on(start):
    with start(env={"OMP_NUM_THREADS": "5"}) as worker:
        assert worker.info().backend == "threads=1"  # --threads of this command line stands above
    with start() as worker:
        environment = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
        assert b"OPENBLAS_NUM_THREADS=1" in environment
        assert b"HF_HUB_OFFLINE=1" in environment


def test_a_cold_load_says_whether_it_was_one(start, tmp_path):
    with start(cold=True) as worker:
        assert (worker.cold_load_seconds is None) == (worker.cold_reason is not None)
        assert worker.cold_load_seconds in (None, worker.load_seconds)


def test_an_unclosed_worker_ends_with_its_object(start):
    worker = start()
    pid = worker.pid
    del worker
    assert gone(pid)
    assert exchanges() == []


PARENT = """
import os, sys, time
from pathlib import Path
import numpy as np
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports.local import LocalWorker
command = [*{command!r}, "--parent", str(os.getpid())]
with LocalWorker(Path({folder!r}), SessionOptions(threads=1), command=command) as worker:
    print(worker.pid, flush=True)
    worker.forward(np.ones((1, 2), np.int64), np.ones((1, 2), np.int64))
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_no_orphan_and_no_litter_when_the_parent_goes(toy, toy_command, name):
    """While the worker is busy."""
    command = toy_command[: toy_command.index("--parent")]
    script = PARENT.format(command=command, folder=str(toy("hang@forward")))
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    worker = int(parent.stdout.readline())
    assert len(exchanges(parent.pid)) == 1
    time.sleep(0.1)
    os.killpg(parent.pid, signal.Signals[name])  # as a terminal does: the whole foreground group
    _, stderr = parent.communicate(timeout=20)
    assert gone(worker)
    assert exchanges(parent.pid) == []
    if name == "SIGINT":
        assert stderr.count(b"KeyboardInterrupt") == 1  # the parent's own, none from the worker


def test_what_was_left_by_the_dead_is_swept_and_the_living_keep_theirs(start):
    dead = subprocess.Popen(["true"])
    dead.wait()
    litter = exchange_root() / f"edgestill-{dead.pid}-x"
    living = exchange_root() / f"edgestill-{os.getppid()}-x"
    litter.mkdir()
    living.mkdir()
    (litter / "w1.bin").write_bytes(b"x")
    try:
        start().close()
        assert not litter.exists()
        assert living.exists()
    finally:
        living.rmdir()
