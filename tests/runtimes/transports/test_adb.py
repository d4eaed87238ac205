"""adb against a scripted ``adb`` on PATH that runs the commands here, in a folder that stands for the phone.

There is no Android in the tests: that adb is called rightly, that files arrive, that the worker is spoken to, and what
happens when the phone is warm or gone, is what they show.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact, Manifest, seal_artifact
from edgestill.errors import BadInput, LinkLost, MissingDependency, Unsupported, UsageError, WorkerError
from edgestill.files import hash_file
from edgestill.runtimes import native
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.targets import open_target
from edgestill.runtimes.transports import adb
from edgestill.runtimes.transports.adb import AdbTarget
from edgestill.runtimes.transports.cooling import Limits, wait_until_cool

ONE = SessionOptions(threads=1)
IDS = np.array([[4, 9, 3]])
MASK = np.ones_like(IDS)

# As adb does: get-state, shell with the command's status, push and pull, and an error for a phone that is gone.
_ADB = """#!/bin/sh
phone={phone}
echo $(echo "$*" | tr '\\n' ' ') >> $phone/calls
[ "$1" = -s ] || exit 64
serial=$2; shift 2
case $(cat $phone/state) in
  gone) echo "adb: device '$serial' not found" >&2; exit 1;;
  unauthorized) echo "error: device unauthorized." >&2; exit 1;;
esac
verb=$1; shift
case $verb in
  get-state) echo device;;
  shell) [ "$1" = -T ] || exit 64; shift; [ $# = 1 ] || exit 64
    exec 3<&0; PATH=$phone/bin:$PATH sh -c "$1" <&3 & wait $!;;
  push|pull) for last; do :; done
    while [ $# -gt 1 ]; do cp "$1" "$last" || exit 1; shift; done; echo "1 file pushed, 0 skipped.";;
  *) exit 64;;
esac
"""
_BATTERY = "Current Battery Service state:\n  AC powered: false\n  level: 81\n  temperature: {tenths}\n"
_THERMAL = "IsStatusOverride: false\nThermal Status: {status}\n"


class Phone:
    """The scripted phone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bin").mkdir()
        (root / "state").write_text("device")
        (root / "calls").write_text("")
        self.script(root / "adb", _ADB.format(phone=root))
        self.script(root / "bin/ln", "#!/bin/sh\nexit 1\n")  # as on Android: the shell user may not make hard links
        self.script(root / "bin/dumpsys", f"#!/bin/sh\ncat {root}/$1\n")
        self.warm(251, 0)

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def warm(self, tenths: int, status: int) -> None:
        (self.root / "battery").write_text(_BATTERY.format(tenths=tenths))
        (self.root / "thermalservice").write_text(_THERMAL.format(status=status))

    @property
    def folder(self) -> Path:
        return self.root / "data" / "edge still"

    @property
    def calls(self) -> str:
        return (self.root / "calls").read_text()

    def target(self, **options: str) -> AdbTarget:
        query = "&".join(f"{name}={value}" for name, value in {"dir": str(self.folder), **options}.items())
        return AdbTarget(f"R5CX!{query}".replace("!", "?"))


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phone:
    (tmp_path / "phone").mkdir()
    phone = Phone(tmp_path / "phone")
    monkeypatch.setenv("PATH", f"{phone.root}:{os.environ['PATH']}")
    toy = Path(__file__).parents[1] / "toy_worker.py"
    runner = tmp_path / "edgestill-runner"
    phone.script(runner, f'#!/bin/sh\nexec {sys.executable} {toy} "$@"\n')
    monkeypatch.setattr(native, "find_runner", lambda machine, facts=None: runner)
    return phone


@pytest.fixture
def make_toy(tmp_path: Path) -> Callable[[str], Artifact]:
    """An artifact that the toy worker opens: its payload says how it behaves."""

    def make(behaviour: str = "well", form: str = "gguf") -> Artifact:
        folder = tmp_path / 'a "toy" моdel'
        folder.mkdir()
        (folder / "behaviour").write_text(behaviour)
        (folder / "it's.txt").write_text(behaviour)  # the same content under another name
        manifest = Manifest(
            format=form, quantisation="q8_0", task="text-generation", entry="behaviour", inputs=(), outputs=(),
            shapes="dynamic", max_length=64, vocab_size=11, contents="", dtype_histogram={}, minimum_runtime={},
            lineage={},
        )  # fmt: skip
        return seal_artifact(folder, manifest)

    return make


def test_a_worker_on_the_phone(phone: Phone, make_toy: Callable[..., Artifact]) -> None:
    toy = make_toy()
    with open_target(phone.target().name) as target:
        with target.open_worker(toy.path, ONE) as worker:
            assert worker.forward(IDS, MASK).shape == (1, 3, 11)
            assert [token.id for token in worker.decode([1, 2], 3)]
            told = worker.sensors()
            assert (told["battery_c"], told["thermal_status"]) == (25.1, 0)
            assert not {"battery_c", "thermal_status"} & set(told["reasons"])
        assert worker.launch_facts["worker"].startswith("native (")
        assert worker.launch_facts["cooling"]["battery_c"] == 25.1
        with target.open_worker(toy.path, ONE) as worker:
            worker.forward(IDS, MASK)
    pushes = [line for line in phone.calls.splitlines() if " push " in line and "/blobs/" in line]
    assert len(pushes) == 3  # the runner, artifact.json and one content for two names: once, not once a worker
    assert sorted(path.name for path in phone.folder.glob("trees/*/*")) == ["artifact.json", "behaviour", "it's.txt"]
    assert not list(phone.folder.glob("exchange/*"))
    assert all(line.startswith("-s R5CX ") for line in phone.calls.splitlines())


def test_the_folder_that_phones_allow_is_the_default() -> None:
    assert AdbTarget("R5CX").settings.folder == "/data/local/tmp/edgestill"
    assert AdbTarget("192.168.0.7:5555").shell.name == "phone 192.168.0.7:5555"


@pytest.mark.parametrize("address", ["", "-s x", "a b", "x?folder=/y", "x?wait_s=soon", "$(reboot)"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(UsageError):
        AdbTarget(address)


def test_onnx_is_unsupported_with_the_reason(phone: Phone, make_toy: Callable[..., Artifact]) -> None:
    with phone.target() as target, pytest.raises(Unsupported, match=r"needs a libonnxruntime\.so of yours") as caught:
        target.open_worker(make_toy(form="onnx").path, ONE)
    assert "adb:SERIAL?onnxruntime=" in caught.value.hint
    assert "target web" in caught.value.hint


ONNX_RUNNER = """#!/bin/sh
[ "$1 $3" = "--onnxruntime --host" ] && [ -f "$2" ] && [ -x "$4" ] || exit 9
shift 4
exec {python} {toy} "$@"
"""


def test_onnx_with_a_library_of_the_users(
    phone: Phone, make_toy: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    make_elf: Callable[..., bytes],
) -> None:  # fmt: skip
    """The library and the program that loads it are pushed by hash, and named to the runner."""
    toy = make_toy(form="onnx")
    library = tmp_path / "lib of 'mine', 1.so"
    library.write_bytes(make_elf(62 if os.uname().machine == "x86_64" else 183, ["libc.so.6"]))
    host, runner = tmp_path / "host", tmp_path / "onnx-runner"
    phone.script(host, "#!/bin/sh\n")
    phone.script(runner, ONNX_RUNNER.format(python=sys.executable, toy=Path(__file__).parents[1] / "toy_worker.py"))
    asked: list[tuple[str, str]] = []

    def find_host(machine: str, libc: str) -> Path:
        asked.append((machine, libc))
        return host

    monkeypatch.setattr(native, "find_runner", lambda machine, facts=None: runner)
    monkeypatch.setattr(native, "find_host", find_host)
    with phone.target(onnxruntime=urllib.parse.quote(str(library))) as target:
        for _ in range(2):
            with target.open_worker(toy.path, ONE) as worker:
                assert worker.forward(IDS, MASK).shape == (1, 3, 11)
    digest = hash_file(library)
    assert worker.launch_facts["worker"].endswith(f"with {library.name}, sha256 {digest[:16]}")
    assert set(asked) == {(os.uname().machine, "glibc")}
    assert (phone.folder / "blobs" / digest).read_bytes() == library.read_bytes()
    assert len([line for line in phone.calls.splitlines() if " push " in line and f"/blobs/{digest}" in line]) == 1


def test_a_library_that_the_phone_can_not_load_is_not_sent(
    phone: Phone, make_toy: Callable[..., Artifact], tmp_path: Path, make_elf: Callable[..., bytes]
) -> None:
    toy = make_toy(form="onnx")
    library = tmp_path / "libonnxruntime.so"
    here, other = (62, 183) if os.uname().machine == "x86_64" else (183, 62)
    for data, text in (
        (make_elf(other, ["libc.so.6"]), f"phone R5CX is {os.uname().machine}"),
        (make_elf(here, ["libc.so"]), "is for Android, phone R5CX is Linux with glibc"),
        (make_elf(40, bits=1), "no 64-bit shared library .*32-bit ARM"),
        (b"text", "no shared library"),
    ):
        library.write_bytes(data)
        with phone.target(onnxruntime=str(library)) as target, pytest.raises(BadInput, match=text):
            target.open_worker(toy.path, ONE)
    library.unlink()
    with (
        phone.target(onnxruntime=str(library)) as target,
        pytest.raises(BadInput, match=r"libonnxruntime\.so can't be read"),
    ):
        target.open_worker(toy.path, ONE)
    assert " push " not in phone.calls


@pytest.mark.slow
def test_the_real_runner_with_a_real_library(
    phone: Phone, onnxruntime_command: list[str], onnxruntime_library: Path, lookup: Artifact, table: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(native, "find_runner", lambda machine, facts=None: Path(onnxruntime_command[0]))
    with phone.target(onnxruntime=str(onnxruntime_library)) as target:
        with target.open_worker(lookup.path, ONE) as worker:
            assert worker.info().runtime == "onnxruntime"
            np.testing.assert_allclose(worker.forward(IDS, MASK), table[IDS].mean(axis=1), atol=1e-6)
            assert len(worker.time_forward(IDS, MASK, repeats=3, warmup=0)) == 3
            assert worker.memory()["peak_rss"] > 5 << 20
        assert worker.machine_load["busy"] in (True, False)
    assert not list(phone.folder.glob("exchange/*"))


def test_without_a_runner_or_adb_it_says_how_to_get_one(
    phone: Phone, make_toy: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toy = make_toy()

    def not_built(machine: str, facts: object = None) -> Path:
        raise MissingDependency(f"no native runner was built for {machine}", hint="edgestill devices build-runner")

    monkeypatch.setattr(native, "find_runner", not_built)
    with phone.target() as target, pytest.raises(MissingDependency, match="no native runner was built for"):
        target.open_worker(toy.path, ONE)
    monkeypatch.setenv("PATH", str(tmp_path))
    with phone.target() as target, pytest.raises(MissingDependency, match="adb is not installed here") as caught:
        target.open_worker(toy.path, ONE)
    assert caught.value.hint == "apt install adb"


@pytest.mark.parametrize(
    ("state", "kind", "message"),
    [("gone", WorkerError, "phone R5CX can't be reached: .*not found"),
     ("unauthorized", BadInput, "phone R5CX does not trust this machine")],
)  # fmt: skip
def test_a_phone_that_is_not_there(
    phone: Phone, make_toy: Callable[..., Artifact], state: str, kind: type[Exception], message: str
) -> None:
    (phone.root / "state").write_text(state)
    with phone.target() as target, pytest.raises(kind, match=message):
        target.open_worker(make_toy().path, ONE)


def test_a_phone_that_is_unplugged_under_a_worker(
    phone: Phone, make_toy: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adb, "RECONNECT_SECONDS", 0.5)
    toy = make_toy()
    with phone.target() as target:
        worker = target.open_worker(toy.path, ONE)
        (phone.root / "state").write_text("gone")
        os.killpg(worker.pid, 9)  # adb's client ends, and takes what runs on this phone with it
        with pytest.raises(LinkLost, match="the link to phone R5CX broke"):
            worker.memory()
        with pytest.raises(WorkerError, match="can't be reached"):
            target.open_worker(toy.path, ONE)
        (phone.root / "state").write_text("device")
        with target.open_worker(toy.path, ONE) as worker:
            worker.forward(IDS, MASK)
        assert target.shell.connections == 2
    assert not list(phone.folder.glob("exchange/*"))


@pytest.mark.parametrize(
    ("behaviour", "message"), [("kill@forward", "died of SIGKILL"), ("exit@forward", "ended with status 3")]
)
def test_a_worker_that_dies_there(
    phone: Phone, make_toy: Callable[..., Artifact], behaviour: str, message: str
) -> None:
    toy = make_toy(behaviour)
    with phone.target() as target:
        worker = target.open_worker(toy.path, ONE)
        with pytest.raises(WorkerError, match=message):
            worker.forward(IDS, MASK)


def test_a_warm_phone_is_waited_for(phone: Phone) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        phone.warm(*((412, 0), (380, 1), (380, 0))[len(slept) - 1])

    phone.warm(415, 0)
    told = wait_until_cool(phone.target().shell, Limits(), pause=sleep)
    assert len(slept) == 3
    assert (told["battery_c"], told["thermal_status"], told["limit_battery_c"]) == (38.0, 0, 38.0)
    assert json.loads(json.dumps(told)) == told


def test_a_phone_that_stays_warm_gives_no_number(phone: Phone, make_toy: Callable[..., Artifact]) -> None:
    phone.warm(452, 2)
    with (
        phone.target(wait_s="0") as target,
        pytest.raises(WorkerError, match=r"too warm to measure after 0 s: the battery has 45.2 °C, 38 are allowed"),
    ):
        target.open_worker(make_toy().path, ONE)


def test_what_a_phone_does_not_tell_is_null_with_the_reason(phone: Phone) -> None:
    for name in ("battery", "thermalservice"):
        (phone.root / name).unlink()
    told = wait_until_cool(phone.target().shell, Limits())
    assert (told["battery_c"], told["thermal_status"]) == (None, None)
    assert set(told["reasons"]) == {"battery_c", "battery_percent", "thermal_status"}
