"""A vocabulary trimmed to a corpus: which tokens a student keeps, and its model without the others' rows.

SmolLM2-135M spends 28.3 of its 134.5 M parameters on 49,152 tokens; text of one domain needs a third. Kept are

* added tokens (control tokens, chat marks), the ids that the config names, and what the chat template writes;
* the alphabet: all bytes (byte-level BPE, byte fallback) and the mark of a space, else all single characters, so that
  any text stays representable;
* the most frequent tokens of the corpus, each with everything that it is made of.

BPE builds a token by merges, so a kept token needs its parts. A span that becomes one token is merged exactly as if it
stood alone (merges across its edges never happened, and within it the lowest rank always goes first): its parts are
those of the token alone, whatever stands around. With the merges among kept tokens, in their old order, **a text whose
tokens are all kept is tokenised as before**; a dropped token falls apart into smaller kept ones. The same holds for
WordPiece (the longest match is still there; it needs the single characters in the vocabulary) and for Unigram (the
best path is still there; the piece with the lowest score is kept, since the price of an unknown character depends
on it).

Kept ids stay in the teacher's order, so ``keep[student id]`` is the teacher's id. Both embeddings cut by the same
``keep``, the teacher reads the student's own tokens, and its distribution is the one conditional on kept tokens:
softmax over the kept logits is softmax over all of them, renormalised.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..checkpoints import ARCHITECTURES, ModelFolder
from ..errors import BadInput, RecipeError, Unsupported
from ..vocabularies import merge_pairs, tokenizer_kind, tokenizer_spec
from .anatomy import base_model

__all__ = [
    "MULTIPLE",
    "Target",
    "choose_vocabulary",
    "count_tokens",
    "plan_vocabulary",
    "token_parts",
    "trim_embeddings",
]

MULTIPLE = 64
"""Sizes are rounded up to it (with further tokens of the teacher, never with empty rows): kernels like whole blocks."""

Target = int | float | Literal["corpus"]
"""A number of tokens, a share of the teacher's (below 1), or all that occur in the corpus."""
Ints = npt.NDArray[np.int64]
_PART = 1024
_SPACE = "\u2581"


def count_tokens(tokenizer: Any, texts: Iterable[str]) -> Ints:
    """How often each id occurs in ``texts``, ``[largest id + 1]``; special tokens around a text are not counted."""
    counts = np.zeros(_size(tokenizer), dtype=np.int64)
    for part in _parts(texts):
        rows = tokenizer(part, add_special_tokens=False, padding=False, return_attention_mask=False, verbose=False)
        ids = np.fromiter((index for row in rows["input_ids"] for index in row), dtype=np.int64)
        counts += np.bincount(ids, minlength=len(counts))
    return counts


def plan_vocabulary(
    teacher: ModelFolder, tokenizer: Any, texts: Iterable[str], target: Target, *, multiple: int = MULTIPLE
) -> tuple[int, ...]:
    """The teacher's ids that a student for ``texts`` keeps, ascending; see :func:`choose_vocabulary`.

    Raises :class:`BadInput` when the tokenizer has ids that the model has no row for.
    """
    if _size(tokenizer) > teacher.vocab_size:
        raise BadInput(
            f"{teacher.path}: the tokenizer has id {_size(tokenizer) - 1}, the model {teacher.vocab_size} tokens",
            hint="tokenizer and weights are not of the same model",
        )
    known = set(tokenizer.get_vocab().values())
    named = {index for _, index in _named_ids(teacher.config) if index in known}
    counts = count_tokens(tokenizer, (teacher.prompt_prefix + text for text in texts))
    return choose_vocabulary(tokenizer, counts, target, also=named | set(_template_ids(tokenizer)), multiple=multiple)


def choose_vocabulary(
    tokenizer: Any, counts: Ints, target: Target, *, also: Iterable[int] = (), multiple: int = MULTIPLE
) -> tuple[int, ...]:
    """The ids to keep, ascending: ``target`` many, or that share of all, or all that ``counts`` has seen ("corpus").

    The number is rounded up to ``multiple`` (all tokens are the most). ``also``: further ids that must stay. What must
    stay and what occurs is filled up with unseen tokens, lowest id first, as the teacher's vocabulary is mostly ordered
    by frequency. Raises :class:`RecipeError` for a target below what must stay or above what there is, and
    :class:`Unsupported` for a tokenizer of another kind.
    """
    spec = tokenizer_spec(tokenizer)
    vocabulary = tokenizer.get_vocab()
    by_id = {index: token for token, index in vocabulary.items()}
    parts = token_parts(spec)

    def whole(index: int) -> set[int]:
        return {index, *(vocabulary[token] for token in parts(by_id[index]))}

    keep: set[int] = set()
    for index in {*(vocabulary[token] for token in _must_stay(spec)), *tokenizer.all_special_ids, *also}:
        keep |= whole(index)
    seen = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index] and int(index) in by_id]
    if target == "corpus":
        for index in seen:
            keep |= whole(index)
        size = _round_up(len(keep), multiple)
    else:
        wanted = target if isinstance(target, int) else math.ceil(target * len(vocabulary))
        if wanted > len(vocabulary):
            raise RecipeError(
                f"[student] vocabulary = {target}, but the teacher's tokenizer has {len(vocabulary)} tokens",
                hint="ask for fewer",
            )
        size = _round_up(wanted, multiple)
        if size < len(keep):
            raise RecipeError(
                f"[student] vocabulary = {target}, but {len(keep)} tokens must stay: special tokens, the alphabet, and "
                "what these are made of",
                hint=f"ask for {_round_up(len(keep), multiple)} or more",
            )
    size = min(size, len(vocabulary))
    for index in (*seen, *_rest(by_id, keep)):
        if len(keep) == size:
            break
        if index not in keep and len(keep | (added := whole(index))) <= size:
            keep |= added
    return tuple(sorted(keep))


def token_parts(spec: dict[str, Any]) -> Any:
    """For a ``tokenizer.json``: a function ``token -> tokens`` that BPE passes through while it builds the token.

    Empty for a token that no merges lead to (then only ``ignore_merges`` can give it), and for kinds that don't merge.
    Raises :class:`Unsupported` for a tokenizer that can't be trimmed.
    """
    kind = tokenizer_kind(spec)
    model = spec["model"]
    affix = model.get("end_of_word_suffix") or (model["type"] == "BPE" and model.get("continuing_subword_prefix"))
    if kind is None or affix:
        what = f"BPE that marks words by {affix!r}" if affix else f"type {model['type']}"
        raise Unsupported(
            f"trimming the vocabulary of a tokenizer of {what}",
            hint="known: BPE (byte-level, with byte fallback, or over characters), WordPiece and Unigram",
        )
    if model["type"] != "BPE":
        return lambda token: frozenset()
    vocabulary = model["vocab"]
    ranks = {pair: rank for rank, pair in enumerate(merge_pairs(spec))}
    never = len(ranks)

    def parts(token: str) -> frozenset[str]:
        symbols = list(token)
        found = set(symbols)
        if not found <= vocabulary.keys():
            return frozenset()
        while len(symbols) > 1:
            rank, at = min((ranks.get(pair, never), at) for at, pair in enumerate(itertools.pairwise(symbols)))
            if rank == never:
                return frozenset()
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            found.add(symbols[at])
        return frozenset(found)

    return parts


def trim_embeddings(model: nn.Module, keep: Sequence[int]) -> None:
    """Drop the rows of all tokens but ``keep`` from embeddings and head, in place; tied ones stay tied.

    Ids in the config (and in the generation config) become the student's. Raises :class:`Unsupported` where positions
    are counted from the padding id (RoBERTa) and that id would move.
    """
    base = base_model(model)
    words = base.get_input_embeddings()
    old = words.weight
    index = torch.as_tensor(keep, dtype=torch.long, device=old.device)
    new_ids = {int(theirs): ours for ours, theirs in enumerate(keep)}
    pad = new_ids.get(words.padding_idx) if words.padding_idx is not None else None
    if ARCHITECTURES[base.config.model_type].position_offset and pad != words.padding_idx:
        raise Unsupported(
            f"padding id {words.padding_idx} of {base.config.model_type} would become {pad}, and positions count from "
            "it",
            hint="keep the vocabulary as it is",
        )
    words.weight = nn.Parameter(old.detach()[index], requires_grad=old.requires_grad)
    words.num_embeddings, words.padding_idx = len(keep), pad
    inner: Any = model
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is not None:
        tied = head.weight is old
        rows = head.weight
        head.weight = words.weight if tied else nn.Parameter(rows.detach()[index], requires_grad=rows.requires_grad)
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias.detach()[index], requires_grad=head.bias.requires_grad)
        head.out_features = len(keep)
    named = [getattr(part, name, None) for part in (model, base) for name in ("config", "generation_config")]
    for config in {id(item): item for item in named if item is not None}.values():
        if hasattr(config, "vocab_size"):
            config.vocab_size = len(keep)
        for key in {key for key, _ in _named_ids(vars(config))}:
            value = getattr(config, key)
            kept = [new_ids[item] for item in (value if isinstance(value, list) else [value]) if item in new_ids]
            setattr(config, key, kept if isinstance(value, list) else next(iter(kept), None))


def _named_ids(config: Any) -> Iterator[tuple[str, int]]:
    """``(key, id)`` of each token that a config names; a key may name several."""
    for key, value in config.items():
        if key.endswith("_token_id"):
            yield from ((key, item) for item in (value if isinstance(value, list) else [value]) if type(item) is int)


def _must_stay(spec: dict[str, Any]) -> set[str]:
    model = spec["model"]
    vocabulary = dict.fromkeys(model["vocab"], 0.0) if isinstance(model["vocab"], dict) else dict(model["vocab"])
    stay = {token["content"] for token in spec.get("added_tokens", ())} | set(_framing(spec.get("post_processor")))
    unknown = model.get("unk_token") if model["type"] != "Unigram" else None
    if model["type"] == "Unigram":
        if model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        stay.add(min(vocabulary, key=lambda token: vocabulary[token]))
    if unknown is not None:
        stay.add(unknown)
    if model.get("byte_fallback"):
        # As bytes, the mark of a space would be read back as the mark.
        stay |= {_SPACE} & vocabulary.keys()
        return stay | {token for token in vocabulary if len(token) == 6 and token.startswith("<0x")}
    prefix = model.get("continuing_subword_prefix") or ""
    letters = {token for token in vocabulary if len(token) == 1}
    if prefix:
        letters |= {token for token in vocabulary if token.startswith(prefix) and len(token) == len(prefix) + 1}
    return stay | letters


def _framing(node: Any) -> Iterator[str]:
    """The tokens that a post-processor puts around a text."""
    if isinstance(node, dict):
        for part in node.get("processors", ()):
            yield from _framing(part)
        for row in node.get("special_tokens", {}).values():
            yield from row["tokens"]
        yield from (node[name][0] for name in ("sep", "cls") if name in node)


def _template_ids(tokenizer: Any) -> list[int]:
    """What the chat template writes by itself around a short talk: names of roles, a system prompt."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        return []
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError:  # it wants another kind of talk; then its words must come from the corpus
        return []
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _rest(by_id: dict[int, str], keep: set[int]) -> Iterator[int]:
    """Ids to fill up with, twice: a token whose parts did not fit at first may fit when only one place is left."""
    for _ in range(2):
        yield from sorted(by_id.keys() - keep)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _size(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for text in texts:
        part.append(text)
        if len(part) == _PART:
            yield part
            part = []
    if part:
        yield part
