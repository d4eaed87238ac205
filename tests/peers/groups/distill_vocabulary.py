"""What a vocabulary trimmed to its domain removes from SmolLM2, and what the model still says."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from edgestill.errors import EdgestillError

from ..context import Context
from ..processes import PROGRAMS, surroundings
from ..quality import held_out_data
from ..registry import Taken, figure
from ..workloads import write_spec

RECIPE = "vocabulary-reviews"
PEER = "the teacher with its whole vocabulary"
_TITLE = "SmolLM2 with 16,384 of 49,152 tokens: "


@figure(
    "vocab_trim", group="distill", title=f"{_TITLE}top-1 agreement on held-out text where both tokenisations coincide",
    unit="fraction", limit=0.99, sense="at_least", peer=PEER,
)  # fmt: skip
def vocab_trim(context: Context, variant: str) -> Taken:
    facts = _measured(context)
    coverage = facts["coverage"]
    how = (
        f"{facts['coinciding_positions']:,} places of {facts['texts_read']} held-out texts of the domain "
        f"({RECIPE}.toml) that both have read in the same tokens so far; where both end the same token, whatever was "
        f"read before: {facts['agreement_aligned']:.4f} of {facts['aligned_positions']:,}; "
        f"coverage: {coverage['kept']:.2%} of the tokens kept, {coverage['coinciding']:.2%} coincide, "
        f"{coverage['same_texts']:.1%} of the texts tokenised alike, {coverage['growth']:.4f} tokens for one"
    )
    return Taken(facts["agreement_coinciding"], how, void=_void(context))


@figure(
    "vocab_trim_teacher", group="distill", title=f"{_TITLE}share of the teacher's parameters removed", unit="fraction",
    limit=0.14, sense="at_least", peer=PEER,
)  # fmt: skip
def vocab_trim_teacher(context: Context, variant: str) -> Taken:
    return _removed(context, "removed_of_teacher", "the whole model")


@figure(
    "vocab_trim_student", group="distill", title=f"{_TITLE}share of the 15-layer student's parameters removed",
    unit="fraction", limit=0.23, sense="at_least", peer=PEER,
)  # fmt: skip
def vocab_trim_student(context: Context, variant: str) -> Taken:
    return _removed(context, "removed_of_student", "the student of half the layers")


def _removed(context: Context, key: str, what: str) -> Taken:
    facts = _measured(context)
    return Taken(facts[key], f"{what}, {facts['tokens']:,} of {facts['of']:,} tokens", void=_void(context))


def _measured(context: Context) -> dict[str, Any]:
    def take() -> dict[str, Any]:
        teacher, data = context.model("decoder"), held_out_data(context, RECIPE)
        spec = write_spec(
            context.scratch / "vocabulary.json", teacher=str(teacher.path), train=data.split("train"),
            held_out=data.split("test"), size=300 if context.tiny else 16_384, positions=50 if context.tiny else 4000,
            window=128, student_layers=teacher.layers // 2,
        )  # fmt: skip
        context.progress("trimming the vocabulary")
        done = subprocess.run(
            [sys.executable, "-P", PROGRAMS / "vocab_trim_ours.py", spec], capture_output=True, text=True,
            env=surroundings(context.threads), check=False,
        )  # fmt: skip
        if done.returncode:
            raise EdgestillError(f"vocab_trim_ours.py: {(done.stderr.strip().splitlines() or ['no word'])[-1][:300]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return context.once("vocabulary", take)


def _void(context: Context) -> str:
    return "a tiny model" if context.tiny else ""
