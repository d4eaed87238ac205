"""``edgestill devices build-runner`` as a user meets it; the build itself is tested in ``tests/runtimes/native``."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgestill import cli
from edgestill.files import hash_file
from edgestill.runtimes.native import HOST_NAME, RUNNER_NAME
from edgestill.schemas import FOLDER


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgestill", "devices", "build-runner", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def test_what_can_not_be_built_is_one_line(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path))
    code, out, err = call("--target", "riscv64")
    assert (code, out) == (2, "")
    assert "not built for 'riscv64'" in err
    assert "aarch64" in err
    code, out, _ = call("--level", "dotprot", "--json")
    assert code == 2
    assert json.loads(out)["error"]["hint"].startswith("did you mean 'dotprod'")


def test_without_the_compiler_the_line_that_installs_it(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = call()
    assert code == 4
    assert "pip install 'edgestill[runner]'" in err


@pytest.mark.slow  # builds where it was not built before
def test_a_build_for_this_machine(call: Any, tmp_path: Path) -> None:
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip(f"the runner is not built for {platform.machine()}")
    code, out, err = call("--target", platform.machine(), "--json", "--out", tmp_path)
    if code == 4:
        pytest.skip(err)
    assert code == 0, err
    document = json.loads(out)
    jsonschema.validate(document, json.loads((FOLDER / "runner.json").read_text()))
    assert document["backend"] == "cpu"
    for one in document["binaries"]:
        path = Path(one["path"])
        name = HOST_NAME if one["level"] in ("glibc", "android") else RUNNER_NAME
        assert path.name == f"{name}-{one['target']}-{one['level']}"
        assert hash_file(path) == one["sha256"]
        assert path.read_bytes()[:4] == b"\x7fELF"
    code, out, err = call("--target", platform.machine())
    assert (code, out) == (0, "")
    assert "CPU only" in err
    assert "0 new" in err
