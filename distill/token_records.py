"""What a teacher said of one token, in a few bytes: the k likeliest tokens, and exactly how much all others weigh.

The record of a token (:attr:`TokenFormat.dtype`, little endian):

=====================  ===============  =========================================================================
``ids``                u16, k           the k likeliest tokens, likeliest first; of a vocabulary above 65,536 tokens
                                        u8 [n], ascending, coded by :mod:`edgestill.sorted_ids`
``offsets``            u16, k           largest logit − logit, as a fraction of ``range`` in 1/65,534; 65,535: −inf
``range``              f32              largest finite offset of the k
``top``                f32              the largest logit
``log_normaliser``     f32              log Σ exp(logit) over the vocabulary, at temperature 1
``tail``               f32, a T         log-probability of all tokens but the k, at each temperature T asked for
``sampled_ids``        u16/u32, T x m   m tokens drawn from the tail at T, with replacement (m may be 0)
``sampled_log_probs``  f32, T x m       their log-probabilities at T, over the whole vocabulary
``hidden``             f16, L x D       outputs of L blocks (none by default)
=====================  ===============  =========================================================================

k = 64 and one temperature: 272 bytes a token (250 over 151,665 tokens, whose ids are coded), 4 more for each further
temperature, 2·D more for each block.

The tail at T comes from the full logits: it can't be had later from masses at T = 1. So the k+1 buckets (k tokens and
"any other") are the teacher's own distribution, coarsened, at each stored temperature. Precision: an offset is off by
at most ``range``/131,068; the k are then normalised to exactly 1 − tail, so that a KL between buckets is one between
two distributions and never negative. Measured (vocabulary 49,152, k = 64, 200 tokens of a Zipf-like teacher, KL 0.1
nats): a token's KL changes by 1e-6 to 4e-6 nats on average, 5e-5 at most at T = 1 and 7e-6 at T = 2; fp16 offsets,
which take the same bytes, cost three to twenty times that, fp16 logits more.

Plain top-k is biased (arXiv 2503.16870, which draws tail tokens too).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from ..sorted_ids import coded_bytes, decode_sets, encode_sets
from .signal import Sparse
from .store import Records

__all__ = ["CODED_IDS", "TokenFormat", "capture", "decode"]

STEPS = 65534
RULED_OUT = 65535
SMALL_VOCABULARY = 1 << 16
CODED_IDS = "elias-fano"


@dataclass(frozen=True)
class TokenFormat:
    """What is kept of each token. ``vocab_size`` is the tokenizer's; ``width`` numbers in a hidden state.

    ``plain_ids``: ids of a large vocabulary are u32, as caches had them before they were coded; still read.
    """

    vocab_size: int
    top_k: int = 64
    temperatures: tuple[float, ...] = (1.0,)
    tail_samples: int = 0
    layers: tuple[int, ...] = ()
    width: int = 0
    plain_ids: bool = False

    @property
    def coded(self) -> bool:
        """Whether the ids of a token are kept in ascending order, coded."""
        return self.vocab_size > SMALL_VOCABULARY and not self.plain_ids

    @property
    def kept(self) -> int:
        """Tokens kept, at most the vocabulary."""
        return min(self.top_k, self.vocab_size)

    @property
    def samples(self) -> int:
        """Tokens drawn from the tail at each temperature; none where there is no tail."""
        return self.tail_samples if self.kept < self.vocab_size else 0

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The packed record."""
        number = "<u2" if self.vocab_size <= SMALL_VOCABULARY else "<u4"
        k, count = self.kept, len(self.temperatures)
        ids = ("ids", "u1", (coded_bytes(k, self.vocab_size),)) if self.coded else ("ids", number, (k,))
        fields: list[tuple[Any, ...]] = [
            ids, ("offsets", "<u2", (k,)), ("range", "<f4"), ("top", "<f4"),
            ("log_normaliser", "<f4"), ("tail", "<f4", (count,)),
        ]  # fmt: skip
        if self.samples:
            shape = (count, self.samples)
            fields += [("sampled_ids", number, shape), ("sampled_log_probs", "<f4", shape)]
        if self.layers:
            fields.append(("hidden", "<f2", (len(self.layers), self.width)))
        return np.dtype(fields)

    @property
    def facts(self) -> dict[str, Any]:
        """What a header says of it."""
        return {
            "vocab_size": self.vocab_size, "top_k": self.kept, "temperatures": list(self.temperatures),
            "tail_samples": self.samples, "layers": list(self.layers), "width": self.width if self.layers else 0,
            **({"ids": CODED_IDS} if self.coded else {}),
        }  # fmt: skip

    def place(self, temperature: float) -> int:
        """Where a temperature stands among the stored ones; :class:`BadInput` when it is not one of them."""
        if temperature not in self.temperatures:
            there = ", ".join(f"{value:g}" for value in self.temperatures)
            raise BadInput(
                f"the teacher cache holds temperature {there}, not {temperature:g}",
                hint="a tail can't be computed afterwards: name it in [distill.cache] temperatures and fill anew",
            )
        return self.temperatures.index(temperature)


def capture(
    logits: Tensor, form: TokenFormat, generators: tuple[torch.Generator, ...] = (), hidden: tuple[Tensor, ...] = ()
) -> Records:
    """Records ``[n]`` of ``logits`` [n, V or more]; what stands behind ``vocab_size`` is padding and cut off.

    ``generators``: one a temperature, drawn from when the format has tail samples. ``hidden``: L tensors [n, D].
    Raises :class:`BadInput` for NaN or +infinity, and for a hidden state that fp16 can't hold.
    """
    wide = logits[:, : form.vocab_size].float()
    values, ids = wide.topk(form.kept, dim=-1)
    top = values[:, :1]
    # topk puts NaN first, so the largest value shows all that must not be there.
    if not bool(torch.isfinite(top).all()):
        raise BadInput("the teacher's logits are not finite (NaN or infinity)", hint="check the teacher's weights")
    if form.coded:
        ids, order = ids.sort(dim=-1)
        values = values.gather(-1, order)
    records = np.zeros(len(wide), dtype=form.dtype)
    offsets = (top - values).double()
    ruled_out = torch.isinf(offsets)
    span = torch.where(ruled_out, 0.0, offsets).amax(-1, keepdim=True).float()
    scaled = torch.where(ruled_out, RULED_OUT, (offsets / span.double().clamp_min(1e-30) * STEPS).round())
    records["ids"] = encode_sets(_numpy(ids), form.vocab_size) if form.coded else _numpy(ids)
    records["offsets"] = _numpy(scaled)
    records["range"] = _numpy(span[:, 0])
    records["top"] = _numpy(top[:, 0])
    centred = wide - top
    records["log_normaliser"] = _numpy(centred.logsumexp(-1).double() + top[:, 0].double())
    for number, temperature in enumerate(form.temperatures):
        rest = (centred / temperature).scatter_(-1, ids, -math.inf)
        log_rest = rest.logsumexp(-1).double()
        log_top = (-offsets / temperature).logsumexp(-1)
        tail = torch.nn.functional.logsigmoid(log_rest - log_top)
        records["tail"][:, number] = _numpy(tail)
        if form.samples:
            drawn, log_probs = _draw(rest, log_rest, tail, form.samples, generators[number])
            records["sampled_ids"][:, number] = _numpy(drawn)
            records["sampled_log_probs"][:, number] = _numpy(log_probs)
    for number, states in enumerate(hidden):
        with np.errstate(over="ignore"):
            records["hidden"][:, number] = _numpy(states.float())
    if hidden and not np.isfinite(records["hidden"]).all():
        raise BadInput(
            "a hidden state of the teacher does not fit fp16", hint="leave [distill.cache] out: live teacher"
        )
    return records


def _draw(
    rest: Tensor, log_rest: Tensor, tail: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``count`` tokens [n, m] of the tail ``rest`` (log-weights), and their log-probabilities overall."""
    empty = torch.isinf(log_rest)  # nothing but ruled-out tokens: any will do, with probability 0
    weights = torch.softmax(torch.where(empty[:, None], 0.0, rest), dim=-1)
    drawn = torch.multinomial(weights.cpu(), count, replacement=True, generator=generator).to(rest.device)
    inside = rest.gather(-1, drawn).double() - log_rest[:, None]
    return drawn, torch.where(empty[:, None], -math.inf, inside + tail[:, None])


def decode(records: Records, form: TokenFormat, temperature: float) -> Sparse:
    """The :class:`Sparse` signal of ``records`` [N] at a stored ``temperature``."""
    place = form.place(temperature)
    tail = torch.from_numpy(records["tail"][:, place].astype(np.float32))
    coarse = torch.from_numpy(records["offsets"].astype(np.float32))
    step = torch.from_numpy(records["range"] / np.float32(STEPS * temperature))[:, None]
    scaled = torch.where(coarse == RULED_OUT, -math.inf, -coarse * step)
    inside = torch.log(-torch.expm1(tail))  # of the k together
    log_probs = scaled + (inside - scaled.logsumexp(-1))[:, None]
    sampled: dict[str, Tensor] = {}
    if form.samples:
        sampled = {
            "sampled_ids": torch.from_numpy(records["sampled_ids"][:, place].astype(np.int64)),
            "sampled_log_probs": torch.from_numpy(records["sampled_log_probs"][:, place].astype(np.float32)),
        }
    stored = records["ids"]
    ids = decode_sets(stored, form.kept, form.vocab_size) if form.coded else stored.astype(np.int64)
    return Sparse(torch.from_numpy(ids), log_probs, tail, temperature, form.vocab_size, **sampled)


def _numpy(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    found: np.ndarray[Any, np.dtype[Any]] = tensor.cpu().numpy()
    return found
