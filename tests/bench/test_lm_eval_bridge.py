"""Our model under lm-eval: what can be asked without it, and (slow) side by side with lm-eval's own ``hf`` model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgestill.bench.lm_eval_bridge import ArtifactModel, register
from edgestill.errors import BadInput, MissingDependency, Unsupported, UsageError

PROGRAM = Path(__file__).resolve().parents[1] / "peers/programs/lm_eval_both_ours.py"


@pytest.fixture(scope="module")
def model(tiny_llama: Path):
    made = ArtifactModel(artifact=str(tiny_llama), threads="1", batch_size="2", max_gen_toks="40")
    made.cache_hook = SimpleNamespace(add_partial=lambda *_: None)
    yield made
    made.worker.close()


def asked(*arguments):
    return SimpleNamespace(args=arguments)


def test_text_is_cut_at_the_first_stop_sequence(model):
    ids = model.tok_encode("the film")
    written = [token.id for token in model.worker.decode(ids, 40)]
    ends = written.index(model.eot_token_id) if model.eot_token_id in written else 40
    whole = model.tok_decode(written[:ends])
    assert len(whole) > 4
    options = {"until": [whole[3]], "do_sample": False}
    cut, full = model.generate_until([asked("the film", options), asked("the film", {})], disable_tqdm=True)
    assert cut == whole.split(whole[3])[0]
    assert full == whole
    assert options == {"until": [whole[3]], "do_sample": False}  # lm-eval's own
    [short] = model.generate_until([asked("the film", {"max_gen_toks": 2})], disable_tqdm=True)
    assert short == model.tok_decode(written[: min(2, ends)])


def test_a_long_context_loses_its_beginning(model):
    text = " ".join(["the film was good"] * 60)
    ids = model.tok_encode(text)
    assert len(ids) > 128
    [got] = model.generate_until([asked(text, {"max_gen_toks": 8})], disable_tqdm=True)
    written = [token.id for token in model.worker.decode(ids[-120:], 8)]
    assert got == model.tok_decode(written[: written.index(2)] if 2 in written else written)


def test_every_token_of_a_rolled_text_is_predicted_once(model, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install 'edgestill[lm-eval]'")
    assert model.loglikelihood_rolling([asked("the film was good")], disable_tqdm=True)[0] < 0


def test_empty_continuations_are_certain(model):
    found = model._loglikelihood_tokens([(None, [1], []), (("a", "b"), [5], [7])], disable_tqdm=True)
    assert found[0] == (0.0, True)
    assert found[1][0] < 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"do_sample": True}, Unsupported),
        ({"temperature": 0.7}, Unsupported),
        ({"max_gen_toks": 128}, UsageError),
        ({"max_gen_toks": "many"}, UsageError),
    ],
)
def test_what_it_can_not_do_is_refused(model, options, error):
    with pytest.raises(error):
        model.generate_until([asked("the film", options)], disable_tqdm=True)


def test_what_is_no_decoder_is_refused(tiny_bert, tmp_path):
    with pytest.raises(BadInput, match="not a folder"):
        ArtifactModel(artifact=str(tmp_path / "none"))
    with pytest.raises(Unsupported, match="feature-extraction"):
        ArtifactModel(artifact=str(tiny_bert), threads=1)
    with pytest.raises(UsageError, match="threads"):
        ArtifactModel(artifact=str(tmp_path), threads="few")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed here")
def test_without_lm_eval_the_extra_is_named():
    with pytest.raises(MissingDependency) as caught:
        register()
    assert "edgestill[lm-eval]" in caught.value.hint


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it makes an environment the first time
def test_equals_lm_evals_own_model(tiny_llama, tmp_path, sentences):
    """The same tiny model as an ONNX artifact in our worker and in lm-eval's ``hf``, on tasks written here."""
    from edgestill.export import export
    from edgestill.recipe import ExportConfig
    from tests.peers.environments import LM_EVAL, prepare
    from tests.peers.registry import Unavailable

    try:
        python = prepare(LM_EVAL).python
    except Unavailable as reason:
        pytest.skip(str(reason))
    artifact = export(tiny_llama, tmp_path / "artifact", ExportConfig(to="onnx:fp32")).path
    tasks = write_tasks(tmp_path / "tasks", sentences)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = tmp_path / "result.json"
    command = [python, "-P", PROGRAM, tiny_llama, artifact, tasks, result]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    both = json.loads(result.read_text())
    assert set(both["hf"]) == {"quiz", "rolling", "writing"}
    for task, theirs in both["hf"].items():
        ours = both["edgestill"][task]
        assert len(ours) == len(theirs) == 12
        if task == "writing":
            assert ours == theirs
            continue
        np.testing.assert_allclose(np.array(ours, float), np.array(theirs, float), rtol=2e-5, atol=2e-4)
    # the command line, with the model found by its name
    command = [python, "-P", "-m", "edgestill", "lm-eval", "--model", "edgestill", "--model_args",
               f"artifact={artifact},threads=1", "--tasks", "quiz", "--include_path", tasks, "--batch_size", "4",
               "--output_path", tmp_path / "out"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [written] = (tmp_path / "out").rglob("results*.json")
    scores = json.loads(written.read_text())["results"]["quiz"]
    assert scores["acc,none"] == pytest.approx(both["acc"]["edgestill"])
    assert scores["acc_norm,none"] == pytest.approx(both["acc_norm"]["edgestill"])
    # our own small tasks count the same
    from edgestill.accuracy import AccuracyRequest, measure_accuracy
    from edgestill.bench.measure import Subject
    from edgestill.stages import Observer

    request = AccuracyRequest(tasks=(tasks / "quiz.jsonl",), threads=1)
    rows = {row.metric: row for row in measure_accuracy([Subject("a", artifact)], request, Observer())}
    assert rows["accuracy_raw"].summary.value == pytest.approx(scores["acc,none"])
    assert rows["accuracy"].summary.value == pytest.approx(scores["acc_norm,none"])


def write_tasks(folder: Path, sentences: list[str]) -> Path:
    folder.mkdir()
    quiz = [{"context": sentences[i], "choices": ["good", "bad film", "a slow and dull plot"], "answer": i % 3}
            for i in range(11)]  # fmt: skip
    quiz.append({"context": " ".join(sentences[:80]), "choices": ["war", "peace", "love"], "answer": 1})  # too long
    rolling = [{"text": sentences[i]} for i in range(11)] + [{"text": " ".join(sentences[:60])}]
    for name, rows in (("quiz", quiz), ("rolling", rolling), ("writing", quiz)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = "dataset_path: json\ntest_split: test\nnum_fewshot: 0\n"
    kinds = {
        "quiz": 'output_type: multiple_choice\ndoc_to_text: "{{context}}"\ndoc_to_choice: choices\n'
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n",
        "writing": 'output_type: generate_until\ndoc_to_text: "{{context}}"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs:\n  until: ["e"]\n  max_gen_toks: 24\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n",
    }
    for name, kind in kinds.items():
        data = json.dumps({"data_files": {"test": str(folder / f"{name}.jsonl")}})
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}dataset_kwargs: {data}\n{kind}")
    return folder
