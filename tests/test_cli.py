"""The command line as a user meets it: output channels, exit codes, errors, documents that fit their schemas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgestill import cli
from edgestill.errors import CheckFailed, EdgestillError, Inconclusive, MissingDependency, RecipeError
from edgestill.recipe import load_recipe
from edgestill.schemas import FOLDER


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def document(self, schema: str) -> Any:
        """The one document on stdout, checked against its committed schema."""
        document = json.loads(self.out)
        jsonschema.validate(document, json.loads((FOLDER / f"{schema}.json").read_text()))
        return document


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run ``edgestill ARGUMENTS`` in this process."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["edgestill", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capfd.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


def test_help_names_every_command(call: Any) -> None:
    outcome = call("--help")
    assert outcome.code == 0
    for command in ("run", "plan", "init", "fetch", "distill", "export", "verify", "bench", "report", "doctor"):
        assert f" {command} " in outcome.out


def test_help_needs_no_heavy_import() -> None:
    """What makes `edgestill --help` start in under 0.3 s (tests/peers measures it): nothing heavy is imported."""
    code = (
        "import sys; sys.argv = ['edgestill', '--help']\n"
        "from edgestill.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'numpy', 'scipy', 'pydantic', 'onnx', 'jinja2'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_distill_has_two_faces(call: Any) -> None:
    assert "compare" in call("distill", "--help").out
    assert "--runs" in call("distill", "some.toml", "--help").out
    assert "--seeds" in call("distill", "compare", "--help").out


def test_an_option_said_twice_adds_to_what_it_said(call: Any, tiny_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "twice.toml"
    assert call("init", str(tiny_bert), "--to", "onnx:int8,onnx:fp32", "--to", "gguf:q8_0", "--out", str(out)).code == 0
    assert [item.to for item in load_recipe(out).export] == ["onnx:int8", "onnx:fp32", "gguf:q8_0"]


def test_version(call: Any) -> None:
    assert call("--version").out.startswith("edgestill 0.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rum"], "No such command"),
        (["run"], "Missing argument"),
        (["run", "minilm", "--untill", "x"], "No such option"),
        (["run", "no-such-recipe"], "no recipe at no-such-recipe"),
        (["plan", "no/such.toml"], "no recipe at"),
        (["export", "nowhere", "--to", "onnx:int8"], "nowhere does not exist"),
        (["verify", "nowhere", "--against", "nowhere"], "not an artifact folder"),
        (["bench", "nowhere"], "is not a model folder"),
        (["report", "nowhere"], "not a run folder"),
        (["init", "nowhere"], "nowhere does not exist"),
        (["run", "minilm", "--until", "exprot"], "no stage 'exprot'"),
        (["fetch", "pypi:nonsense"], "malformed address"),
        (["distill", "no-such-recipe"], "no recipe at no-such-recipe"),
        (["distill", "student", "no-such-recipe"], "no recipe at no-such-recipe"),
        (["distill", "--runs", "here"], "Missing argument"),
        (["distill", "compare", "minilm"], "Missing option '--loss'"),
        (["distill", "compare", "no-such-recipe", "--loss", "jsd"], "no recipe at no-such-recipe"),
        (["distill", "compare", "minilm", "--loss", "forwrd_kl"], "did you mean 'forward_kl'?"),
        (["distill", "compare", "minilm", "--loss", "jsd", "--seeds", "0"], "0 seeds"),
    ],
)
def test_bad_usage_is_one_line_with_a_hint(call: Any, arguments: list[str], words: str, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    outcome = call(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    flat = " ".join(outcome.err.split())
    assert words in flat
    assert "hint:" in flat
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_a_wrong_recipe_names_file_line_and_nearest_key(call: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "r"\n[teacher]\nsource = "x"\n[distill]\nloss = { forward_kl = 1 }\ntemprature = 2\n')
    outcome = call("run", recipe)
    assert outcome.code == 2
    flat = " ".join(outcome.err.split())
    assert f"{recipe}:6" in flat
    assert "did you mean 'temperature'?" in flat


def test_errors_are_documents_too_with_json(call: Any) -> None:
    outcome = call("plan", "no-such-recipe", "--json")
    document = json.loads(outcome.out)
    assert document["exit_code"] == outcome.code == 2
    assert document["error"]["kind"] == "BadInput"
    assert document["error"]["hint"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckFailed("x"), 1),
        (RecipeError("x"), 2),
        (Inconclusive("x"), 3),
        (MissingDependency.package("onnx", "export"), 4),
        (EdgestillError("x"), 5),
        (ZeroDivisionError("x"), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(call: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr("edgestill.doctor.doctor", fail)
    outcome = call("doctor")
    assert outcome.code == code
    assert "Traceback" not in outcome.err


def test_debug_shows_the_traceback(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("edgestill.doctor.doctor", fail)
    outcome = call("--debug", "doctor")
    assert outcome.code == 5
    assert "Traceback" in outcome.err


def test_doctor_document(call: Any) -> None:
    document = call("doctor", "--json").document("doctor")
    assert document["ready"] is True


def test_what_native_code_prints_stays_out_of_the_document(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from edgestill.benchmark import BenchResult

    def noisy(*_: Any) -> BenchResult:
        os.write(1, b"a native library says hello\n")
        return BenchResult((), ())

    monkeypatch.setattr("edgestill.benchmark.bench_subjects", noisy)
    outcome = call("bench", "somewhere", "--json")
    assert outcome.document("bench")["measurements"] == []
    assert "a native library says hello" in outcome.err


def test_plan_document_lists_all_that_is_missing(call: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'name = "r"\n[teacher]\nsource = "gone"\n[[data.text]]\nname = "t"\nsource = "also-gone.txt"\ntest = 1\n'
        '[[export]]\nto = "onnx:int8"\n'
    )
    outcome = call("plan", recipe, "--json")
    document = outcome.document("plan")
    assert outcome.code == document["exit_code"] == 2
    messages = " ".join(problem["message"] for problem in document["problems"])
    assert "gone" in messages
    assert "also-gone.txt" in messages
    assert not (tmp_path / "runs").exists()
