"""Small offline tasks for text generation: multiple choice and cloze from a JSON-lines file of one's own.

A line is one example, of one of two kinds; a file holds one kind::

    {"context": "Question: what is red?\\nAnswer:", "choices": ["grass", "blood"], "answer": 1}
    {"context": "The capital of France is", "target": "Paris"}

Multiple choice is right when the likelihood of the true choice **per byte of its text** is the highest (else long
choices lose for their length; per byte, and not per token, so that models with different tokenizers compare); ties go
to the first. Cloze is right when greedy decoding writes exactly the target. Context and continuation are joined by a
space unless one of them brings white space to the joint; ``"join": ""`` (or any text) says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import BadInput
from ..files import read_json
from ..progress import Progress, silent
from ..runtimes.session import SessionInfo
from .fidelity import Estimate, mean_estimate
from .likelihood import Likelihood, likelihoods
from .records import Summary
from .statistics import bootstrap_interval
from .task_files import checked, load_tokenizer_file, read_examples
from .tasks import accuracy_ratio

__all__ = [
    "CompletionSet",
    "Example",
    "completion_estimates",
    "encode_pairs",
    "read_completions",
]

Kind = Literal["choice", "cloze"]
_FIELDS = ("context", "choices", "answer", "target", "join")


@dataclass(frozen=True)
class Example:
    """``continuations`` of ``context``, as they are scored (joined, white space in place), and which one is true."""

    context: str
    continuations: tuple[str, ...]
    answer: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class CompletionSet:
    """All examples of a file; ``sha256`` is of the file."""

    name: str
    kind: Kind
    examples: tuple[Example, ...]
    sha256: str
    headline: str = "accuracy"

    def ask(
        self, worker: Any, folder: Path, *, batch_size: int = 8, progress: Progress = silent
    ) -> list[Likelihood]:  # fmt: skip
        """How likely the model finds each continuation, example after example."""
        info: SessionInfo = worker.info()
        if info.task != "text-generation":
            raise BadInput(f"{self.name} asks for continuations, {folder.name} is for {info.task}",
                           hint="choices and cloze need a model that generates text")  # fmt: skip
        tokenizer = load_tokenizer_file(folder)
        pairs = [(one.context, text) for one in self.examples for text in one.continuations]
        ids = encode_pairs(tokenizer, pairs, _prefix(folder, tokenizer))
        return likelihoods(worker, ids, batch_size=batch_size, progress=progress)

    def estimates(self, answers: Any, *, teacher: Any | None = None, seed: int = 0) -> list[Estimate]:
        """See :func:`completion_estimates`."""
        return completion_estimates(self, answers, teacher=teacher, seed=seed)


def read_completions(path: Path) -> CompletionSet:
    """Read a file of examples; :class:`BadInput` names the line that is not one."""
    hint = '{"context", "choices", "answer"} or {"context", "target"} on each line'
    found, digest = read_examples(path, _example, hint)
    kinds = {kind for kind, _ in found}
    if len(kinds) > 1:
        raise BadInput(f"{path} mixes multiple choice and cloze", hint="a file for each kind")
    return CompletionSet(path.stem, kinds.pop(), tuple(example for _, example in found), digest)


def _example(raw: Any) -> tuple[Kind, Example]:
    raw = checked(raw, _FIELDS)
    context, join = raw.get("context"), raw.get("join")
    if not isinstance(context, str) or not (join is None or isinstance(join, str)):
        raise ValueError("`context` (and `join`, where given) must be text")
    if "choices" not in raw:
        if not isinstance(raw.get("target"), str) or not raw["target"]:
            raise ValueError("neither `choices` nor a `target`")
        if "answer" in raw:
            raise ValueError("`answer` belongs to `choices`")
        return "cloze", _joined(context, (raw["target"],), 0, join)
    choices, answer = raw["choices"], raw.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("`choices` must be two or more texts")
    if isinstance(answer, str):
        if choices.count(answer) != 1:
            raise ValueError(f"`answer` {answer[:40]!r} is not one of the choices")
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"`answer` must be a choice or its index, 0 to {len(choices) - 1}")
    if "target" in raw:
        raise ValueError("`target` beside `choices`")
    return "choice", _joined(context, tuple(choices), answer, join)


def _joined(context: str, texts: tuple[str, ...], answer: int, join: str | None) -> Example:
    def gap(text: str) -> str:
        if join is not None:
            return join
        return "" if not context or context[-1:].isspace() or text[:1].isspace() else " "

    return Example(context, tuple(gap(text) + text for text in texts), answer, texts)


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], prefix: int | None
) -> list[tuple[list[int], list[int]]]:
    """Token ids of contexts and continuations, as lm-eval cuts them: the continuation's are what the whole text has
    more than its context; white space at a context's end belongs to the continuation. An empty context is the token
    ``prefix`` (BOS, else end of text)."""
    found = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        if not stripped:
            ids = tokenizer.encode(context + continuation, add_special_tokens=False).ids
            if prefix is None:
                raise BadInput("an empty context, and the tokenizer has no BOS", hint="give each example a context")
            found.append(([prefix], ids[1:] if ids[:1] == [prefix] else ids))
            continue
        before = tokenizer.encode(stripped).ids
        whole = tokenizer.encode(context + continuation).ids
        found.append((before, whole[len(before) :]))
    return found


def completion_estimates(
    data: CompletionSet, found: Sequence[Likelihood], *, teacher: Sequence[Likelihood] | None = None, seed: int = 0
) -> list[Estimate]:
    """``accuracy`` (choice: per byte; cloze: greedy), for choices ``accuracy_raw`` (by plain likelihood), for cloze
    ``perplexity`` of a target, and with what a teacher ``found`` on the same examples ``accuracy_ratio``.

    ``found`` holds the likelihoods of all continuations, example after example. Intervals resample examples.
    """
    rows, theirs = _by_example(data, found), _by_example(data, teacher) if teacher is not None else None
    protocol: dict[str, Any] = {"task": data.kind, "data_sha256": data.sha256}
    if data.kind == "cloze":
        right = np.array([row[0].greedy for row in rows])
        estimates = [mean_estimate("accuracy", right, seed=seed, protocol={**protocol, "right": "greedy decoding"})]
        estimates.append(_target_perplexity(np.array([-row[0].logprob for row in rows]), protocol, seed))
        if theirs is not None and any(row[0].greedy for row in theirs):
            estimates.append(accuracy_ratio(right, np.array([row[0].greedy for row in theirs]), seed=seed))
        return estimates
    right = _chosen_right(data, rows, per_byte=True)
    how: Mapping[str, Any] = {**protocol, "right": "highest log-likelihood per byte"}
    estimates = [mean_estimate("accuracy", right, seed=seed, protocol=how)]
    raw = _chosen_right(data, rows, per_byte=False)
    how = {**protocol, "right": "highest log-likelihood"}
    estimates.append(mean_estimate("accuracy_raw", raw, seed=seed, protocol=how))
    if theirs is not None:
        reference = _chosen_right(data, theirs, per_byte=True)
        if reference.any():
            estimates.append(accuracy_ratio(right, reference, seed=seed))
    return estimates


def _by_example(data: CompletionSet, found: Sequence[Likelihood]) -> list[Sequence[Likelihood]]:
    counts = [len(example.continuations) for example in data.examples]
    if sum(counts) != len(found):
        raise BadInput(f"{len(found)} likelihoods for {sum(counts)} continuations", hint="score the same examples")
    ends = np.cumsum(counts).tolist()
    return [found[end - count : end] for count, end in zip(counts, ends, strict=True)]


def _chosen_right(
    data: CompletionSet, rows: Sequence[Sequence[Likelihood]], *, per_byte: bool
) -> npt.NDArray[np.bool_]:
    right = []
    for example, row in zip(data.examples, rows, strict=True):
        sizes = [len(text.encode()) if per_byte else 1 for text in example.texts]
        scores = [likelihood.logprob / size for likelihood, size in zip(row, sizes, strict=True)]
        right.append(int(np.argmax(scores)) == example.answer)
    return np.array(right)


def _target_perplexity(surprise: npt.NDArray[np.float64], protocol: Mapping[str, Any], seed: int) -> Estimate:
    """``exp`` of the mean surprise of a whole target (as LAMBADA's perplexity is given), not of a token."""
    low = high = None
    if len(surprise) > 1:
        low, high = bootstrap_interval(surprise, lambda drawn: np.exp(drawn.mean(axis=1)), seed=seed)
    summary = Summary(float(np.exp(surprise.mean())), "geometric_mean", len(surprise), low, high)
    samples = tuple(float(f"{value:.6g}") for value in np.exp(surprise))
    return Estimate("target_perplexity", summary, samples, {**protocol, "of": "a whole target"})


def _prefix(folder: Path, tokenizer: Any) -> int | None:
    """The token that stands for an empty context: BOS, else end of text, as ``tokenizer_config.json`` names them."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    for name in ("bos_token", "eos_token"):
        value = config.get(name) if isinstance(config, dict) else None
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found = tokenizer.token_to_id(text)
            if found is not None:
                return int(found)
    return None
