"""What a Core ML program is run on while it is converted: a little calibration text, as its inputs want it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bench.reference import encode_texts
from ..runtimes.coreml_session import causal_mask

if TYPE_CHECKING:
    from .source import Source

__all__ = ["BUILT_IN", "Feeds", "feeds_of"]

BUILT_IN = (
    "The river had been rising for three days when the ferryman tied his boat to the old oak and walked home.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / max(1, len(values))  # 0.0 for none\n",
    "Q: What is 17 times 24?\nA: 17 * 24 = 408. Then 408 - 399 = 9, and 9 / 3 = 3.\n\n* first\n* second: 1,234.56 €",
    "Où est la gare ? Wo ist der Bahnhof? 駅はどこですか。 Где вокзал? أين المحطة؟ 🚉 — “thank you”, she said…",
)
"""Prose, code, figures and other scripts: what an export without calibration text is measured on."""

_TEXTS, _TOKENS = 4, 64
_LONGEST = 512


@dataclass(frozen=True)
class Feeds:
    """Inputs by name, one sequence each: ``rows`` of up to 64 tokens, and (encoders, whose pooling sums over tokens)
    one as long as the model takes, up to 512. ``source`` says which text it is."""

    rows: tuple[Mapping[str, Any], ...]
    longest: tuple[Mapping[str, Any], ...]
    source: str


def feeds_of(source: Source, texts: Sequence[str], lengths: Sequence[int], *, fixed: bool = False) -> Feeds:
    """Inputs from the first ``texts`` that say something, else from :data:`BUILT_IN`.

    ``lengths``: what the program takes, rising, the last the most; ``fixed`` ones are filled up with padding.
    """
    given = [text for text in texts if text.strip()]
    chosen = given[:_TEXTS] or list(BUILT_IN)
    said = f"{len(chosen)} calibration texts" if given else "built-in lines"
    folder, tokenizer = source.folder, source.tokenizer
    prefix = folder.prompt_prefix or ""
    most = lengths[-1]
    generates = folder.task == "text-generation"
    short = encode_texts(tokenizer, chosen, max_length=min(_TOKENS, most), prefix=prefix)
    rows = [row[: int(mask.sum())] for row, mask in zip(short.ids, short.mask, strict=True)]
    long: list[Any] = []
    if not generates and most > _TOKENS:
        joined = encode_texts(tokenizer, [" ".join(chosen)], max_length=min(_LONGEST, most), prefix=prefix)
        content = joined.ids[0][: int(joined.mask[0].sum())]
        long = [np.resize(content, min(_LONGEST, most))]

    def feed(ids: Any) -> Mapping[str, Any]:
        ids = np.asarray(ids, np.int32)[None]
        if generates:
            return {"input_ids": ids, "causal_mask": causal_mask(ids.shape[1], ids.shape[1])}
        size = next(length for length in lengths if length >= ids.shape[1]) if fixed else ids.shape[1]
        padding = ((0, 0), (0, size - ids.shape[1]))
        return {"input_ids": np.pad(ids, padding), "attention_mask": np.pad(np.ones_like(ids), padding)}

    return Feeds(tuple(feed(row) for row in rows), tuple(feed(row) for row in long), said)
