from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from edgestill.distill import checkpoint
from edgestill.distill.checkpoint import (
    find_checkpoint,
    load_torch_state,
    save_torch_state,
    sweep_checkpoints,
    write_checkpoint,
)
from edgestill.distill.journal import Journal
from edgestill.errors import BadInput, ResourceExhausted


def _write(work: Path, step: int) -> Path:
    target = work / f"checkpoint-{step}"
    with write_checkpoint(target) as folder:
        save_torch_state({"a": torch.arange(5.0)}, folder / "weights.pt")
    return target


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path):
    assert find_checkpoint(tmp_path / "missing") is None
    _write(tmp_path, 5)
    newest = _write(tmp_path, 20)
    assert find_checkpoint(tmp_path) == (newest, 20)
    half = tmp_path / "checkpoint-100"  # as it would look if folders were filled in place
    half.mkdir()
    (half / "weights.pt").write_bytes(b"PK")
    assert find_checkpoint(tmp_path) == (newest, 20)
    (newest / "weights.pt").write_bytes((newest / "weights.pt").read_bytes()[:-1])
    assert find_checkpoint(tmp_path) == (tmp_path / "checkpoint-5", 5)
    (tmp_path / ".checkpoint-7.123.xyz.partial").mkdir()
    sweep_checkpoints(tmp_path, keep=tmp_path / "checkpoint-5")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path):
    def interrupted() -> None:
        with write_checkpoint(tmp_path / "checkpoint-5") as folder:
            save_torch_state({"a": torch.zeros(3)}, folder / "weights.pt")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_state_comes_back_and_a_damaged_one_is_one_line(tmp_path: Path):
    path = _write(tmp_path, 1) / "weights.pt"
    assert torch.equal(load_torch_state(path)["a"], torch.arange(5.0))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadInput, match="damaged"):
        load_torch_state(path)


class _Full:
    """A file on a full disk."""

    def __init__(self, stream: object) -> None:
        self._stream = stream

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        pass


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: _Full(real(self, *a, **k)) if "weights" in self.name else
                        real(self, *a, **k))  # fmt: skip
    with pytest.raises(ResourceExhausted, match="no space left"):
        _write(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_plain_data_is_refused(tmp_path: Path):
    torch.save({"a": checkpoint.write_checkpoint}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match="damaged"):
        load_torch_state(tmp_path / "x.pt")


def test_the_journal_forgets_what_will_be_done_again(tmp_path: Path):
    journal = Journal(tmp_path / "training.jsonl")
    for step in range(4):
        journal.append({"step": step, "loss": 1 / 3} if step else {"step": 0, "dev": {}})
    journal.append({"step": 3, "dev": {"spearman": 1.0}})
    with journal.path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    again = Journal(journal.path)
    again.rewind(3)
    assert [row["step"] for row in again.rows] == [0, 1, 2, 3]
    assert "dev" not in again.rows[-1]
    again.rewind(1)
    assert again.rows == [{"step": 0, "dev": {}}, {"step": 1, "loss": 1 / 3}]
    assert journal.path.read_text() == again.text()
