"""The worker spoken to in raw bytes, as an implementer of another client or worker would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from edgestill.runtimes.protocol import OPERATIONS, PROTOCOL_VERSION, Exchange
from edgestill.runtimes.worker import THREAD_VARIABLES


class Raw:
    """A worker process on three pipes."""

    def __init__(self, command: list[str], folder) -> None:
        self.exchange = Exchange(folder, "c")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.count = 0

    def line(self, data: bytes) -> dict:
        self.process.stdin.write(data + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def ask(self, op: str, **fields) -> dict:
        self.count += 1
        reply = self.line(json.dumps({"id": self.count, "op": op, **fields}).encode())
        assert reply["id"] == self.count
        return reply

    def get(self, op: str, **fields) -> dict:
        reply = self.ask(op, **fields)
        assert reply["ok"] is True, reply
        return reply["result"]

    def hello(self) -> dict:
        return self.get("hello", protocol=PROTOCOL_VERSION, exchange=str(self.exchange.folder))

    def end(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()
        self.process.wait()


@pytest.fixture
def raw(toy_command, tmp_path):
    folder = tmp_path / "exchange"
    folder.mkdir()
    worker = Raw(toy_command, folder)
    yield worker
    worker.end()


@pytest.fixture(scope="module")
def unopened(toy_command, tmp_path_factory):
    """One worker for all requests that it must refuse before it has seen a hello."""
    worker = Raw(toy_command, tmp_path_factory.mktemp("exchange"))
    yield worker
    worker.end()


@pytest.fixture(scope="module")
def opened(toy_command, tmp_path_factory):
    """One worker with an open model for all requests that it must refuse and survive."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "behaviour").write_text("well")
    worker = Raw(toy_command, tmp_path_factory.mktemp("exchange"))
    worker.hello()
    worker.get("open", folder=str(folder))
    yield worker
    worker.end()


def batch(raw: Raw, ids) -> dict:
    array = np.array(ids, np.int64)
    return {"ids": raw.exchange.put(array), "mask": raw.exchange.put(np.ones_like(array))}


def test_hello_says_version_and_operations(raw):
    hello = raw.hello()
    assert hello["protocol"] == PROTOCOL_VERSION == 1
    assert set(OPERATIONS) == set(hello["operations"])
    assert hello["worker"] == "edgestill-python"


def test_the_machine_and_its_sensors_need_no_model(raw):
    raw.hello()
    assert raw.get("facts")["cores_usable"] >= 1
    reading = raw.get("sensors")
    assert reading["time_s"] > 0
    assert all(reading["reasons"].values())


def test_another_version_is_refused_and_both_are_named(raw):
    error = raw.ask("hello", protocol=2, exchange=str(raw.exchange.folder))["error"]
    assert error["kind"] == "WorkerError"
    assert "protocol 2, this worker 1" in error["message"]
    assert raw.hello()["protocol"] == 1  # an error ends no worker


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"op": "dance"}, "WorkerError", "unknown operation 'dance'"),
        ({}, "WorkerError", "unknown operation None"),
        ({"op": ["open"]}, "WorkerError", "unknown operation"),
        ({"op": "hello"}, "BadInput", "protocol is None"),
        ({"op": "hello", "protocol": True, "exchange": "/"}, "BadInput", "protocol is True"),
        ({"op": "hello", "protocol": 1, "exchange": "/no/such/folder"}, "BadInput", "/no/such/folder"),
        ({"op": "open", "folder": "x"}, "WorkerError", "open before hello"),
        ({"op": "forward"}, "WorkerError", "no model is open"),
        ({"op": "memory"}, "WorkerError", "no model is open"),
    ],
)
def test_what_can_not_be_done_is_an_error_reply(unopened, fields, kind, text):
    reply = unopened.line(json.dumps({"id": 9, **fields}).encode())
    assert reply["ok"] is False
    assert reply["id"] == 9
    assert reply["error"]["kind"] == kind
    assert text in reply["error"]["message"]
    assert set(reply["error"]) == {"kind", "message", "hint", "trace"}


@pytest.mark.parametrize("garbage", [b"", b"hello", b"[1, 2]", b"\xff\xff", b'{"id": 1', b"nul\0"])
def test_garbage_is_answered_and_survived(unopened, garbage):
    reply = unopened.line(garbage)
    assert (reply["id"], reply["ok"]) == (None, False)
    assert "not a protocol message" in reply["error"]["message"]
    assert unopened.ask("dance")["error"]["kind"] == "WorkerError"


def test_the_whole_conversation(raw, toy):
    raw.hello()
    folder = toy("print@load")
    opened = raw.get("open", folder=str(folder), options={"threads": 1, "backend": None, "extra": {}})
    assert opened["info"] == {
        "runtime": "toy", "version": "1.0", "backend": "threads=1", "task": "text-generation",
        "capabilities": ["forward", "decode", "score", "latency"], "vocab_size": 11, "max_length": 64,
        "placement": {"cpu": 3},
    }  # fmt: skip
    assert opened["load_seconds"] >= 0
    assert opened["cold"] is None
    assert raw.get("info")["info"] == opened["info"]

    output = raw.exchange.take(raw.get("forward", **batch(raw, [[1, 2, 3], [4, 5, 6]]))["output"])
    np.testing.assert_array_equal(output.argmax(-1), [[1, 3, 5], [4, 6, 8]])
    decoded = raw.get("decode", prompt_ids=[1, 2], max_new_tokens=3, logits=True)
    assert decoded["ids"] == [3, 5, 8]
    assert len(decoded["seconds"]) == 3
    assert raw.exchange.take(decoded["logits"]).argmax(-1).tolist() == [3, 5, 8]
    assert raw.get("decode", prompt_ids=[1], max_new_tokens=1)["logits"] is None

    bounds = {"repeats": 4, "warmup": 1, "max_seconds": 5}
    timed = raw.get("time_forward", **batch(raw, [[1, 2]]), **bounds)
    assert len(timed["samples"]) == 4
    assert all(sample > 0 for sample in timed["samples"])
    timed = raw.get("time_decode", prompt_ids=[1], max_new_tokens=3, **bounds)
    assert [len(sample["tokens_s"]) for sample in timed["samples"]] == [2] * 4
    assert list(raw.exchange.folder.iterdir()) == []  # nothing was left lying about

    assert raw.get("close") == {}
    assert raw.process.wait(5) == 0
    assert raw.process.stderr.read() == b"llama_model_loader: loaded\nand from Python\n"  # not among the messages


def test_memory_is_told_in_parts(raw, toy):
    raw.hello()
    raw.get("open", folder=str(toy()))
    raw.get("forward", **batch(raw, [[1, 2, 3]]))
    told = raw.get("memory")
    assert {"baseline_anonymous", "load_anonymous", "peak_anonymous", "peak_file_backed", "peak_rss"} <= set(told)
    if sys.platform == "linux":
        assert 0 < told["baseline_anonymous"] <= told["load_anonymous"] <= told["peak_anonymous"] < told["peak_rss"]
        assert told["peak_anonymous"] == max(told["load_anonymous"], told["run_anonymous"])
        assert told["samples"] >= 5


@pytest.mark.parametrize(
    ("op", "fields", "text"),
    [
        ("open", {"folder": "elsewhere"}, "a model is open already"),
        ("forward", {"ids": 3}, "ids is 3"),
        ("forward", {"ids": {"file": "x"}, "mask": {}}, "not a tensor reference"),
        ("decode", {"prompt_ids": [], "max_new_tokens": 2}, "0 prompt tokens"),
        ("decode", {"prompt_ids": [1], "max_new_tokens": 0}, "0 new ones"),
        ("decode", {"prompt_ids": [11], "max_new_tokens": 1}, "outside the vocabulary of 11"),
        ("decode", {"prompt_ids": ["a"], "max_new_tokens": 1}, "not all integers"),
        ("decode", {"prompt_ids": [1] * 60, "max_new_tokens": 5}, "60 + 5 tokens, the model takes 64"),
        ("score", {"reference": "/no/such"}, "/no/such/reference.json does not exist"),
        ("time_decode", {"prompt_ids": [1], "max_new_tokens": 2, "repeats": 0, "warmup": 0, "max_seconds": 1}, "can't"),
        ("time_forward", {"ids": None}, "ids is None"),
    ],
)
def test_bad_requests_to_an_open_model(opened, op, fields, text):
    assert text in opened.ask(op, **fields)["error"]["message"]
    assert opened.get("decode", prompt_ids=[1], max_new_tokens=1)["ids"] == [1]  # and it goes on


@pytest.mark.parametrize(
    ("ids", "mask", "text"),
    [
        ([[1, 11]], [[1, 1]], "token ids 1 to 11"),
        ([[-1, 1]], [[1, 1]], "token ids -1 to 1"),
        ([[1, 2]], [[0, 1]], "not ones followed by zeros"),
        ([[1, 2]], [[0, 0]], "not ones followed by zeros"),
        ([[1, 2]], [[2, 1]], "not ones followed by zeros"),
        ([[1, 2]], [[1]], r"ids [1, 2] with mask [1, 1]"),
        ([1, 2], [1, 1], "ids [2]"),
        ([[1] * 65], [[1] * 65], "65 tokens, the model takes 64"),
        (np.empty((0, 3), np.int64), np.empty((0, 3), np.int64), "ids [0, 3]"),
        (np.ones((1, 2), np.int32), [[1, 1]], "ids of int32"),
    ],
)
def test_batches_are_checked_before_the_runtime_sees_them(opened, ids, mask, text):
    sent = {"ids": opened.exchange.put(np.asarray(ids)), "mask": opened.exchange.put(np.asarray(mask))}
    reply = opened.ask("forward", **sent)
    assert reply["error"]["kind"] == "BadInput"
    assert text in reply["error"]["message"]


def test_a_session_that_breaks_its_contract_is_told_apart(raw, toy):
    raw.hello()
    raw.get("open", folder=str(toy("double")))
    error = raw.ask("forward", **batch(raw, [[1, 2]]))["error"]
    assert "toy gave float64 [1, 2, 11] instead of float32 [1, 2, 11]" in error["message"]


def test_the_folder_may_come_from_the_command_line(toy_command, toy, tmp_path):
    exchange = tmp_path / "exchange"
    exchange.mkdir()
    raw = Raw([*toy_command, str(toy())], exchange)
    try:
        raw.hello()
        assert raw.get("open")["info"]["runtime"] == "toy"
    finally:
        raw.end()


def test_bad_options_are_refused(raw, toy):
    raw.hello()
    for options in ({"threads": 0}, {"threads": "2"}, {"thread": 2}, [], 3):
        error = raw.ask("open", folder=str(toy()), options=options)["error"]
        assert (error["kind"], error["message"][:6]) == ("BadInput", "open: ")


def test_it_ends_at_once_when_its_input_ends_even_while_it_works(raw, toy):
    raw.hello()
    raw.get("open", folder=str(toy("hang@decode")))
    raw.process.stdin.write(b'{"id": 3, "op": "decode", "prompt_ids": [1], "max_new_tokens": 1}\n')
    raw.process.stdin.close()
    assert raw.process.wait(5) == 0
    assert not raw.exchange.folder.exists()


def test_it_ends_when_its_parent_is_gone_though_its_input_stays_open(toy_command, tmp_path):
    """The parent is killed; a sibling process still holds the pipe."""
    reading, writing = os.pipe()
    command = toy_command[: toy_command.index("--parent")]
    script = (
        "import os, subprocess, sys\n"
        f"command = {command!r} + ['--parent', str(os.getpid())]\n"
        f"child = subprocess.Popen(command, stdin={reading}, stdout=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, pass_fds=[reading])
    os.close(reading)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.close(writing)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    """Runs still (a zombie that waits for its reaper does not)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_call_that_hangs_with_the_lock_held_ends_by_its_timeout(raw, toy):
    """Nobody kills it here: a native thread ends it 10 s after the client's patience."""
    raw.hello()
    raw.get("open", folder=str(toy("hold@decode")))
    message = {"id": 3, "op": "decode", "prompt_ids": [1], "max_new_tokens": 1, "timeout_s": -9.5}
    raw.process.stdin.write(json.dumps(message).encode() + b"\n")
    raw.process.stdin.flush()
    assert raw.process.wait(10) == 1
    assert b"toy_worker.py" in raw.process.stderr.read()  # and says where it hung


def test_importing_the_worker_loads_nothing_heavy():
    script = (
        "import sys, edgestill.runtimes.worker\n"
        "heavy = {'numpy', 'torch', 'transformers', 'pydantic', 'onnxruntime', 'llama_cpp'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import edgestill.runtimes.service\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'scipy', 'onnxruntime', 'llama_cpp'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_thread_limits_stand_before_numpy_is_imported(toy, toy_command, tmp_path):
    """--threads alone, no variable in the environment: the session sees OMP_NUM_THREADS."""
    exchange = tmp_path / "exchange"
    exchange.mkdir()
    command = [part if part != "1" else "3" for part in toy_command]
    for name in THREAD_VARIABLES:
        assert name not in os.environ or os.environ[name] != "3"
    raw = Raw(command, exchange)
    try:
        raw.hello()
        assert raw.get("open", folder=str(toy()))["info"]["backend"] == "threads=3"
    finally:
        raw.end()


def test_the_page_for_implementers_names_everything(raw, toy):
    """docs/worker-protocol.md: each operation, dtype and field of the replies."""
    from pathlib import Path

    from edgestill.runtimes.protocol import DTYPES

    page = (Path(__file__).parents[2] / "docs" / "worker-protocol.md").read_text(encoding="utf-8")
    assert f"version {PROTOCOL_VERSION}" in page
    raw.hello()
    opened = raw.get("open", folder=str(toy()), cold=True)
    names = {
        *OPERATIONS,
        *DTYPES,
        *opened,
        *opened["info"],
        *opened["cold"],
        *raw.get("memory"),
        *raw.get("facts"),
        *raw.get("sensors"),
    }
    names |= {*raw.get("time_decode", prompt_ids=[1], max_new_tokens=2, repeats=1, warmup=0, max_seconds=1)}
    assert [name for name in sorted(names) if name not in page] == []
