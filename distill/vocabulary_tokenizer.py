"""A tokenizer rewritten for a trimmed vocabulary: same normalisation, same splitting, fewer pieces, new ids."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import ModelFolder, load_tokenizer
from ..errors import RecipeError, Unsupported
from ..vocabularies import merge_pairs, tokenizer_spec
from .coverage import measure_coverage
from .vocabulary import Target, plan_vocabulary

if TYPE_CHECKING:
    from ..data import DataSets

__all__ = ["FittedVocabulary", "fit_vocabulary", "trim_spec", "trim_tokenizer"]

# What older formats keep beside tokenizer.json; it would say something else now.
_OTHER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "*.model")


@dataclass(frozen=True)
class FittedVocabulary:
    """The teacher's ids ``keep`` that a student has left (empty: all), its tokenizer, and what the card says of it."""

    keep: tuple[int, ...]
    tokenizer: Any
    facts: dict[str, Any] | None = None


def fit_vocabulary(teacher: ModelFolder, target: Target | None, data: DataSets) -> FittedVocabulary:
    """What ``[student] vocabulary = target`` keeps for the train and calibration text of ``data``.

    ``facts`` tell how much of the dev text that covers (:class:`edgestill.distill.coverage.Coverage`). Without a target
    everything is kept and nothing is counted. Raises :class:`RecipeError` without text, and what
    :func:`edgestill.distill.vocabulary.plan_vocabulary` and :func:`trim_tokenizer` raise.
    """
    tokenizer = load_tokenizer(teacher.path)
    if target is None:
        return FittedVocabulary((), tokenizer)
    texts = data.split("train") + data.split("calibration")
    if not texts:
        raise RecipeError(
            "[student] vocabulary is chosen by text, and there is none",
            hint="set `train` (not with streaming) or `calibration` in a [[data.text]]",
        )
    keep = plan_vocabulary(teacher, tokenizer, texts, target)
    trimmed = trim_tokenizer(tokenizer, keep)
    held_out = measure_coverage(tokenizer, trimmed, keep, data.split("dev"), prefix=teacher.prompt_prefix)
    facts = {"tokens": len(keep), "of": len(tokenizer), "held_out": held_out.facts() if held_out else None}
    return FittedVocabulary(keep, trimmed, facts)


def trim_tokenizer(tokenizer: Any, keep: Sequence[int]) -> Any:
    """The fast Transformers tokenizer with only the tokens ``keep`` (its ids, ascending), numbered from 0 on.

    Raises :class:`Unsupported` when the tokenizers library gives other ids than asked for (added tokens in the middle
    of a vocabulary that does not hold them).
    """
    from ..torch_models import quiet

    with tempfile.TemporaryDirectory(prefix="edgestill-") as scratch:
        folder = Path(scratch)
        with quiet():
            tokenizer.save_pretrained(folder)
        for pattern in _OTHER_FILES:
            for path in folder.glob(pattern):
                path.unlink()
        spec = trim_spec(tokenizer_spec(tokenizer), tokenizer.get_vocab(), keep)
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("added_tokens_decoder", None)  # tokenizer.json has them, with their new ids
        path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        trimmed = load_tokenizer(folder)
    if trimmed.convert_ids_to_tokens(list(range(len(keep)))) != tokenizer.convert_ids_to_tokens(list(keep)):
        raise Unsupported(
            "trimming a vocabulary whose added tokens stand neither in it nor behind it",
            hint="keep the vocabulary as it is",
        )
    return trimmed


def trim_spec(spec: Mapping[str, Any], vocabulary: Mapping[str, int], keep: Sequence[int]) -> dict[str, Any]:
    """``tokenizer.json`` with the tokens ``keep`` only; ``vocabulary`` gives the old id of each token."""
    numbers = {old: new for new, old in enumerate(keep)}
    ids = {token: numbers[old] for token, old in vocabulary.items() if old in numbers}
    model = {**spec["model"]}
    if model["type"] == "Unigram":
        if model.get("unk_id") is not None:
            model["unk_id"] = numbers[model["unk_id"]]
        model["vocab"] = [row for row in model["vocab"] if row[0] in ids]
    else:
        model["vocab"] = {token: ids[token] for token in model["vocab"] if token in ids}
    if model["type"] == "BPE":
        model["merges"] = [
            [first, second]
            for first, second in merge_pairs(spec)
            if first in ids and second in ids and first + second in ids
        ]
    added = [{**token, "id": ids[token["content"]]} for token in spec.get("added_tokens", ())]
    padding = spec.get("padding")
    if padding is not None:
        padding = {**padding, "pad_id": ids[padding["pad_token"]]}
    return {
        **spec,
        "model": model,
        "added_tokens": added,
        "padding": padding,
        "post_processor": _renumber(spec.get("post_processor"), ids),
    }


def _renumber(node: Any, ids: Mapping[str, int]) -> Any:
    """A post-processor (or a sequence of them) with the new ids of its special tokens."""
    if not isinstance(node, dict):
        return node
    if node["type"] == "Sequence":
        return {**node, "processors": [_renumber(part, ids) for part in node["processors"]]}
    if node["type"] == "TemplateProcessing":
        special = {
            name: {**row, "ids": [ids[token] for token in row["tokens"]]}
            for name, row in node["special_tokens"].items()
        }
        return {**node, "special_tokens": special}
    if node["type"] in ("BertProcessing", "RobertaProcessing"):
        return {**node, **{name: [node[name][0], ids[node[name][0]]] for name in ("sep", "cls")}}
    return node
