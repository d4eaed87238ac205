"""Students made from their teacher: a plan of what is kept, and the model that it gives.

A reduced copy of the teacher beats a foreign small model (sentence-transformers, DistilBERT). Keeping everything gives
the teacher's outputs exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..checkpoints import ModelFolder, load_torch
from ..files import hash_json
from .anatomy import Part, Widths, base_model, blocks, count_parameters, teacher_widths
from .depth import choose_layers, cut_layers, spread
from .heads import cut_heads
from .hooks import BlockOutputs
from .layer_maps import map_layers
from .vocabulary import trim_embeddings
from .width import cut_ffn

__all__ = [
    "BlockOutputs",
    "StudentPlan",
    "base_model",
    "blocks",
    "choose_layers",
    "cut_layers",
    "make_student",
    "map_layers",
    "spread",
]


@dataclass(frozen=True)
class StudentPlan:
    """Everything that decides a student's weights before training, as plain numbers: equal plans, equal students.

    ``keep``: the teacher's layers, ascending. ``ffn`` neurons a layer, ``heads`` query heads over ``kv_heads`` groups,
    ``vocab_size`` token ids. ``neurons``, ``queries``, ``groups``: for each kept layer the teacher's neurons, query
    heads and key-value heads that stay, ascending; empty where all do. ``vocabulary``: the teacher's token ids that
    stay, ascending (see :mod:`edgestill.distill.vocabulary`); empty for all. ``parameters`` is what comes out.
    """

    keep: tuple[int, ...]
    ffn: int
    heads: int
    kv_heads: int
    vocab_size: int
    parameters: int
    neurons: tuple[tuple[int, ...], ...] = ()
    queries: tuple[tuple[int, ...], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    vocabulary: tuple[int, ...] = ()

    @classmethod
    def of_layers(
        cls, folder: ModelFolder, keep: Sequence[int] | None = None, vocabulary: Sequence[int] = ()
    ) -> StudentPlan:
        """The plan that keeps the layers ``keep`` (default: all) and everything in them, and the tokens
        ``vocabulary``."""
        chosen = tuple(range(folder.layers) if keep is None else keep)
        widths = teacher_widths(folder)
        if vocabulary:
            widths = dataclasses.replace(widths, vocab_size=len(vocabulary))
        return cls(
            chosen, widths.ffn, widths.heads, widths.kv_heads, widths.vocab_size,
            sum(count_parameters(folder, chosen, widths).values()), vocabulary=tuple(vocabulary),
        )  # fmt: skip

    @property
    def widths(self) -> Widths:
        """The sizes alone."""
        return Widths(self.ffn, self.heads, self.kv_heads, self.vocab_size)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights as the student's folder stores them, in fp32."""
        return 4 * self.parameters

    def groups_of(self, folder: ModelFolder) -> dict[Part, int]:
        """Parameters by group, see :func:`edgestill.distill.anatomy.count_parameters`."""
        return count_parameters(folder, self.keep, self.widths)

    def facts(self) -> dict[str, Any]:
        """The sizes, and the digest that stands for which parts they are."""
        sizes = ("ffn", "heads", "kv_heads", "vocab_size", "parameters")
        return {**{name: getattr(self, name) for name in sizes}, "digest": self.digest()}

    def digest(self) -> str:
        """sha256 of the plan."""
        return hash_json(dataclasses.asdict(self))


def make_student(teacher: ModelFolder, plan: StudentPlan) -> nn.Module:
    """A fresh fp32 copy of the teacher with only what ``plan`` keeps, in ``eval()``."""
    student = load_torch(teacher.path)
    cut_layers(student, plan.keep)
    if plan.vocabulary:
        trim_embeddings(student, plan.vocabulary)
    if plan.neurons:
        cut_ffn(student, plan.neurons)
    if plan.queries:
        cut_heads(student, plan.queries, plan.groups)
    return student
