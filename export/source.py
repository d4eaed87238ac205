"""What artifacts are made of: a model folder, read once for all of them.

Its hash, the check of its weights, its tokenizer and the text as ids are had when first asked for, and stay. What is
large, the model in torch and the moments of its inputs, stays only while an artifact that is still to come will ask for
it: :meth:`Source.in_turn` takes those that need most first. So making many artifacts takes no more memory than the
costliest of them, and the model is loaded once.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import BadInput
from ..files import hash_json
from ..progress import Progress, silent
from ..quantisation import Budget
from . import writer

if TYPE_CHECKING:
    from ..bench.reference import Inputs
    from ..checkpoints import ModelFolder
    from ..recipe import ExportConfig

__all__ = ["Source"]

Floats = npt.NDArray[np.float32]

_WINDOW = 128  # tokens; longest row of a measurement


class Source:
    """The model ``folder`` with what was read of it. For one thread, as long as its files stay as they are."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        self._stamp = _stamp(folder.path)
        self._checked = False
        self._inputs: dict[tuple[str, int, int], Inputs] = {}
        self._loaded: weakref.ref[Any] | None = None  # wherever it is held
        self._keeps_model = self._keeps_moments = False
        self._model: Any = None
        self._moments: tuple[tuple[str, int, int], Mapping[str, Floats]] | None = None

    def in_turn(self, configs: Iterable[ExportConfig]) -> Iterator[ExportConfig]:
        """``configs`` of this model, those first that need the most of it in memory, else in their order. At each turn
        what only earlier ones needed is let go."""
        order = sorted(configs, key=lambda one: (not isinstance(one.parsed, Budget), not one.parsed.runs_model))
        try:
            for turn, config in enumerate(order, start=1):
                later = [one.parsed for one in order[turn:]]
                self._keeps_model = any(one.runs_model for one in later)
                self._keeps_moments = any(isinstance(one, Budget) for one in later)
                yield config
                self._let_go()
        finally:
            self._keeps_model = self._keeps_moments = False
            self._let_go()

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """What is loaded inside stays to the end of the block, whatever comes later."""
        before, self._keeps_model = self._keeps_model, True
        try:
            yield
        finally:
            self._keeps_model = before
            self._let_go()

    def _let_go(self) -> None:
        if not self._keeps_model:
            self._model = None
        if not self._keeps_moments:
            self._moments = None

    # ---- the files ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every weight is finite and the tokenizer fits (:func:`.writer.check_model`), the first time; every time, that
        the files are still those that were read before. Raises :class:`BadInput`."""
        if self._stamp != _stamp(self.folder.path):
            raise BadInput(
                f"{self.folder.path} changed while artifacts were made of it", hint="run the same command again"
            )
        if not self._checked:
            _ = self._identity  # a hash of all weights: meanwhile they are checked and written
            writer.check_model(self.folder)
            self._checked = True

    @property
    def model_id(self) -> str:
        """See :attr:`edgestill.checkpoints.ModelFolder.model_id`."""
        return self._identity.result()

    @cached_property
    def _identity(self) -> Future[str]:
        aside = ThreadPoolExecutor(1)
        try:
            return aside.submit(lambda: self.folder.model_id)
        finally:
            aside.shutdown(wait=False)

    @property
    def tokenizer(self) -> Any:
        """See :func:`edgestill.checkpoints.load_tokenizer`. Each time as it was loaded: where one caller had its text
        cut is not left to the next."""
        tokenizer, truncation, padding = self._tokenizer
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
            backend.enable_padding(**padding) if padding else backend.no_padding()
        return tokenizer

    @cached_property
    def _tokenizer(self) -> tuple[Any, Any, Any]:
        """With how it cuts and fills up by itself."""
        from ..checkpoints import load_tokenizer

        tokenizer = load_tokenizer(self.folder.path)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return tokenizer, getattr(backend, "truncation", None), getattr(backend, "padding", None)

    # ---- the model ------------------------------------------------------------------------------------------------

    def torch(self) -> tuple[Any, Any]:
        """What :func:`edgestill.checkpoints.load_torch` gives, and the Transformers model in it (the same but for
        embeddings). Whoever changes it puts everything back.

        There is never more than one: it is loaded again only when nobody holds it any more.
        """
        model = self._loaded() if self._loaded is not None else None
        if model is None:
            from ..checkpoints import load_torch

            model = load_torch(self.folder.path)
            self._loaded = weakref.ref(model)
        self._model = model if self._keeps_model else None
        return model, model.encoder if self.folder.task == "feature-extraction" else model

    # ---- text ---------------------------------------------------------------------------------------------------

    def inputs(self, texts: Sequence[str], tokens: int, count: int) -> Inputs:
        """What is measured on: windows of 128 tokens that hold ``tokens`` (text generation), else the first ``count``
        texts. Raises :class:`BadInput` for texts that are too short."""
        key = (hash_json(list(texts)), tokens, count)
        if key not in self._inputs:
            self._inputs[key] = self._encoded(texts, tokens, count)
        return self._inputs[key]

    def _encoded(self, texts: Sequence[str], tokens: int, count: int) -> Inputs:
        from ..bench.reference import encode_texts, window_texts

        folder = self.folder
        length = min(_WINDOW, folder.max_length)
        if folder.task != "text-generation":
            return encode_texts(self.tokenizer, texts[:count], max_length=length, prefix=folder.prompt_prefix)
        try:
            return window_texts(self.tokenizer, texts, window=length, limit=tokens)
        except BadInput as error:
            raise BadInput(error.message, hint="give longer `calibration` and `dev` texts") from None

    def moments(
        self, texts: Sequence[str], tokens: int, count: int, progress: Progress = silent
    ) -> Mapping[str, Floats]:
        """What goes into each matrix product on :meth:`inputs` of the same arguments (:mod:`.moments`)."""
        key = (hash_json(list(texts)), tokens, count)
        if self._moments is not None and self._moments[0] == key:
            return self._moments[1]
        from .moments import input_moments

        self._moments = None
        model, root = self.torch()
        found = input_moments(model, root, self.folder.task, self.inputs(texts, tokens, count), progress=progress)
        if self._keeps_moments:
            self._moments = key, found
        return found


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of each file of a model folder."""
    if not folder.is_dir():
        return ()
    files = [(path.name, path.stat()) for path in folder.iterdir() if path.is_file()]
    return tuple(sorted((name, found.st_size, found.st_mtime_ns) for name, found in files))
