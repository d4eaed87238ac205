"""A student with a trimmed vocabulary: taught by its teacher, exported to every format, judged on its own ids."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from edgestill.bench.reference import vocabulary_columns
from edgestill.bench.sample_text import SAMPLE_TEXT
from edgestill.checkpoints import load_tokenizer, load_torch, open_model
from edgestill.data import DataSets, TextSet
from edgestill.distill import distill
from edgestill.distill.batches import collate, encode
from edgestill.distill.evaluate import HeldOut
from edgestill.distill.objective import Objective, count_items
from edgestill.distill.student import StudentPlan, make_student
from edgestill.distill.teacher import Teacher
from edgestill.distill.vocabulary_tokenizer import fit_vocabulary
from edgestill.errors import RecipeError
from edgestill.export import export
from edgestill.pipeline import RunConfig, run_recipe
from edgestill.recipe import DistillConfig, ExportConfig, StudentConfig
from edgestill.runtimes.session import SessionOptions, open_session


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers over 768 byte-level tokens, more than the sentences of the fixtures need."""
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("wordy") / "wordy"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    words = "the film was good, bad, funny, awful, slow and dark; a movie, a plot"
    backend.train_from_iterator([*SAMPLE_TEXT, words], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|im_end|>",
                                        pad_token="<|im_end|>", model_max_length=64)  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=800, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
        pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    facts = {"schema_version": 1, "license": "Apache-2.0", "task": "text-generation", "max_length": 64}
    (folder / "edgestill.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def texts(sentences: list[str]) -> DataSets:
    held_out = [*sentences[150:], "a zebra! 🦓", SAMPLE_TEXT[0]]
    return DataSets((TextSet("words", tuple(sentences[:150]), (), tuple(held_out), (), "0" * 64),), ())


def _config(loss: dict[str, float], **changes: Any) -> DistillConfig:
    plain = {"batch_size": 8, "epochs": 2.0, "learning_rate": 2e-3, "save_every": 10, "threads": 1}
    return DistillConfig(loss=loss, **{**plain, **changes})  # type: ignore[arg-type]


def test_a_loss_is_that_of_the_whole_teacher_reading_the_same_pieces(wordy: Path, texts: DataSets):
    """Against the definition: map the ids, let the untouched teacher read them, gather its logits, renormalise."""
    folder = open_model(wordy)
    found = fit_vocabulary(folder, 320, texts)
    examples = encode(texts.split("dev"), found.tokenizer, folder.task, 32)
    batch = collate([examples[row] for row in range(len(examples))], int(found.tokenizer.pad_token_id))
    teacher = Teacher(folder, vocabulary=found.keep)
    student = make_student(folder, StudentPlan.of_layers(folder, (0, 2), found.keep))
    objective = Objective(student, folder.task, {"forward_kl": 1.0}, temperature=2.0, vocab_size=len(found.tokenizer))
    counts = count_items([batch])
    with torch.no_grad():
        loss, _ = objective(batch, teacher.say(batch), counts)
        columns = torch.tensor(found.keep)
        whole = load_torch(wordy)
        theirs = whole(input_ids=columns[batch["input_ids"]], attention_mask=batch["attention_mask"]).logits.double()
        ours = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    total, places = 0.0, 0
    for row in range(len(examples)):
        for at in range(len(examples.ids[row]) - 1):
            p = torch.softmax(theirs[row, at] / 2, -1)[columns]
            p = p / p.sum()
            q = torch.softmax(ours[row, at] / 2, -1)
            total += 4 * float((p * (p / q).log()).sum())
            places += 1
    assert places == counts["predicted"]
    assert float(loss) == pytest.approx(total / places, rel=1e-5)
    dev = HeldOut(examples, teacher, len(found.tokenizer)).measure(whole_cut := make_student(
        folder, StudentPlan.of_layers(folder, None, found.keep)))  # fmt: skip
    assert dev["kl"] == pytest.approx(0.0, abs=1e-9)  # trimming alone loses nothing of that distribution
    assert dev["top1_agreement"] == 1.0
    assert whole_cut.config.vocab_size == 320


def test_a_decoder_with_half_its_vocabulary_learns(wordy: Path, texts: DataSets, tmp_path: Path):
    student = StudentConfig(layers=2, vocabulary="corpus")
    config = _config({"forward_kl": 1.0, "cross_entropy": 0.1})
    result = distill(wordy, tmp_path / "out", student=student, config=config, data=texts, max_length=32,
                     work=tmp_path / "work")  # fmt: skip
    assert result.dev_after["kl"] < 0.95 * result.dev_before["kl"]
    folder = open_model(result.path)
    tokenizer, full = load_tokenizer(result.path), load_tokenizer(wordy)
    assert folder.vocab_size == len(tokenizer) < len(full)
    assert folder.vocab_size % 64 == 0
    model = load_torch(result.path)
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    card = json.loads((result.path / "distillation.json").read_text())["vocabulary"]
    assert (card["tokens"], card["of"]) == (len(tokenizer), len(full))
    plan = StudentPlan.of_layers(open_model(wordy), (0, 2), range(folder.vocab_size))
    assert plan.parameters == folder.parameters  # what a plan promises
    said = card["held_out"]
    ids = [full(text)["input_ids"] for text in texts.split("dev")]
    known = {full.convert_tokens_to_ids(token) for token in tokenizer.get_vocab()}
    assert said["tokens"] == sum(map(len, ids))
    assert said["kept"] == pytest.approx(sum(index in known for row in ids for index in row) / said["tokens"], abs=1e-6)
    assert said["coinciding"] <= said["kept"] < 1 < said["growth"]


def test_the_run_is_resumed_and_another_vocabulary_is_another_job(wordy: Path, texts: DataSets, tmp_path: Path):
    def run(vocabulary: Any, steps: int = 4) -> Any:
        return distill(wordy, tmp_path / "out", student=StudentConfig(layers=2, vocabulary=vocabulary),
                       config=_config({"forward_kl": 1.0}, max_steps=steps), data=texts, max_length=32,
                       work=tmp_path / "work")  # fmt: skip

    first = run(448)
    assert run(448) == first
    assert open_model(run(512).path).vocab_size == 512


@pytest.mark.parametrize("losses", [{"embedding_cosine": 1.0}, {"embedding_cosine": 1.0, "hidden_states": 0.1}])
def test_an_encoder_with_fewer_words_learns(encoder: Path, texts: DataSets, tmp_path: Path, losses: dict[str, float]):
    few = DataSets((TextSet("few", tuple(t for t in texts.split("train") if "war" not in t and "love" not in t), (),
                            tuple(texts.split("dev")), (), "0" * 64),), ())  # fmt: skip
    student = StudentConfig(layers=2, vocabulary=100)
    result = distill(encoder, tmp_path / "out", student=student, config=_config(losses), data=few, max_length=32,
                     work=tmp_path / "work")  # fmt: skip
    assert result.dev_after["cosine"] > result.dev_before["cosine"]
    assert open_model(result.path).vocab_size == 128 < open_model(encoder).vocab_size


def test_only_trimming_keeps_what_the_teacher_says(encoder: Path, texts: DataSets, tmp_path: Path):
    result = distill(encoder, tmp_path / "out", student=StudentConfig(vocabulary=0.9), config=None, data=texts,
                     max_length=32, work=tmp_path / "work")  # fmt: skip
    theirs, ours = load_tokenizer(encoder), load_tokenizer(result.path)
    known = {theirs.convert_tokens_to_ids(token) for token in ours.get_vocab()}
    alike = [text for text in texts.split("dev") if set(theirs(text)["input_ids"]) <= known]
    assert alike
    for text in alike:
        with torch.no_grad():
            before, after = (
                load_torch(path)(torch.tensor([ids := side(text, truncation=True, max_length=32)["input_ids"]]),
                                 torch.ones(1, len(ids)))
                for path, side in ((encoder, theirs), (result.path, ours))
            )  # fmt: skip
        assert torch.equal(before, after)


def test_without_text_there_is_nothing_to_choose_by(wordy: Path):
    with pytest.raises(RecipeError, match="chosen by text"):
        fit_vocabulary(open_model(wordy), "corpus", DataSets((), ()))


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.0, 1.5, "all", True])
def test_a_vocabulary_is_a_number_a_share_or_corpus(value: Any):
    with pytest.raises(ValueError, match="no number of tokens"):
        StudentConfig(vocabulary=value)


RECIPE = """
name = "trimmed"
[teacher]
source = "{teacher}"
[student]
{student}
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
max_steps = 6
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


def _run(folder: Path, teacher: Path, sentences: list[str], *to: str, **parts: str) -> Any:
    text = folder / "words.txt"
    text.write_text("\n".join(sentences))
    exports = "\n".join(f'[[export]]\nto = "{variant}"' for variant in to)
    exports += f'\n[[export]]\nto = "{to[0]}"\nof = "teacher"'
    recipe = folder / "trimmed.toml"
    recipe.write_text(RECIPE.format(**{"teacher": teacher, "text": text, "exports": exports, "more": "", **parts}))
    return run_recipe(RunConfig(recipe, folder / "runs"))


def _check(folder: Path, result: Any, rows: int) -> None:
    assert (result.status, result.exit_code) == ("passed", 0), [a.failures for a in result.artifacts]
    run = folder / "runs/trimmed"
    assert open_model(run / "student").vocab_size == rows
    assert open_model(run / "work/cut").vocab_size == rows
    assert all(artifact.level == "device_verified" for artifact in result.artifacts)


@pytest.fixture(scope="module")
def trimmed(wordy: Path, texts: DataSets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with its first and last layer and the tokens of the sentences, untrained."""
    place = tmp_path_factory.mktemp("trimmed")
    student = StudentConfig(layers=2, vocabulary="corpus")
    return distill(wordy, place / "out", student=student, config=None, data=texts, max_length=32,
                   work=place / "work").path  # fmt: skip


AWKWARD = (
    "a good film", "zebra \U0001f993 x\r\ny", "<|im_start|>user\nhi<|im_end|>", "  I'm 1234 caf\u00e9s", SAMPLE_TEXT[3],
)  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize(
    ("to", "near"),
    [("onnx:fp32", 1e-4), ("gguf:f32", 1e-2), ("coreml:fp16", 5e-2)],
)
def test_a_trimmed_student_is_exported_to_every_format(trimmed: Path, tmp_path: Path, to: str, near: float):
    """Logits of the runtime that will load it, over the new ids; and llama.cpp's own tokenizer gives these ids."""
    if to.startswith("gguf"):
        pytest.importorskip("llama_cpp")
    tokenizer, model, rows = load_tokenizer(trimmed), load_torch(trimmed), open_model(trimmed).vocab_size
    artifact = export(trimmed, tmp_path / "artifact", ExportConfig(to=to, context_length=32))
    assert artifact.manifest.vocab_size == rows < 768
    shipped = Tokenizer.from_file(str(artifact.path / "tokenizer.json"))
    opened: Any = open_session(artifact.path, SessionOptions(1))
    for text in AWKWARD:
        ids = tokenizer(text)["input_ids"]
        assert shipped.encode(text).ids == ids
        if to.startswith("gguf"):
            assert opened.tokenize(text) == ids
        row = np.array([ids[:32]], dtype=np.int64)
        with torch.no_grad():
            expected = model(input_ids=torch.from_numpy(row)).logits.numpy()
        found = opened.forward(row, np.ones_like(row))
        np.testing.assert_allclose(found, expected, atol=near * np.abs(expected).max(), rtol=0)
    opened.close()


@pytest.mark.slow
def test_a_trimmed_decoder_is_judged_on_its_own_ids(wordy: Path, sentences: list[str], tmp_path: Path):
    """Beside an artifact of the whole teacher, which reads its own."""
    result = _run(tmp_path, wordy, sentences, "onnx:fp32", student='layers = 2\nvocabulary = "corpus"',
                  loss="{ forward_kl = 1.0 }")  # fmt: skip
    rows = open_model(tmp_path / "runs/trimmed/student").vocab_size
    assert rows < 768
    _check(tmp_path, result, rows)
    places = tmp_path / "runs/trimmed/work/references/words"
    said = {name: np.load(places / name / "logits.npy") for name in ("teacher", "student", "teacher-of-student")}
    assert [logits.shape[-1] for logits in said.values()] == [800, rows, rows]
    columns = vocabulary_columns(open_model(wordy), open_model(tmp_path / "runs/trimmed/student"))
    ids, mask = (np.load(places / "teacher-of-student" / f"{name}.npy") for name in ("ids", "mask"))
    with torch.no_grad():
        whole = load_torch(wordy)(
            input_ids=torch.tensor(columns)[torch.from_numpy(ids)], attention_mask=torch.from_numpy(mask)
        )
    expected = whole.logits.numpy()[..., list(columns or ())]
    np.testing.assert_allclose(said["teacher-of-student"][mask == 1], expected[mask == 1], atol=1e-4)
    metrics = {artifact.name: artifact.metrics for artifact in result.artifacts}
    assert metrics["onnx-fp32"]["kl@words"] > 1e-3
    assert metrics["teacher-onnx-fp32"]["kl@words"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_a_trimmed_encoder_is_judged_with_its_labels(tiny_bert: Path, sentences: list[str], tmp_path: Path):
    labelled = tmp_path / "labelled.csv"
    labelled.write_text("text,label\n" + "\n".join(f"{line},{index % 2}" for index, line in enumerate(sentences)))
    more = f'[[data.task]]\nname = "parity"\nsource = "{labelled}"\ntrain = 40\ntest = 20\n'
    result = _run(tmp_path, tiny_bert, sentences, "onnx:fp32", more=more, student="layers = 2\nvocabulary = 100",
                  loss="{ embedding_cosine = 1.0 }")  # fmt: skip
    _check(tmp_path, result, 128)
    for artifact in result.artifacts:
        assert 0 <= artifact.metrics["accuracy@parity"] <= 1


def test_a_trimmed_encoder_keeps_llama_cpps_tokenizer(tiny_bert: Path, texts: DataSets, tmp_path: Path):
    pytest.importorskip("llama_cpp")
    student = distill(tiny_bert, tmp_path / "out", student=StudentConfig(vocabulary=100), config=None, data=texts,
                      max_length=32, work=tmp_path / "work")  # fmt: skip
    artifact = export(student.path, tmp_path / "artifact", ExportConfig(to="gguf:f32"))
    opened: Any = open_session(artifact.path, SessionOptions(1))
    tokenizer = load_tokenizer(student.path)
    for text in ("a good film", "zebra, quiet!", "war and peace"):
        assert opened.tokenize(text) == tokenizer(text)["input_ids"]
    opened.close()


def test_a_copy_of_the_teacher_is_not_trimmed_by_accident(tiny_bert: Path, sentences: list[str], tmp_path: Path):
    """Without the key nothing is rewritten: the student's tokenizer is the teacher's, byte for byte."""
    data = DataSets((TextSet("words", tuple(sentences), (), (), (), "0" * 64),), ())
    plain = distill(tiny_bert, tmp_path / "out", student=StudentConfig(layers=2), config=None, data=data,
                    max_length=32, work=tmp_path / "work")  # fmt: skip
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    assert (plain.path / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
    assert "vocabulary" not in json.loads((plain.path / "distillation.json").read_text())


def test_the_figure_of_the_peers_measures_what_it_says(wordy: Path, texts: DataSets):
    """``vocab_trim`` on a tiny teacher: with all tokens kept nothing is lost, with fewer the rows count."""
    path = Path(__file__).parents[1] / "peers/programs/vocab_trim_ours.py"
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("vocab_trim", path))  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    settings = {"positions": 100, "window": 24, "student_layers": 2}
    everything = module.measure(wordy, texts.split("train"), texts.split("dev"), size=768, **settings)
    assert everything["agreement_coinciding"] == everything["agreement_aligned"] == 1.0
    assert everything["coverage"]["growth"] == everything["coverage"]["kept"] == 1.0
    found = module.measure(wordy, list(SAMPLE_TEXT[:4]), SAMPLE_TEXT[4:], size=448, **settings)
    parameters = open_model(wordy).parameters
    assert found["removed_of_teacher"] == pytest.approx((800 - 448) * 64 / parameters)
    assert found["removed_of_student"] > found["removed_of_teacher"]
    assert min(found["coinciding_positions"], found["aligned_positions"]) > 10
    assert found["agreement_coinciding"] < 1.0
    assert found["coverage"]["kept"] < 1.0 < found["coverage"]["growth"]
