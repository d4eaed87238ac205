"""The tokenizer in a GGUF file's metadata -> a fast Transformers tokenizer.

Byte-level BPE (``tokenizer.ggml.model = "gpt2"``) with the pre-tokenizers of ``tokenizer.ggml.pre``, and SentencePiece
BPE (``"llama"``). The regular expressions are those of each model's own ``tokenizer.json``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import BadInput, Unsupported

if TYPE_CHECKING:
    from .gguf_import import GgufSource

__all__ = ["build_tokenizer"]

# Token kinds, from the GGUF specification (llama.cpp's llama_token_type).
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (_GPT2,),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
}


def build_tokenizer(source: GgufSource, max_length: int) -> Any:
    """A ``PreTrainedTokenizerFast`` with the special tokens, the bos policy and the chat template of the file.

    eos is the one that the metadata names, bos is put before a text only where ``add_bos_token`` says so, and pad is
    the file's or, when it names none, eos. Raises :class:`BadInput` and :class:`Unsupported`.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = source.get("tokenizer.ggml.tokens", list)
    kinds = source.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(set(tokens)) != len(tokens) or len(kinds) != len(tokens) or not all(isinstance(t, str) for t in tokens):
        raise BadInput(f"{source.path}: the vocabulary repeats tokens or has gaps", hint="fetch the file again")
    model = source.get("tokenizer.ggml.model", str)
    if model == "gpt2":
        backend = _byte_level(source, tokens)
    elif model == "llama":
        backend = _sentencepiece(source, tokens)
    else:
        raise Unsupported(f"{source.path}: tokenizer model {model!r}", hint="start from its Transformers folder")
    special = {name: _token(source, tokens, key) for name, key in _NAMES.items()}
    special["pad_token"] = special["pad_token"] or special["eos_token"]
    backend.add_special_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL]
    )
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED]
    )
    _add_bos(source, backend, special["bos_token"], default=model == "llama")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=max_length, clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )  # fmt: skip
    if template := source.metadata.get("tokenizer.chat_template"):
        tokenizer.chat_template = str(template)
    if len(tokenizer) != len(tokens):
        raise BadInput(f"{source.path}: {len(tokenizer)} tokens after rebuilding {len(tokens)}", hint="fetch it again")
    return tokenizer


_NAMES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def _token(source: GgufSource, tokens: list[str], key: str) -> str | None:
    index = source.metadata.get(key)
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise BadInput(f"{source.path}: {key} is {index!r}, of {len(tokens)} tokens", hint="the file is damaged")
    return tokens[index]


def _byte_level(source: GgufSource, tokens: list[str]) -> Tokenizer:
    pre = source.get("tokenizer.ggml.pre", str, "default")
    if pre not in _SPLITS:
        known = ", ".join(sorted(_SPLITS))
        raise Unsupported(
            f"{source.path}: pre-tokenizer {pre!r}", hint=f"known: {known}; or use its Transformers folder"
        )
    merges = [tuple(merge.split(" ")) for merge in source.get("tokenizer.ggml.merges", list)]
    if any(len(pair) != 2 for pair in merges):
        raise BadInput(f"{source.path}: a merge is not a pair of tokens", hint="the file is damaged")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = _bpe(source, vocabulary, merges, ignore_merges=pre == "llama-bpe")
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(source: GgufSource, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE merges the adjacent pair whose result scores best: the merge list in that order."""
    scores = source.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise BadInput(f"{source.path}: {len(scores)} scores for {len(tokens)} tokens", hint="the file is damaged")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for index, token in enumerate(tokens):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [(-scores[index], vocabulary[a], vocabulary[b], a, b) for a, b in found]
    merges.sort()
    unknown = _token(source, tokens, _NAMES["unk_token"])
    backend = _bpe(
        source, vocabulary, [(a, b) for *_, a, b in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    prefix = source.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _bpe(source: GgufSource, vocabulary: dict[str, int], merges: list[Any], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocabulary, merges, **options))
    except Exception as error:  # the tokenizers library raises a bare Exception for merges outside the vocabulary
        raise BadInput(
            f"{source.path}: vocabulary and merges do not fit: {error}", hint="the file is damaged"
        ) from None


def _add_bos(source: GgufSource, backend: Tokenizer, bos: str | None, *, default: bool) -> None:
    if not source.get("tokenizer.ggml.add_bos_token", bool, default):
        return
    if bos is None:
        raise BadInput(f"{source.path}: add_bos_token without a bos token", hint="the file is damaged")
    pair = [(bos, backend.token_to_id(bos))]
    backend.post_processor = processors.TemplateProcessing(f"{bos}:0 $A:0", f"{bos}:0 $A:0 {bos}:1 $B:1", pair)
