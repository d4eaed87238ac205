"""What goes into each matrix of a model, on calibration text: the second moments that error compensation needs.

A moment has as many numbers as a square matrix, so the matrices are taken a few at a time, each time with a pass of the
model over the text, and memory stays below the model's own size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput, MissingDependency
from ..progress import Progress, silent
from .input_sums import InputSums, matrices

if TYPE_CHECKING:
    from .source import Source

__all__ = ["Moments"]

Floats = npt.NDArray[np.float32]

_BATCH_TOKENS = 512  # of one pass
_LEAST_BYTES = 64 << 20


class Moments:
    """``mean(x x^T)`` of the inputs ``x [K]`` of the matrices of a model over the tokens of ``texts`` (each cut at
    ``max_length``).

    Raises :class:`BadInput` for texts without a token, :class:`MissingDependency` without torch.
    """

    def __init__(
        self, source: Source, texts: Sequence[str], *, max_length: int = 512, most_bytes: int | None = None,
        progress: Progress = silent,
    ) -> None:  # fmt: skip
        try:
            import torch
        except ModuleNotFoundError:
            raise MissingDependency.package("torch", "distill") from None
        folder = source.folder
        self._torch = torch
        self._progress = progress
        self._model, root = source.torch()
        tokenizer = source.tokenizer
        length = min(max_length, folder.max_length)
        rows = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts]
        self._rows = sorted((row for row in rows if row), key=len)
        if not self._rows:
            raise BadInput("the calibration text has no token", hint="give the recipe `calibration` examples")
        linear = dict(matrices(root, ("Linear", "Conv1D")).values())
        head = getattr(root, "get_output_embeddings", lambda: None)()
        first = [name for name, part in linear.items() if part is head]  # a tied one is stored first of all
        self._linear = {name: linear[name] for name in (*first, *linear)}
        self._most_bytes = most_bytes or max(_LEAST_BYTES, folder.size_bytes // 2)
        self._found: dict[str, Floats] = {}

    def of(self, name: str) -> Floats | None:
        """``[K, K]`` of the matrix of parameter ``name``; ``None`` for a parameter that no matrix product reads."""
        if name not in self._linear:
            return None
        if name not in self._found:
            self._found = {}
            self._found = self._take(self._next(name))
        return self._found[name]

    def _next(self, name: str) -> list[str]:
        """``name`` and those after it, as many as memory is given."""
        names = list(self._linear)
        chosen: list[str] = []
        left = self._most_bytes
        for candidate in names[names.index(name) :]:
            left -= 4 * self._width(candidate) ** 2
            if chosen and left < 0:
                break
            chosen.append(candidate)
        return chosen

    def _width(self, name: str) -> int:
        part = self._linear[name]
        return int(part.weight.shape[0] if type(part).__name__ == "Conv1D" else part.weight.shape[1])

    def _take(self, names: Sequence[str]) -> dict[str, Floats]:
        torch = self._torch
        sums, counts = InputSums(), Counter[str]()
        mask: Any = None

        def look(name: str, given: Any) -> None:
            if sums.first(name, given) != name:
                return
            whole = given.ndim == 3 and given.shape[:2] == mask.shape
            rows = given[mask] if whole else given.reshape(-1, given.shape[-1])
            sums.add(name, rows)
            counts[name] += len(rows)

        hooks = [
            self._linear[name].register_forward_pre_hook(lambda _, given, name=name: look(name, given[0]))
            for name in names
        ]
        try:
            with torch.inference_mode():
                done = 0
                for rows in self._batches():
                    longest = max(map(len, rows))
                    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
                    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]).bool()
                    sums.forget()
                    self._model(input_ids=ids, attention_mask=mask.long())
                    done += len(rows)
                    self._progress("what goes into each matrix", done / len(self._rows))
        finally:
            for hook in hooks:
                hook.remove()
        lost = [name for name in names if name not in sums.shared]
        if lost:
            raise BadInput(f"{lost[0]} is not used on text", hint="is it the right model?")
        return sums.means(counts)

    def _batches(self) -> list[list[list[int]]]:
        """Rows of about the same length together."""
        batches: list[list[list[int]]] = []
        for row in self._rows:
            if batches and len(row) * (len(batches[-1]) + 1) <= _BATCH_TOKENS:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches
