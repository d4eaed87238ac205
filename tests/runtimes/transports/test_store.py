"""The store on a device, through a shell of this machine: what is sent, what is kept, what is found damaged."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgestill.errors import BadInput, LinkLost, ResourceExhausted, WorkerError
from edgestill.runtimes.transports.options import parse_query
from edgestill.runtimes.transports.probe import Board, probe
from edgestill.runtimes.transports.shell import STATUS, RemoteShell, quote, split_status
from edgestill.runtimes.transports.ssh import DEFAULT_FOLDER, parse_address
from edgestill.runtimes.transports.store import DeviceStore, LocalFile


class HereShell(RemoteShell):
    """This machine's own sh. ``breaks`` cuts a transfer after that many bytes, once each."""

    name = "board here"

    def __init__(self) -> None:
        self.breaks: list[int] = []
        self.sent: list[tuple[str, int]] = []

    def connect(self) -> None:
        self.connections = max(1, self.connections)

    def argv(self, script: str) -> list[str]:
        return ["sh", "-c", script]

    def send(self, source: Path, there: str, offset: int) -> None:
        self.sent.append((source.name, offset))
        data = source.read_bytes()[offset:]
        with Path(there).open("ab" if offset else "wb") as stream:
            if self.breaks:
                stream.write(data[: self.breaks.pop(0)])
                raise self.lost("the cable was pulled")
            stream.write(data)

    def put(self, files: Sequence[Path], folder: str) -> None:
        raise NotImplementedError

    def get(self, names: Sequence[str], folder: str, here: Path) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


@pytest.fixture
def shell() -> HereShell:
    return HereShell()


@pytest.fixture
def store(shell: HereShell, tmp_path: Path) -> DeviceStore:
    return DeviceStore(shell, probe(shell, str(tmp_path / "the board's store"), None).root)


@pytest.fixture
def file(tmp_path: Path) -> LocalFile:
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 40)
    return LocalFile.of(tmp_path / "weights")


def test_a_cut_transfer_goes_on_where_it_stopped(store: DeviceStore, shell: HereShell, file: LocalFile) -> None:
    shell.breaks = [3000, 2000]
    there = store.blob(file)
    assert shell.sent == [("weights", 0), ("weights", 3000), ("weights", 5000)]
    assert Path(there).read_bytes() == file.path.read_bytes()
    assert [path.name for path in Path(store.root, "blobs").iterdir()] == [file.sha256]


def test_a_link_that_never_holds_is_given_up(store: DeviceStore, shell: HereShell, file: LocalFile) -> None:
    shell.breaks = [0] * 10
    with pytest.raises(LinkLost, match="the link to board here broke: the cable was pulled"):
        store.blob(file)
    assert len(shell.sent) == 4


def test_a_part_that_is_damaged_is_sent_again(store: DeviceStore, shell: HereShell, file: LocalFile) -> None:
    Path(store.root, "blobs").mkdir()
    Path(store.root, "blobs", f"{file.sha256}.part").write_bytes(b"?" * 500)
    Path(store.root, "blobs", file.sha256).write_bytes(b"not what its name says")
    there = store.blob(file)
    assert Path(there).read_bytes() == file.path.read_bytes()
    assert shell.sent[-1] == ("weights", 0)


def test_a_file_that_changes_meanwhile_is_refused(store: DeviceStore, shell: HereShell, file: LocalFile) -> None:
    file.path.write_bytes(b"other")
    with pytest.raises(BadInput, match="weights changed while it was sent"):
        store.blob(file)
    assert not list(Path(store.root, "blobs").iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_contents_are_shared_and_sent_once(
    store: DeviceStore, shell: HereShell, file: LocalFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:  # as on Android
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/ln").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin/ln").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    first = store.tree({"a": file, "b/c d": file})
    assert len(shell.sent) == 1
    assert all(Path(first, name).read_bytes() == file.path.read_bytes() for name in ("a", "b/c d"))
    again = DeviceStore(shell, store.root)
    assert again.tree({"a": file, "b/c d": file}) == first
    assert len(shell.sent) == 1
    assert again.tree({"a": file}) != first  # a folder holds just its files
    assert len(shell.sent) == (1 if links else 2)
    assert len(list(Path(store.root, "blobs").iterdir())) == (1 if links else 0)


def test_an_empty_file_and_many_files(store: DeviceStore, tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"f{index}").write_bytes(b"x" * index)
    files = {f"f{index}": LocalFile.of(tmp_path / f"f{index}") for index in range(40)}
    there = Path(store.tree(files))
    assert [(there / f"f{index}").stat().st_size for index in range(40)] == list(range(40))


def test_a_board_without_room_is_told_before(
    store: DeviceStore, shell: HereShell, file: LocalFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/df").write_text("#!/bin/sh\necho header\necho '/dev/x y 100 90 2048 98% /mnt/my card'\n")
    (tmp_path / "bin/df").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    with pytest.raises(ResourceExhausted, match=r"board here: 2 MB are free in .*, 4 MB are needed"):
        store.blob(file)
    assert not shell.sent


def test_a_script_that_fails_says_why(shell: HereShell) -> None:
    with pytest.raises(WorkerError, match=r"board here: looking failed: .*/nowhere"):
        shell.check("ls /nowhere", "looking")
    with pytest.raises(ResourceExhausted, match="no space left: writing failed"):
        shell.check("echo 'cat: write error: No space left on device' >&2; exit 1", "writing")
    assert shell.run("printf 'a\\0b'; exit 7").out == b"a\0b"
    assert shell.run("exit 7").status == 7


def test_a_script_that_is_cut_is_a_lost_link(shell: HereShell) -> None:
    with pytest.raises(LinkLost, match="the link to board here broke"):
        shell.run("kill -9 $$")
    with pytest.raises(LinkLost, match=r"nothing came from it for 0\.2 s"):
        shell.run("sleep 30", seconds=0.2)


def test_status_is_read_from_the_last_line() -> None:
    assert split_status(f"a\n{STATUS} 0\n") == ("a\n", 0)
    assert split_status("a\nb") == ("a\nb", None)
    assert quote("~/x y") == "\"$HOME\"/'x y'"


def test_a_probe_asks_for_python_and_its_packages(shell: HereShell, device_python: Path, tmp_path: Path) -> None:
    board = probe(shell, str(tmp_path / "store"), str(device_python))
    assert board.system == "Linux"
    assert board.why_no_worker("onnxruntime") is None
    assert board.why_no_worker("llama_cpp") == "python3 without llama_cpp"
    assert (tmp_path / "store").stat().st_mode & 0o077 == 0  # others on the board have no business there
    assert probe(shell, str(tmp_path / "store"), "no-such-python").why_no_worker() == "no python3"
    assert shutil.which("sh")


def test_what_a_board_lacks_in_half_a_sentence() -> None:
    board = Board("/x", "Linux", "aarch64", (), "3.9.2", {"numpy": "1"})
    assert board.why_no_worker() == "python3 is 3.9.2, 3.11 or newer is needed"
    assert Board("/x", "Linux", "armv7l", (), "3.12.1").why_no_worker("onnxruntime") == (
        "python3 without numpy and onnxruntime"
    )


@pytest.mark.parametrize(
    ("address", "destination", "port", "folder"),
    [
        ("board", "board", None, DEFAULT_FOLDER),
        ("pi@10.0.0.7:2222", "pi@10.0.0.7", 2222, DEFAULT_FOLDER),
        ("pi@[fe80::1%25eth0]:22/mnt/a%20b/", "pi@fe80::1%eth0", 22, "/mnt/a b"),
        ("board/~/it's", "board", None, "~/it's"),
        ("board?python=/opt/py/bin/python3&runner=native", "board", None, DEFAULT_FOLDER),
    ],
)
def test_an_address_taken_apart(address: str, destination: str, port: int | None, folder: str) -> None:
    got = parse_address(address)
    assert (got[0], got[1], got[2].folder) == (destination, port, folder)


@pytest.mark.parametrize(
    "address",
    ["", "-oProxyCommand=x", "pi@-oProxyCommand=x", "a b", "board:0", "board:99999", "board:x", "u@v@w",
     "board?pyhton=x", "board?python=", "board?runner=a&runner=b", "[::1"],
)  # fmt: skip
def test_an_address_that_is_none(address: str) -> None:
    from edgestill.errors import UsageError

    with pytest.raises(UsageError):
        parse_address(address)


def test_an_unknown_option_names_the_nearest() -> None:
    from edgestill.errors import UsageError

    with pytest.raises(UsageError) as caught:
        parse_query("pyton=x", ("python", "config"), "ssh://board")
    assert "python" in caught.value.hint
