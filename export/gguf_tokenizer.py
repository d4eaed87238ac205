"""A Transformers tokenizer as the ``tokenizer.*`` keys of a GGUF file, proven by llama.cpp's own tokenizer.

llama.cpp has its pre-tokenizers built in, under names. Which one fits can't be read off a Transformers tokenizer for
certain, so the likely ones are tried: llama.cpp tokenises awkward texts, and the first that agrees with Transformers on
every one is taken. When none does, the model is refused: a wrong one degrades a model without an error. Only a script
that llama.cpp reads otherwise (its WordPiece drops the vowels of Korean and Hindi) is let through, and said.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, Unsupported
from ..model_tokenizer import load_tokenizer_lightly
from . import gguf_native
from .gguf_metadata import Metadata
from .gguf_write import write_gguf

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder

__all__ = ["Tokenizer", "tokenizer_metadata"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"

# One name for each different pre-tokenizer of llama.cpp, the common ones first.
_CANDIDATES = (
    "gpt-2", "llama-bpe", "qwen2", "smollm", "default", "gpt-4o", "tekken", "chatglm-bpe", "qwen35", "deepseek-v3",
    "deepseek-llm", "deepseek-coder", "falcon", "seed-coder", "bailingmoe", "superbpe", "bloom", "viking", "mpt",
)  # fmt: skip

# Where pre-tokenizers differ: case, digits, contractions, runs of blanks and newlines, scripts, symbols, code.
_CORPUS = (
    "Hello world", " Hello  world ", "hello\nworld\n\n\nagain", "tabs\t\tand  spaces   end   ",
    "I'm you're he'LL they'Ve", "don't 'quote' \"double\" o'clock 'S", "ALLCAPS MixedCase snake_case kebab-case",
    "3 33 333 3333 33333 333333 3333333", "v1.2.3-rc4, 10,000.50 EUR; 1e-5", "H2O CO2 x² ½ №5",
    "f(x) = {'a': [1, 2]};  // done!!", "for i in range(10):\n    print(i)\n\n\treturn None\n",
    "!!! ??? ... ---- ____ ==== ~~~", "e-mail: a.b@c.org <tag> </tag> #5 $9 50% a&b",
    "Grüße aus Köln, señor façade naïve", "🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙", "“quoted” – dashes — ‘single’…",
    "x\r\ny\r\n", "a" * 40 + " " + "ab" * 20,
)  # fmt: skip


_SCRIPTS = {
    "Arabic": "مرحبا بالعالم", "Chinese": "中文文本，你好。", "Cyrillic": "Привет, мир", "Greek": "Ελληνικά κείμενα",
    "Hebrew": "שלום עולם", "Hindi": "हिन्दी भाषा", "Japanese": "日本語のテキスト", "Korean": "한국어 문장",
    "Thai": "ภาษาไทย", "Vietnamese": "tiếng Việt",
}  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """The ``tokenizer.*`` keys, and the scripts that llama.cpp's tokenizer reads otherwise than Transformers'."""

    metadata: Metadata
    differing_scripts: tuple[str, ...]


def tokenizer_metadata(model: ModelFolder, described: Metadata, scratch: Path) -> Tokenizer:
    """The tokenizer of a model folder for llama.cpp; ``described`` are the file's other keys, ``scratch`` is a folder
    to write in.

    Raises :class:`Unsupported` when llama.cpp has no tokenizer that gives the same ids, :class:`BadInput` when
    tokenizer and config contradict each other.
    """
    tokenizer = load_tokenizer_lightly(model.path)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = _tokens(tokenizer, model)
    kind = _kind(spec)
    keys = {"bpe": _bpe, "wordpiece": _wordpiece, "sentencepiece": _sentencepiece, "unigram": _unigram}[kind](
        tokenizer, spec, tokens, model
    )
    found: Metadata = {**keys, **_special(tokenizer), **_frame(tokenizer, kind)}
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = _chat_template(tokenizer.chat_template)
    texts = found["tokenizer.ggml.tokens"]
    if len(set(texts)) != len(texts):  # llama.cpp aborts on it
        twice = next(text for text in texts if texts.count(text) > 1)
        raise Unsupported(f"two tokens of the vocabulary are both {twice!r} in llama.cpp", hint="use onnx or coreml")
    candidates: list[str | None] = [None]
    if kind == "bpe":
        candidates = list(dict.fromkeys(_likely(spec, model.architecture)))
    found["tokenizer.ggml.pre"], scripts = _proven(tokenizer, candidates, {**described, **found}, scratch)
    return Tokenizer(found, scripts)


def _kind(spec: dict[str, Any]) -> str:
    model = spec["model"]
    if model["type"] == "BPE":
        return "sentencepiece" if model.get("byte_fallback") else "bpe"
    if model["type"] in ("WordPiece", "Unigram"):
        return str(model["type"]).lower()
    raise Unsupported(f"llama.cpp has no tokenizer of type {model['type']}", hint="export to onnx or coreml")


def _tokens(tokenizer: Any, model: ModelFolder) -> list[tuple[str, int]]:
    """Text and type of each id of the model; ids that the tokenizer never makes are filled up as unused."""
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= model.vocab_size:
        raise BadInput(
            f"{model.path}: the tokenizer has id {max(vocabulary.values())}, the model {model.vocab_size} tokens",
            hint="tokenizer and weights are not of the same model",
        )
    added = tokenizer.added_tokens_decoder
    found = [(f"[PAD{index}]", _UNUSED) for index in range(model.vocab_size)]
    for text, index in vocabulary.items():
        found[index] = (text, _NORMAL)
        if index in added:
            special = added[index].special or re.fullmatch(r"<\|.*\|>|<pad>|<mask>", text)
            found[index] = (text, _CONTROL) if special else (text.replace(_SPACE, " "), _USER_DEFINED)
    return found


def _lists(tokens: list[tuple[str, int]]) -> Metadata:
    texts, types = zip(*tokens, strict=True)
    return {"tokenizer.ggml.tokens": list(texts), "tokenizer.ggml.token_type": list(types)}


def _bpe(tokenizer: Any, spec: dict[str, Any], tokens: list[tuple[str, int]], model: ModelFolder) -> Metadata:
    merges = [item if isinstance(item, str) else " ".join(item) for item in spec["model"]["merges"]]
    found = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default", **_lists(tokens)}
    found["tokenizer.ggml.merges"] = merges
    if model.task != "text-generation":  # the bert graph counts token types, whatever the tokenizer
        found["tokenizer.ggml.token_type_count"] = model.config.get("type_vocab_size", 1)
    return found


def _wordpiece(tokenizer: Any, spec: dict[str, Any], tokens: list[tuple[str, int]], model: ModelFolder) -> Metadata:
    """llama.cpp marks the beginning of a word, not its continuation: ``##ing`` is ``ing``, ``run`` is ``▁run``."""
    prefix = spec["model"].get("continuing_subword_prefix", "##")
    marked = [
        (text if kind == _CONTROL else text.removeprefix(prefix) if text.startswith(prefix) else _SPACE + text, kind)
        for text, kind in tokens
    ]
    found = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.pre": "default", **_lists(marked)}
    found["tokenizer.ggml.token_type_count"] = model.config.get("type_vocab_size", 1)
    normalizer = _find(spec.get("normalizer"), "BertNormalizer") or {"lowercase": False, "strip_accents": None}
    found["tokenizer.ggml.normalizer.lowercase"] = bool(normalizer["lowercase"])
    if normalizer.get("strip_accents") is not None:
        found["tokenizer.ggml.normalizer.strip_accents"] = bool(normalizer["strip_accents"])
    return found


def _sentencepiece(tokenizer: Any, spec: dict[str, Any], tokens: list[tuple[str, int]], model: ModelFolder) -> Metadata:
    """BPE with byte fallback. llama.cpp merges by score, highest first; Transformers by the order of the merges."""
    unknown = spec["model"].get("unk_token")
    typed = [
        (text, _BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else _UNKNOWN if text == unknown else kind)
        for text, kind in tokens
    ]
    ranks: dict[str, int] = {}
    for rank, item in enumerate(spec["model"]["merges"]):
        ranks.setdefault("".join(item.split(" ") if isinstance(item, str) else item), rank)
    found = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", **_lists(typed)}
    found["tokenizer.ggml.scores"] = [-float(ranks.get(text, len(ranks))) for text, _ in typed]
    found["tokenizer.ggml.add_space_prefix"] = _adds_space(tokenizer)
    return found


def _unigram(tokenizer: Any, spec: dict[str, Any], tokens: list[tuple[str, int]], model: ModelFolder) -> Metadata:
    scores = dict(spec["model"]["vocab"])
    unknown = spec["model"]["vocab"][spec["model"].get("unk_id") or 0][0]
    typed = [(text, _UNKNOWN if text == unknown else kind) for text, kind in tokens]
    found = {"tokenizer.ggml.model": "t5", "tokenizer.ggml.pre": "default", **_lists(typed)}
    found["tokenizer.ggml.scores"] = [float(scores.get(text, -10000.0)) for text, _ in typed]
    found["tokenizer.ggml.token_type_count"] = model.config.get("type_vocab_size", 1)
    found["tokenizer.ggml.add_space_prefix"] = _adds_space(tokenizer)
    plain = tokenizer("a  a", add_special_tokens=False, verbose=False)["input_ids"]
    found["tokenizer.ggml.remove_extra_whitespaces"] = (
        plain == tokenizer("a a", add_special_tokens=False, verbose=False)["input_ids"]
    )
    precompiled = _find(spec.get("normalizer"), "Precompiled")
    if precompiled and precompiled.get("precompiled_charsmap"):
        found["tokenizer.ggml.precompiled_charsmap"] = base64.b64decode(precompiled["precompiled_charsmap"])
    return found


def _find(node: Any, kind: str) -> dict[str, Any] | None:
    """The part of type ``kind`` in a (sequence of) normalizer or pre-tokenizer."""
    if not isinstance(node, dict):
        return None
    if node.get("type") == kind:
        return node
    parts = node.get("normalizers") or node.get("pretokenizers") or []
    return next((found for part in parts if (found := _find(part, kind))), None)


def _adds_space(tokenizer: Any) -> bool:
    ids = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    return bool(ids) and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(_SPACE)


def _special(tokenizer: Any) -> Metadata:
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}  # sic
    ids = {
        f"tokenizer.ggml.{theirs}_token_id": getattr(tokenizer, f"{ours}_token_id") for ours, theirs in roles.items()
    }
    return {key: index for key, index in ids.items() if index is not None}


def _frame(tokenizer: Any, kind: str) -> Metadata:
    """The special tokens that Transformers puts around a text, as llama.cpp's flags say it."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), None)
    before, after = (framed[:at], framed[at + len(plain) :]) if at is not None else ([], [0, 0])
    if len(before) > 1 or len(after) > 1:
        raise Unsupported(
            "a tokenizer that puts several special tokens on one side of a text", hint="use onnx or coreml"
        )
    found: Metadata = {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}
    if before:
        found["tokenizer.ggml.bos_token_id"] = before[0]
    if after:
        found["tokenizer.ggml.eos_token_id"] = after[0]
    if not after and kind in ("bpe", "sentencepiece"):  # what llama.cpp assumes, and its converter leaves out
        del found["tokenizer.ggml.add_eos_token"]
    if kind == "wordpiece":  # else llama.cpp would add [SEP] of its own accord
        found["tokenizer.ggml.add_sep_token"] = False
    return found


def _chat_template(template: Any) -> str:
    return str(template if isinstance(template, str) else template["default"])


def _likely(spec: dict[str, Any], model_type: str) -> Iterator[str | None]:
    """Names of pre-tokenizers, the one that the tokenizer's own description suggests first."""
    pre = spec.get("pre_tokenizer")
    split = (_find(pre, "Split") or {}).get("pattern", {})
    pattern = str(split)
    if model_type == "roberta":
        yield "roberta-bpe"
    if (_find(pre, "Digits") or {}).get("individual_digits") or split == {"Regex": r"\p{N}"}:
        yield "smollm"
    if r"\p{N}{1,3}" in pattern:
        yield "llama-bpe"
    elif r"\p{N}" in pattern:
        yield "qwen2"
    yield from _CANDIDATES


def _proven(
    tokenizer: Any, candidates: list[str | None], metadata: Metadata, scratch: Path
) -> tuple[str, tuple[str, ...]]:
    """The candidate with which llama.cpp gives Transformers' ids on every text of the corpus, and the scripts on which
    it does not; the first without such a script, else the first."""
    path = scratch / ".vocabulary.gguf"
    write_gguf(path, metadata, [], lambda name: ())
    try:
        texts = [*_SCRIPTS.values(), *_CORPUS, *_around_special(tokenizer, metadata)]
        plain = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        framed = tokenizer(list(_CORPUS[:3]), verbose=False)["input_ids"]
        fitting: list[tuple[str, tuple[str, ...]]] = []
        difference = ""
        for group in filter(None, (candidates[:1], candidates[1:])):
            for name, answer in zip(group, gguf_native.tokenise(path, group, texts, _CORPUS[:3]), strict=True):
                if isinstance(answer, str):
                    difference = difference or answer
                    continue
                got, got_framed = answer
                wrong = _difference([*texts, *_CORPUS[:3]], [*plain, *framed], [*got, *got_framed])
                difference = difference or wrong or ""
                scripts = tuple(s for s, ours, theirs in zip(_SCRIPTS, plain, got, strict=False) if ours != theirs)
                if wrong is None:
                    fitting.append((name or "default", scripts))
            if any(not scripts for _, scripts in fitting):
                break
    finally:
        path.unlink()
    if not fitting:
        raise Unsupported(
            f"none of llama.cpp's tokenizers gives this model's token ids; {difference}",
            hint="export this model to onnx or coreml",
        )
    return min(fitting, key=lambda item: len(item[1]))


def _difference(texts: list[str], wanted: list[list[int]], got: list[list[int]]) -> str | None:
    """The first text outside :data:`_SCRIPTS` with other ids, as a phrase."""
    for text, ours, theirs in list(zip(texts, wanted, got, strict=True))[len(_SCRIPTS) :]:
        if ours != theirs:
            return f"{text!r} is {ours[:12]} in Transformers and {theirs[:12]} in llama.cpp"
    return None


def _around_special(tokenizer: Any, metadata: Metadata) -> list[str]:
    """Texts with special tokens inside, for a decoder: chat templates are made of them."""
    if metadata["tokenizer.ggml.model"] not in ("gpt2", "llama") or "tokenizer.chat_template" not in metadata:
        return []
    plain = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = [token.content for token in plain if not (token.lstrip or token.rstrip or token.single_word)][:6]
    return [f"a{name}\nb {name}" for name in names]
