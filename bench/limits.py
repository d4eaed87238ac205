"""The limits that a verdict uses, each with its reason: one table for weights, one for *faithful*, one for *loss*.

*Faithful* limits are tight: they bound what is left between an artifact in its runtime and torch running the same
stored weights with the same activation quantisation, that is the order of summation, half precision inside kernels,
and codes that round the other way. *Loss* ceilings are wide: they reject garbage, and a recipe's gates say what is
good enough. Figures in the reasons were measured on MiniLM-L6 and SmolLM2-135M, with and without a defect put in.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..artifact import Format, Manifest, StoredTensor
from ..grids import ggml_grid

__all__ = [
    "GRID_LIMITS",
    "Activation",
    "Ceiling",
    "Faithful",
    "GridLimit",
    "Noise",
    "activation_of",
    "ceiling_for",
    "compensated_limit",
    "faithful_for",
    "grid_limit",
    "half_cache",
    "is_budget",
]

Activation = str
"""What happens to the input of a matrix product: ``none``, ``float16`` (output too), ``float16-in``, ``float16-maybe``
(where the processor has such kernels; not simulated), ``bfloat16-in``, ``uint8-tensor``, ``int8-bN`` (blocks of N),
``uint8-static`` (a fixed grid in the payload), ``q8_0``, ``q8_k``."""


@dataclass(frozen=True)
class GridLimit:
    """How far a stored weight may lie from the float one, in steps of its grid.

    The step of a block is its largest magnitude over ``2**(bits-1) - 1``, the coarsest that a sane quantiser uses.
    ``largest`` bounds every weight, ``rms`` the root mean square over a tensor (rounding alone gives 0.29). ``block``
    0 is a row, -1 the tensor. Where ``bits`` is 0 the grid is floating point and ``relative`` bounds the error
    against the weight itself (beside ``absolute``, for subnormal numbers). K-quants keep the scales of their blocks as
    integers, shared by 256 weights: a small block beside a large one gets a coarse scale, so ``outer`` times the
    largest magnitude of the 256 is added to its step. A GGML scale is a float16, whose smallest step is 2**-24: what
    that does to the largest code is ``absolute``, which is added too. ``rows`` share a block (-1: all). A ``palette``
    has values where they are needed, not at equal distances: each weight must lie on the nearest value of its table,
    of which there are ``2**bits``, and ``rms`` still bounds what k-means leaves. Of a ``sparse`` tensor that many
    percent may be 0, the smallest ones; what is kept is judged by the rest.
    """

    bits: int = 0
    block: int = 0
    largest: float = 1.1
    rms: float = 0.5
    relative: float = 0.0
    absolute: float = 0.0
    outer: float = 0.0
    rows: int = 1
    palette: bool = False
    sparse: int = 0


_HALF = GridLimit(relative=2**-11 * 1.001, absolute=2**-24)  # of subnormal numbers, whatever way they are rounded
_BRAIN = GridLimit(relative=2**-8)
_EXACT = GridLimit()


def _ggml(bits: int, **changes: Any) -> GridLimit:
    """A GGML type with one float16 scale for 32 weights."""
    return GridLimit(bits, 32, absolute=2.0 ** (bits - 25), **changes)


def _k_quant(bits: int, block: int, scales: int, rms: float = 0.75) -> GridLimit:
    """A K-quant, whose integer scales go up to ``scales``. Both they and the codes are searched for the least squared
    error, so that extremes may be clipped."""
    absolute = scales * 2.0 ** (bits - 25)
    return GridLimit(bits, block, largest=4.0, rms=rms, absolute=absolute, outer=1 / scales)


GRID_LIMITS: Mapping[str, GridLimit] = {
    "float32": _EXACT, "f32": _EXACT, "float16": _HALF, "f16": _HALF, "bfloat16": _BRAIN, "bf16": _BRAIN,
    # Of other tools: codes with a scale along either axis, or one.
    "folded8-channel": GridLimit(7, -1), "folded8-tensor": GridLimit(7, -1),
    "dynamic8-channel": GridLimit(7, -1), "dynamic8-tensor": GridLimit(7, -1),
    "int8": GridLimit(7, -1),  # ONNX MatMulInteger: a scale a tensor or a row, 7 or 8 bits
    "int8-static": GridLimit(7),  # the same with a scale a row, and a fixed grid for the input
    "q8_0": _ggml(8), "q5_0": _ggml(5), "q5_1": _ggml(5), "q4_0": _ggml(4), "q4_1": _ggml(4),
    "iq4_nl": _ggml(4, largest=4.0, rms=0.75), "iq4_xs": _k_quant(4, 32, 31), "q2_k": _k_quant(2, 16, 15, 0.4),
    "q3_k": _k_quant(3, 16, 31), "q4_k": _k_quant(4, 32, 63), "q5_k": _k_quant(5, 32, 63),
    "q6_k": _k_quant(6, 16, 127),
    # Code books: vectors of eight (or four) values stand for each other, weighed by what the inputs make of them.
    "iq3_s": _k_quant(3, 32, 31), "iq3_xxs": _k_quant(3, 32, 31), "iq2_s": _k_quant(2, 16, 31, 0.5),
    "iq2_xs": _k_quant(2, 16, 31, 0.5), "iq2_xxs": _k_quant(2, 32, 31, 0.5), "iq1_m": _k_quant(2, 16, 15, 0.5),
    "iq1_s": _k_quant(2, 32, 15, 0.5),
    # -1, 0, 1 (and 2) times the scale of a block: of a weight not trained so, little more than the sign is left.
    "tq2_0": GridLimit(2, 256, absolute=2.0**-23), "tq1_0": GridLimit(2, 256, absolute=2.0**-23),
    "q2_0": GridLimit(2, 64, rms=0.6, absolute=2.0**-23), "q1_0": GridLimit(2, 128, rms=0.6, absolute=2.0**-23),
}  # fmt: skip


def grid_limit(grid: str) -> GridLimit | None:
    """The limit of a grid: one of :data:`GRID_LIMITS`, ``intB-bN`` (blocks of N in a row), ``intB-channel`` (a scale
    a row), ``palB`` (a table), ``palB-gN`` (a table for N rows), ``sparseP`` or ``sparseP-`` and one of these; ``None``
    for an unknown one.

    ``intB-bN-search``: the range of a block is cut to 0.6 of its own at most. ``intB-bN-gptq``: codes make up for each
    other's errors, so that a single weight may be anywhere in its block's range (13.8 steps off were seen); the tensor
    as a whole may not (0.23 to 0.42 steps in the mean square were seen on SmolLM2 in 4 bits).
    """
    if grid in GRID_LIMITS:
        return GRID_LIMITS[grid]
    if sparse := re.fullmatch(r"sparse(\d{1,2}|100)(?:-((?:int|pal).+))?", grid):
        kept = grid_limit(sparse[2]) if sparse[2] else _HALF
        return dataclasses.replace(kept, sparse=int(sparse[1])) if kept else None
    if palette := re.fullmatch(r"pal([1-8])(?:-g([1-9]\d*))?", grid):
        return GridLimit(int(palette[1]), 0, rows=int(palette[2] or -1), palette=True)
    found = re.fullmatch(r"int([2-8])-(?:b([1-9]\d*)(-search|-gptq)?|channel)", grid)
    if not found:
        return None
    bits, block, how = int(found[1]), int(found[2] or 0), found[3]
    absolute = 2.0 ** (bits - 25)  # scales in float16, whose smallest step is 2**-24
    if how == "-search":
        return GridLimit(bits, block, largest=0.4 * ((1 << bits - 1) - 1) + 1.1, rms=0.6, absolute=absolute)
    if how == "-gptq":
        return GridLimit(bits, block, largest=2.0 * (1 << bits - 1), rms=1.0, absolute=absolute)
    return GridLimit(bits, block, absolute=absolute if block else 0.0)


def compensated_limit(limit: GridLimit) -> GridLimit:
    """The limit where each code was moved to make up for the errors of those before it (the exporter's choice under a
    byte budget, GPTQ): weights then lie some steps from the float ones, on purpose, so that the outputs stay.

    Seen on a tiny random model: up to 2.2 steps, and a root mean square of 0.41. A row in another's place is 4 steps
    off in the mean at 4 bits, and far more at 8. Two bits leave no room between the two.
    """
    if not limit.bits:
        return limit
    return dataclasses.replace(limit, largest=max(10.0, limit.largest), rms=1.5 if limit.bits > 2 else 0.65)


@dataclass(frozen=True)
class Noise:
    """What noise in the last bits does to the dequantised student itself: ``mean`` and ``largest`` divergence (KL in
    nats, or 1 − cosine), and the share of first choices that change. Codes that sit on an edge round the other way and
    the difference grows from layer to layer, so this depends on the model, not only on the format."""

    mean: float = 0.0
    largest: float = 0.0
    disagreement: float = 0.0


@dataclass(frozen=True)
class Faithful:
    """Limits against the dequantised student: ``divergence`` is the mean KL (nats) or the largest 1 − cosine,
    ``agreement`` the least share of equal first choices, ``parity`` bounds prefill against decode and a row alone
    against the same row in a padded batch (largest KL or 1 − cosine). ``most`` is how far :meth:`for_noise` may go."""

    divergence: float
    agreement: float
    parity: float
    most: float
    reason: str

    def for_noise(self, noise: Noise) -> Faithful:
        """Wider for a model that amplifies noise: 3 times what last-bit noise does, but never over ``most``.

        Artifacts without a defect were seen at 0.2 to 1.2 times their noise: MiniLM at 1.4e-4 of 2.2e-4, SmolLM2 in
        Q8_0 at 0.0040 of 0.0045 and in dynamic int8 at 0.071 of 0.067 nats, since its activation outliers (up to
        2,824) leave all but a few codes to the rest.
        """
        own = 3 * max(noise.mean, 0.0)
        if own <= self.divergence and 3 * noise.largest <= self.parity:
            return self
        return dataclasses.replace(
            self,
            divergence=max(self.divergence, min(own, self.most)),
            parity=max(self.parity, min(3 * noise.largest, 20 * self.most)),
            agreement=min(self.agreement, 1 - min(3 * noise.disagreement, 0.25)),
            reason=f"{self.reason}; this model turns last-bit noise into {noise.mean:.2g}, 3 times that is allowed",
        )


@dataclass(frozen=True)
class Ceiling:
    """Loss ceilings against the float student: mean KL, perplexity ratio, mean 1 − cosine; ``None``: not judged."""

    kl: float
    perplexity_ratio: float
    cosine_distance: float
    reason: str


_FP32 = Faithful(1e-5, 0.99, 1e-5, 1e-4, "float32 on both sides: only the order of summation differs")
_FP16 = Faithful(1e-3, 0.97, 2e-3, 1e-2, "half precision between the kernels: rounding of 2**-11 in every activation")
_BLOCKS = Faithful(1e-3, 0.97, 2e-3, 5e-2, "activations in int8 blocks, as simulated")
_DYNAMIC = Faithful(5e-3, 0.95, 1.0, 2e-1, "one activation range for a whole batch, as simulated; a row depends on "
                    "the rows beside it")  # fmt: skip
_STATIC = Faithful(2e-3, 0.97, 5e-3, 1e-1, "activations on fixed grids, as simulated: codes on an edge may round the "
                   "other way")  # fmt: skip
_LLAMA_FLOAT = Faithful(1e-4, 0.98, 1e-3, 1e-3, "float weights; key/value cache and GELU's table in float16")
_LLAMA_CPP = Faithful(1e-3, 0.97, 2e-3, 5e-2, "activations in q8 blocks as simulated, key/value cache in float16")
# 1 - cosine of embeddings is some hundred times smaller than the KL of logits for the same noise.
_OF_EMBEDDINGS = 0.01
_LEAST_OF_EMBEDDINGS = 1e-5  # half precision anywhere: MiniLM in F16 is 2e-6 off in llama.cpp, 7e-7 in Core ML


def faithful_for(manifest: Manifest, activations: frozenset[Activation]) -> Faithful:
    """The limits of an artifact, by the coarsest activation that its weights bring with them."""
    limits = _by_activation(manifest, activations)
    if manifest.task == "feature-extraction":
        least = 0.0 if limits is _FP32 else _LEAST_OF_EMBEDDINGS
        scaled = max(limits.divergence * _OF_EMBEDDINGS, least)
        return dataclasses.replace(limits, divergence=scaled, parity=limits.parity / 10, most=limits.most / 10)
    return limits


def _by_activation(manifest: Manifest, activations: frozenset[Activation]) -> Faithful:
    if "uint8-tensor" in activations:
        return _DYNAMIC
    if "uint8-static" in activations:
        return _STATIC
    if manifest.format == "gguf":
        return _LLAMA_CPP if activations & {"q8_0", "q8_k"} else _LLAMA_FLOAT
    if any(kind.startswith("int8-b") for kind in activations):
        return _BLOCKS
    half = activations & {"float16", "float16-in", "float16-maybe"}
    stateful = manifest.format == "coreml" and manifest.task == "text-generation"  # states are float16 in any precision
    if stateful or half or half_cache(manifest):
        return _FP16
    return _FP32


def half_cache(manifest: Manifest) -> bool:
    """Whether keys and values are kept in float16: in llama.cpp, and in ONNX where the graph's past has that type."""
    pasts = {spec.dtype for spec in manifest.inputs if spec.name.startswith("past_key_values.")}
    return manifest.format == "gguf" or pasts == {"float16"}


_GGUF_FLOATS: Mapping[str, Activation] = {"f32": "none", "f16": "float16-in", "bf16": "bfloat16-in"}


def activation_of(form: Format, tensor: StoredTensor) -> Activation:
    """What the runtime does to the input of a matrix product with this stored weight.

    ONNX: MatMulInteger takes uint8 with one range a tensor (DynamicQuantizeLinear), a product between QDQ pairs uint8
    with the range that stands in the graph, MatMulNBits at accuracy level 4
    int8 in blocks of its own block size. Without fp16 kernels (x86) ONNX Runtime drops the casts of an fp16 graph and
    computes in float32: SmolLM2 is then 2e-5 nats from its weights in torch, and 0.004 with the rounding simulated.
    llama.cpp converts the input to the weight type's ``vec_dot_type`` (ggml-cpu.c): q8_0 for the types of small
    blocks, q8_K for the 256-wide, fp16 for f16, bfloat16 for bf16. Core ML decompresses weights before it
    computes, in fp16.
    """
    grid = tensor.grid
    if form == "onnx":
        if grid == "int8" or grid.startswith("dynamic8"):
            return "uint8-tensor"
        if grid == "int8-static":
            return "uint8-static"
        if grid.startswith("int"):
            return f"int8-{grid.split('-')[1]}"
        return "float16-maybe" if grid == "float16" else "none"
    if form == "gguf":
        if grid in _GGUF_FLOATS:
            return _GGUF_FLOATS[grid]
        return "q8_k" if ggml_grid(grid).elements == 256 else "q8_0"
    return "float16" if form == "coreml" and grid != "float32" else "none"


_CEILINGS: tuple[tuple[tuple[str, ...], Ceiling], ...] = (
    (("fp32", "f32"), Ceiling(1e-4, 1.001, 1e-4, "nothing is quantised")),
    (("fp16", "f16", "bf16"), Ceiling(0.01, 1.02, 1e-3, "float16 costs about 1e-5 nats")),
    (("q8_0", "int8", "pal8"), Ceiling(0.1, 1.15, 0.02, "8-bit blocks cost about 0.005 nats")),
    (("q6_k", "q5_k_m", "q5_k_s", "q5_0", "q5_1", "pal6"), Ceiling(0.2, 1.3, 0.03, "5 and 6 bits cost about "
     "0.02 nats")),
    (("q4_k_m", "q4_k_s"), Ceiling(0.5, 1.6, 0.06, "4-bit K-quants cost about 0.05 nats")),
    (("q4_0", "q4_1", "iq4_nl", "iq4_xs", "int4", "pal4"), Ceiling(1.0, 2.5, 0.1, "4-bit blocks cost about 0.4 nats on "
     "a 135M model")),
    (("q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "q2_k"), Ceiling(2.0, 6.0, 0.2, "3 bits "
     "cost about 0.5 nats on a 135M model")),
    (("q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"), Ceiling(5.0, 150.0, 0.5, "1 and 2 bits are "
     "for large models: a small one keeps little")),
    (("tq2_0", "tq1_0", "q2_0", "q1_0"), Ceiling(10.0, 1e5, 1.0, "one and two bits without a search are for models "
     "trained to have them; others keep little more than signs")),
    (("int8-static",), Ceiling(0.2, 1.3, 0.03, "what costs most is kept in blocks, to stay below 0.05 nats on "
     "calibration text")),
    (("int8-dynamic", "int8-dynamic-per-channel"), Ceiling(1.5, 4.0, 0.1, "dynamic int8 costs about 0.6 nats; the "
     "saturating one 13.7")),
    (("pal3", "pal2", "sparse"), Ceiling(2.0, 6.0, 0.2, "small tables and pruning need training to be good: "
     "only garbage is refused")),
)  # fmt: skip
_BUDGETED = Ceiling(2.0, 6.0, 0.2, "a byte budget: what it costs is told in its contents; only garbage is refused")
_WIDEST = Ceiling(2.0, 6.0, 0.2, "unknown quantisation: only garbage is refused")


def ceiling_for(quantisation: str) -> Ceiling:
    """The default ceilings of a quantisation; options after the family's name (``int4-b16-gptq``) keep its own."""
    quantisation = quantisation.removesuffix("-portable").removesuffix("-imatrix")  # the same grids
    if is_budget(quantisation):
        return _BUDGETED
    known = {name: ceiling for names, ceiling in _CEILINGS for name in names}
    if quantisation in known:
        return known[quantisation]
    family = quantisation.partition("-")[0]
    family = "sparse" if family.startswith("sparse") else family
    return known.get(family, _WIDEST) if family in ("int4", "int8", "sparse") or family[:3] == "pal" else _WIDEST


def is_budget(quantisation: str) -> bool:
    """Whether a manifest's quantisation is a size, ``"60MB"``: the types were chosen, the codes compensated."""
    return re.fullmatch(r"[\d.]+(?:MB|MiB)", quantisation) is not None
