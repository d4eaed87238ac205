"""Which tokens stay, and that what stays means the same."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from edgestill.bench.sample_text import SAMPLE_TEXT
from edgestill.checkpoints import load_tokenizer, load_torch, open_model
from edgestill.distill.vocabulary import (
    choose_vocabulary,
    count_tokens,
    plan_vocabulary,
    token_parts,
    trim_embeddings,
)
from edgestill.distill.vocabulary_tokenizer import trim_spec, trim_tokenizer
from edgestill.errors import BadInput, RecipeError, Unsupported
from edgestill.vocabularies import tokenizer_spec

AWKWARD = (
    "Hello   world", "x\r\ny\r\n", "señor naïve Grüße", "🚀 (normal) 😶\u200d🌫️ 🦙🦙", "中文文本，你好。",
    "I'm he'LL 1234", " leading", "trailing ", "", "\t\n", "<|im_start|>user\nhi<|im_end|>", "the film was good",
)  # fmt: skip
KINDS = ("byte-level", "whole words", "sentencepiece", "unigram", "wordpiece", "characters")


def _corpus() -> list[str]:
    return [*SAMPLE_TEXT, "naïve señor Grüße aus Köln 🚀 🦙", "中文文本 你好", "I'm he'LL 1234 x\r\ny"]


def _make(kind: str) -> Any:
    """A fast tokenizer of about 700 tokens, trained on a page of text."""
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    quiet = {"special_tokens": special, "show_progress": False}
    if kind in ("byte-level", "whole words"):
        backend = Tokenizer(models.BPE(ignore_merges=kind == "whole words"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, **quiet)
    elif kind == "sentencepiece":
        special = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False, max_token_length=12)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=700, unk_token="<unk>", **quiet)
    elif kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=700, **quiet)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(vocab_size=700, **quiet)
    backend.train_from_iterator(_corpus(), trainer)
    if kind == "sentencepiece":  # bytes are no control tokens: they must not be matched in the text
        spec = json.loads(backend.to_str())
        spec["added_tokens"] = [row for row in spec["added_tokens"] if not row["content"].startswith("<0x")]
        backend = Tokenizer.from_str(json.dumps(spec))
    frame = [(name, backend.token_to_id(name)) for name in special[1:3]]
    backend.post_processor = processors.TemplateProcessing("<|im_start|> $A <|im_end|>", None, frame)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return _make(request.param)


def _half() -> list[str]:
    return list(SAMPLE_TEXT)[: len(SAMPLE_TEXT) // 3]


def _trim(tokenizer: Any, texts: list[str], target: Any, multiple: int = 1) -> tuple[tuple[int, ...], Any]:
    keep = choose_vocabulary(tokenizer, count_tokens(tokenizer, texts), target, multiple=multiple)
    return keep, trim_tokenizer(tokenizer, keep)


def _probes() -> list[str]:
    chooser = random.Random(0)
    words = " ".join(_corpus()).split()
    mixed = [" ".join(chooser.choices(words, k=chooser.randint(1, 6))) for _ in range(300)]
    letters = ["".join(chooser.choices("etaoin shrdlu,.", k=chooser.randint(1, 20))) for _ in range(300)]
    return [*AWKWARD, *mixed, *letters]


def _smallest(tokenizer: Any) -> int:
    """What must stay, as the error says it."""
    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    with pytest.raises(RecipeError, match="must stay") as caught:
        choose_vocabulary(tokenizer, counts, 1, multiple=1)
    return int(caught.value.hint.split()[2])


def test_text_of_kept_tokens_is_tokenised_as_before_and_all_text_by_kept_tokens(tokenizer: Any):
    """The claim of the module, on 600 random texts: two sizes, and the corpus' own."""
    smallest, total = _smallest(tokenizer), len(tokenizer)
    agreed = 0
    for target in ("corpus", smallest, (2 * smallest + total) // 3, total - 1):
        keep, trimmed = _trim(tokenizer, _half(), target)
        known = np.asarray(keep)
        alike = other = 0
        for text in _probes():
            before, after = tokenizer(text)["input_ids"], trimmed(text)["input_ids"]
            mapped = known[after].tolist()
            if set(before) <= set(keep):
                alike += 1
                assert mapped == before, text
            else:
                other += 1
                assert mapped != before
            assert tokenizer.decode(mapped) == trimmed.decode(after)
            plain, same = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (mapped, before))
            if tokenizer.backend_tokenizer.decoder is None:  # pieces are joined by spaces then
                plain, same = plain.replace(" ", ""), same.replace(" ", "")
            assert plain == same
        agreed += alike
        assert other > 10 or target in ("corpus", total - 1)
    assert agreed > 100


def test_the_corpus_itself_is_tokenised_as_before(tokenizer: Any):
    keep, trimmed = _trim(tokenizer, _half(), "corpus")
    assert len(keep) < len(tokenizer)
    for text in _half():
        assert [keep[index] for index in trimmed(text)["input_ids"]] == tokenizer(text)["input_ids"]


def test_special_tokens_frame_and_padding_have_their_new_ids(tokenizer: Any):
    keep, trimmed = _trim(tokenizer, _half(), "corpus")
    for name in ("unk", "eos", "pad"):
        theirs, ours = (getattr(side, f"{name}_token_id") for side in (tokenizer, trimmed))
        assert keep[ours] == theirs
    framed = trimmed("the")["input_ids"]
    assert trimmed.convert_ids_to_tokens([framed[0], framed[-1]]) == ["<|im_start|>", "<|im_end|>"]
    assert sorted(trimmed.added_tokens_decoder) == [keep.index(i) for i in sorted(tokenizer.added_tokens_decoder)]
    assert len(trimmed) == len(keep)
    assert list(keep) == sorted(set(keep))


def test_a_trimmed_tokenizer_is_saved_and_read_again(tokenizer: Any, tmp_path: Path):
    _, trimmed = _trim(tokenizer, _half(), "corpus")
    trimmed.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == trimmed.get_vocab()
    assert [again(text)["input_ids"] for text in AWKWARD] == [trimmed(text)["input_ids"] for text in AWKWARD]


def test_keeping_everything_changes_nothing(tokenizer: Any):
    keep, trimmed = _trim(tokenizer, _half(), len(tokenizer))
    assert keep == tuple(range(len(tokenizer)))
    assert tokenizer_spec(trimmed)["model"] == tokenizer_spec(tokenizer)["model"]


def test_the_most_frequent_stay_and_the_number_is_that_asked_for():
    tokenizer = _make("byte-level")
    counts = count_tokens(tokenizer, _half())
    keep = choose_vocabulary(tokenizer, counts, 400, multiple=64)
    assert len(keep) == 448
    assert len(choose_vocabulary(tokenizer, counts, 0.5, multiple=1)) == -(-len(tokenizer) // 2)
    assert len(choose_vocabulary(tokenizer, counts, "corpus")) % 64 == 0
    dropped = set(range(len(tokenizer))) - set(keep)
    parts = token_parts(tokenizer_spec(tokenizer))
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    vocabulary = tokenizer.get_vocab()
    whole = {index: {index, *(vocabulary[part] for part in parts(by_id[index]))} for index in range(len(by_id))}
    assert all(whole[index] <= set(keep) for index in keep)  # every kept token can be formed
    # A dropped token is rarer than any that stands for itself alone: one that no other kept token needs.
    needed = set().union(*(whole[index] - {index} for index in keep)) | set(keep[:259])
    rarest = min(int(counts[index]) for index in keep if index not in needed)
    assert max(int(counts[index]) for index in dropped) <= rarest + 1


def test_counts_are_those_of_a_loop(tokenizer: Any):
    counts = count_tokens(tokenizer, iter(_half()))
    expected: dict[int, int] = {}
    for text in _half():
        for index in tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids:
            expected[index] = expected.get(index, 0) + 1
    assert {index: int(count) for index, count in enumerate(counts) if count} == expected


def test_parts_are_what_bpe_passes_through():
    """Against the definition: apply each merge in order, wherever it fits, and note what appears."""
    tokenizer = _make("byte-level")
    spec = tokenizer_spec(tokenizer)
    parts = token_parts(spec)
    for token in itertools.islice(spec["model"]["vocab"], 300, 500):
        symbols, seen = list(token), set(token)
        for first, second in (tuple(pair) for pair in spec["model"]["merges"]):
            at = 0
            while at < len(symbols) - 1:
                if (symbols[at], symbols[at + 1]) == (first, second):
                    symbols[at : at + 2] = [first + second]
                    seen.add(first + second)
                at += 1
        assert symbols == [token]
        assert parts(token) == seen


def test_other_kinds_are_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(Unsupported, match="WordLevel") as caught:
        choose_vocabulary(tokenizer, np.array([1, 1]), "corpus")
    assert "WordPiece" in caught.value.hint
    marked = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(Unsupported, match="</w>"):
        choose_vocabulary(PreTrainedTokenizerFast(tokenizer_object=marked), np.array([1, 1]), "corpus")


def test_impossible_sizes_say_what_is_possible():
    tokenizer = _make("wordpiece")
    counts = count_tokens(tokenizer, _half())
    with pytest.raises(RecipeError, match=f"has {len(tokenizer)} tokens"):
        choose_vocabulary(tokenizer, counts, len(tokenizer) + 1)
    least = _smallest(tokenizer)
    assert len(choose_vocabulary(tokenizer, counts, least, multiple=1)) == least
    with pytest.raises(RecipeError, match="must stay"):
        choose_vocabulary(tokenizer, counts, least - 1, multiple=1)


def test_older_formats_are_rewritten_too():
    vocabulary = {"[CLS]": 0, "a": 1, "b": 2, "[SEP]": 3}
    spec = {
        "added_tokens": [{"id": 0, "content": "[CLS]"}, {"id": 3, "content": "[SEP]"}],
        "padding": {"pad_token": "[SEP]", "pad_id": 3},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 0]}, {"type": "ByteLevel"}]},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b", "a a"]},
    }  # fmt: skip
    found = trim_spec(spec, vocabulary, (0, 1, 3))
    assert found["post_processor"]["processors"][0] == {"type": "BertProcessing", "sep": ["[SEP]", 2],
                                                        "cls": ["[CLS]", 0]}  # fmt: skip
    assert found["padding"]["pad_id"] == 2
    assert found["model"] == {"type": "BPE", "vocab": {"[CLS]": 0, "a": 1, "[SEP]": 2}, "merges": []}
    assert [row["id"] for row in found["added_tokens"]] == [0, 2]


# ---- models -----------------------------------------------------------------------------------------------------


def test_rows_of_a_model_are_those_of_its_kept_tokens(model: Any):
    """Every family, tied or not: logits of the kept tokens are unchanged, and so are vectors."""
    keep = (0, 1, 2, 3, 5, 8, 13, 21, 34, 39)
    ids = torch.tensor([[2, 3, 5, 9, 7, 4]])
    with torch.no_grad():
        before = model(input_ids=torch.tensor(keep)[ids])[0]
        trim_embeddings(model, keep)
        after = model(input_ids=ids)[0]
    if before.shape[-1] == 40:
        before = before[..., list(keep)]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert model.config.vocab_size == len(keep)
    assert model.get_input_embeddings().weight.shape[0] == len(keep)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_stays_tied(build: Any, family: str, tied: bool):
    decoder = build(family)
    if not tied:
        decoder.config.tie_word_embeddings = False
        decoder.lm_head.weight = torch.nn.Parameter(torch.randn_like(decoder.lm_head.weight))
    trim_embeddings(decoder, range(0, 40, 3))
    words, head = decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight
    assert (words.data_ptr() == head.data_ptr()) == tied
    assert (words is head) == tied
    assert head.shape == (14, 32)
    assert words.requires_grad


def test_ids_in_configs_become_the_students(build: Any):
    decoder = build("llama")
    decoder.config.bos_token_id, decoder.config.eos_token_id, decoder.config.pad_token_id = 4, [6, 5, 38], 38
    decoder.generation_config.eos_token_id = [38]
    trim_embeddings(decoder, (0, 4, 6, 38))
    assert (decoder.config.bos_token_id, decoder.config.eos_token_id, decoder.config.pad_token_id) == (1, [2, 3], 3)
    assert decoder.generation_config.eos_token_id == [3]


def test_a_padding_id_that_positions_count_from_stays(build: Any):
    roberta = build("roberta")
    with pytest.raises(Unsupported, match="padding id 1"):
        trim_embeddings(roberta, (1, 2, 3))
    trim_embeddings(roberta, (0, 1, 3))
    assert roberta.get_input_embeddings().padding_idx == 1


def test_a_tokenizer_larger_than_its_model_is_refused(tiny_llama: Path):
    with pytest.raises(BadInput, match="the tokenizer has id"):
        plan_vocabulary(open_model(tiny_llama), _make("byte-level"), ["a"], "corpus")


def test_the_template_and_the_configs_tokens_stay(tiny_llama: Path):
    """'<|im_end|>' (eos, pad) and the roles that the template writes, though the text has none of them."""
    folder, tokenizer = open_model(tiny_llama), load_tokenizer(tiny_llama)
    keep = plan_vocabulary(folder, tokenizer, ["zz"], "corpus", multiple=1)
    role = tokenizer("user\n", add_special_tokens=False)["input_ids"]
    assert {0, 1, 2, *role} <= set(keep)
    assert len(keep) < len(tokenizer)
    model = load_torch(tiny_llama)
    trim_embeddings(model, keep)
    assert model.config.eos_token_id == keep.index(2)
