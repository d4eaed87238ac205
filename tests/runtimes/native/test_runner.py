"""The native runner spoken to in raw bytes: what its page promises where Python's worker is not asked.

The numbers are in ``test_conformance.py``. Skipped where the runner was not built.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgestill.errors import WorkerError
from edgestill.recipe import ExportConfig
from edgestill.runtimes.machine import machine_facts
from edgestill.runtimes.protocol import Exchange
from edgestill.runtimes.sensors import read_sensors
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports.local import LocalWorker

pytestmark = pytest.mark.slow


class Raw:
    """A runner on three pipes."""

    def __init__(self, command: list[str], exchange: Path) -> None:
        exchange.mkdir()
        self.exchange = Exchange(exchange, "c")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def line(self, data: bytes) -> dict:
        self.process.stdin.write(data + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def ask(self, op: object, **fields: object) -> dict:
        return self.line(json.dumps({"id": 7, "op": op, **fields}).encode())

    def get(self, op: str, **fields: object) -> dict:
        reply = self.ask(op, **fields)
        assert reply["ok"] is True, reply
        return reply["result"]

    def hello(self) -> dict:
        return self.get("hello", protocol=1, exchange=str(self.exchange.folder))

    def end(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()
        self.process.wait()


@pytest.fixture(scope="module")
def gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgestill.export import export

    folder = tmp_path_factory.mktemp("artifacts") / "a 'model' of \"mine\""
    export(tiny_llama, folder, ExportConfig(to="gguf:q8_0"))
    return folder


@pytest.fixture
def raw(native_command: Callable[..., list[str]], tmp_path: Path) -> Iterator[Raw]:
    worker = Raw(native_command(), tmp_path / "exchange")
    yield worker
    worker.end()


@pytest.fixture(scope="module")
def opened(
    native_command: Callable[..., list[str]], gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Raw]:
    worker = Raw(native_command(), tmp_path_factory.mktemp("exchange") / "folder")
    worker.hello()
    worker.get("open", folder=str(gguf), options={"threads": 1})
    yield worker
    worker.end()


def test_hello_says_what_it_is(raw: Raw) -> None:
    hello = raw.hello()
    assert (hello["protocol"], hello["worker"]) == (1, "edgestill-native")
    assert {"forward", "decode", "score", "time_decode", "memory", "facts", "sensors", "close"} <= set(
        hello["operations"]
    )


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"op": "dance"}, "WorkerError", "unknown operation 'dance'"),
        ({}, "WorkerError", "unknown operation None"),
        ({"op": ["open"]}, "WorkerError", "unknown operation"),
        ({"op": "hello"}, "BadInput", "protocol is None"),
        ({"op": "hello", "protocol": True, "exchange": "/"}, "BadInput", "protocol is True"),
        ({"op": "hello", "protocol": 2, "exchange": "/"}, "WorkerError", "protocol 2, this worker 1"),
        ({"op": "hello", "protocol": 1, "exchange": "/no/such/folder"}, "BadInput", "/no/such/folder"),
        ({"op": "open", "folder": "x"}, "WorkerError", "open before hello"),
        ({"op": "forward"}, "WorkerError", "no model is open"),
        ({"op": "memory"}, "WorkerError", "no model is open"),
    ],
)
def test_what_can_not_be_done_is_an_error_reply(raw: Raw, fields: dict, kind: str, text: str) -> None:
    reply = raw.line(json.dumps({"id": 9, **fields}).encode())
    assert (reply["ok"], reply["id"], reply["error"]["kind"]) == (False, 9, kind)
    assert text in reply["error"]["message"]
    assert reply["error"]["hint"]
    assert raw.hello()["protocol"] == 1


def test_garbage_is_answered_and_survived(raw: Raw) -> None:
    for garbage in (b"", b"hello", b"[1, 2]", b"\xff\xff", b'{"id": 1', b"nul\0", b"[" * 100_000):
        reply = raw.line(garbage)
        assert (reply["id"], reply["ok"]) == (None, False)
        assert "not a protocol message" in reply["error"]["message"]
    assert raw.hello()["protocol"] == 1


@pytest.mark.parametrize(
    ("op", "fields", "text"),
    [
        ("open", {"folder": "elsewhere"}, "a model is open already"),
        ("forward", {"ids": 3}, "ids is 3"),
        ("forward", {"ids": {"file": "x"}, "mask": {}}, "not a tensor reference"),
        ("forward", {"ids": {"file": "../x", "dtype": "int64", "shape": [1], "sha256": ""}, "mask": {}}, "leaves"),
        ("decode", {"prompt_ids": [], "max_new_tokens": 2}, "0 prompt tokens"),
        ("decode", {"prompt_ids": [1], "max_new_tokens": 0}, "0 new ones"),
        ("decode", {"prompt_ids": [1 << 40], "max_new_tokens": 1}, "outside the vocabulary"),
        ("decode", {"prompt_ids": ["a"], "max_new_tokens": 1}, "not all integers"),
        ("decode", {"prompt_ids": [1], "max_new_tokens": 1 << 62}, "the model takes"),
        ("score", {"reference": "/no/such"}, "/no/such/reference.json does not exist"),
        ("time_decode", {"prompt_ids": [1], "max_new_tokens": 2, "repeats": 0, "warmup": 0, "max_seconds": 1}, "can't"),
        ("time_decode", {"prompt_ids": [1], "max_new_tokens": 2, "repeats": 1, "warmup": 0}, "max_seconds is None"),
    ],
)
def test_bad_requests_to_an_open_model(opened: Raw, op: str, fields: dict, text: str) -> None:
    assert text in opened.ask(op, **fields)["error"]["message"]
    assert len(opened.get("decode", prompt_ids=[1], max_new_tokens=1)["ids"]) == 1


@pytest.mark.parametrize(
    ("ids", "mask", "text"),
    [
        ([[1, 1 << 40]], [[1, 1]], "token ids 1 to"),
        ([[-1, 1]], [[1, 1]], "token ids -1 to 1"),
        ([[1, 2]], [[0, 1]], "not ones followed by zeros"),
        ([[1, 2]], [[0, 0]], "not ones followed by zeros"),
        ([[1, 2]], [[2, 1]], "not ones followed by zeros"),
        ([[1, 2]], [[1]], "ids [1, 2] with mask [1, 1]"),
        ([1, 2], [1, 1], "ids [2]"),
        (np.empty((0, 3), np.int64), np.empty((0, 3), np.int64), "ids [0, 3]"),
        (np.ones((1, 2), np.int32), [[1, 1]], "ids of int32"),
    ],
)
def test_batches_are_checked(opened: Raw, ids: object, mask: object, text: str) -> None:
    sent = {"ids": opened.exchange.put(np.asarray(ids)), "mask": opened.exchange.put(np.asarray(mask))}
    error = opened.ask("forward", **sent)["error"]
    assert error["kind"] == "BadInput"
    assert text in error["message"]


def test_a_damaged_tensor_is_noticed_and_removed(opened: Raw) -> None:
    reference = opened.exchange.put(np.array([[1, 2]], np.int64))
    (opened.exchange.folder / reference["file"]).write_bytes(bytes(16))
    error = opened.ask("forward", ids=reference, mask=reference)["error"]
    assert "does not match its sha256" in error["message"]
    assert list(opened.exchange.folder.iterdir()) == []


def test_bad_options_are_refused(raw: Raw, gguf: Path) -> None:
    raw.hello()
    for options in ({"threads": 0}, {"threads": "2"}, {"thread": 2}, [], 3):
        error = raw.ask("open", folder=str(gguf), options=options)["error"]
        assert (error["kind"], error["message"][:6]) == ("BadInput", "open: ")
    for extra in ({"kv": "f8"}, {"speed": "high"}, {"mmap": "yes"}, 3):
        error = raw.ask("open", folder=str(gguf), options={"extra": extra})["error"]
        assert error["kind"] == "UsageError"
    assert raw.ask("open", folder=str(gguf), options={"backend": "vulkan"})["error"]["kind"] == "UsageError"
    assert raw.get("open", folder=str(gguf) + "/", options={"extra": {"kv": "q8_0", "mmap": False}})["info"][
        "placement"
    ] == {"kv:q8_0": 1}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: (f / "model.gguf").write_bytes((f / "model.gguf").read_bytes()[:-1]), "does not match its sha256"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "more.txt").write_text("x"), "more.txt is not listed"),
        (lambda f: (f / "artifact.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "artifact.json").unlink(), "artifact.json does not exist"),
        (lambda f: _edit(f, "artifact_id", "0" * 64), "artifact_id does not match"),
        (lambda f: _edit(f, "schema_version", 9), "schema_version 9"),
        (lambda f: _edit(f, "files", 3), "is not an artifact description"),
    ],
)
def test_a_changed_artifact_is_refused(raw: Raw, gguf: Path, tmp_path: Path, change: Callable, text: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(gguf, folder)
    change(folder)
    raw.hello()
    error = raw.ask("open", folder=str(folder))["error"]
    assert (error["kind"], text in error["message"]) == ("BadInput", True), error


def _edit(folder: Path, key: str, value: object) -> None:
    manifest = json.loads((folder / "artifact.json").read_text())
    (folder / "artifact.json").write_text(json.dumps({**manifest, key: value}))


def test_an_artifact_of_another_format_is_refused(raw: Raw, gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(gguf, folder)
    _edit(folder, "format", "onnx")
    raw.hello()
    error = raw.ask("open", folder=str(folder))["error"]
    assert (error["kind"], "opens gguf" in error["message"]) == ("Unsupported", True)


def test_the_folder_and_threads_may_come_from_the_command_line(
    native_command: Callable[..., list[str]], gguf: Path, tmp_path: Path
) -> None:
    raw = Raw([*native_command(), str(gguf), "--threads", "1"], tmp_path / "exchange")
    try:
        raw.hello()
        assert raw.get("open", cold=True)["cold"]["total_bytes"] > 10_000
        assert len(list(Path(f"/proc/{raw.process.pid}/task").iterdir())) <= 3  # this one, the reader, no pool
    finally:
        raw.end()


def test_it_tells_the_machine_as_pythons_worker_does(raw: Raw) -> None:
    facts = raw.get("facts")
    assert facts == machine_facts()
    told, wanted = raw.get("sensors"), read_sensors()
    assert told["time_s"] < wanted["time_s"]  # one clock
    assert set(told) == set(wanted)
    assert told["reasons"] == wanted["reasons"]


def test_it_reads_the_sensors_of_a_board_as_pythons_worker_does(raw: Raw, tmp_path: Path) -> None:
    files = {
        "class/powercap/intel-rapl:0/name": "package-0\n", "class/powercap/intel-rapl:0/energy_uj": "2500000\n",
        "class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850\n",
        "class/powercap/intel-rapl:0:0/name": "dram", "class/powercap/intel-rapl:0:0/energy_uj": "7",
        "class/powercap/intel-rapl:1:0/name": "dram", "class/powercap/intel-rapl:1:0/energy_uj": "9",
        "class/powercap/intel-rapl-mmio:0/name": "package-0", "class/powercap/intel-rapl-mmio:0/energy_uj": "1",
        "class/thermal/thermal_zone0/type": "cpu-thermal\n", "class/thermal/thermal_zone0/temp": "48312\n",
        "class/thermal/thermal_zone2/type": "cpu-thermal", "class/thermal/thermal_zone2/temp": "-1500",
        "class/thermal/thermal_zone10/temp": "-274000", "class/thermal/thermal_zone3/temp": "torn",
        "class/thermal/cooling_device0/type": "Processor", "class/thermal/cooling_device0/cur_state": "3",
        "class/thermal/cooling_device1/type": "fan", "class/thermal/cooling_device1/cur_state": "1",
        "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
        "devices/system/cpu/cpu10/cpufreq/scaling_cur_freq": "600000\n",
        "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "2",
        "devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "5",
        "devices/system/cpu/cpu1/thermal_throttle/package_throttle_count": "4",
        "class/power_supply/ac/type": "Mains", "class/power_supply/battery/type": "Battery",
        "class/power_supply/battery/temp": "315", "class/power_supply/battery/capacity": "88",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "root" / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    told, wanted = raw.get("sensors", root=str(tmp_path / "root")), read_sensors(root=tmp_path / "root")
    assert {**told, "time_s": 0} == {**wanted, "time_s": 0}
    assert told["temperature_c"] == {"cpu-thermal": 48.312, "cpu-thermal (thermal_zone2)": -1.5}


def test_it_reads_the_processor_of_a_board_as_pythons_worker_does(raw: Raw, tmp_path: Path) -> None:
    folder = tmp_path / "root"
    cores = "devices/system/cpu"
    files = {
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n",
        **{f"sys/{cores}/cpu{core}/topology/core_id": str(core // 2) for core in range(4)},
        **{f"sys/{cores}/cpu{core}/topology/physical_package_id": "0" for core in range(4)},
        **{f"sys/{cores}/cpu{core}/cpufreq/scaling_governor": ("ondemand", "schedutil")[core % 2] for core in range(4)},
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    told, wanted = raw.get("facts", root=str(folder)), machine_facts(root=folder)
    assert told["cpu"] == "ARM implementer 0x41 part 0xd0b"
    for key in ("cpu", "cpu_flags", "cores_physical", "governor", "governor_reason", "machine"):
        assert told[key] == wanted[key], key


def test_it_computes_what_pythons_worker_computes(native_command: Callable[..., list[str]], gguf: Path) -> None:
    """The same engine: logits agree to what another compiler and another order of sums may change."""
    ids = np.arange(5, 45, dtype=np.int64)[None]
    options = SessionOptions(threads=1)
    with LocalWorker(gguf, options) as ours, LocalWorker(gguf, options, command=native_command()) as native:
        wanted, got = (worker.forward(ids, np.ones_like(ids)) for worker in (ours, native))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-2)
        assert native.info().version.startswith(ours.info().version.rstrip(")"))
        assert [t.id for t in native.decode([5, 6, 7], 8)] == [t.id for t in ours.decode([5, 6, 7], 8)]


def test_it_ends_at_once_when_its_input_ends_even_while_it_works(raw: Raw, gguf: Path) -> None:
    raw.hello()
    limit = raw.get("open", folder=str(gguf), options={"threads": 1})["info"]["max_length"]
    request = {"id": 3, "op": "time_decode", "prompt_ids": [1], "max_new_tokens": limit - 1, "repeats": 10**6}
    raw.process.stdin.write(json.dumps({**request, "warmup": 0, "max_seconds": 600}).encode() + b"\n")
    raw.process.stdin.flush()
    time.sleep(0.3)
    raw.process.stdin.close()
    assert raw.process.wait(10) == 0
    assert not raw.exchange.folder.exists()


def test_a_request_that_is_not_done_in_its_time_ends_it(raw: Raw, gguf: Path) -> None:
    raw.hello()
    limit = raw.get("open", folder=str(gguf))["info"]["max_length"]
    request = {"id": 3, "op": "time_decode", "prompt_ids": [1], "max_new_tokens": limit - 1, "repeats": 10**6}
    message = {**request, "warmup": 0, "max_seconds": 600, "timeout_s": -9.5}
    raw.process.stdin.write(json.dumps(message).encode() + b"\n")
    raw.process.stdin.flush()
    assert raw.process.wait(20) == 1
    assert b"not done in its time" in raw.process.stderr.read()


def test_it_ends_when_its_parent_is_gone(native_command: Callable[..., list[str]]) -> None:
    reading, writing = os.pipe()
    script = f"{' '.join(native_command())} --parent $$ <&{reading} >/dev/null & echo $!; read line"
    parent = subprocess.Popen(["bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[reading])
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    for stream in (parent.stdin, parent.stdout):
        stream.close()
    os.close(reading)
    os.close(writing)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_arguments_that_it_does_not_know(native_command: Callable[..., list[str]]) -> None:
    for arguments in (["--speed"], ["a", "b"], ["--threads"], ["--threads", "none"]):
        done = subprocess.run([*native_command(), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "usage:" in done.stderr


def test_the_emulated_core_gets_the_same_numbers(native_command: Callable[..., list[str]], gguf: Path) -> None:
    """armv8.0 on a Cortex-A53 and dotprod on an A76, against Python's worker here."""
    ids = np.arange(5, 15, dtype=np.int64)[None]
    with LocalWorker(gguf, SessionOptions(threads=1)) as ours:
        wanted = ours.forward(ids, np.ones_like(ids))
    for core, level in (("cortex-a53", "armv8.0"), ("cortex-a76", "dotprod")):
        command = native_command(core, level)
        with LocalWorker(gguf, SessionOptions(threads=1), command=command, timeout=300) as worker:
            np.testing.assert_allclose(worker.forward(ids, np.ones_like(ids)), wanted, rtol=0, atol=2e-2)
            assert level in worker.info().version
            assert worker.capabilities["machine"] == "aarch64"


def test_a_level_that_the_core_has_not_dies_of_sigill(native_command: Callable[..., list[str]], gguf: Path) -> None:
    command = native_command("cortex-a53", "dotprod")
    ids = np.arange(5, 15, dtype=np.int64)[None]
    with pytest.raises(WorkerError, match="SIGILL"):  # noqa: SIM117
        with LocalWorker(gguf, SessionOptions(threads=1), command=command, timeout=300) as worker:
            worker.forward(ids, np.ones_like(ids))
