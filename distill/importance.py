"""What each layer, FFN neuron and attention head is worth, measured on text; deterministic.

Three measures (the larger, the more it is needed):

* block influence of a layer, ``1 - cos(in, out)``, mean over tokens (ShortGPT, arXiv 2403.03853): a layer that hardly
  turns its input is hardly missed;
* activation magnitude (Minitron, arXiv 2407.14679): mean ``|a|`` of a neuron's activation before the FFN's last
  matrix, mean length of a head's output before the output projection;
* first-order Taylor, ``|w * dL/dw|``: summed over all weights of a layer (Shortened LLaMA, arXiv 2402.02834); for a
  neuron or a head the sign is kept within the weights that carry its output, ``|sum(w * dL/dw)|``: exactly the
  first-order change of the loss when the neuron is set to zero.

``L`` is the text's own cross-entropy for a decoder. An encoder's text has no label; there ``L`` is the output's product
with fixed random signs, whose expected squared gradient is that of the whole output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..checkpoints import ModelFolder, load_torch
from ..errors import BadInput
from ..progress import Progress, silent
from .anatomy import SLICES, Slice, base_model, blocks, find_module, head_size, teacher_widths
from .batches import Batch, Examples, collate
from .chunked import chunked_head
from .losses import shift
from .teacher import vectors

__all__ = ["MOST_EXAMPLES", "MOST_TOKENS", "Importance", "best", "calibration_batches", "measure_importance"]

MOST_EXAMPLES = 512
MOST_TOKENS = 16_384
BATCH_SIZE = 8
SIGNS_SEED = 0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Importance:
    """Scores of a model of L layers: ``layers`` [L], ``neurons`` [L, F], ``queries`` [L, heads].

    ``layer_measure`` and ``width_measure`` say what they are; scores of different measures can't be compared.
    """

    layers: Floats
    neurons: Floats
    queries: Floats
    layer_measure: Literal["block_influence", "taylor"]
    width_measure: Literal["activation", "taylor"]
    tokens: int


def calibration_batches(examples: Examples, pad_id: int, most_tokens: int = MOST_TOKENS) -> list[Batch]:
    """The first examples, up to :data:`MOST_EXAMPLES` and about ``most_tokens``, in batches of eight."""
    chosen: list[int] = []
    tokens = 0
    for number in range(min(len(examples), MOST_EXAMPLES)):
        if tokens >= most_tokens:
            break
        tokens += len(examples.ids[number])
        chosen.append(number)
    if not chosen:
        raise BadInput(
            "no text to measure importance on", hint="set `calibration` or `train` in a [[data.text]] of the recipe"
        )
    parts = [chosen[begin : begin + BATCH_SIZE] for begin in range(0, len(chosen), BATCH_SIZE)]
    return [collate([examples[number] for number in part], pad_id) for part in parts]


def measure_importance(
    folder: ModelFolder, batches: Sequence[Batch], *, taylor: bool = False, progress: Progress = silent
) -> Importance:
    """Scores of the model in ``folder`` on ``batches``: Taylor's, or block influence and activation magnitude.

    Raises :class:`~edgestill.errors.BadInput` when a score is not finite.
    """
    model = load_torch(folder.path)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    found = (
        _taylor(model, folder, batches, progress) if taylor else _forward_only(model, folder, batches, tokens, progress)
    )
    layers, neurons, queries = (np.array(part.double().numpy()) for part in found)
    if not all(np.isfinite(part).all() for part in (layers, neurons, queries)):
        raise BadInput("the teacher's importance scores are not finite (NaN or infinity)", hint="check its weights")
    if taylor:
        return Importance(layers, neurons, queries, "taylor", "taylor", tokens)
    return Importance(layers, neurons, queries, "block_influence", "activation", tokens)


def _forward_only(
    model: nn.Module, folder: ModelFolder, batches: Sequence[Batch], tokens: int, progress: Progress
) -> tuple[Tensor, Tensor, Tensor]:
    widths, size = teacher_widths(folder), head_size(folder)
    layers = torch.zeros(folder.layers, dtype=torch.float64)
    neurons = torch.zeros(folder.layers, widths.ffn, dtype=torch.float64)
    queries = torch.zeros(folder.layers, widths.heads, dtype=torch.float64)
    real = torch.zeros(0)  # the mask of the batch at work, set below

    def influence(index: int, state: Tensor, out: Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(state[real].double(), out[real].double(), dim=-1)
        layers[index] += (1 - cosine).sum()

    def activation(index: int, state: Tensor, _: Tensor) -> None:
        # DistilBERT's FFN is run on [B, T, F] like all others; a flattened [B * T, F] would do, too.
        neurons[index] += state.reshape(*real.shape, -1)[real].abs().double().sum(0)

    def head(index: int, state: Tensor, _: Tensor) -> None:
        rows = state.reshape(*real.shape, -1)[real]
        queries[index] += rows.reshape(len(rows), -1, size).double().norm(dim=-1).sum(0)

    handles = []
    for index, layer in enumerate(blocks(model)):
        handles.append(_watch(layer, index, influence))
        handles.append(_watch(layer.get_submodule(find_module(model, "ffn", 1)), index, activation))
        handles.append(_watch(layer.get_submodule(find_module(model, "query", 1)), index, head))
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            progress("measure importance", number / len(batches))
            real = batch["attention_mask"].bool()
            base_model(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    return layers / tokens, neurons / tokens, queries / tokens


def _watch(module: nn.Module, index: int, note: Callable[[int, Tensor, Tensor], None]) -> Any:
    def hook(_: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        state = inputs[0] if inputs else named["hidden_states"]
        note(index, state, output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(hook, with_kwargs=True)


def _taylor(
    model: nn.Module, folder: ModelFolder, batches: Sequence[Batch], progress: Progress
) -> tuple[Tensor, Tensor, Tensor]:
    """Means over batches, each batch's loss being the mean over its tokens or examples."""
    size = head_size(folder)
    ffn, query = find_module(model, "ffn", 1), find_module(model, "query", 1)
    table = SLICES[folder.architecture]
    sums: list[list[Tensor]] = [[], [], []]
    for number, batch in enumerate(batches):
        progress("measure importance", number / len(batches))
        model.zero_grad(set_to_none=True)
        _loss(model, folder, batch).backward()
        rows: list[list[Tensor]] = [[], [], []]
        for layer in blocks(model):
            products = [w.detach().double() * w.grad.double() for w in layer.parameters() if w.grad is not None]
            rows[0].append(torch.stack([part.abs().sum() for part in products]).sum())
            rows[1].append(_columns(layer, ffn, table[ffn]).abs())
            rows[2].append(_columns(layer, query, table[query]).reshape(-1, size).sum(1).abs())
        for total, row in zip(sums, rows, strict=True):
            stacked = torch.stack(row) / len(batches)
            total[:] = [total[0] + stacked] if total else [stacked]
    return sums[0][0], sums[1][0], sums[2][0]


def _columns(layer: nn.Module, name: str, part: Slice) -> Tensor:
    """``sum(w * dL/dw)`` of each column of a layer's matrix."""
    weight: Any = layer.get_submodule(name).weight
    product: Tensor = (weight.detach().double() * weight.grad.double()).sum(1 - part.stored_axis)
    return product


def _loss(model: nn.Module, folder: ModelFolder, batch: Batch) -> Tensor:
    inner: Any = model
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if folder.task == "text-generation":
        states, following = shift(base_model(model)(input_ids=ids, attention_mask=mask).last_hidden_state, ids, mask)

        def chunk(logits: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
            value = torch.nn.functional.cross_entropy(logits, following[begin:end], reduction="sum")
            return value, value.detach()[None]

        return chunked_head(states, inner.get_output_embeddings(), chunk)[0] / max(1, len(following))
    output = vectors(model, batch)
    if folder.task == "token-classification":
        output = output[mask.bool()]
    chooser = torch.Generator().manual_seed(SIGNS_SEED)
    signs = torch.randint(0, 2, output.shape, generator=chooser).to(output.dtype) * 2 - 1
    return (output * signs).sum(-1).mean()


def best(scores: Floats, count: int) -> tuple[int, ...]:
    """The ``count`` positions with the highest ``scores``, ascending; of equal ones the first.

    >>> best(np.array([0.5, 2.0, 0.5, 1.0]), 3)
    (0, 1, 3)
    """
    return tuple(sorted(np.argsort(-scores, kind="stable")[:count].tolist()))
