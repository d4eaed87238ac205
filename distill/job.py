"""One distillation as a value: everything that decides the student that comes out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..checkpoints import ModelFolder, load_tokenizer
from ..data_labels import NO_LABEL, AnyLabelledSet, in_labels_of, join_words, label_places, tag_tokens
from ..data_stream import TextStream
from ..errors import BadInput, RecipeError
from ..files import hash_json
from ..recipe import DistillConfig
from . import ranks
from .batches import Examples, encode
from .cache_use import CacheUse, plan_cache
from .ensemble import check_teachers, normalised
from .foreign import PairedExamples, encode_pairs
from .losses import Loss, select_losses
from .quantized import Ship
from .rollout import check_on_policy
from .sampling import stop_ids
from .sequence import check_sequence
from .start import Start
from .stream import check_streaming
from .student import StudentPlan
from .vocabulary_tokenizer import FittedVocabulary

if TYPE_CHECKING:
    from ..data import DataSets

__all__ = ["NOT_IDENTITY", "Job", "prepare"]

VERSION = 2
# Settings that change when checkpoints are written or how fast it goes, and not what comes out.
# Where a teacher was fetched from says nothing either: its content does. Nor does the place of a cache.
NOT_IDENTITY: dict[str, Any] = {
    "save_every": True, "threads": True, "gradient_checkpointing": True, "report_to": True,
    "teacher": {"__all__": {"source", "sha256", "license"}}, "cache": {"path", "temperatures"},
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Everything that decides the outcome."""

    teacher: ModelFolder
    start: Start
    plan: StudentPlan
    config: DistillConfig
    train: Examples
    dev: Examples
    vocabulary: FittedVocabulary
    steps: int
    original: ModelFolder | None = None
    """What the teacher was before it was corrected."""
    others: tuple[ModelFolder, ...] = ()
    texts: tuple[str, ...] | TextStream = ()
    """What is streamed, instead of ``train``."""
    length: int = 0
    """Tokens of a streamed window."""
    ship: Ship | None = None
    """How a model folder becomes the artifact that ``config.quantized`` trains for, which says what decides."""
    shelf: Path | None = None
    """Where the teacher's answers lie, if not in the job's own folder; decides nothing."""

    @property
    def foreign(self) -> bool:
        """Whether the teacher counts with other tokens than the student."""
        return isinstance(self.train, PairedExamples)

    @property
    def tokenizer(self) -> Any:
        """The student's."""
        return self.vocabulary.tokenizer

    @property
    def weights(self) -> dict[str, float]:
        """Weights above 0 by full loss name, in the order of the table."""
        return {name: self.config.loss[name] for name in self.losses}

    @property
    def losses(self) -> dict[str, Loss]:
        """The losses that have these weights."""
        return select_losses(self.config.loss, self.teacher.task)

    @property
    def stop(self) -> frozenset[int]:
        """The student's ids that end a text."""
        return stop_ids(self.teacher, self.tokenizer, self.vocabulary.keep)

    @property
    def pad_id(self) -> int:
        """What fills rows up; never looked at, since masks go by length."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows (the embedding may have more rows), or the number of classes."""
        rows = self.plan.vocab_size if self.foreign else min(self.teacher.vocab_size, self.plan.vocab_size)
        return len(self.teacher.labels) or min(len(self.tokenizer), rows)

    @property
    def teachers(self) -> list[dict[str, Any]]:
        """Each teacher's content and its part in the mean."""
        folders = (self.teacher, *self.others)
        return [
            {"model_id": folder.model_id, "weight": weight}
            for folder, weight in zip(folders, normalised(self.config), strict=True)
        ]

    def cache(self, mapped: tuple[int, ...] = ()) -> CacheUse | None:
        """How the teacher's answers are kept, with its blocks ``mapped``; ``None``: it is asked live."""
        if self.config.cache is None:
            return None
        return plan_cache(
            self.config.cache, self.losses, self.teacher.task, temperature=self.config.temperature,
            vocab_size=self.vocab_size, layers=mapped, width=self.teacher.hidden_size,
        )  # fmt: skip

    @property
    def _streamed(self) -> str:
        texts = self.texts.sha256 if isinstance(self.texts, TextStream) else list(self.texts)
        return hash_json([texts, self.teacher.prompt_prefix, self.length])

    def identity(self) -> str:
        """sha256 of all of it, and of the libraries' versions."""
        return hash_json(
            {
                "version": VERSION,
                "teacher": self.teacher.model_id,
                "others": [other.model_id for other in self.others],
                "start": self.start.folder.model_id,
                "plan": self.plan.digest(),
                "config": self.config.model_dump(mode="json", exclude=NOT_IDENTITY),
                "train": self._streamed if self.texts else self.train.digest(),
                "dev": self.dev.digest(),
                "libraries": [torch.__version__, transformers.__version__],
            }
        )


def prepare(
    folder: ModelFolder,
    start: Start,
    plan: StudentPlan,
    config: DistillConfig,
    data: DataSets,
    max_length: int,
    vocabulary: FittedVocabulary,
    others: tuple[ModelFolder, ...] = (),
    foreign: bool = False,
) -> Job:
    """Everything that decides the outcome, from the recipe's parts; loads no weights, trains nothing."""
    losses = select_losses(config.loss, folder.task)
    if config.layer_map != "cka" and start.of_teacher:
        start.taught(config.layer_map, plan, folder.layers)  # a map that names no layer is found before any work
    length = min(max_length, *(model.max_length for model in (folder, start.folder, *others)))
    texts = data.split("train")
    check_teachers(folder, others, config, texts[:200] or list(itertools.islice(data.stream or (), 200)))
    prefix, tokenizer = folder.prompt_prefix, vocabulary.tokenizer
    if folder.labels and list(losses) == ["cross_entropy"]:
        texts = []  # without a teacher, a text without a label has nothing to say
    labels, tags = [NO_LABEL] * len(texts), list[tuple[int, ...]]()
    if "cross_entropy" in losses and folder.task == "text-classification":
        for text, label in _labelled(folder, data.tasks):
            texts.append(text)
            labels.append(label)
    if "cross_entropy" in losses and folder.task == "token-classification":
        found = _labelled(folder, data.tagged)
        tags = [()] * len(texts) + tag_tokens(tokenizer, found, length, prefix)
        texts += [join_words(words) for words, _ in found]
        labels += [NO_LABEL] * len(found)
    check_streaming(config, folder)
    streamed = (data.stream or tuple(texts)) if config.streaming else ()
    if foreign:
        theirs, held_out = load_tokenizer(folder.path), data.split("dev")
        train: Examples = encode_pairs(texts, tokenizer, theirs, length, prefix=prefix)
        dev: Examples = encode_pairs(held_out, tokenizer, theirs, length, prefix=prefix)
    else:
        train = encode(
            [] if streamed else texts, tokenizer, folder.task, length, prefix=prefix, labels=labels, tags=tags
        )
        dev = encode(data.split("dev"), tokenizer, folder.task, length, prefix=prefix)
    if not len(train) and not streamed:
        raise BadInput("[distill] found no text to learn from", hint="set `train` in a [[data.text]]")
    check_sequence(config.sequence, folder, length)
    known = plan if start.of_teacher else None
    check_on_policy(config, folder, known, window=length, held_out=len(dev), cached=config.cache is not None)
    if config.batch_size % ranks.world():
        raise RecipeError(
            f"[distill] batch_size = {config.batch_size} can't be shared by {ranks.world()} processes",
            hint="make it a multiple of them: each forward pass is cut among the processes",
        )
    if config.evaluate_every and not len(dev):
        raise RecipeError("[distill] evaluate_every has no text to measure on", hint="set `dev` in a [[data.text]]")
    group = config.batch_size * config.gradient_accumulation
    steps = config.max_steps or max(1, round(config.epochs * len(train) / group))
    return Job(folder, start, plan, config, train, dev, vocabulary, steps, others=others, texts=streamed, length=length)


def _labelled(folder: ModelFolder, sets: Sequence[AnyLabelledSet]) -> list[tuple[Any, Any]]:
    """Training rows of the labelled sets that have the model's own classes, with its numbers for them."""
    found: list[tuple[Any, Any]] = []
    for task in sets:
        if label_places(task.labels, folder.labels) is not None:
            found += in_labels_of(task, folder.labels).train
    if not found:
        words = folder.task == "token-classification"
        raise RecipeError(
            f"loss 'cross_entropy' needs {'words' if words else 'texts'} labelled {', '.join(folder.labels)}",
            hint=f"add a [[data.task]] with these labels{' and `tags`' if words else ''}, or use forward_kl",
        )
    return found
