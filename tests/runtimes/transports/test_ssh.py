"""ssh against a real OpenSSH server on a board of its own (namespaces, a veth cable): slow, dropped and full."""

from __future__ import annotations

import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.accuracy import AccuracyRequest, measure_accuracy
from edgestill.artifact import Artifact
from edgestill.bench.measure import Place, Subject, measure_speed
from edgestill.errors import (
    BadInput,
    EdgestillError,
    LinkLost,
    MissingDependency,
    ResourceExhausted,
    Unsupported,
    WorkerError,
)
from edgestill.export import export
from edgestill.files import hash_file
from edgestill.recipe import BenchConfig, ExportConfig
from edgestill.runtimes.machine import machine_facts
from edgestill.runtimes.native import find_runner
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.targets import open_target
from edgestill.runtimes.transports import ssh
from edgestill.runtimes.transports.local import LocalWorker
from edgestill.runtimes.transports.remote_worker import RemoteWorker
from edgestill.runtimes.transports.ssh import SshTarget
from edgestill.runtimes.transports.store import LocalFile
from edgestill.stages import Observer

ONE = SessionOptions(threads=1)
IDS = np.array([[4, 9, 30]])
MASK = np.ones_like(IDS)
STORE = "/home/board/.cache/edgestill"

pytestmark = [pytest.mark.slow]


@pytest.fixture
def target(board: Any) -> Iterator[SshTarget]:
    with SshTarget(board.target()) as target:
        yield target


@pytest.fixture
def quick_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead link is noticed in eight seconds instead of twenty."""
    monkeypatch.setattr(ssh, "ALIVE_SECONDS", 2)


def works(target: SshTarget, artifact: Artifact, table: np.ndarray) -> None:
    with target.open_worker(artifact.path, ONE) as worker:
        np.testing.assert_allclose(worker.forward(IDS, MASK), table[IDS].mean(axis=1), atol=1e-6)


def test_a_worker_on_the_board(board: Any, lookup: Artifact, table: np.ndarray) -> None:
    with open_target(f"ssh://{board.target()}") as target:
        with target.open_worker(lookup.path, ONE, cold=True) as worker:
            assert worker.info().runtime == "onnxruntime"
            np.testing.assert_allclose(worker.forward(IDS, MASK), table[IDS].mean(axis=1), atol=1e-6)
            assert len(worker.time_forward(IDS, MASK, repeats=3, warmup=0)) == 3
            assert worker.memory()["peak_rss"] > 0
            assert "worker.pyz" not in board.inside("ls", f"{STORE}/blobs")  # by hash, not by name
        assert worker.machine_load["busy"] in (True, False)
        assert worker.launch_facts["worker"] == "python"
        facts = target.facts()
        assert (facts["system"], facts["versions"]["onnxruntime"]) == ("Linux", facts["versions"]["onnxruntime"])
        assert facts["cores_usable"] >= 1
        assert target.shell.connections == 1
    assert board.inside("ls", f"{STORE}/exchange") == ""
    assert "edgestill" not in board.inside("ps", "-eo", "args").replace("sshd", "")


def test_gguf_needs_nothing_on_the_board(board: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """The native runner is sent; it says the same as llama.cpp here."""
    try:
        find_runner(platform.machine(), machine_facts())
    except EdgestillError as error:
        pytest.skip(f"{error}")
    artifact = export(tiny_llama, tmp_path / "tiny gguf", ExportConfig(to="gguf:q8_0"))
    ids = np.array([[5, 60, 90, 130, 7]])
    with LocalWorker(artifact.path, ONE) as here:
        wanted = here.forward(ids, np.ones_like(ids))
    with SshTarget(board.target(python="/nowhere/python3")) as target:
        with target.open_worker(artifact.path, ONE) as worker:
            assert worker.info().runtime == "llama.cpp"
            assert worker.launch_facts["worker"].startswith("native (")
            np.testing.assert_allclose(worker.forward(ids, np.ones_like(ids)), wanted, atol=1e-3)
            assert len(worker.time_decode([5, 6], 4, repeats=2)) == 2
        assert target.facts()["memory_bytes"] > 0
        assert target.facts()["versions"] == {}


def test_onnx_needs_only_a_library_of_the_users(
    board: Any, lookup: Artifact, table: np.ndarray, onnxruntime_command: list[str], onnxruntime_library: Path
) -> None:
    """The native runner is sent with ONNX Runtime itself, to a board without Python."""
    options = {"python": "/nowhere/python3", "onnxruntime": str(onnxruntime_library)}
    with SshTarget(board.target(**options)) as target:
        works(target, lookup, table)
        with target.open_worker(lookup.path, ONE) as worker:
            assert worker.info().backend == "CPUExecutionProvider"
            assert worker.launch_facts["worker"].endswith(f"sha256 {hash_file(onnxruntime_library)[:16]}")
            assert len(worker.time_forward(IDS, MASK, repeats=3, warmup=0)) == 3
    assert "edgestill" not in board.inside("ps", "-eo", "args").replace("sshd", "")


def test_only_what_is_missing_is_sent(
    board: Any, make_lookup: Callable[[Path], Artifact], table: np.ndarray, tmp_path: Path
) -> None:
    artifact = make_lookup(tmp_path / 'it\'s a «módel» "x"')
    with SshTarget(board.target("/~/odd%20'folder'")) as target:
        works(target, artifact, table)
        assert target._store.sent_bytes > 50_000
    with SshTarget(board.target("/~/odd%20'folder'")) as target:
        works(target, artifact, table)
        assert target._store.sent_bytes == 0
    # a file that was damaged on the board is sent again
    board.inside("sh", "-c", 'for f in /home/board/odd*/trees/*/model.onnx; do echo x >> "$f"; done')
    with SshTarget(board.target("/~/odd%20'folder'")) as target:
        works(target, artifact, table)
        assert target._store.sent_bytes == (artifact.path / "model.onnx").stat().st_size


def test_names_of_every_kind_arrive(target: SshTarget, board: Any, tmp_path: Path) -> None:
    names = ["a b", "it's", 'say "x"', "$(touch oops)", "модель", "-rf", "new\nline", "back\\slash", "*"]
    for name in names:
        (tmp_path / name).write_text(f"content of {name}")
    _, store = target._ready()
    there = store.tree({f"sub dir/{name}": LocalFile.of(tmp_path / name) for name in names})
    found = board.inside("find", f"{there}/sub dir", "-type", "f", "-print0").split("\0")
    assert sorted(found)[1:] == sorted(f"{there}/sub dir/{name}" for name in names)
    assert board.inside("cat", f"{there}/sub dir/new\nline") == "content of new\nline"


def test_a_reference_is_scored_there(target: SshTarget, lookup: Artifact, table: np.ndarray, tmp_path: Path) -> None:
    said = table[IDS].mean(axis=1)
    (tmp_path / "reference.json").write_text('{"task": "feature-extraction"}')
    for name, array in (("ids", IDS), ("mask", MASK), ("embeddings", said)):
        np.save(tmp_path / f"{name}.npy", array)
    with target.open_worker(lookup.path, ONE) as worker:
        assert worker.score(tmp_path)["cosine"] == pytest.approx(1.0)


def test_an_unknown_host_key_is_refused(board: Any, lookup: Artifact, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(board.config.read_text().replace("known_hosts", "no_hosts"))
    with (
        SshTarget(board.target(config=str(config))) as target,
        pytest.raises(BadInput, match="has a host key that is not known: refused") as caught,
    ):
        target.open_worker(lookup.path, ONE)
    assert "ssh -p 2222 board" in caught.value.hint
    assert not (board.work / "no_hosts").exists()


def test_a_changed_host_key_is_refused(board: Any, lookup: Artifact, tmp_path: Path) -> None:
    other = " ".join((board.work / "other_key.pub").read_text().split()[:2])
    (tmp_path / "known").write_text(f"[{board.address}]:2222 {other}\n")
    config = tmp_path / "config"
    text = board.config.read_text().replace(f"{board.work}/known_hosts", str(tmp_path / "known"))
    config.write_text(text + "  StrictHostKeyChecking no\n")  # what a user's config says does not weaken it
    with (
        SshTarget(board.target(config=str(config))) as target,
        pytest.raises(BadInput, match="shows another host key than the known one: refused"),
    ):
        target.open_worker(lookup.path, ONE)


def test_a_login_that_is_refused(board: Any, lookup: Artifact, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(board.config.read_text().replace("user_key", "other_key"))
    with (
        SshTarget(board.target(config=str(config))) as target,
        pytest.raises(BadInput, match="refuses the login") as caught,
    ):
        target.open_worker(lookup.path, ONE)
    assert "ssh-copy-id" in caught.value.hint


def test_nobody_listens(board: Any, lookup: Artifact) -> None:
    with SshTarget(board.target().replace(":2222", ":2223")) as target:
        with pytest.raises(WorkerError, match=r"can't be reached: .*Connection refused"):
            target.open_worker(lookup.path, ONE)
        begin = time.monotonic()
        with pytest.raises(WorkerError, match="can't be reached"):
            target.open_worker(lookup.path, ONE)
        assert time.monotonic() - begin < 0.5  # it isn't waited for again


def test_what_the_board_lacks_is_said(board: Any, lookup: Artifact) -> None:
    with (
        SshTarget(board.target(python="~/bin/bare-python3")) as target,
        pytest.raises(MissingDependency, match="board board:2222: python3 without numpy and onnxruntime"),
    ):
        target.open_worker(lookup.path, ONE)
    with (
        SshTarget(board.target(python="/nowhere/python3")) as target,
        pytest.raises(MissingDependency, match="no python3"),
    ):
        target.open_worker(lookup.path, ONE)


def test_a_folder_that_may_not_be_written(board: Any, lookup: Artifact) -> None:
    with (
        SshTarget(board.target("/usr/edgestill")) as target,
        pytest.raises(BadInput, match=r"making the folder /usr/edgestill failed: .*Permission denied"),
    ):
        target.open_worker(lookup.path, ONE)


def test_an_artifact_that_changed_is_refused_here(
    target: SshTarget, make_lookup: Callable[[Path], Artifact], table: np.ndarray, tmp_path: Path
) -> None:
    artifact = make_lookup(tmp_path / "model")
    works(target, artifact, table)
    time.sleep(0.02)
    (artifact.path / "model.onnx").write_bytes((artifact.path / "model.onnx").read_bytes() + b"x")
    with pytest.raises(BadInput, match=r"payload file model\.onnx does not match its sha256"):
        target.open_worker(artifact.path, ONE)
    with pytest.raises(Unsupported, match="runs artifacts"):
        target.open_worker(tmp_path, ONE)


def big_file(folder: Path, megabytes: int) -> LocalFile:
    path = folder / "weights.bin"
    path.write_bytes(np.random.default_rng(3).bytes(megabytes << 20))
    return LocalFile.of(path)


def test_a_full_disk(board: Any, lookup: Artifact, table: np.ndarray, tmp_path: Path) -> None:
    """Known before anything is sent, or found on the way: nothing half-sent is left, and small things still work."""
    with SshTarget(board.target("/~/small/store")) as target:
        works(target, lookup, table)
        _, store = target._ready()
        big = big_file(tmp_path, 5)
        with pytest.raises(ResourceExhausted, match=r"\d MB are free in /home/board/small/store, 9 MB are needed"):
            store.blob(big)
        store._check_room = lambda needed: None
        board.inside("dd", "if=/dev/zero", "of=/home/board/small/filler", "bs=1M", "count=3")
        with pytest.raises(ResourceExhausted, match=r"no space left: sending weights.bin failed"):
            store.blob(big)
        assert big.sha256 not in board.inside("ls", "/home/board/small/store/blobs")
        board.inside("dd", "if=/dev/zero", "of=/home/board/small/filler2", "bs=1M", "count=9")
        with pytest.raises((ResourceExhausted, WorkerError), match=r"[Nn]o space left"):
            works(target, lookup, table)
        board.inside("rm", "/home/board/small/filler", "/home/board/small/filler2")
        works(target, lookup, table)


def test_a_slow_link(board: Any, target: SshTarget, lookup: Artifact, table: np.ndarray, tmp_path: Path) -> None:
    """Half a megabit: slower than the send buffers are deep, and still alive."""
    board.slow("512kbit")
    try:
        works(target, lookup, table)
        _, store = target._ready()
        begin = time.monotonic()
        store.blob(big_file(tmp_path, 1))
        assert 10 < time.monotonic() - begin < 60
        assert target.shell.connections == 1
    finally:
        board.slow(None)


def test_a_link_that_drops_while_a_file_is_sent(
    board: Any, quick_link: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transfer goes on where it was cut, over a new connection; what arrives is whole."""
    with SshTarget(board.target()) as target:
        _, store = target._ready()
        big = big_file(tmp_path, 6)
        sends = []
        send = target.shell.send
        monkeypatch.setattr(target.shell, "send", lambda f, p, offset: (sends.append(offset), send(f, p, offset)))
        board.slow("4mbit")
        dropped = threading.Timer(4, board.link, ["down"])
        back = threading.Timer(14, board.link, ["up"])
        dropped.start()
        back.start()
        try:
            there = store.blob(big)
        finally:
            dropped.join()
            back.join()
            board.slow(None)
        assert board.inside("sha256sum", there).split()[0] == big.sha256
        assert target.shell.connections == 2
        assert len(sends) == 2
        assert sends[0] == 0
        assert sends[1] > 256 << 10, "it began again"


def test_a_link_that_drops_under_a_worker(board: Any, quick_link: None, lookup: Artifact, table: np.ndarray) -> None:
    """The launch that was cut is an error of its own kind; the next one finds its files there and sweeps up."""
    with SshTarget(board.target()) as target:
        worker = target.open_worker(lookup.path, ONE)
        pid = board.inside("sh", "-c", f"cat {STORE}/exchange/*/pid").strip()
        sent = target._store.sent_bytes
        board.link("down")
        threading.Timer(10, board.link, ["up"]).start()
        with pytest.raises(LinkLost, match="the link to board board:2222 broke"):
            worker.time_forward(IDS, MASK, repeats=10, warmup=0)
        assert f"/{pid}/" in board.inside("sh", "-c", f"ls -d /proc/{pid}/")  # it does not know yet
        works(target, lookup, table)
        assert target._store.sent_bytes == sent
        assert board.inside("sh", "-c", f"ls {STORE}/exchange; ls -d /proc/{pid}/ 2>/dev/null") == ""


def test_a_bench_survives_a_link_that_drops(board: Any, quick_link: None, lookup: Artifact) -> None:
    """The launch that was cut is repeated; every number is there, and the record says that one was cut."""
    opened = 0

    def open_worker(folder: Path, options: SessionOptions, *, cold: bool = False) -> RemoteWorker:
        nonlocal opened
        worker = target.open_worker(folder, options, cold=cold)
        opened += 1
        if opened == 2:
            board.link("down")
            threading.Timer(12, board.link, ["up"]).start()
        return worker

    with SshTarget(board.target()) as target:
        place = Place(dict(target.facts()), target.name, target.source)
        rows = measure_speed(
            [Subject("lookup", lookup.path)], BenchConfig(launches=2, repeats=3, length=3, max_seconds=5), ids=IDS,
            task="feature-extraction", open_worker=open_worker, place=place,
        )  # fmt: skip
        assert target.shell.connections == 2
    found = {row.metric: row for row in rows}
    assert (found["latency_ms"].source, len(found["latency_ms"].samples)) == ("measured", 2)
    assert found["latency_ms"].summary.value > 0
    assert found["peak_memory_bytes"].summary is not None
    environment = found["latency_ms"].environment
    assert environment["launches_cut"] == 1
    assert environment["cpu"] == target.facts()["cpu"]
    assert {load["worker"] for load in environment["machine_load"]} == {"python"}
    assert all(load["busy"] in (True, False) for load in environment["machine_load"])


def test_a_short_drop_is_not_noticed(board: Any, target: SshTarget, lookup: Artifact, table: np.ndarray) -> None:
    with target.open_worker(lookup.path, ONE) as worker:
        board.link("down")
        threading.Timer(2, board.link, ["up"]).start()
        np.testing.assert_allclose(worker.forward(IDS, MASK), table[IDS].mean(axis=1), atol=1e-6)
    assert target.shell.connections == 1


@pytest.mark.parametrize(
    ("signal", "message"),
    [("ILL", "died of SIGILL .*lacks an instruction"), ("KILL", "died of SIGKILL"), ("SEGV", "died of SIGSEGV")],
)
def test_a_worker_that_is_killed_there(
    board: Any, target: SshTarget, lookup: Artifact, table: np.ndarray, signal: str, message: str
) -> None:
    worker = target.open_worker(lookup.path, ONE)
    pid = board.inside("sh", "-c", f"cat {STORE}/exchange/*/pid").strip()
    board.inside("kill", f"-{signal}", pid)
    with pytest.raises(WorkerError, match=message) as caught:
        worker.memory()
    assert not isinstance(caught.value, LinkLost)
    works(target, lookup, table)  # the others go on, over the same connection
    assert target.shell.connections == 1
    assert board.inside("ls", f"{STORE}/exchange") == ""


def test_without_ssh_it_says_what_to_install(
    board: Any, lookup: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with SshTarget(board.target()) as target:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(MissingDependency, match="ssh is not installed here"):
            target.open_worker(lookup.path, ONE)


def test_nothing_is_left_here(board: Any, lookup: Artifact) -> None:
    before = set(Path("/tmp").glob("edgestill-ssh-*"))
    with SshTarget(board.target()) as target:
        target.facts()
        assert len(set(Path("/tmp").glob("edgestill-ssh-*")) - before) == 1
    assert set(Path("/tmp").glob("edgestill-ssh-*")) <= before
    assert shutil.which("ssh")
    masters = subprocess.run(["pgrep", "-af", "edgestill-ssh-"], capture_output=True, text=True, check=False).stdout
    assert str(target.shell._socket) not in masters


def test_accuracy_on_the_board(board: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """The reference goes there, the reduction comes back; the same runtime on the same processor says the same. A model
    folder needs torch there, which is told."""
    folder = export(tiny_llama, tmp_path / "it's int8", ExportConfig(to="onnx:int8")).path
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"context": "the film was", "choices": ["good", "bad"], "answer": "bad"}\n')
    subjects = [Subject("int8", folder), Subject("torch", tiny_llama, "model")]
    request = AccuracyRequest(tiny_llama, tasks=(quiz,), threads=1, tokens=200, window=32)
    rows = measure_accuracy(subjects, request, Observer(), targets=("host", f"ssh://{board.target()}"))
    sides: dict[str, dict[Any, Any]] = {}
    for row in rows:
        if row.subject == "int8":
            assert row.summary is not None, row.reason
            sides.setdefault(row.target, {})[row.metric, row.against, row.data] = row.summary.value
    here, there = sides.values()
    assert list(sides) == ["host", f"ssh://{board.target()}"]
    assert there == pytest.approx(here, rel=1e-5, abs=1e-7)
    assert here["kl", "teacher", "sample"] > 0
    lost = [row for row in rows if row.subject == "torch" and row.target != "host"]
    assert [row.summary for row in lost] == [None, None]
    assert all(row.reason for row in lost)
    assert board.inside("ls", f"{STORE}/exchange") == ""
