"""A small ONNX artifact, a device's Python (numpy and onnxruntime, nothing else), and a board of its own behind an
OpenSSH server, in namespaces of the kernel."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Artifact, Histogram, Manifest, TensorSpec, seal_artifact

WIDTH, VOCABULARY = 8, 50


@pytest.fixture(scope="session")
def table() -> np.ndarray:
    """The embedding table ``[50, 8]`` of :func:`lookup`."""
    return np.random.default_rng(5).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)


@pytest.fixture(scope="session")
def make_lookup(table: np.ndarray) -> Callable[[Path], Artifact]:
    """Write an ONNX artifact that looks token vectors up and leaves mean pooling to the caller."""

    def make(folder: Path) -> Artifact:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        folder.mkdir(parents=True)
        graph = helper.make_graph(
            [helper.make_node("Gather", ["table", "input_ids"], ["hidden"])],
            "lookup",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
            [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "length", WIDTH])],
            [numpy_helper.from_array(table, "table")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, folder / "model.onnx")
        manifest = Manifest(
            format="onnx", quantisation="fp32", task="feature-extraction", entry="model.onnx",
            inputs=(TensorSpec("input_ids", "int64", ("batch", "length")),),
            outputs=(TensorSpec("hidden", "float32", ("batch", "length", WIDTH)),),
            shapes="dynamic", max_length=64, vocab_size=VOCABULARY, contents="fp32",
            dtype_histogram={"float32": Histogram(1, table.size, table.nbytes)},
            minimum_runtime={"onnxruntime": "1.17"}, lineage={}, pooling="mean",
        )  # fmt: skip
        return seal_artifact(folder, manifest)

    return make


@pytest.fixture(scope="session")
def lookup(make_lookup: Callable[[Path], Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One such artifact, not to be changed."""
    return make_lookup(tmp_path_factory.mktemp("artifacts") / "lookup")


@pytest.fixture(scope="session")
def device_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages as a board has them: numpy and onnxruntime, and no edgestill."""
    import onnxruntime

    folder = tmp_path_factory.mktemp("device") / "packages"
    folder.mkdir()
    for package in (Path(np.__file__).parent, Path(onnxruntime.__file__).parent):
        (folder / package.name).symlink_to(package)
        bundled = package.parent / f"{package.name}.libs"
        if bundled.is_dir():
            (folder / bundled.name).symlink_to(bundled)
    return folder


_DEVICE_PYTHON = """#!{python} -IS
import sys
from runpy import run_path

sys.path.append({packages!r})
arguments = sys.argv[1:]
while arguments[0] in ("-I", "-u"):
    del arguments[0]
if arguments[0] == "-c":
    code = arguments.pop(1)
    sys.argv = arguments
    exec(code, {{"__name__": "__main__"}})
else:
    sys.argv = arguments
    sys.path.insert(0, "")
    run_path(arguments[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def device_python(device_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An executable that behaves as the ``python3`` of a board with only :func:`device_packages`: -S shuts this
    environment's own packages out."""
    script = tmp_path_factory.mktemp("device") / "python3"
    script.write_text(_DEVICE_PYTHON.format(python=sys.executable, packages=str(device_packages)))
    script.chmod(0o755)
    return script


NEEDS = ("sshd", "ssh", "ssh-keygen", "ip", "tc", "unshare")


def why_no_board() -> str | None:
    """What this machine lacks to be its own remote board, or ``None``."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in NEEDS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt install openssh-server openssh-client iproute2 util-linux)"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return None if probe.returncode == 0 else "this system lets nobody make namespaces"


# The board's own start: a mount namespace with another user list and home, a process namespace, no network but veth's.
_INIT = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=96m,mode=755 board /home
mkdir -p /home/board/bin /home/board/py /home/board/packages /home/board/small /home/board/.ssh
cp {work}/authorized_keys /home/board/.ssh/
cp {work}/python3 {work}/bare-python3 /home/board/bin/
cp {work}/device_python.py /home/board/
mount --bind {base} /home/board/py
{packages}
chown -R 4321:4321 /home/board/.ssh /home/board/bin
chown 4321:4321 /home/board
chmod 700 /home/board/.ssh
mount -t tmpfs -o size=6m,mode=755,uid=4321 small /home/board/small
cp {work}/passwd {work}/passwd.new
mount --bind {work}/passwd.new /etc/passwd
mount -t tmpfs run /run
mkdir -p /run/sshd /run/host
cp {work}/host_key {work}/sshd_config /run/host/
chmod 600 /run/host/host_key
exec {sshd} -D -e -f /run/host/sshd_config
"""


@dataclass
class BoardMachine:
    """A board of its own: user list, home, processes and network are not this machine's. Only the kernel is shared."""

    work: Path
    name: str
    address: str
    process: subprocess.Popen[bytes]

    @property
    def config(self) -> Path:
        """The ssh config that reaches it (``Host board``)."""
        return self.work / "config"

    def target(self, folder: str = "", **options: str) -> str:
        """The address for ``parse_target``, with ``python`` set to the board's own."""
        chosen = {"config": str(self.config), "python": "~/bin/python3", **options}
        return f"board:2222{folder}?" + "&".join(f"{key}={value}" for key, value in chosen.items())

    def inside(self, *command: str) -> str:
        """Run a command in the board's namespaces, as its root, for looking at it."""
        child = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0]
        full = ["nsenter", "--target", child, "--mount", "--pid", "--net", *command]
        return subprocess.run(full, capture_output=True, text=True, check=False, timeout=30).stdout

    def link(self, *words: str) -> None:
        """``up`` or ``down``: the cable."""
        _run("ip", "link", "set", f"{self.name}h", *words)

    def slow(self, rate: str | None) -> None:
        """Limit what leaves for the board (``"1mbit"``); ``None``: no limit."""
        subprocess.run(["tc", "qdisc", "del", "dev", f"{self.name}h", "root"], capture_output=True, check=False)
        if rate:
            _run("tc", "qdisc", "add", "dev", f"{self.name}h", "root", "tbf", "rate", rate, "burst", "16kb",
                 "latency", "300ms")  # fmt: skip


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _board_files(work: Path, packages: Path, address: str) -> None:
    for key in ("host_key", "user_key", "other_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(work / key))
    (work / "authorized_keys").write_text((work / "user_key.pub").read_text())
    host_key = " ".join((work / "host_key.pub").read_text().split()[:2])
    (work / "known_hosts").write_text(f"[{address}]:2222 {host_key}\n")
    sftp = next((p for p in ("/usr/lib/openssh/sftp-server", "/usr/libexec/sftp-server") if Path(p).exists()), "none")
    (work / "sshd_config").write_text(
        "Port 2222\nHostKey /run/host/host_key\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin no\nUsePAM no\nPidFile none\nMaxStartups 50\nSubsystem sftp {sftp}\n"
    )
    (work / "config").write_text(
        f"Host board\n  HostName {address}\n  User board\n  IdentityFile {work}/user_key\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {work}/known_hosts\n  GlobalKnownHostsFile /dev/null\n  IdentityAgent none\n"
    )
    (work / "passwd").write_text(Path("/etc/passwd").read_text() + "board:*:4321:4321::/home/board:/bin/sh\n")
    script = _DEVICE_PYTHON.format(python=sys.executable, packages="/home/board/packages")
    (work / "device_python.py").write_text(script)
    start = "#!/bin/sh\nexport LD_LIBRARY_PATH=/home/board/py/lib\nexec /home/board/py/bin/python3 -IS "
    (work / "python3").write_text(f'{start}/home/board/device_python.py "$@"\n')
    (work / "bare-python3").write_text(f'{start}"$@"\n')
    mounts = []
    for entry in packages.iterdir():
        mounts += [f"mkdir /home/board/packages/{entry.name}"]
        mounts += [f"mount --bind {entry.resolve()} /home/board/packages/{entry.name}"]
    sshd = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin")
    init = _INIT.format(work=work, base=sys.base_prefix, packages="\n".join(mounts), sshd=sshd)
    (work / "init.sh").write_text(init)
    for name in ("python3", "bare-python3"):
        (work / name).chmod(0o755)


@pytest.fixture(scope="session")
def board(device_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BoardMachine]:
    """A board behind a real OpenSSH server, in namespaces of its own, at the other end of a veth cable."""
    if reason := why_no_board():
        pytest.skip(reason)
    work = tmp_path_factory.mktemp("board")
    number = os.getpid() % 16000
    name, subnet = f"es{number}", f"10.{200 + number // 4096}.{number // 16 % 256}"
    base = number % 16 * 16
    here, there = f"{subnet}.{base + 1}", f"{subnet}.{base + 2}"
    _board_files(work, device_packages, there)
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", f"{name}h", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        _run("ip", "addr", "add", f"{here}/28", "dev", f"{name}h")
        _run("ip", "link", "set", f"{name}h", "up")
        for command in (("addr", "add", f"{there}/28", "dev", f"{name}b"), ("link", "set", f"{name}b", "up"),
                        ("link", "set", "lo", "up")):  # fmt: skip
            _run("ip", "-n", name, *command)
        start = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", str(work / "init.sh")]
        with (work / "sshd.log").open("wb") as log:
            process = subprocess.Popen(["ip", "netns", "exec", name, *start], stdout=log, stderr=log)
        try:
            _wait_for_port(there, process, work)
            yield BoardMachine(work, name, there, process)
        finally:
            process.kill()
            process.wait()
    finally:
        _run("ip", "netns", "del", name)
        subprocess.run(["ip", "link", "del", f"{name}h"], capture_output=True, check=False)


def _wait_for_port(address: str, process: subprocess.Popen[bytes], work: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, (work / "sshd.log").read_text()
        try:
            socket.create_connection((address, 2222), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError((work / "sshd.log").read_text())
