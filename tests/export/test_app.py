"""Samples for apps: the Python ones say what our own session says; the others are whole and name real things."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.artifact import Artifact, Manifest, TensorSpec, open_artifact, seal_artifact
from edgestill.checkpoints import load_tokenizer
from edgestill.errors import Unsupported, UsageError
from edgestill.export import export
from edgestill.export.app import LANGUAGES, _literal, check_app, write_app
from edgestill.recipe import ExportConfig
from edgestill.runtimes.session import SessionOptions, open_session

MESSAGE = "one good movie 🎬"
TEXTS = ["a good film", "it was the dull plot of a slow movie", "x " * 200]
CASES = (
    "llama onnx:fp32", "llama onnx:fp16", "llama onnx:int4", "llama gguf:q8_0", "llama coreml:fp16",
    "bert onnx:int8", "bert gguf:f16", "bert coreml:fp16", "classifier onnx:fp32", "classifier coreml:fp16",
)  # fmt: skip
KOTLIN = Path(__file__).with_name("kotlin")


@pytest.fixture(scope="module")
def artifacts(
    tiny_llama: Path, tiny_bert: Path, tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """``artifacts("llama onnx:int8")``, each made once."""
    folders = {"llama": tiny_llama, "bert": tiny_bert, "classifier": tiny_classifier}
    root = tmp_path_factory.mktemp("apps") / "artifacts"

    def make(case: str) -> Artifact:
        model, to = case.split()
        out = root / case.replace(" ", "-").replace(":", "-")
        return open_artifact(out) if out.exists() else export(folders[model], out, ExportConfig(to=to))

    return make


@pytest.fixture
def predicting(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``MLModel`` with the calls that it has on a Mac: our interpreter in the place of Apple's runtime."""
    import coremltools

    from edgestill.runtimes.mil.interpreter import Interpreter
    from edgestill.runtimes.milproto import load_program

    class Predicting:
        def __init__(self, path: str) -> None:
            self._program = Interpreter(load_program(Path(path)))

        def make_state(self) -> Any:
            return self._program.new_state()

        def predict(self, feed: dict[str, Any], state: Any = None) -> Any:
            for name, kind in self._program.program.inputs.items():
                assert str(feed[name].dtype) == {"fp16": "float16", "fp32": "float32"}.get(kind.dtype, kind.dtype)
            return self._program.run(feed, state)

    return lambda: monkeypatch.setattr(coremltools.models, "MLModel", Predicting)


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"sample_{path.parent.name.replace('-', '_')}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _app(artifact: Artifact, language: Any, out: Path) -> str:
    return write_app(artifact.path, language, out).read_text(encoding="utf-8")


@pytest.mark.whole
@pytest.mark.parametrize("case", CASES)
def test_python_says_what_our_session_says(case: str, artifacts: Any, predicting: Any, tmp_path: Path) -> None:
    artifact = artifacts(case)
    predicting()
    model = _import(write_app(artifact.path, "python", tmp_path / "app")).Model()
    session = open_session(artifact.path, SessionOptions(threads=1))
    tokenizer = load_tokenizer(artifact.path)
    if artifact.manifest.task == "text-generation":
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": MESSAGE}], add_generation_prompt=True)
        prompt = prompt if isinstance(prompt, list) else prompt["input_ids"]
        assert model.prompt(MESSAGE) == prompt
        wanted = [token.id for token in session.decode(prompt, 24)]
        wanted = list(itertools.takewhile(lambda token: token != tokenizer.eos_token_id, wanted))
        answer = list(model.generate(MESSAGE, 24))
        assert answer == wanted
        assert len(answer) > 3
        assert model.text(answer)
        assert len(list(model.generate("a " * 20, 10_000))) <= artifact.manifest.max_length
        return
    texts = TEXTS[:2] if "gguf" in case else TEXTS  # llama-cpp-python cuts off the token that ends a text
    for text, row in zip(texts, model.run(texts), strict=True):
        ids = np.asarray([tokenizer(text, truncation=True, max_length=64)["input_ids"]])
        np.testing.assert_allclose(
            row, session.forward(ids, np.ones_like(ids))[0], atol=2e-3 if "gguf" in case else 1e-5
        )


def test_python_runs_as_a_program(artifacts: Any, tmp_path: Path) -> None:
    """As a user starts it, from another folder, in a process that knows nothing of edgestill."""
    for case, pattern in (("classifier onnx:fp32", r"(bad|fair|good)\ta film\n"), ("bert onnx:int8", r"\+1.000 .*\n")):
        sample = write_app(artifacts(case).path, "python", tmp_path / case.replace(" ", "-"))
        done = subprocess.run(
            [sys.executable, "-I", sample, "a film"], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert re.fullmatch(pattern, done.stdout)
        assert "edgestill" not in sample.read_text()
        assert (sample.parent / "requirements.txt").read_text().startswith("onnxruntime>=")


def test_pooling_outside_the_graph(artifacts: Any, tmp_path: Path) -> None:
    """An artifact of another tool gives hidden states: the sample pools and normalises."""
    import onnx

    whole = artifacts("bert onnx:fp32")
    model = onnx.load(whole.entry)
    hidden = next(node.input[0] for node in model.graph.node if node.name == "pool.masked")
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(hidden, 1, ["batch", "length", 32]))
    folder = shutil.copytree(whole.path, tmp_path / "foreign")
    (folder / "artifact.json").unlink()
    onnx.save(model, folder / "model.onnx")
    fields = {**vars(whole.manifest), "outputs": (TensorSpec(hidden, "float32", ("batch", "length", 32)),)}
    foreign = seal_artifact(folder, Manifest(**{**fields, "pooling_in_graph": False}))
    sample = _import(write_app(foreign.path, "python", tmp_path / "app"))
    own = _import(write_app(whole.path, "python", tmp_path / "own"))
    np.testing.assert_allclose(sample.Model().run(TEXTS), own.Model().run(TEXTS), atol=1e-6)
    assert "pool(" in _app(foreign, "kotlin", tmp_path / "kotlin")
    assert "squareRoot" in _app(foreign, "swift", tmp_path / "swift")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("language", ["kotlin", "swift"])
def test_other_languages_are_whole(case: str, language: str, artifacts: Any, tmp_path: Path) -> None:
    """Brackets close, nothing of a template is left, and the names of the artifact stand in it."""
    artifact = artifacts(case)
    form = artifact.manifest.format
    refused = (language == "kotlin" and form != "onnx") or (language, case) == ("swift", "llama onnx:fp16")
    if refused:
        with pytest.raises(Unsupported, match=f"no {language} sample for {form}") as caught:
            write_app(artifact.path, language, tmp_path / "app")
        assert "export" in caught.value.hint
        assert not (tmp_path / "app").exists()
        return
    code = _app(artifact, language, tmp_path / "app")
    bare = re.sub(r'"(\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', "", code)
    for opened, closed in ("()", "[]", "{}"):
        assert bare.count(opened) == bare.count(closed)
    assert "{{" not in code
    assert "{%" not in code
    assert not re.search(r"\n\n\n|[ \t]\n", code)
    names = {artifact.manifest.entry, artifact.manifest.artifact_id[:12], str(artifact.manifest.max_length)}
    if form != "gguf":
        names |= {spec.name for spec in artifact.manifest.inputs} | {artifact.manifest.outputs[0].name}
    if artifact.manifest.task == "text-generation":
        names |= {"<|im_start|>user\\n", str(load_tokenizer(artifact.path).eos_token_id)}
    assert not [name for name in names if name not in code]
    assert "not compiled" in (tmp_path / "app/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if "onnx" in case])
def test_kotlin_compiles(case: str, artifacts: Any, tmp_path: Path) -> None:
    """Against the signatures of ONNX Runtime's and DJL's Java interfaces, where there is a Kotlin compiler
    (``kotlinc``, or the command in EDGESTILL_KOTLINC)."""
    command = shlex.split(os.environ.get("EDGESTILL_KOTLINC", "")) or [shutil.which("kotlinc") or ""]
    if not command[0]:
        pytest.skip("no Kotlin compiler here: set EDGESTILL_KOTLINC")
    sample = write_app(artifacts(case).path, "kotlin", tmp_path / "app")
    done = subprocess.run(
        [*command, "-Werror", "-d", tmp_path / "classes", sample, KOTLIN], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "classes/sample/Model.class").exists()


def test_what_there_is_no_sample_for(artifacts: Any, tiny_classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no sample in 'pyton'"):
        check_app("pyton", "onnx")
    with pytest.raises(Unsupported, match="no library for Android"):
        check_app("kotlin", "gguf")
    classes = export(tiny_classifier, tmp_path / "classes", ExportConfig(to="gguf:f16"))
    with pytest.raises(Unsupported, match="no class scores"):
        write_app(classes.path, "python", tmp_path / "app")
    whole = artifacts("bert onnx:int8")
    fixed = seal_artifact(whole.path, Manifest(**{**vars(whole.manifest), "shapes": "fixed"}))
    try:
        with pytest.raises(Unsupported, match="shapes are fixed"):
            write_app(fixed.path, "python", tmp_path / "app")
    finally:
        seal_artifact(whole.path, whole.manifest)


def test_a_model_without_a_chat_template(tiny_llama: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(tiny_llama, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    artifact = export(plain, tmp_path / "artifact", ExportConfig(to="onnx:fp32"))
    model = _import(write_app(artifact.path, "python", tmp_path / "app")).Model()
    assert model.prompt("a film") == load_tokenizer(plain)("a film")["input_ids"]
    assert "no chat template" in (tmp_path / "app/README.md").read_text()
    (artifact.path / "chat_template.jinja").write_text("{{ messages[0]['content'] | upper }}")
    (artifact.path / "artifact.json").unlink()
    seal_artifact(artifact.path, artifact.manifest)
    with pytest.raises(Unsupported, match="does not show a message"):
        write_app(artifact.path, "python", tmp_path / "app")


def test_equal_bytes_and_hostile_words(artifacts: Any, tmp_path: Path) -> None:
    """Two writings are equal; whatever a template or label says stays inside its string."""
    artifact = artifacts("llama onnx:fp32")
    assert _app(artifact, "kotlin", tmp_path / "a") == _app(artifact, "kotlin", tmp_path / "b")
    nasty = '"""\\ ${x} \\(y) \n\r\t\0\u2028 \' # // */ 🎬'
    assert eval(_literal(nasty, "python")) == nasty
    assert json.loads(_literal(nasty, "kotlin").replace("\\$", "$")) == nasty
    assert "\\u{2028}" in _literal(nasty, "swift")
    assert "\n" not in "".join(_literal(nasty, language) for language in LANGUAGES)
