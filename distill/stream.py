"""Windows of tokens from a corpus of any size, read as they are needed, in an order that a killed run finds again.

Documents are tokenised one after the other and cut into windows that follow each other without a gap; a document's
rest goes into the next window, behind the token that ends a text. The place in the corpus is three numbers and the
tokens carried over (:meth:`TokenStream.state_dict`), so that memory follows the longest document and not the corpus.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from ..checkpoints import ModelFolder
from ..data_labels import NO_LABEL
from ..data_stream import TextStream
from ..errors import BadInput, RecipeError, Unsupported
from ..recipe import DistillConfig
from .batches import Batch, collate

__all__ = ["StreamedBatches", "TokenStream", "check_streaming", "stream_of"]


class TokenStream(Iterator[tuple[int, ...]]):
    """An endless iterator of windows of ``length`` token ids over ``documents()``, pass after pass.

    ``documents`` opens the corpus at its beginning, always in the same order; ``tokenize`` gives the ids of a text;
    ``end`` is put between documents (``None``: nothing). Raises :class:`BadInput` for a corpus without a token, and
    when a corpus that is gone on with has become shorter.
    """

    def __init__(
        self,
        documents: Callable[[], Iterable[str]],
        tokenize: Callable[[str], list[int]],
        length: int,
        end: int | None = None,
    ) -> None:
        self._documents = documents
        self._tokenize = tokenize
        self._length = length
        self._end = end
        self._pass = 0
        self._document = 0  # the next one to be opened in this pass
        self._carry: list[int] = []  # tokens of opened documents that no window has taken
        self._open: Iterator[str] | None = None
        self._found = False  # a token in this pass

    @property
    def passes(self) -> int:
        """How often the corpus has been read to its end."""
        return self._pass

    def __next__(self) -> tuple[int, ...]:
        while len(self._carry) < self._length:
            self._read()
        window, self._carry = tuple(self._carry[: self._length]), self._carry[self._length :]
        return window

    def _read(self) -> None:
        """Take in one more document, from the beginning again behind the last one."""
        if self._open is None:
            self._open = iter(self._documents())
            if self._document:
                skipped = sum(1 for _ in itertools.islice(self._open, self._document))
                if skipped < self._document:
                    raise BadInput(
                        f"the corpus has {skipped} documents, and document {self._document} was read before",
                        hint="it has changed: put it back, or remove the work folder to begin again",
                    )
        text = next(self._open, None)
        if text is None:
            if not self._found and not self._carry:
                raise BadInput("the corpus holds no text", hint="check the file and its field")
            self._open, self._document, self._pass, self._found = None, 0, self._pass + 1, False
            return
        self._document += 1
        ids = self._tokenize(text)
        if ids:
            self._found = True
            self._carry += ids if self._end is None else [*ids, self._end]

    def state_dict(self) -> dict[str, Any]:
        """The cursor: pass, next document, tokens carried over (fewer than a document and a window)."""
        return {"pass": self._pass, "document": self._document, "carry": list(self._carry), "found": self._found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a cursor; documents before it are read over without being tokenised."""
        self._pass, self._document = int(state["pass"]), int(state["document"])
        self._carry, self._found = [int(token) for token in state["carry"]], bool(state["found"])
        self._open = None


class StreamedBatches(IterableDataset[Batch]):
    """Endless batches of ``batch_size`` windows, of which process ``rank`` of ``world`` sees its share."""

    def __init__(self, stream: TokenStream, batch_size: int, pad_id: int, rank: int = 0, world: int = 1) -> None:
        self._stream = stream
        self._batch_size = batch_size
        self._pad_id = pad_id
        self._share = slice(rank, None, world)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            windows = [next(self._stream) for _ in range(self._batch_size)]
            rows = [{"index": row, "ids": ids, "label": NO_LABEL} for row, ids in enumerate(windows)]
            yield collate(rows[self._share], self._pad_id)


def check_streaming(config: DistillConfig, folder: ModelFolder) -> None:
    """Refuse what can't be streamed, before anything is read."""
    if not config.streaming:
        return
    if folder.task != "text-generation":
        raise Unsupported(
            f"[distill] streaming for {folder.task}: its texts can't be cut into windows",
            hint="leave streaming out: an encoder's texts are short",
        )
    if config.max_steps is None:
        raise RecipeError("[distill] streaming needs max_steps: nobody knows how long the text is", hint="set it")
    if config.on_policy is not None or config.sequence is not None:
        raise Unsupported(
            "[distill] streaming together with on_policy or sequence: both need examples that are known beforehand",
            hint="leave one of them out",
        )


def stream_of(texts: Sequence[str] | TextStream, tokenizer: Any, length: int, prefix: str = "") -> TokenStream | None:
    """Windows of ``length`` tokens of ``texts``, each behind ``prefix`` and ended by the tokenizer's end of text;
    ``None`` without texts."""
    if not texts:
        return None

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(prefix + text, return_attention_mask=False, verbose=False)["input_ids"]
        return ids

    return TokenStream(lambda: texts, tokenize, length, tokenizer.eos_token_id)
