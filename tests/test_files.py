from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.errors import BadInput, EdgestillError, MissingDependency, ResourceExhausted, nearest
from edgestill.files import (
    atomic_directory,
    atomic_write,
    canonical_json,
    check_links,
    hash_file,
    hash_json,
    hash_tree,
    list_files,
    read_json,
    safe_join,
)


def test_hashes_are_those_of_hashlib(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert hash_file(tmp_path / "a") == hash_tree(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_tree_hash_depends_on_names_and_content_only(tmp_path: Path) -> None:
    for root in ("one", "deep/er/two"):
        (tmp_path / root / "sub").mkdir(parents=True)
        (tmp_path / root / "sub" / "b").write_text("b")
        (tmp_path / root / "a").write_text("a")
    one, two = tmp_path / "one", tmp_path / "deep" / "er" / "two"
    before = hash_tree(one)
    assert before == hash_tree(two)
    os.utime(two / "a", (0, 0))
    assert before == hash_tree(two)
    (two / "a").rename(two / "c")
    assert before != hash_tree(two)
    digests = [[name, hashlib.sha256(name[-1].encode()).hexdigest()] for name in ("a", "sub/b")]
    assert before == hashlib.sha256(json.dumps(digests, separators=(",", ":")).encode()).hexdigest()


def test_a_missing_tree_has_no_hash(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a folder"):
        hash_tree(tmp_path / "gone")


@pytest.mark.parametrize("folder", [False, True])
def test_links_in_a_tree_are_refused(folder: bool, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path if folder else "/etc/passwd")
    with pytest.raises(BadInput, match="is a symbolic link"):
        list_files(tmp_path / "tree")


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner))
)
def test_canonical_json_reads_back_and_ignores_the_order_of_keys(value: object) -> None:
    assert json.loads(canonical_json(value)) == value
    if isinstance(value, dict):
        assert hash_json(dict(reversed(value.items()))) == hash_json(value)


def test_canonical_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize("path", ["..", "../a", "a/../../b", "/a", "", "a\\b", "a\0b", "\ud800"])
def test_unsafe_paths(path: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unsafe path"):
        safe_join(tmp_path, path)


@given(st.text(max_size=30))
def test_a_safe_path_stays_inside(path: str) -> None:
    root = Path("/nowhere/root")
    try:
        joined = safe_join(root, path)
    except BadInput:
        return
    assert Path(os.path.normpath(joined)).is_relative_to(root)


def test_a_link_inside_does_not_lead_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(BadInput, match="through a link"):
        safe_join(root, "out/secret")
    assert safe_join(root, "a/b") == root / "a" / "b"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000])
def test_broken_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(BadInput, match="can't be read"):
        read_json(tmp_path)


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    atomic_write(path, "one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")

    def full(_: int) -> None:
        raise OSError(code, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceExhausted, match="no space left while writing"):
        atomic_write(path, "new")
    with pytest.raises(ResourceExhausted), atomic_directory(tmp_path / "folder") as folder:
        (folder / "a").write_text("a")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_atomic_directory_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "[x]*"  # a name that a pattern would take for something else
    for name in ("one", "two"):
        with atomic_directory(target) as folder:
            (folder / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["two"]
    with pytest.raises(FileNotFoundError), atomic_directory(target) as folder:
        (folder / "three" / "no such folder").write_text("three")
    assert [path.name for path in target.iterdir()] == ["two"]
    assert os.listdir(tmp_path) == ["[x]*"]


def test_an_atomic_directory_does_not_take_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="is not a folder"), atomic_directory(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_swept_and_of_a_living_one_is_not(tmp_path: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
from edgestill.files import atomic_directory
with atomic_directory(Path({str(tmp_path / "target")!r})) as folder:
    (folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with atomic_directory(tmp_path / "target"):
        pass
    assert len(list(tmp_path.glob(".target.*.partial"))) == 1
    process.kill()
    process.wait()
    time.sleep(0.05)
    with atomic_directory(tmp_path / "target"):
        pass
    assert os.listdir(tmp_path) == ["target"]


def test_errors_form_one_tree_with_exit_codes() -> None:
    def all_below(kind: type[EdgestillError]) -> list[type[EdgestillError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in all_below(child))]

    codes = {kind.__name__: kind.exit_code for kind in all_below(EdgestillError)}
    assert set(codes.values()) <= {1, 2, 3, 4, 5}
    assert (codes["BadInput"], codes["CheckFailed"], codes["Inconclusive"], codes["MissingDependency"]) == (2, 1, 3, 4)
    assert codes["WorkerError"] == codes["ResourceExhausted"] == 5
    assert str(BadInput("what", hint="do")) == "what (hint: do)"
    assert MissingDependency.package("torch", "distill").hint == "pip install 'edgestill[distill]'"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


def test_links_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    (folder / "file").write_text("x")
    (folder / "sub/inside").symlink_to("../file")
    check_links(folder)
    (tmp_path / "way").symlink_to(folder)
    check_links(tmp_path / "way")  # the folder itself may be reached through a link
    for name, target in (("a", "../outside"), ("sub/b", outside), ("c", "nowhere"), ("sub/d", "d")):
        (folder / name).symlink_to(target)
        with pytest.raises(BadInput, match=f"{name} is a symbolic link"):
            check_links(folder)
        (folder / name).unlink()


def test_a_circle_of_links_is_an_unsafe_path(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert safe_join(tmp_path, "a").is_symlink()
    (tmp_path / "c").symlink_to("..")
    with pytest.raises(BadInput, match="leaves"):
        safe_join(tmp_path, "c/x")
