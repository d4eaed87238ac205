"""The teacher at work: what it says about a batch, live or from the cache, never with a gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints import ModelFolder, load_torch
from ..errors import BadInput
from ..files import hash_file, hash_json
from ..progress import Progress, silent
from .anatomy import base_model
from .batches import Batch, Examples, collate
from .cache import VectorCache
from .chunked import chunk_rows
from .losses import predicting
from .rows import wide
from .signal import Hidden, Relations, Sparse
from .taps import Heard, Taps
from .token_cache import TokenCache
from .token_records import TokenFormat
from .vocabulary import trim_embeddings

__all__ = ["Said", "Teacher", "check_finite", "vectors"]


class Said:
    """What the teacher said about one batch; a field is ``None`` where nobody asked.

    ``final`` [B, T, D]: states before the language-model head, ``head`` that head; or ``sparse``: top-k from the cache
    of the N places that predict; ``vectors``: embeddings [B, D], class logits [B, C] or, of every token, [B, T, C];
    ``blocks`` and ``attention``: outputs and attention maps of the mapped blocks; ``relations``: queries, keys and
    values of the last of them.
    """

    def __init__(
        self,
        final: Tensor | None = None,
        head: nn.Module | None = None,
        vectors: Tensor | None = None,
        blocks: tuple[Tensor, ...] | None = None,
        attention: tuple[Tensor, ...] | None = None,
        relations: Relations | None = None,
        sparse: Sparse | None = None,
    ) -> None:
        self.final = final
        self.head = head
        self.vectors = vectors
        self.blocks = blocks
        self.attention = attention
        self.relations = relations
        self.sparse = sparse


def vectors(model: nn.Module, batch: Batch) -> Tensor:
    """Embeddings [B, D], class logits [B, C], or those of every token [B, T, C], of an encoder."""
    output: Any = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output if isinstance(output, Tensor) else output.logits


def check_finite(model: nn.Module, who: str) -> None:
    """:class:`BadInput` when a weight is NaN or infinite, naming the first: everything after it would be, too."""
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise BadInput(f"{who}: {name} is not finite (NaN or infinity)", hint="fetch or save the model again")


class Teacher:
    """A frozen teacher, loaded when it is first asked something that no cache knows.

    ``vocabulary``: the ids that a student with a trimmed vocabulary has left. The teacher's own rows are then cut
    alike, so that it reads the student's tokens (each is one of its own) and answers over them: its distribution
    conditional on the kept tokens. Nothing else has to know.

    Encoders whose blocks nobody asks for are asked once for each text (:meth:`remember`), decoders once for each token
    where the recipe has a cache (:meth:`remember_tokens`).

    ``precision`` "bf16": its layers run under autocast when it is asked what to teach; ``model`` itself stays fp32.
    """

    def __init__(
        self,
        folder: ModelFolder,
        layers: Sequence[int] = (),
        pad_id: int = 0,
        device: str | torch.device = "cpu",
        vocabulary: Sequence[int] = (),
        precision: str = "fp32",
    ) -> None:
        self.folder = folder
        self.pad_id = pad_id
        self.precision = precision
        self.device = torch.device(device)
        self.vocabulary = tuple(vocabulary)
        self._model: nn.Module | None = None
        self.layers: tuple[int, ...] = ()
        self._kinds: Collection[type] = ()
        self._taps: Taps | None = None
        self._cache: VectorCache | None = None
        self._tokens: TokenCache | None = None
        self._temperature = 1.0
        self.listen(layers)

    @property
    def model(self) -> nn.Module:
        """The model itself, in ``eval()``."""
        return self.load()

    def load(self) -> nn.Module:
        """Load the model unless that is done; a damaged one is named now."""
        if self._model is None:
            self._model = self._load().requires_grad_(False).to(self.device)
            self._tap()
        return self._model

    def release(self) -> None:
        """Give its memory back; it is loaded again should anybody ask."""
        self._model = self._taps = None

    def listen(self, layers: Sequence[int], kinds: Collection[type] = (Hidden,)) -> None:
        """From now on tell what happens in the blocks ``layers`` (one for each block of the student), too.

        ``kinds`` of :data:`.signal.INSIDE`.
        """
        if self._taps is not None:
            self._taps.remove()
        self.layers, self._kinds, self._taps = tuple(layers), tuple(kinds), None
        if self._model is not None:
            self._tap()

    def _tap(self) -> None:
        self._taps = Taps(self.inside, self.layers, self._kinds) if self.layers and self._kinds else None

    @property
    def inside(self) -> nn.Module:
        """The model whose blocks are listened to."""
        return self.model

    def _load(self) -> nn.Module:
        return self._load_one(self.folder)

    def _load_one(self, folder: ModelFolder) -> nn.Module:
        model = load_torch(folder.path)
        if self.vocabulary:
            trim_embeddings(model, self.vocabulary)
        check_finite(model, f"the teacher {folder.path}")
        return model

    @property
    def identity(self) -> str:
        """Names what it says, in keys of caches."""
        return self.folder.model_id

    @property
    def width(self) -> int:
        """Numbers in one hidden state."""
        return self.folder.hidden_size

    @property
    def live(self) -> bool:
        """Whether it reads each batch anew, and no cache answers for it."""
        return self._cache is None and self._tokens is None

    def remember(self, examples: Examples, work: Path, progress: Progress = silent) -> None:
        """Fill the cache of vectors for ``examples`` (resumable), from which :meth:`say` then reads."""
        key = {"teacher": self.identity, "texts": examples.digest(), "pad_id": self.pad_id}
        if self.vocabulary:  # the same numbers would be other words
            key["vocabulary"] = hash_json(self.vocabulary)
        if self.precision != "fp32":
            key["precision"] = self.precision
        width = len(self.folder.labels) or self.folder.hidden_size
        self._cache = VectorCache(work, key, examples.lengths, width)
        self._cache.fill(lambda rows: self.read(examples, rows), progress=progress)

    def remember_tokens(
        self,
        examples: Examples,
        place: Path,
        form: TokenFormat,
        temperature: float,
        progress: Progress = silent,
    ) -> None:
        """Fill the cache of top-k logits for ``examples`` (resumable), from which :meth:`say` then reads.

        ``place``: see :class:`TokenCache`; ``temperature``: the one of ``form`` that the losses ask for.
        """
        tokenizer = hash_file(self.folder.path / "tokenizer.json")
        if self.vocabulary:  # the same numbers would be other words
            tokenizer = hash_json([tokenizer, self.vocabulary])
        dtype = "float32" if self.precision == "fp32" else "bfloat16"
        key = {"teacher": self.identity, "tokenizer": tokenizer, "corpus": examples.digest(), "dtype": dtype}
        cache = TokenCache(place, key, form, examples.lengths)
        cache.fill(lambda rows: self._places(examples, rows, cache.form), progress)
        self._tokens, self._temperature = cache, temperature

    @torch.inference_mode()
    def _places(
        self, examples: Examples, rows: Sequence[int], form: TokenFormat
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Logits and block outputs at the places of ``rows`` that predict (with blocks: at all of them), in chunks."""
        batch = collate([examples[row] for row in rows], self.pad_id)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        said = self._live(batch)
        assert said.final is not None  # text-generation
        assert said.head is not None
        mask = batch["attention_mask"]
        places = mask.bool() if form.layers else torch.nn.functional.pad(predicting(mask), (0, 1))
        states = said.final[places]
        blocks = [block[places] for block in said.blocks or ()]
        size = chunk_rows(form.vocab_size)
        for begin in range(0, len(states), size):
            piece = slice(begin, begin + size)
            yield said.head(states[piece]), tuple(block[piece] for block in blocks)

    def read(self, examples: Examples, rows: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Vectors of the examples ``rows``, computed now, in one batch."""
        batch = collate([examples[row] for row in rows], self.pad_id)
        with torch.inference_mode(), self._computing():
            found: np.ndarray[Any, np.dtype[np.float32]] = (
                vectors(self.model, {name: value.to(self.device) for name, value in batch.items()})
                .float()
                .cpu()
                .numpy()
            )
        return found

    def say(self, batch: Batch) -> Said:
        """What the losses need, for one batch."""
        if self._cache is not None:
            rows = self._cache.rows(batch["index"].cpu().numpy())
            return Said(vectors=torch.from_numpy(rows).to(batch["input_ids"].device))
        if self._tokens is not None:
            return self._remembered(self._tokens, batch)
        with torch.inference_mode():
            said = self._live(batch)
        heard = Heard(said.blocks, said.attention, said.relations).outside()
        # Autograd refuses to save inference tensors, so what a loss will touch is copied out (states, never logits).
        return Said(
            final=_outside(said.final),
            head=said.head,
            vectors=_outside(said.vectors),
            blocks=heard.blocks,
            attention=heard.attention,
            relations=heard.relations,
        )

    def _remembered(self, cache: TokenCache, batch: Batch) -> Said:
        device = batch["input_ids"].device
        rows, mask = batch["index"].cpu().numpy(), batch["attention_mask"].cpu()
        everywhere = predicting(mask)
        learnt = predicting(mask, batch["learn"].cpu() if "learn" in batch else None)
        sparse = cache.sparse(rows, self._temperature, learnt[everywhere].numpy())
        blocks = tuple(state.to(device) for state in cache.hidden(rows)) if cache.form.layers else None
        return Said(sparse=sparse.to(device), blocks=blocks)

    def _computing(self) -> torch.autocast:
        """Around the layers alone: logits of a large vocabulary are noise in bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _live(self, batch: Batch) -> Said:
        model: Any = self.model
        said = Said()
        with self._computing():
            if self.folder.task == "text-generation":
                output = base_model(model)(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                )
                checked = said.final = wide(output.last_hidden_state)
                said.head = model.get_output_embeddings()
            else:
                checked = said.vectors = wide(vectors(model, batch))
        if self._taps is not None:
            heard = self._taps.take()
            said.blocks = None if heard.blocks is None else tuple(wide(block) for block in heard.blocks)
            said.attention, said.relations = heard.attention, heard.relations
        if not bool(torch.isfinite(checked).all()):
            raise BadInput("the teacher's output is not finite (NaN or infinity)", hint="check the teacher's weights")
        return said


def _outside(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
