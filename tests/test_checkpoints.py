from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgestill import checkpoints
from edgestill.checkpoints import (
    ARCHITECTURES,
    SentenceEncoder,
    load_tokenizer,
    load_torch,
    open_model,
    prepare_model,
    save_model,
)
from edgestill.errors import BadInput, Unsupported

TEXTS = ["the film was good", "a", "perhaps never the phone model that it was"]


def batch(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = load_tokenizer(folder)(TEXTS, padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def copy(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a model folder without edgestill.json, as a stranger would have it; ``config`` is changed in it."""
    shutil.copytree(source, target)
    (target / "edgestill.json").unlink()
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def tiny(model_type: str, folder: Path, tiny_bert: Path, tiny_llama: Path) -> tuple[Path, Any]:
    """A random two-layer model of any supported type, saved by Transformers, and that model."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    row = ARCHITECTURES[model_type]
    shutil.copytree(tiny_bert if row.family == "encoder" else tiny_llama, folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    for stale in ("config.json", "edgestill.json", "model.safetensors", "generation_config.json"):
        (folder / stale).unlink(missing_ok=True)
    sizes = {row.layers_key: 2, row.hidden_key: 32, row.heads_key: 4, row.ffn_key: 64}
    extra: dict[str, Any] = {"num_key_value_heads": 2, "eos_token_id": 2} if row.family == "decoder" else {}
    if model_type == "gpt2":
        extra = {"eos_token_id": 2, "bos_token_id": 0}
    config = AutoConfig.for_model(
        model_type, vocab_size=vocabulary, **{row.positions_key: 80}, pad_token_id=0 if row.family == "encoder" else 2,
        **sizes, **extra,
    )  # fmt: skip
    torch.manual_seed(1)
    model = (AutoModel if row.family == "encoder" else AutoModelForCausalLM).from_config(config).eval()
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_supported_architecture_keeps_its_numbers(
    model_type: str, tmp_path: Path, tiny_bert: Path, tiny_llama: Path
) -> None:
    source, model = tiny(model_type, tmp_path / "source", tiny_bert, tiny_llama)
    row = ARCHITECTURES[model_type]
    described = prepare_model(source, tmp_path / "out")
    assert described.architecture == model_type
    assert (described.layers, described.hidden_size) == (2, 32)
    assert described.task == row.tasks[0]
    assert described.max_length == min(80 - row.position_offset, 64 if row.family == "encoder" else 128)
    loaded = load_torch(described.path)
    ids, mask = batch(described.path)
    names = set(loaded.state_dict()) if row.family == "decoder" else set(loaded.encoder.state_dict())
    assert f"{described.layers_path}.1" in {name[: len(described.layers_path) + 2] for name in names}
    assert described.embeddings_path in names
    with torch.no_grad():
        if row.family == "decoder":
            given = {"input_ids": ids, "attention_mask": mask}
            torch.testing.assert_close(loaded(**given).logits, model(**given).logits, rtol=0, atol=1e-6)
        else:
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = torch.stack([hidden[i, : mask[i].sum()].mean(0) for i in range(len(TEXTS))])
            torch.testing.assert_close(loaded(ids, mask), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_table_agrees_with_optimum(model_type: str) -> None:
    """optimum's NormalizedConfigManager is an independent table of the same names."""
    utils = pytest.importorskip("optimum.utils")
    from transformers import AutoConfig

    row = ARCHITECTURES[model_type]
    config = AutoConfig.for_model(model_type, **{row.layers_key: 3, row.hidden_key: 24, row.heads_key: 6})
    if model_type == "gemma3_text":  # which optimum 2.3 does not know
        assert model_type not in utils.NormalizedConfigManager._conf
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 24, 6)
        return
    normal = utils.NormalizedConfigManager.get_normalized_config_class(model_type)(config)
    assert (normal.num_layers, normal.hidden_size, normal.num_attention_heads) == (3, 24, 6)


def test_the_same_model_gives_the_same_bytes_from_any_folder(tiny_llama: Path, tmp_path: Path) -> None:
    first = prepare_model(copy(tiny_llama, tmp_path / "a"), tmp_path / "out" / "one")
    second = prepare_model(copy(tiny_llama, tmp_path / "b" / "deeper"), tmp_path / "two")
    again = prepare_model(first.path, tmp_path / "three")
    assert first.model_id == second.model_id == again.model_id
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in first.path.iterdir())
    assert first.license is None


def test_saving_gives_the_same_bytes_and_numbers(tiny_bert: Path, tmp_path: Path) -> None:
    model, tokenizer, like = load_torch(tiny_bert), load_tokenizer(tiny_bert), open_model(tiny_bert)
    one = save_model(model, tokenizer, tmp_path / "one", like)
    two = save_model(load_torch(one.path), load_tokenizer(one.path), tmp_path / "x" / "two", one)
    assert one.model_id == two.model_id
    assert (two.license, two.pooling, two.normalize) == ("Apache-2.0", "mean", True)
    ids, mask = batch(tiny_bert)
    with torch.no_grad():
        assert torch.equal(load_torch(two.path)(ids, mask), model(ids, mask))
    changed = save_model(model, tokenizer, tmp_path / "three", like, max_length=32, license="MIT", normalize=False)
    assert (changed.max_length, changed.license, changed.normalize) == (32, "MIT", False)


def test_a_cut_model_is_described_by_its_weights(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_torch(tiny_llama)
    model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[3]])
    model.config.num_hidden_layers = 2
    student = save_model(model, load_tokenizer(tiny_llama), tmp_path / "cut", open_model(tiny_llama))
    assert student.layers == 2
    assert student.parameters < open_model(tiny_llama).parameters
    assert load_torch(student.path)(*batch(tiny_llama)).logits.shape[-1] == student.vocab_size


def test_tied_weights_are_stored_once_and_tied_after_loading(tiny_llama: Path, tmp_path: Path) -> None:
    out = prepare_model(tiny_llama, tmp_path / "out")
    assert "lm_head.weight" not in load_file(out.path / "model.safetensors")
    model = load_torch(out.path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_untied_head_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    source = copy(tiny_llama, tmp_path / "source", tie_word_embeddings=False)
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = torch.randn_like(state["model.embed_tokens.weight"])
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    model = load_torch(prepare_model(source, tmp_path / "out").path)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def _safetensors_shards(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"m-1.safetensors": names[::2], "m-2.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: state[name] for name in chosen}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _torch_file(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _torch_shards(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    for file, chosen in {"a.bin": names[:5], "b.bin": names[5:]}.items():
        torch.save({name: state[name] for name in chosen}, folder / file)
    index = {"weight_map": {name: "a.bin" if name in names[:5] else "b.bin" for name in names}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("store", [_safetensors_shards, _torch_file, _torch_shards])
def test_weights_are_read_however_they_are_stored(
    store: Callable[[Path], None], tiny_llama: Path, tmp_path: Path
) -> None:
    source = copy(tiny_llama, tmp_path / "source")
    store(source)
    expected = prepare_model(copy(tiny_llama, tmp_path / "plain"), tmp_path / "a").model_id
    assert prepare_model(source, tmp_path / "b").model_id == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_become_float32(dtype: torch.dtype, tiny_llama: Path, tmp_path: Path) -> None:
    source = copy(tiny_llama, tmp_path / "source", dtype=str(dtype).removeprefix("torch."))
    state = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    out = prepare_model(source, tmp_path / "out")
    stored = load_file(out.path / "model.safetensors")
    assert all(torch.equal(stored[name], state[name].float()) for name in stored)
    assert {parameter.dtype for parameter in load_torch(out.path).parameters()} == {torch.float32}


def sentence_transformer(
    source: Path, folder: Path, *, mode: str = "mean_tokens", normalize: bool = True, **limits: Any
) -> Path:
    copy(source, folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] if normalize else [])
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, **limits}))
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# a card\nlicense: mit\n")
    settings = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(("mode", "pooling"), [("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "last")])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_sentence_transformers_folder(
    mode: str, pooling: str, normalize: bool, tiny_bert: Path, tmp_path: Path
) -> None:
    source = sentence_transformer(tiny_bert, tmp_path / "source", mode=mode, normalize=normalize)
    out = prepare_model(source, tmp_path / "out")
    assert (out.task, out.pooling, out.normalize, out.max_length) == ("feature-extraction", pooling, normalize, 48)
    assert (out.license, out.prompt_prefix) == ("Apache-2.0", "query: ")
    model = load_torch(out.path)
    assert isinstance(model, SentenceEncoder)
    ids, mask = batch(out.path)
    with torch.no_grad():
        hidden, found = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, model(ids, mask)
    for row in range(len(TEXTS)):
        length = int(mask[row].sum())
        tokens = hidden[row, :length]
        expected = {"mean": tokens.mean(0), "cls": tokens[0], "last": tokens[length - 1]}[pooling]
        expected = expected / expected.norm() if normalize else expected
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)
    assert open_model(prepare_model(out.path, tmp_path / "again").path).model_id == out.model_id


def test_lower_casing_outside_the_tokenizer_is_moved_into_it(tiny_bert: Path, tmp_path: Path) -> None:
    source = sentence_transformer(tiny_bert, tmp_path / "source", do_lower_case=True)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    saved = load_tokenizer(prepare_model(source, tmp_path / "out").path)
    assert saved("The FILM")["input_ids"] == saved("the film")["input_ids"]


def test_truncation_and_padding_of_the_tokenizer_are_not_kept(tiny_bert: Path, tmp_path: Path) -> None:
    source = copy(tiny_bert, tmp_path / "source")
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(source / "tokenizer.json"))
    out = prepare_model(source, tmp_path / "out")
    assert len(Tokenizer.from_file(str(out.path / "tokenizer.json")).encode("the film was good").ids) == 6


def test_a_classifier_keeps_its_labels_in_the_order_of_its_logits(tiny_classifier: Path, tmp_path: Path) -> None:
    out = prepare_model(copy(tiny_classifier, tmp_path / "source"), tmp_path / "out")
    assert (out.task, out.labels, out.pooling) == ("text-classification", ("bad", "fair", "good"), None)
    ids, mask = batch(out.path)
    with torch.no_grad():
        torch.testing.assert_close(
            load_torch(out.path)(ids, mask).logits, load_torch(tiny_classifier)(ids, mask).logits
        )


def test_a_masked_language_model_becomes_a_mean_pooled_encoder(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    source = copy(tiny_bert, tmp_path / "source")
    model = BertForMaskedLM(BertConfig.from_pretrained(source)).eval()
    model.save_pretrained(source)
    out = prepare_model(source, tmp_path / "out")
    assert (out.task, out.pooling, out.normalize) == ("feature-extraction", "mean", False)
    ids, mask = batch(out.path)
    with torch.no_grad():
        expected = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:1, : mask[0].sum()].mean(1)
        torch.testing.assert_close(load_torch(out.path)(ids, mask)[:1], expected, rtol=0, atol=1e-6)


def test_chat_template_survives(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(prepare_model(tiny_llama, tmp_path / "out").path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "mamba"}, Unsupported, "unsupported architecture 'mamba'.*supported: bert, "),
        ({"model_type": None}, Unsupported, "unsupported architecture None"),
        ({"model_type": "evil", "auto_map": {"AutoModel": "evil.Model"}}, Unsupported, "own Python code.*never run"),
        ({"architectures": ["BertForQuestionAnswering"]}, Unsupported, "question-answering, which edgestill"),
        ({"quantization_config": {"bits": 4}}, Unsupported, "quantised"),
        ({"num_hidden_layers": 10**9}, BadInput, "says 1000000000 layers, the weights hold 4"),
        ({"num_hidden_layers": 10**12}, BadInput, "num_hidden_layers is 1000000000000"),
        ({"num_hidden_layers": 3}, BadInput, "says 3 layers, the weights hold 4"),
        ({"vocab_size": 10**9}, BadInput, r"embeddings are \[137, 32\], config.json says \[1000000000, 32\]"),
        ({"hidden_size": "32"}, BadInput, "hidden_size is '32'"),
        ({"intermediate_size": 10**8}, BadInput, r"describes \d{10,} parameters, the weights hold 40736"),
    ],
)
def test_a_source_that_cannot_be_used(
    config: dict[str, Any], error: type[Exception], message: str, tiny_bert: Path, tmp_path: Path
) -> None:
    source = copy(tiny_bert, tmp_path / "source", **config)
    with pytest.raises(error, match=message):
        prepare_model(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_unknown_task_and_task_of_another_family(tiny_bert: Path, tmp_path: Path) -> None:
    for task, message in (
        ("text-generation", "gemma3_text, gpt2, llama, qwen2, qwen3"),
        ("translation", "tasks: feature-extraction"),
    ):
        with pytest.raises(Unsupported, match=message):
            prepare_model(tiny_bert, tmp_path / "out", task=task)


class _Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch pwned",))


def test_a_pickle_is_never_executed(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = copy(tiny_bert, tmp_path / "source")
    (source / "model.safetensors").unlink()
    torch.save({"weight": _Evil()}, source / "pytorch_model.bin")
    with pytest.raises(BadInput, match="needs more than weights_only to load") as caught:
        prepare_model(source, tmp_path / "out")
    assert "safetensors" in caught.value.hint
    assert not (tmp_path / "pwned").exists()
    torch.save([torch.zeros(2)], source / "pytorch_model.bin")
    with pytest.raises(BadInput, match="is not a state dict"):
        prepare_model(source, tmp_path / "out")
    (source / "pytorch_model.bin").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(BadInput, match="truncated or not a torch file"):
        prepare_model(source, tmp_path / "out")


def test_truncated_missing_and_escaping_weights(tiny_bert: Path, tmp_path: Path) -> None:
    source = copy(tiny_bert, tmp_path / "source")
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, 8, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(BadInput, match=r"model\.safetensors (is truncated|has a damaged)"):
            prepare_model(source, tmp_path / "out")
    weights.write_bytes(whole + b"more")
    with pytest.raises(BadInput, match="truncated: header promises"):
        prepare_model(source, tmp_path / "out")
    weights.unlink()
    with pytest.raises(BadInput, match="holds no weights"):
        prepare_model(source, tmp_path / "out")
    for shard, message in (("../secret.safetensors", "shards lie beside"), ("gone.safetensors", "is missing")):
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(BadInput, match=message):
            prepare_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(value: float, tiny_bert: Path, tmp_path: Path) -> None:
    source = copy(tiny_bert, tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["encoder.layer.1.output.dense.bias"][3] = value
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"layer\.1\.output\.dense\.bias holds NaN or infinite"):
        prepare_model(source, tmp_path / "out")


def test_missing_weights_are_not_made_up(tiny_bert: Path, tmp_path: Path) -> None:
    source = copy(tiny_bert, tmp_path / "source")
    state = load_file(source / "model.safetensors")
    renamed = {name.replace("1.output.dense.bias", "1.output.dance.bias"): tensor for name, tensor in state.items()}
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"weights are missing: encoder\.layer\.1\.output\.dense\.bias"):
        prepare_model(source, tmp_path / "out")
    del state["encoder.layer.1.output.dense.bias"]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"describes 40736 parameters, the weights hold 40704"):
        prepare_model(source, tmp_path / "out")


def test_other_pooling_and_modules_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    source = sentence_transformer(tiny_bert, tmp_path / "a", mode="max_tokens")
    with pytest.raises(Unsupported, match="pooling pooling_mode_max_tokens"):
        prepare_model(source, tmp_path / "out")
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (source / "modules.json").write_text(json.dumps([*modules, {"path": "2_Dense", "type": "x.Dense"}]))
    with pytest.raises(Unsupported, match="Transformer, Pooling, Dense"):
        prepare_model(source, tmp_path / "out")
    (source / "modules.json").write_text(json.dumps([{**modules[0], "path": "../../etc"}, modules[1]]))
    with pytest.raises(BadInput, match="unsafe path"):
        prepare_model(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("edgestill.json", {"schema_version": 2}, "schema_version must be 1"),
        ("edgestill.json", {"schema_version": 1, "task": "feature-extraction"}, "pooling None does not fit"),
        ("edgestill.json", {"schema_version": 1, "task": "feature-extraction", "pooling": "mean", "max_length": 65},
         "max_length is 65, the model has 64 positions"),
        ("edgestill.json", {"schema_version": 1, "task": "sing"}, "task 'sing' is not supported"),
        ("config.json", [], "is not an object"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("edgestill.json", None, "has no edgestill.json"),
        ("model.safetensors", None, "does not exist"),
    ],
)  # fmt: skip
def test_open_model_refuses(file: str, content: Any, message: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(json.dumps(content))
    with pytest.raises((BadInput, Unsupported), match=message):
        open_model(folder)


def test_a_damaged_tokenizer_is_one_line(tiny_bert: Path, tmp_path: Path) -> None:
    for content in ("{", "{}", '{"version": "1.0", "model": {"type": "None"}}'):
        folder = tmp_path / str(len(content))
        shutil.copytree(tiny_bert, folder)
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(BadInput, match="the tokenizer does not load") as caught:
            load_tokenizer(folder)
        assert "\n" not in caught.value.message


def test_describing_a_folder_needs_no_torch(tiny_bert: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgestill.checkpoints import open_model;"
        f"print(open_model(Path({str(tiny_bert)!r})).model_id);"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [open_model(tiny_bert).model_id, "False", "False"]


def test_loading_says_nothing_and_uses_no_network(tiny_llama: Path, tmp_path: Path) -> None:
    code = f"""
import socket
def refuse(*arguments, **options): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from pathlib import Path
from edgestill.checkpoints import load_tokenizer, load_torch, prepare_model
folder = prepare_model(Path({str(tiny_llama)!r}), Path({str(tmp_path / "out")!r})).path
load_torch(folder), load_tokenizer(folder)
"""
    run = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    own = [line for line in run.stderr.splitlines() if "site-packages" not in line and not line.startswith("  ")]
    assert (run.stdout, own) == ("", [])


def test_exported_names_exist() -> None:
    assert all(hasattr(checkpoints, name) for name in checkpoints.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = checkpoints.nothing
