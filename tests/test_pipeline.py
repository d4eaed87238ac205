"""The main job on tiny models: whole, resumed, killed, broken."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgestill.artifact import open_artifact
from edgestill.bench.records import read_measurements
from edgestill.errors import RecipeError, UsageError
from edgestill.files import hash_tree
from edgestill.pipeline import RunConfig, rebuild_report, run_recipe
from edgestill.plan import plan_recipe
from edgestill.schemas import FOLDER
from edgestill.stages import Observer

RECIPE = """
name = "tiny"
[teacher]
source = "{teacher}"
[student]
layers = 2
[data]
max_length = 32
[[data.text]]
name = "words"
source = "{text}"
train = 96
calibration = 8
dev = 16
test = 24
{more}
[distill]
loss = {loss}
batch_size = 8
save_every = 4
threads = 1
{exports}
[bench]
launches = 1
repeats = 2
max_seconds = 0.5
threads = 1
length = 16
new_tokens = 4
tokens = 200
window = 16
"""
EMBEDDING_LOSS = "{ embedding_cosine = 1.0, embedding_gram = 1.0 }"
LOGITS_LOSS = "{ forward_kl = 1.0 }"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(sentences))
    return path


def write_recipe(folder: Path, teacher: Path, text: Path, *to: str, loss: str = EMBEDDING_LOSS, more: str = "") -> Path:
    exports = "\n".join(f'[[export]]\nto = "{variant}"' for variant in to)
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(teacher=teacher, text=text, loss=loss, more=more, exports=exports))
    return path


class Stages(Observer):
    """Which stages ran, and which were skipped."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.skipped: list[str] = []

    def finished(self, name: str, seconds: float, note: str) -> None:
        self.ran.append(name)

    def unchanged(self, name: str, title: str, note: str) -> None:
        self.skipped.append(name)


# What keeps its own cache is asked every time.
ALWAYS = {"fetch", "data", "references", "task references"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, text: Path) -> tuple[Path, Any]:
    """A run of the encoder with one artifact of each format, and its result."""
    folder = tmp_path_factory.mktemp("encoder")
    labelled = folder / "labelled.csv"
    rows = [f"{line},{index % 2}" for index, line in enumerate(text.read_text().splitlines())]
    labelled.write_text("text,label\n" + "\n".join(rows))
    more = f'[[data.task]]\nname = "parity"\nsource = "{labelled}"\ntrain = 40\ntest = 20\n'
    recipe = write_recipe(folder, tiny_bert, text, "onnx:int8", "gguf:q8_0", "coreml:fp16", more=more)
    return folder, run_recipe(RunConfig(recipe, folder / "runs"))


@pytest.mark.whole
def test_the_whole_way(finished: tuple[Path, Any]) -> None:
    folder, result = finished
    run = folder / "runs/tiny"
    assert (result.status, result.exit_code) == ("passed", 0), [a.failures for a in result.artifacts]
    levels = {artifact.name: artifact.level for artifact in result.artifacts}
    assert levels == {
        "onnx-int8": "device_verified", "gguf-q8_0": "device_verified",
        "coreml-fp16": "device_verified" if sys.platform == "darwin" else "program_verified",
    }  # fmt: skip
    for artifact in result.artifacts:
        assert open_artifact(run / artifact.folder).manifest.artifact_id == artifact.artifact_id
        assert artifact.metrics["spearman@words"] > 0
        assert 0 <= artifact.metrics["accuracy@parity"] <= 1
    for name in ("report.html", "MODEL_CARD.md", "measurements.jsonl", "recipe.toml", "run.json"):
        assert (run / name).stat().st_size > 0
    assert "parity" in (run / "report.html").read_text()


@pytest.mark.whole
def test_the_document_fits_its_schema(finished: tuple[Path, Any]) -> None:
    folder, result = finished
    document = json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))
    jsonschema.validate(document, json.loads((FOLDER / "run.json").read_text()))
    lines = (folder / "runs/tiny/measurements.jsonl").read_text().splitlines()
    schema = json.loads((FOLDER / "measurement.json").read_text())
    for line in lines:
        jsonschema.validate(json.loads(line), schema)
    for name in ("onnx-int8", "gguf-q8_0", "coreml-fp16"):
        manifest = json.loads((folder / "runs/tiny/artifacts" / name / "artifact.json").read_text())
        jsonschema.validate(manifest, json.loads((FOLDER / "artifact.json").read_text()))


@pytest.mark.whole
def test_numbers_that_can_not_be_taken_are_null_with_a_reason(finished: tuple[Path, Any]) -> None:
    if sys.platform == "darwin":
        pytest.skip("Core ML runs natively here")
    folder, result = finished
    rows = read_measurements(folder / "runs/tiny/measurements.jsonl")
    [latency] = [row for row in rows if row.subject == "coreml-fp16" and row.metric == "latency_ms"]
    assert latency.summary is None
    assert latency.reason
    [artifact] = [artifact for artifact in result.artifacts if artifact.name == "coreml-fp16"]
    assert artifact.metrics["latency_ms"] is None


@pytest.mark.whole
def test_nothing_is_done_twice(finished: tuple[Path, Any]) -> None:
    folder, first = finished
    before = (folder / "runs/tiny/report.html").read_text()
    stages = Stages()
    again = run_recipe(RunConfig(folder / "tiny.toml", folder / "runs"), stages)
    assert set(stages.ran) <= ALWAYS
    assert [a.artifact_id for a in again.artifacts] == [a.artifact_id for a in first.artifacts]
    assert "Core ML" in before


@pytest.mark.whole
def test_a_changed_bench_measures_again_but_makes_nothing_again(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = finished
    shutil.copytree(folder / "runs", tmp_path / "runs")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text((folder / "tiny.toml").read_text().replace("repeats = 2", "repeats = 3"))
    stages = Stages()
    run_recipe(RunConfig(recipe, tmp_path / "runs"), stages)
    assert set(stages.ran) - ALWAYS == {"speed"}


@pytest.mark.whole
def test_a_damaged_artifact_is_made_again(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder, first = finished
    shutil.copytree(folder / "runs", tmp_path / "runs")
    victim = tmp_path / "runs/tiny/artifacts/onnx-int8/model.onnx"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    stages = Stages()
    again = run_recipe(RunConfig(folder / "tiny.toml", tmp_path / "runs"), stages)
    assert "export:onnx-int8" in stages.ran
    assert [a.artifact_id for a in again.artifacts] == [a.artifact_id for a in first.artifacts]


@pytest.mark.whole
def test_the_report_can_be_written_anew(finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    report = folder / "runs/tiny/report.html"
    report.unlink()
    assert rebuild_report(folder / "runs/tiny") == report
    assert report.stat().st_size > 0


@pytest.mark.whole
def test_a_decoder_as_it_is(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    """No [distill] and no [student]: the model is shipped as it is."""
    recipe = write_recipe(tmp_path, tiny_llama, text, "onnx:fp32", "gguf:q8_0")
    lines = recipe.read_text().split("[distill]")
    bench = "[bench]" + lines[1].partition("[bench]")[2]
    exports = lines[1][lines[1].index("[[export]]") : lines[1].index("[bench]")]
    recipe.write_text(lines[0].replace("[student]\nlayers = 2\n", "") + exports + bench)
    result = run_recipe(RunConfig(recipe, tmp_path / "runs"))
    assert result.exit_code == 0, [a.failures for a in result.artifacts]
    assert not (tmp_path / "runs/tiny/student").exists()
    numbers = {artifact.name: artifact.metrics for artifact in result.artifacts}
    assert numbers["onnx-fp32"]["kl@words"] < 1e-5
    assert numbers["gguf-q8_0"]["decode_tokens_per_s"] > 0


def _as_it_is(recipe: Path) -> Path:
    """The recipe without [student] and [distill]."""
    before, _, rest = recipe.read_text().partition("[distill]")
    exports = rest[rest.index("[[export]]") :]
    recipe.write_text(before.replace("[student]\nlayers = 2\n", "") + exports)
    return recipe


@pytest.mark.whole
def test_all_artifacts_of_a_recipe_come_from_one_load(
    tiny_bert: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgestill import checkpoints, torch_models
    from edgestill.export import writer

    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "cache"))
    calls: list[str] = []

    def count(where: Any, name: str) -> None:
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *given, **named: (calls.append(name), real(*given, **named))[1])

    count(torch_models, "load_torch")
    count(writer, "check_model")
    count(checkpoints, "hash_tree")
    asked = ("onnx:fp32", "coreml:fp16", "onnx:int4-b32-gptq", "gguf:q4_0-imatrix", "onnx:int8-static", "gguf@0.05MB")
    recipe = _as_it_is(write_recipe(tmp_path, tiny_bert, text, *asked))
    result = run_recipe(RunConfig(recipe, tmp_path / "runs", until="export"))
    assert [artifact.name for artifact in result.artifacts] == [to.replace(":", "-").replace("@", "-") for to in asked]
    assert calls.count("load_torch") == 1
    assert calls.count("check_model") == 1
    seen = Stages()
    shutil.rmtree(tmp_path / "runs/tiny/artifacts/coreml-fp16")
    run_recipe(RunConfig(recipe, tmp_path / "runs", until="export"), seen)
    assert set(seen.ran) - ALWAYS == {"export:coreml-fp16"}
    assert calls.count("load_torch") == 2


def test_one_refused_artifact_does_not_lose_the_others(tiny_tagger: Path, text: Path, tmp_path: Path) -> None:
    recipe = _as_it_is(write_recipe(tmp_path, tiny_tagger, text, "onnx:int8-static", "coreml:fp16", "onnx:fp32"))
    result = run_recipe(RunConfig(recipe, tmp_path / "runs", until="export"))
    assert (result.status, result.exit_code) == ("failed", 1)
    assert [artifact.name for artifact in result.artifacts] == ["onnx-int8-static", "onnx-fp32"]
    assert "token-classification" in result.problems["coreml-fp16"]


@pytest.mark.whole
def test_a_model_that_labels_tokens(tiny_tagger: Path, text: Path, tmp_path: Path) -> None:
    """With labelled words beside the plain text: learnt from, and judged on in onnxruntime."""
    names = {True: "B-PER", False: "O"}
    lines = [
        "".join(f"{word} {names[word in ('film', 'movie')]}\n" for word in line.split())
        for line in text.read_text().splitlines()
    ]
    labelled = tmp_path / "words.conll"
    labelled.write_text("\n".join(lines))
    more = f'[[data.task]]\nname = "people"\nsource = "{labelled}"\ntrain = 40\ntest = 20\n'
    loss = "{ forward_kl = 0.5, cross_entropy = 0.5 }"
    recipe = write_recipe(tmp_path, tiny_tagger, text, "onnx:int8", loss=loss, more=more)
    result = run_recipe(RunConfig(recipe, tmp_path / "runs"))
    assert result.exit_code == 0, [a.failures for a in result.artifacts]
    run = tmp_path / "runs/tiny"
    manifest = open_artifact(run / "artifacts/onnx-int8").manifest
    assert (manifest.task, manifest.labels) == ("token-classification", ("O", "B-PER", "I-PER"))
    assert manifest.outputs[0].shape == ("batch", "length", 3)
    (numbers,) = [artifact.metrics for artifact in result.artifacts]
    assert numbers["top1_agreement@words"] > 0.5
    assert numbers["kl@words"] > 0
    assert numbers["latency_ms"] > 0
    assert 0 <= numbers["f1@people"] <= 1
    assert 0 <= numbers["accuracy@people"] <= 1
    assert "cross_entropy" in json.loads((run / "student/distillation.json").read_text())["losses"]
    report = (run / "report.html").read_text()
    assert "F1 of entities" in report  # the student card, beside the teacher


@pytest.mark.whole
def test_recipes_share_a_teacher_cache_that_lies_beside_them(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    place = tmp_path / "recipes"
    place.mkdir()
    recipe = write_recipe(place, tiny_llama, text, loss=LOGITS_LOSS)
    first = recipe.read_text().replace("threads = 1\n", "threads = 1\nmax_steps = 2\n", 1)
    first += '[distill.cache]\ntop_k = 8\npath = "caches"\n'
    recipe.write_text(first)
    needed = plan_recipe(recipe, tmp_path / "runs").disk_bytes
    recipe.write_text(first.replace("top_k = 8", "top_k = 64"))
    assert plan_recipe(recipe, tmp_path / "runs").disk_bytes == pytest.approx(needed + 96 * 32 * 4 * 56)
    recipe.write_text(first)
    run_recipe(RunConfig(recipe, tmp_path / "a", until="student"))
    (cache,) = (place / "caches").iterdir()
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    recipe.write_text(first.replace("layers = 2", "layers = 3"))
    run_recipe(RunConfig(recipe, tmp_path / "b", until="student"))
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    # Where it lies does not change the student: nothing is done again.
    shutil.move(place / "caches", place / "moved")
    recipe.write_text(first.replace('"caches"', '"moved"'))
    stages = Stages()
    run_recipe(RunConfig(recipe, tmp_path / "a", until="student"), stages)
    assert "student" in stages.skipped


@pytest.mark.whole
def test_a_broken_artifact_fails_the_run_after_the_others(
    tiny_bert: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter is sabotaged (two weights of one layer swapped): the verdict must catch it."""
    import edgestill.export.onnx as exporter
    from edgestill.export.writer import Weights

    read, write = Weights.__getitem__, exporter.write

    def other(name: str) -> str:
        if "layer.0.attention.self" not in name:
            return name
        return name.replace("query", "\0").replace("key", "query").replace("\0", "key")

    def sabotaged(*arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Weights, "__getitem__", lambda self, name: read(self, other(name)))
            return write(*arguments, **options)

    monkeypatch.setattr(exporter, "write", sabotaged)
    recipe = write_recipe(tmp_path, tiny_bert, text, "onnx:fp32", "gguf:q8_0")
    result = run_recipe(RunConfig(recipe, tmp_path / "runs", until="verify"))
    assert (result.status, result.exit_code) == ("failed", 1)
    judged = {artifact.name: artifact for artifact in result.artifacts}
    assert judged["onnx-fp32"].level == "failed"
    assert judged["onnx-fp32"].folder == "quarantine/onnx-fp32"
    # Both weights of the pair are wrong; the first in the student's order is the one that is named.
    assert any("encoder.layer.0.attention.self.key" in failure for failure in judged["onnx-fp32"].failures)
    assert not (tmp_path / "runs/tiny/artifacts/onnx-fp32").exists()
    assert judged["gguf-q8_0"].level == "device_verified"

    stages = Stages()
    again = run_recipe(RunConfig(recipe, tmp_path / "runs", until="verify"), stages)
    assert again.exit_code == 1, "it stays failed when nothing has changed"
    assert set(stages.ran) <= ALWAYS


@pytest.mark.whole
def test_gates_decide_the_exit_code(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = finished
    shutil.copytree(folder / "runs", tmp_path / "runs")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text((folder / "tiny.toml").read_text() + "\n[gates]\nmodel_bytes = { max = 10 }\n")
    result = run_recipe(RunConfig(recipe, tmp_path / "runs"))
    assert result.exit_code == 1
    assert {gate.outcome for gate in result.gates} == {"fail"}


def test_an_unknown_gate_is_found_before_anything_runs(tiny_bert: Path, text: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bert, text, "onnx:fp32")
    recipe.write_text(recipe.read_text() + "\n[gates]\nspaerman = { min = 0.9 }\n")
    stages = Stages()
    with pytest.raises(RecipeError, match="spaerman"):
        run_recipe(RunConfig(recipe, tmp_path / "runs"), stages)
    assert stages.ran == []


def test_a_loss_of_another_task_is_refused(tiny_bert: Path, text: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bert, text, loss=LOGITS_LOSS)
    with pytest.raises(UsageError, match="forward_kl"):
        run_recipe(RunConfig(recipe, tmp_path / "runs"))
    assert not (tmp_path / "runs/tiny/student").exists()


KILL = """
import os, signal, sys
from pathlib import Path
from edgestill.pipeline import RunConfig, run_recipe
from edgestill.schemas import FOLDER
from edgestill.stages import Observer

class Killer(Observer):
    stage, after = sys.argv[3], int(sys.argv[4])
    now, calls = "", 0
    def started(self, name, title):
        self.now = name
        if name == self.stage and self.after == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def advanced(self, message, fraction=None):
        if self.now == self.stage:
            self.calls += 1
            if self.calls >= self.after:
                os.kill(os.getpid(), signal.SIGKILL)

run_recipe(RunConfig(sys.argv[1], Path(sys.argv[2])), Killer())
"""


def killed(recipe: Path, runs: Path, stage: str, after: int) -> bool:
    """Run until ``stage`` has reported progress ``after`` times, then SIGKILL; whether it came that far."""
    command = [sys.executable, "-c", KILL, str(recipe), str(runs), stage, str(after)]
    return subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL


def hashes(run: Path) -> dict[str, str]:
    found = {"student": hash_tree(run / "student")}
    for path in sorted((run / "artifacts").iterdir()):
        found[path.name] = json.loads((path / "artifact.json").read_text())["artifact_id"]
    return found


@pytest.mark.parametrize(
    ("stage", "after"),
    [
        pytest.param("student", 3, marks=pytest.mark.slow),
        pytest.param("teacher", 1, marks=pytest.mark.slow),
        pytest.param("student", 1, marks=pytest.mark.slow),
        pytest.param("student", 8, marks=pytest.mark.slow),
        pytest.param("export:onnx-int8", 1, marks=pytest.mark.slow),
        pytest.param("export:coreml-fp16", 2, marks=pytest.mark.slow),
        pytest.param("references", 1, marks=pytest.mark.slow),
        pytest.param("verify:gguf-q8_0", 2, marks=pytest.mark.slow),
        pytest.param("accuracy:student", 1, marks=pytest.mark.slow),
        pytest.param("tasks:onnx-int8", 1, marks=pytest.mark.slow),
        pytest.param("speed", 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_an_undisturbed_one(
    finished: tuple[Path, Any], tmp_path: Path, stage: str, after: int
) -> None:
    folder, _ = finished
    assert killed(folder / "tiny.toml", tmp_path, stage, after), f"{stage} was never reached"
    result = run_recipe(RunConfig(folder / "tiny.toml", tmp_path))
    assert result.exit_code == 0
    assert hashes(tmp_path / "tiny") == hashes(folder / "runs/tiny")
    leftovers = list((tmp_path / "tiny").rglob("*.partial"))
    assert leftovers == []


@pytest.mark.whole
def test_ctrl_c_says_how_to_go_on(tiny_bert: Path, text: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bert, text, "onnx:int8")
    command = [sys.executable, "-m", "edgestill", "run", str(recipe), "--runs", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        before = []
        for line in process.stderr:
            before.append(line)
            if "distil the student" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, "".join(before) + rest
    assert rest.splitlines()[-1] == "interrupted; the same command goes on where it stopped"
    assert "Traceback" not in rest


def test_further_teachers_are_prepared_counted_and_part_of_the_input(
    tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    from edgestill.plan import plan_recipe

    (tmp_path / "alone").mkdir()
    alone = plan_recipe(write_recipe(tmp_path / "alone", tiny_llama, text, loss=LOGITS_LOSS), tmp_path)
    recipe = write_recipe(tmp_path, tiny_llama, text, loss=LOGITS_LOSS)
    more = f'[[distill.teacher]]\nsource = "{tiny_llama}"\nweight = 3.0\n[distill.on_policy]\nprompt_tokens = 3\n'
    recipe.write_text(recipe.read_text() + more + "new_tokens = 4\nreplay = 8\n")
    plan = plan_recipe(recipe, tmp_path)
    assert plan.facts["teacher 2 is"].startswith("llama, 4 layers")
    assert plan.disk_bytes > alone.disk_bytes
    assert plan.memory_bytes > alone.memory_bytes
    # 12 steps of 8 texts, half of them the student's, half of these new ones, of 4 tokens each.
    [step] = [step for step in plan.steps if step.name == "student"]
    assert step.note.endswith(", 96 written by the student")
    run_recipe(RunConfig(recipe, tmp_path, until="student"))
    stages = json.loads((tmp_path / "tiny/run.json").read_text())["stages"]
    assert {"teacher", "teacher-2", "student"} <= set(stages)
    assert hash_tree(tmp_path / "tiny/teacher-2") == hash_tree(tmp_path / "tiny/teacher")
    card = json.loads((tmp_path / "tiny/student/distillation.json").read_text())
    assert [row["weight"] for row in card["teachers"]] == [0.25, 0.75]
    assert card["cost"] == stages["student"]["facts"]["result"]["cost"]
    assert str(tiny_llama) not in json.dumps(card)
    seen = Stages()
    run_recipe(RunConfig(recipe, tmp_path, until="student"), seen)
    assert {"teacher-2", "student"} <= set(seen.skipped)
