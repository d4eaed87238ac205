"""References: what a model says about held-out text, on disk, for every artifact to be compared with.

Text is tokenised once, here, with the model folder's own tokenizer; every artifact gets the same ids, so that no
difference of tokenizers leaks into a figure (a difference is found by its own check, :mod:`edgestill.bench.verify`).
A folder holds ``reference.json``, ``ids.npy``, ``mask.npy`` and ``logits.npy`` or ``embeddings.npy``
(:mod:`edgestill.runtimes.scoring` reads it; shapes are given there).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..artifact import TOKEN_TASKS, Task
from ..errors import BadInput, MissingDependency
from ..files import atomic_directory, hash_file, hash_json, read_json
from ..progress import Progress, silent
from ..runtimes.scoring import open_reference
from ..vocabularies import compare_vocabularies

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder

__all__ = [
    "Inputs",
    "encode_texts",
    "inputs_of",
    "make_reference",
    "read_facts",
    "renamed",
    "torch_forward",
    "vocabulary_columns",
    "window_texts",
    "write_reference",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Forward = Callable[[Ints, Ints], Floats]

SCHEMA_VERSION = 1
REFERENCE_FILE = "reference.json"
SHORTEST_WINDOW = 8  # tokens; a shorter rest of a document predicts too little from too little


@dataclass(frozen=True)
class Inputs:
    """Token ids ``[N, T]`` with their mask, the index of the text that each row came from, and how they were made."""

    ids: Ints
    mask: Ints
    documents: tuple[int, ...]
    facts: Mapping[str, Any]


def make_reference(
    model: Path,
    out: Path,
    *,
    texts: Sequence[str] = (),
    ids_from: Path | None = None,
    columns: Sequence[int] | None = None,
    max_length: int | None = None,
    window: int = 128,
    limit: int | None = None,
    batch_size: int = 8,
    threads: int = 2,
    extra: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Path:
    """Write what the model folder ``model`` (torch, fp32) says about ``texts`` to the reference folder ``out``.

    Encoders and classifiers: a row a text, cut at ``max_length`` tokens, at most ``limit`` texts. Text generation:
    windows of ``window`` tokens, each inside one document, not overlapping (the stride is the window less a BOS), the
    first window of every document before the second of any, until ``limit`` tokens are predicted. ``ids_from`` is a
    reference whose inputs are used instead of ``texts`` (the teacher's view of what the student was asked). With
    ``columns`` its ids are those of a student with a trimmed vocabulary (:func:`vocabulary_columns`): the model reads
    ``columns[id]`` in place of each, and of its logits only these columns are kept, in that order.
    ``extra`` is kept in ``reference.json`` under ``"extra"``.

    Nothing is done when ``out`` already holds the answer to the same question (model, inputs, versions). Raises
    :class:`BadInput` when no text is long enough, or the ids are not of the model's vocabulary.
    """
    from ..checkpoints import open_model

    folder = open_model(model)
    if ids_from is None:
        question = {"texts": hash_json(list(texts)), "max_length": max_length, "window": window, "limit": limit}
    else:
        question = {"ids": read_facts(ids_from)["inputs_sha256"]}
        if columns is not None:
            question["columns"] = hash_json(list(columns))
    key = hash_json(
        {
            "schema_version": SCHEMA_VERSION, "model_id": folder.model_id, "extra": dict(extra or {}),
            "batch_size": batch_size, "threads": threads, "versions": _versions(), **question,
        }
    )  # fmt: skip
    if _is_made(out, key):
        return out
    if ids_from is not None:
        inputs = inputs_of(ids_from)
    else:
        inputs = _tokenise(folder, texts, max_length, window, limit, progress)
    if int(inputs.ids.max()) >= (folder.vocab_size if columns is None else len(columns)):
        raise BadInput(
            f"token id {int(inputs.ids.max())} is not in the vocabulary of {folder.vocab_size} of {model.name}",
            hint="teacher and student need the same tokenizer to be compared token by token",
        )
    facts = {"key": key, "model_id": folder.model_id, "versions": _versions(), "extra": dict(extra or {})}
    with torch_forward(model, threads) as plain:
        forward = plain if columns is None else renamed(plain, columns, folder.task)
        write_reference(out, folder.task, inputs, forward, facts=facts, batch_size=batch_size, progress=progress)
    return out


def vocabulary_columns(teacher: ModelFolder, student: ModelFolder) -> tuple[int, ...] | None:
    """The teacher's id of each id of a ``student`` whose vocabulary is a part of the teacher's; ``None`` for equal ids.

    Raises :class:`BadInput` when their tokenizers differ in more than that.
    """
    from ..checkpoints import load_tokenizer

    found = compare_vocabularies(
        load_tokenizer(teacher.path), teacher.vocab_size, load_tokenizer(student.path), student.vocab_size
    )
    if found.relation == "different":
        raise BadInput(
            f"{student.path.name} can't be compared with {teacher.path.name} token by token: {found.reason}",
            hint="compare models with the same tokenizer, or one with a trimmed copy of it",
        )
    return found.columns


def write_reference(
    out: Path,
    task: Task,
    inputs: Inputs,
    forward: Forward,
    *,
    facts: Mapping[str, Any],
    batch_size: int = 8,
    progress: Progress = silent,
) -> Path:
    """Run ``forward`` over ``inputs`` in the batches that ``score()`` makes and write the reference folder ``out``.

    Each batch is cut to its longest row, as ``score()`` does, so that activation quantisation (which looks at whole
    batches) sees the same values. Logits go to disk batch by batch: memory follows one batch.
    """
    name = "embeddings.npy" if task == "feature-extraction" else "logits.npy"
    rows, length = inputs.ids.shape
    with atomic_directory(out) as folder:
        np.save(folder / "ids.npy", inputs.ids)
        np.save(folder / "mask.npy", inputs.mask)
        said: Any = None
        for first in range(0, rows, batch_size):
            mask = inputs.mask[first : first + batch_size]
            longest = int(mask.sum(axis=1).max())
            output = forward(inputs.ids[first : first + batch_size, :longest], mask[:, :longest])
            if said is None:
                shape = (rows, length, output.shape[2]) if task in TOKEN_TASKS else (rows, output.shape[1])
                said = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                    folder / name, mode="w+", dtype=np.float32, shape=shape
                )
            if task in TOKEN_TASKS:
                said[first : first + len(output), :longest] = output
            else:
                said[first : first + len(output)] = output
            progress("reference", min(1.0, (first + batch_size) / rows))
        said.flush()
        del said
        described = {
            **facts,
            "schema_version": SCHEMA_VERSION,
            "task": task,
            "rows": rows,
            "length": length,
            "documents": list(inputs.documents),
            "inputs": dict(inputs.facts),
            "inputs_sha256": _hash_inputs(folder),
        }
        text = json.dumps(described, indent=1, sort_keys=True, ensure_ascii=False)
        (folder / REFERENCE_FILE).write_text(text + "\n", encoding="utf-8")
    return out


def read_facts(reference: Path) -> dict[str, Any]:
    """The content of ``reference.json``; :class:`BadInput` when it is not one that this module wrote."""
    facts = read_json(reference / REFERENCE_FILE)
    if not isinstance(facts, dict) or facts.get("schema_version") != SCHEMA_VERSION or "documents" not in facts:
        raise BadInput(f"{reference} is not a reference of this version", hint="make it again")
    return facts


def inputs_of(reference: Path, rows: int | None = None) -> Inputs:
    """The inputs of a reference, in memory; the first ``rows`` of them."""
    facts, opened = read_facts(reference), open_reference(reference)
    ids, mask = np.array(opened.ids[:rows]), np.array(opened.mask[:rows])
    longest = int(mask.sum(axis=1).max())
    return Inputs(
        np.ascontiguousarray(ids[:, :longest]), np.ascontiguousarray(mask[:, :longest]),
        tuple(facts["documents"][:rows]), facts["inputs"],
    )  # fmt: skip


def encode_texts(tokenizer: Any, texts: Sequence[str], *, max_length: int, prefix: str = "") -> Inputs:
    """A row a text, with the tokenizer's special tokens, cut at ``max_length``, padded on the right."""
    if not texts:
        raise BadInput("no text to tokenise", hint="raise `test` of a [[data.text]], or `test` of a [[data.task]]")
    encoded = tokenizer([prefix + text for text in texts], truncation=True, max_length=max_length)["input_ids"]
    kept = [index for index, row in enumerate(encoded) if row]
    if not kept:
        raise BadInput("every text is empty after tokenising", hint="look at the text and at its field name")
    facts = {
        "text_sha256": hash_json(list(texts)), "texts": len(texts), "max_length": max_length, "prompt_prefix": prefix,
    }  # fmt: skip
    return _pad([encoded[index] for index in kept], kept, _padding(tokenizer), facts)


def window_texts(tokenizer: Any, texts: Sequence[str], *, window: int, limit: int | None = None) -> Inputs:
    """Windows for text generation, see :func:`make_reference`; BOS stands first where the tokenizer itself puts it."""
    if window < 2:
        raise BadInput(f"a window of {window} tokens predicts nothing", hint="set [bench] window to 2 or more")
    backend = tokenizer.backend_tokenizer
    bos = tokenizer.bos_token_id
    with_bos = bos is not None and backend.encode("a", add_special_tokens=True).ids[:1] == [bos]
    start = [bos] if with_bos else []
    stride = window - len(start)
    encoded: dict[int, list[int]] = {}
    chosen: list[tuple[int, int, list[int]]] = []
    predicted = 0
    for turn in itertools.count():
        found = False
        for document, text in enumerate(texts):
            if limit is not None and predicted >= limit:
                break
            if document not in encoded:
                encoded[document] = backend.encode(text, add_special_tokens=False).ids
            piece = encoded[document][turn * stride : (turn + 1) * stride]
            if len(piece) < min(SHORTEST_WINDOW, stride):
                continue
            found = True
            chosen.append((document, turn, start + piece))
            predicted += len(start) + len(piece) - 1
        if not found or (limit is not None and predicted >= limit):
            break
    if not chosen:
        raise BadInput(
            f"none of {len(texts)} texts has {min(SHORTEST_WINDOW, stride)} tokens", hint="give longer test text"
        )
    chosen.sort(key=lambda item: item[:2])
    facts = {
        "text_sha256": hash_json(list(texts)), "texts": len(texts), "window": window, "stride": stride,
        "bos": f"prepended ({bos})" if with_bos else "none", "order": "first windows of all documents first",
        "predicted_tokens": predicted,
    }  # fmt: skip
    return _pad([ids for _, _, ids in chosen], [document for document, _, _ in chosen], _padding(tokenizer), facts)


def renamed(forward: Forward, columns: Sequence[int], task: Task) -> Forward:
    """``forward`` for the ids of a part of its vocabulary."""
    known = np.asarray(columns, dtype=np.int64)

    def call(ids: Ints, mask: Ints) -> Floats:
        output = forward(known[ids], mask)
        return np.ascontiguousarray(output[..., known]) if task == "text-generation" else output

    return call


class torch_forward:  # noqa: N801  (a context manager, used like a function)
    """``with torch_forward(folder, threads) as forward``: the model in this process, fp32, as numpy in and out.

    ``model`` may also be a torch module that is already loaded. The number of torch's threads is restored at the end.
    """

    def __init__(self, model: Any, threads: int) -> None:
        self._model = model
        self._threads = threads

    def __enter__(self) -> Forward:
        try:
            import torch
        except ModuleNotFoundError:
            raise MissingDependency.package("torch", "distill") from None
        from ..checkpoints import load_torch

        self._before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        module = load_torch(self._model) if isinstance(self._model, Path) else self._model

        def forward(ids: Ints, mask: Ints) -> Floats:
            with torch.inference_mode():
                output = module(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
            tensor = output if isinstance(output, torch.Tensor) else output.logits
            return np.ascontiguousarray(tensor.float().numpy())

        return forward

    def __exit__(self, *_: object) -> None:
        import torch

        torch.set_num_threads(self._before)


def _tokenise(
    folder: ModelFolder,
    texts: Sequence[str],
    max_length: int | None,
    window: int,
    limit: int | None,
    progress: Progress,
) -> Inputs:
    from ..checkpoints import load_tokenizer

    progress("tokenising")
    tokenizer = load_tokenizer(folder.path)
    if folder.task == "text-generation":
        return window_texts(tokenizer, texts, window=min(window, folder.max_length), limit=limit)
    length = min(max_length or folder.max_length, folder.max_length)
    return encode_texts(tokenizer, texts[:limit], max_length=length, prefix=folder.prompt_prefix)


def _pad(rows: Sequence[Sequence[int]], documents: Sequence[int], pad: int, facts: Mapping[str, Any]) -> Inputs:
    ids = np.full((len(rows), max(len(row) for row in rows)), pad, np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return Inputs(ids, mask, tuple(documents), facts)


def _padding(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _hash_inputs(folder: Path) -> str:
    return hash_json([hash_file(folder / "ids.npy"), hash_file(folder / "mask.npy")])


def _is_made(out: Path, key: str) -> bool:
    """Whether ``out`` holds the answer to ``key``, whole (folders appear atomically; shapes are checked again)."""
    if not (out / REFERENCE_FILE).exists():
        return False
    try:
        facts = read_facts(out)
        return facts.get("key") == key and len(open_reference(out).ids) == facts["rows"]
    except BadInput:
        return False


def _versions() -> dict[str, str]:
    return dict(_installed(("torch", "transformers", "tokenizers", "numpy")))


def _installed(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
