"""What the figures about training steps are taken on: SmolLM2's shapes with random weights, and rows of random tokens.

The time of a step depends on shapes and not on what the weights say, so nothing is downloaded. Each token is a word of
the tokenizer, so that ours, which reads text, and peers, which are given ids, see the same rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgestill.data import DataSets, TextSet
from edgestill.distill import distill
from edgestill.recipe import StudentConfig

from .context import Context

__all__ = ["Workload", "row_ids", "row_text", "workload", "write_spec"]


@dataclass(frozen=True)
class Workload:
    """Folders of a teacher and of the student cut from it; rows of ``length`` tokens, ``batch_size`` a step."""

    teacher: Path
    student: Path
    student_layers: int
    vocab_size: int
    batch_size: int
    length: int
    what: str


def workload(context: Context) -> Workload:
    """30 -> 15 layers of width 576 over 49,152 tokens, 4 rows of 128 tokens a step; a tiny one with ``--tiny``."""
    return context.once("workload", lambda: _make(context))


def row_ids(work: Workload, rows: int, seed: int = 0) -> list[list[int]]:
    """Token ids of ``rows`` full rows."""
    chooser = np.random.default_rng(seed)
    found: list[list[int]] = chooser.integers(_SPECIAL, work.vocab_size, (rows, work.length)).tolist()
    return found


def row_text(ids: list[int]) -> str:
    """The text whose token ids these are."""
    return " ".join(f"w{number}" for number in ids)


_SPECIAL = 2  # ids 0 and 1: padding and unknown


def _make(context: Context) -> Workload:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..conftest import _describe

    if context.tiny:
        layers, width, heads, inner, vocab_size, batch_size, length = 4, 64, 4, 128, 512, 2, 16
    else:
        layers, width, heads, inner, vocab_size, batch_size, length = 30, 576, 9, 1536, 49_152, 4, 128
    context.progress("making teacher and student")
    teacher, student = context.scratch / "workload-teacher", context.scratch / "workload-student"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 3 or 1, intermediate_size=inner, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.04,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(teacher)
    _words(teacher, vocab_size)
    _describe(teacher, task="text-generation", max_length=length)
    kept = StudentConfig(layers=layers // 2)
    distill(
        teacher, student, student=kept, config=None, data=_no_data(), max_length=length, work=context.scratch / "cut"
    )  # fmt: skip
    what = (
        f"{layers} -> {layers // 2} layers, width {width}, {vocab_size:,} tokens of vocabulary, random weights, fp32, "
        f"{batch_size} rows of {length} tokens a step"
    )
    return Workload(teacher, student, layers // 2, vocab_size, batch_size, length, what)


def _words(folder: Path, vocab_size: int) -> None:
    """A tokenizer whose token N is the word ``wN``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 1} | {f"w{number}": number for number in range(_SPECIAL, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<pad>", eos_token="<pad>",
        model_max_length=2048,
    ).save_pretrained(folder)  # fmt: skip


def _no_data() -> DataSets:
    return DataSets((TextSet("none", (), (), (), (), "0" * 64),), ())


def write_spec(path: Path, **facts: object) -> Path:
    """What a program is told, as a JSON file."""
    path.write_text(json.dumps(facts))
    return path
