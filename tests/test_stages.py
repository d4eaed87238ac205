from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgestill.bench.environment import package_versions
from edgestill.errors import UsageError
from edgestill.stages import Observer, RunFolder


class Recorder(Observer):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def started(self, name: str, title: str) -> None:
        self.events.append(("started", name))

    def finished(self, name: str, seconds: float, note: str) -> None:
        self.events.append(("finished", note))

    def unchanged(self, name: str, title: str, note: str) -> None:
        self.events.append(("unchanged", note))


def run(path: Path, inputs: dict[str, Any], text: str = "x") -> tuple[Recorder, dict[str, Any]]:
    recorder = Recorder()

    def action() -> dict[str, Any]:
        (path / "out.txt").write_text(text)
        return {"note": f"wrote {text}", "size": len(text)}

    with RunFolder(path, recorder).locked() as folder:
        facts = folder.stage("write", inputs, action, ["out.txt"])
    return recorder, dict(facts)


def test_a_stage_is_not_done_twice(tmp_path: Path) -> None:
    first, facts = run(tmp_path, {"a": 1})
    again, same = run(tmp_path, {"a": 1}, "never written")
    assert first.events == [("started", "write"), ("finished", "wrote x")]
    assert again.events == [("unchanged", "wrote x")]
    assert facts == same
    assert (tmp_path / "out.txt").read_text() == "x"


def test_a_changed_input_runs_it_again(tmp_path: Path) -> None:
    run(tmp_path, {"a": 1})
    again, _ = run(tmp_path, {"a": 2}, "y")
    assert again.events[0] == ("started", "write")
    assert (tmp_path / "out.txt").read_text() == "y"


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_output_runs_it_again(tmp_path: Path, damage: str) -> None:
    run(tmp_path, {"a": 1})
    if damage == "change":
        (tmp_path / "out.txt").write_text("tampered")
    else:
        (tmp_path / "out.txt").unlink()
    again, _ = run(tmp_path, {"a": 1})
    assert again.events[0] == ("started", "write")


def test_other_package_versions_run_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, {"a": 1})
    monkeypatch.setattr("edgestill.stages.package_versions", lambda: {**package_versions(), "torch": "0"})
    again, _ = run(tmp_path, {"a": 1})
    assert again.events[0] == ("started", "write")


def test_a_failed_action_leaves_no_record(tmp_path: Path) -> None:
    def action() -> None:
        raise RuntimeError("boom")

    with RunFolder(tmp_path).locked() as folder, pytest.raises(RuntimeError):
        folder.stage("bad", {}, action)
    with RunFolder(tmp_path).locked() as folder:
        assert folder.records() == {}


HOLD = """
import sys
from pathlib import Path
from edgestill.stages import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another run"), RunFolder(tmp_path).locked():
            pass
        other.kill()
    with RunFolder(tmp_path).locked():
        pass  # a killed holder leaves no lock behind


def test_a_run_file_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 99, "stages": {}}))
    with pytest.raises(UsageError, match="another version"), RunFolder(tmp_path).locked():
        pass
