"""Continue many prompts at once: KV-cached, seeded for each text by itself, by one model or by a mixture of several.

A text's random numbers depend on its own key only, never on what was drawn before, so nothing has to be stored to go
on after a kill, and the texts of a step don't depend on how it is cut into forward passes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints import ModelFolder
from ..errors import BadInput
from ..recipe_teaching import Writing
from .anatomy import base_model
from .ensemble import mixture

__all__ = ["Continuation", "Writer", "choose", "stop_ids"]

Key = tuple[int, ...]


@dataclass(frozen=True)
class Continuation:
    """What was written after one prompt: token ids, with the closing one when the model ended the text itself."""

    ids: tuple[int, ...]
    ended: bool


def stop_ids(folder: ModelFolder, tokenizer: Any, vocabulary: Sequence[int] = ()) -> frozenset[int]:
    """The ids that end a text: the tokenizer's, and the one or the several of the model's config.

    ``vocabulary``: the ids of ``folder``'s model that ``tokenizer`` has left, in its order (empty: all).
    """
    named = folder.config.get("eos_token_id")
    ends = set(named if isinstance(named, list) else [named])
    kept = {ours for ours, theirs in enumerate(vocabulary) if theirs in ends} if vocabulary else ends
    found = {tokenizer.eos_token_id, *kept}
    return frozenset(int(number) for number in found if number is not None)


def choose(log_probs: Tensor, uniforms: Tensor, top_p: float = 1.0, top_k: int | None = None) -> Tensor:
    """Draw one id for each row of ``log_probs`` [B, V] by inverting the distribution function at ``uniforms`` [B].

    ``top_k`` keeps the likeliest k, then ``top_p`` the fewest of them that hold this part of the probability (the
    one that crosses it is kept; nucleus sampling, arXiv 1904.09751). Among equals the lower id comes first.
    """
    probabilities = torch.softmax(log_probs.double(), dim=-1)
    order = None
    if top_p < 1 or top_k is not None:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            probabilities[:, top_k:] = 0
        total = probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = torch.where(before < top_p * total, probabilities, 0.0)
    cumulative = probabilities.cumsum(-1)
    aim = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, aim, right=True)
    # The last id with any probability: rounding must not lead behind it.
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1, keepdim=True)
    place = torch.minimum(place, last)
    return (place if order is None else order.gather(-1, place)).squeeze(-1)


class Writer:
    """Continues prompts with ``models`` (all of one vocabulary), whose next-token probabilities are averaged.

    ``weights`` sum to 1; ``vocab_size`` is the tokenizer's (ids that only pad the embedding are never drawn);
    ``stop`` ends a text. ``whose`` ("student" or "teacher") is named in errors.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        settings: Writing,
        *,
        vocab_size: int,
        stop: Collection[int],
        pad_id: int = 0,
        weights: Sequence[float] = (1.0,),
        whose: str = "student",
    ) -> None:
        self._models: list[Any] = list(models)
        self._weights = tuple(weights)
        self._settings = settings
        self._vocab_size = vocab_size
        self._stop = frozenset(stop)
        self._pad_id = pad_id
        self._whose = whose

    @torch.no_grad()  # not inference_mode: what a model caches in a forward pass must stay usable in training
    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[Key]) -> list[Continuation]:
        """Continue each prompt (one token or more); ``keys`` seed them one by one.

        Prompts are padded on the left while they are read, with positions that start at each one's first token, so
        that every row goes on at the same place of the cache. Raises :class:`BadInput` when a model says NaN.
        """
        device = next(self._models[0].parameters()).device
        limit = self._settings.new_tokens
        draws = np.stack([np.random.default_rng([*key]).random(limit) for key in keys])
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self._pad_id, dtype=torch.long)
        mask = torch.ones((len(prompts), longest + limit), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
            mask[row, : longest - len(prompt)] = 0
        ids, mask = ids.to(device), mask.to(device)
        places = (mask[:, :longest].cumsum(-1) - 1).clamp_min(0)
        written: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # those that are not ended yet
        caches: list[Any] = [None] * len(self._models)
        for step in range(limit):
            log_probs = self._next(ids, mask[:, : longest + step], places, caches)
            chosen = self._draw(log_probs, torch.from_numpy(draws[rows, step]).to(device))
            for row, token in zip(rows, chosen.tolist(), strict=True):
                written[row].append(token)
            going = [at for at, row in enumerate(rows) if written[row][-1] not in self._stop]
            if not going or step + 1 == limit:
                break
            places = places[:, -1:] + 1
            ids = chosen[:, None]
            if len(going) < len(rows):
                kept = torch.tensor(going, device=device)
                ids, mask, places = ids[kept], mask[kept], places[kept]
                rows = [rows[at] for at in going]
                for cache in caches:
                    cache.batch_select_indices(kept)
        return [Continuation(tuple(found), found[-1] in self._stop) for found in written]

    def _next(self, ids: Tensor, mask: Tensor, places: Tensor, caches: list[Any]) -> Tensor:
        """Log-probabilities (up to a constant) [B, V] of the token after ``ids`` [B, T]; moves the caches on."""
        found = []
        for number, model in enumerate(self._models):
            output = base_model(model)(
                input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=caches[number], use_cache=True
            )
            caches[number] = output.past_key_values
            logits = model.get_output_embeddings()(output.last_hidden_state[:, -1])[:, : self._vocab_size]
            if bool(torch.isnan(logits).any()):
                raise BadInput(f"the {self._whose}'s output is not finite (NaN)", hint="check its weights")
            found.append(logits.float())
        temperature = self._settings.sampling_temperature or 1.0
        return found[0] / temperature if len(found) == 1 else mixture(found, self._weights, temperature)

    def _draw(self, log_probs: Tensor, uniforms: Tensor) -> Tensor:
        if self._settings.sampling_temperature == 0:
            return log_probs.argmax(-1)
        return choose(log_probs, uniforms, self._settings.top_p, self._settings.top_k)
