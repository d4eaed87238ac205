from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgestill import archives, registries
from edgestill import fetch as fetch_module
from edgestill.errors import BadInput, EdgestillError, MissingDependency, ResourceExhausted
from edgestill.fetch import Address, cache_folder, fetch, fetch_source, parse_address
from edgestill.files import hash_bytes, hash_file, hash_tree

FILES = {"words/data/a.txt": b"first\n", "words/data/deep/b.txt": b"second\n", "words/other.txt": b"x" * 5000}


def make_wheel(folder: Path, files: dict[str, bytes] = FILES, name: str = "words") -> Path:
    """A small wheel that pip takes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for inside, content in files.items():
            archive.writestr(inside, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a folder, which pip is configured to look in, and nowhere else: real pip, no network."""
    wheel = make_wheel(tmp_path / "registry")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return wheel


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run to download."""
    seen: list[list[str]] = []
    run = registries._run

    def counted(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return run(command, folder)

    monkeypatch.setattr(registries, "_run", counted)
    return seen


def test_a_file_and_a_folder_of_a_wheel_by_pip(registry: Path, calls: list[list[str]], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    file = fetch("pypi:words==1.0!words/data/a.txt", cache=cache, sha256=hash_file(registry))
    folder = fetch("pypi:words==1.0!words/data", cache=cache)
    everything = fetch("pypi:words==1.0", cache=cache)
    assert file.path.read_bytes() == b"first\n"
    assert file.sha256 == folder.sha256 == hash_file(registry)
    assert sorted(p.name for p in folder.path.rglob("*") if p.is_file()) == ["a.txt", "b.txt"]
    assert not (folder.path.parent / "other.txt").exists()
    assert (everything.path / "words" / "other.txt").exists()
    assert len(calls) == 1  # one download for three paths


def test_the_cache_is_used_checked_and_mended(registry: Path, calls: list[list[str]], tmp_path: Path) -> None:
    cache, address = tmp_path / "cache", "pypi:words==1.0!words/data/a.txt"
    path = fetch(address, cache=cache).path
    shutil.rmtree(registry.parent)
    os.utime(path)  # another time, same content: still good, and recorded
    assert fetch(address, cache=cache).path == path
    path.write_bytes(b"changed")
    assert fetch(address, cache=cache).path.read_bytes() == b"first\n"  # mended from the cached package
    path.unlink()
    assert fetch(address, cache=cache).path.read_bytes() == b"first\n"
    assert len(calls) == 1


def test_a_corrupted_package_is_fetched_again(registry: Path, calls: list[list[str]], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fetch("pypi:words==1.0!words/data/a.txt", cache=cache)
    (wheel,) = (cache / "packages").rglob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:100])
    assert fetch("pypi:words==1.0!words/other.txt", cache=cache).path.stat().st_size == 5000
    assert len(calls) == 2


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(registry: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(BadInput, match=f"sha256 is {hash_file(registry)}, the recipe says 0000"):
            fetch("pypi:words==1.0!words/data/a.txt", cache=cache, sha256="0" * 64)
    left = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []
    assert fetch("pypi:words==1.0!words/data/a.txt", cache=cache).sha256 == hash_file(registry)
    with pytest.raises(BadInput, match="the recipe says 0000"):
        fetch("pypi:words==1.0!words/data/a.txt", cache=cache, sha256="0" * 64)


def test_what_is_not_there(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the registry has no such version"):
        fetch("pypi:words==2.0!a", cache=tmp_path / "cache")
    with pytest.raises(BadInput, match=r"holds no words/data/aa\.txt.*did you mean 'words/data/a\.txt'"):
        fetch("pypi:words==1.0!words/data/aa.txt", cache=tmp_path / "cache")


def make_source(folder: Path, witness: Path) -> Path:
    """A source package whose build script, which pip runs, leaves a trace."""
    backend = (
        "import pathlib\n"
        f"pathlib.Path({str(witness)!r}).write_text('ran')\n"
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        "    info = pathlib.Path(folder) / 'engine-2.0.dist-info'\n"
        "    info.mkdir()\n"
        "    (info / 'METADATA').write_text('Metadata-Version: 2.1\\nName: engine\\nVersion: 2.0\\n')\n"
        "    return info.name\n"
    )
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n',
        "own.py": backend, "vendor/a.c": "int a;\n", "vendor/deep/b.c": "int b;\n", "other.c": "int c;\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: engine\nVersion: 2.0\n",
    }  # fmt: skip
    path = folder / "engine-2.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"engine-2.0/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content.encode()))
    return path


def test_a_folder_of_a_source_package(registry: Path, calls: list[list[str]], tmp_path: Path) -> None:
    package = make_source(registry.parent, tmp_path / "ran")
    cache, digest = tmp_path / "cache", hash_file(package)
    folder = fetch_source("engine", "2.0", "vendor", sha256=digest, cache=cache)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.c")) == ["a.c", "deep/b.c"]
    assert not (folder.parent / "other.c").exists()
    assert fetch_source("engine", "2.0", "vendor", sha256=digest, cache=cache) == folder
    assert len(calls) == 1
    assert (tmp_path / "ran").exists()  # that is why the next test matters


def test_a_source_package_with_another_checksum_is_not_run(registry: Path, tmp_path: Path) -> None:
    make_source(registry.parent, tmp_path / "ran")
    with pytest.raises(BadInput, match="does not have the pinned sha256"):
        fetch_source("engine", "2.0", "vendor", sha256="0" * 64, cache=tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_no_network_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    monkeypatch.setattr(registries, "_RETRIES", "1")
    with pytest.raises(EdgestillError, match="the registry can't be reached") as caught:
        fetch("pypi:words==1.0!a", cache=tmp_path / "cache")
    assert "network" in caught.value.hint
    assert "127.0.0.1" not in str(caught.value)


def test_missing_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="npm is not installed"):
        fetch("npm:words@1.0.0!a", cache=tmp_path / "cache")
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'No module named pip' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(MissingDependency, match="pip is not installed") as caught:
        fetch("pypi:words==1.0!a", cache=tmp_path / "cache")
    assert caught.value.hint.endswith("-m ensurepip")


def make_npm(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_a_scoped_package_by_npm(tmp_path: Path) -> None:
    """npm packs a local folder as it packs a published package, with the same client and the same archive."""
    package = tmp_path / "package"
    (package / "data").mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"name": "@edge/words", "version": "1.2.3"}))
    (package / "data" / "a.txt").write_text("first\n")
    subprocess.run(["npm", "pack", str(package)], cwd=tmp_path, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tgz")
    target = tmp_path / "out"
    target.mkdir()
    assert archives.extract_tar(archive, "data/a.txt", target).read_text() == "first\n"


def test_an_npm_address_runs_npm_pack_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def pack(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        make_npm(folder / "edge-words-1.2.3.tgz", {"package/data/a.txt": b"first\n", "package/package.json": b"{}"})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(registries, "_run", pack)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    for path in ("data/a.txt", "package.json"):
        assert fetch(f"npm:@edge/words@1.2.3!{path}", cache=tmp_path / "cache").path.is_file()
    assert len(commands) == 1
    assert commands[0][:3] == ["/bin/npm", "pack", "@edge/words@1.2.3"]
    assert "--ignore-scripts" in commands[0]


@pytest.mark.parametrize("name", ["../evil", "words/../../evil", "/evil", "words/..\\evil"])
def test_no_archive_writes_outside(name: str, tmp_path: Path) -> None:
    target = tmp_path / "in" / "target"
    target.mkdir(parents=True)
    wheel = make_wheel(tmp_path / "w", {name: b"evil"})
    package = make_npm(tmp_path / "p.tgz", {f"package/{name.lstrip('/')}": b"evil"})
    before = set(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match="unsafe path"):
        archives.extract_zip(wheel, "", target)
    if not name.startswith("/"):
        with pytest.raises(BadInput, match="unsafe path"):
            archives.extract_tar(package, "", target)
    evil = [path for path in set(tmp_path.rglob("*")) - before if "evil" in path.name]
    assert evil == []


def test_links_in_archives_are_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = zipfile.ZipInfo("words/link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    package = tmp_path / "p.tgz"
    with tarfile.open(package, "w:gz") as tar:
        member = tarfile.TarInfo("package/words/link")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    target = tmp_path / "target"
    target.mkdir()
    for extract, path in ((archives.extract_zip, wheel), (archives.extract_tar, package)):
        with pytest.raises(BadInput, match="link"):
            extract(path, "words", target)
    assert list(target.iterdir()) == []


def test_bombs_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    zeros = bytes(30 << 20)
    wheel = make_wheel(tmp_path / "w", {"words/bomb": zeros})
    package = make_npm(tmp_path / "p.tgz", {"package/words/bomb": zeros})
    target = tmp_path / "target"
    target.mkdir()
    for extract, path in ((archives.extract_zip, wheel), (archives.extract_tar, package)):
        with pytest.raises(BadInput, match="looks like a zip bomb"):
            extract(path, "words/bomb", target)
    assert list(target.iterdir()) == []


def test_a_full_disk_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "w")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 4000))
    with pytest.raises(ResourceExhausted, match="more than the disk has"):
        archives.extract_zip(wheel, "words/other.txt", tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_truncated_archives(keep: int, tmp_path: Path) -> None:
    wheel, package = make_wheel(tmp_path / "w"), make_npm(tmp_path / "p.tgz", {"package/a": os.urandom(4000)})
    for extract, path in ((archives.extract_zip, wheel), (archives.extract_tar, package)):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(BadInput, match="is damaged"):
            extract(path, "a", tmp_path)


def test_a_changed_byte_in_a_wheel_is_noticed(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "w", {"words/a": os.urandom(4000)})
    data = bytearray(wheel.read_bytes())
    data[1000] ^= 255
    wheel.write_bytes(data)
    with pytest.raises(BadInput, match="is damaged"):
        archives.extract_zip(wheel, "words/a", tmp_path)


def test_local_paths_are_relative_to_the_recipe_then_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, base = tmp_path / "here", tmp_path / "base"
    here.mkdir()
    base.mkdir()
    monkeypatch.chdir(here)
    (here / "a.txt").write_text("here")
    assert fetch("a.txt", base=base).path.read_text() == "here"
    (base / "a.txt").write_text("base")
    assert fetch("a.txt", base=base).path.read_text() == "base"
    found = fetch(f"file:{base / 'a.txt'}", sha256=hash_bytes(b"base"))
    assert (found.path, found.sha256) == (base / "a.txt", hash_bytes(b"base"))
    assert fetch(str(base)).sha256 == hash_tree(base)
    with pytest.raises(BadInput, match=r"no file or folder 'b\.txt'.*looked at"):
        fetch("b.txt", base=base)
    with pytest.raises(BadInput, match="the recipe says"):
        fetch("a.txt", base=base, sha256="0" * 64)


def test_a_linked_hub_folder_hashes_as_its_files(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("content")
    linked, plain = tmp_path / "linked", tmp_path / "plain"
    linked.mkdir()
    plain.mkdir()
    (linked / "config.json").symlink_to(tmp_path / "blob")
    (plain / "config.json").write_text("content")
    assert fetch(str(linked)).sha256 == fetch(str(plain)).sha256 == hash_tree(plain)


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("pypi:evals==3.0.1.post1!a/b.jsonl", Address("pypi", "evals", "3.0.1.post1", "a/b.jsonl")),
        ("npm:@stdlib/words@0.2.3!data/", Address("npm", "@stdlib/words", "0.2.3", "data")),
        ("npm:words@0.2.3", Address("npm", "words", "0.2.3")),
        ("hf:org/name@0123abc", Address("hf", "org/name", "0123abc")),
        ("file:a/b", Address("file", "a/b")),
        ("../a b/c.txt", Address("file", "../a b/c.txt")),
    ],
)
def test_addresses(address: str, parsed: Address) -> None:
    assert parse_address(address) == parsed


@pytest.mark.parametrize(
    "address",
    ["pypi:evals", "pypi:evals==1!../x", "pypi:evals==1!/etc", "pypi:-e==1!x", "pypi:a==1 --index-url=x!b", "npm:words",
     "npm:--x@1.0.0!b", "npm:../x@1.0.0", "hf:org/name@main", "hf:org/name", "https://example.org/x", "", "file:"],
)  # fmt: skip
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_address(address)
    assert caught.value.hint


def test_no_hub_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    seen: dict[str, Any] = {}

    def offline(name: str, **options: object) -> str:
        seen.update(options, name=name)
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(EdgestillError, match="no model hub can be reached") as caught:
        fetch("hf:org/name@0123abc", cache=tmp_path / "cache")
    assert "file:" in caught.value.hint
    assert (seen["name"], seen["revision"]) == ("org/name", "0123abc")
    assert "*.bin" in seen["ignore_patterns"]
    assert not list((tmp_path / "cache").rglob("stamp.json"))


def test_a_hub_snapshot_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    times = []

    def download(name: str, *, local_dir: Path, **options: object) -> str:
        times.append(name)
        (local_dir / ".cache").mkdir(parents=True)
        (local_dir / ".cache" / "x.lock").write_text("")
        (local_dir / "config.json").write_text("{}")
        return str(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", download)
    for _ in range(2):
        folder = fetch("hf:org/name@0123abc", cache=tmp_path / "cache")
        assert [path.name for path in folder.path.iterdir()] == ["config.json"]
        assert folder.sha256 == hash_tree(folder.path)
    assert len(times) == 1


def test_two_runs_at_once_download_once(registry: Path, tmp_path: Path) -> None:
    """Processes wait for each other's lock; the slow "registry" is a pip that writes down each call."""
    log = tmp_path / "log"
    code = f"""
import time
from pathlib import Path
from edgestill import registries
from edgestill.fetch import fetch
run = registries._run
def slow(command, folder):
    with open({str(log)!r}, "a") as stream:
        stream.write("x")
    time.sleep(0.5)
    return run(command, folder)
registries._run = slow
print(fetch("pypi:words==1.0!words/data/a.txt", cache=Path({str(tmp_path / "cache")!r})).path.read_text())
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["first", "first"]
    assert log.read_text() == "x"


def test_a_killed_download_leaves_nothing_that_counts(registry: Path, tmp_path: Path) -> None:
    cache, started = tmp_path / "cache", tmp_path / "started"
    code = f"""
import time
from pathlib import Path
from edgestill import registries
from edgestill.fetch import fetch
def stuck(command, folder):
    (folder / "words-1.0-py3-none-any.whl").write_bytes(b"half")
    Path({str(started)!r}).touch()
    time.sleep(60)
registries._run = stuck
fetch("pypi:words==1.0!words/data/a.txt", cache=Path({str(cache)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert fetch("pypi:words==1.0!words/data/a.txt", cache=cache).path.read_bytes() == b"first\n"
    assert not list(cache.rglob("*.partial"))


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("EDGESTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "edgestill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "edgestill"


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="can't be written") as caught:
        fetch("pypi:words==1.0!a", cache=tmp_path / "file")
    assert "EDGESTILL_CACHE" in caught.value.hint


def test_a_forged_stamp_does_not_count(registry: Path, tmp_path: Path) -> None:
    cache, address = tmp_path / "cache", "pypi:words==1.0!words/data/a.txt"
    path = fetch(address, cache=cache).path
    (slot,) = (folder for folder in (cache / "fetch").iterdir() if folder.is_dir())
    for content in ("", "[]", "{}", "5", '{"files": []}'):
        (slot / fetch_module._STAMP).write_text(content)
        assert fetch(address, cache=cache).path == path
