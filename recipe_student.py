"""``[student]``: what the student is made of, before it learns anything."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from .recipe_base import Positive, PositiveFloat, Sha256, Source, Strict

__all__ = ["BYTES_PER_WEIGHT", "StudentConfig", "TargetConfig"]

Precision = Literal["fp32", "fp16", "int8", "int4"]

# Scales of blocks of 32 weights included: one fp16 scale (int8), one fp16 scale and one fp16 offset (int4).
BYTES_PER_WEIGHT: dict[Precision, float] = {"fp32": 4.0, "fp16": 2.0, "int8": 1 + 2 / 32, "int4": 0.5 + 4 / 32}


class TargetConfig(Strict):
    """`[student.target]`: how small the student must become; one of `parameters`, `bytes`, `fraction`, `latency_ms`.

    What `[student]` fixes stays fixed. The rest is cut in the order that costs least accuracy: FFN neurons first, down
    to half of the teacher's, then layers (arXiv 2407.14679), each no further than the target asks.
    """

    parameters: Positive | None = None
    """most parameters, embeddings included."""
    bytes: Positive | None = None
    """most bytes of all weights, each stored at `precision`."""
    precision: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    """what `bytes` counts a weight as, block scales included."""
    fraction: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    """most parameters, as a share of the teacher's."""
    latency_ms: PositiveFloat | None = None
    """most milliseconds of one forward pass of `[bench] length` tokens in torch, measured here on `[bench] threads`."""

    def most_parameters(self, teacher: int) -> int | None:
        """The limit in parameters, for a teacher of so many; ``None`` for a latency."""
        if self.bytes is not None:
            return int(self.bytes / BYTES_PER_WEIGHT[self.precision])
        if self.fraction is not None:
            return int(self.fraction * teacher)
        return self.parameters

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [k for k in ("parameters", "bytes", "fraction", "latency_ms") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError("give one of `parameters`, `bytes`, `fraction`, `latency_ms`")
        return self


class StudentConfig(Strict):
    """`[student]`: what the student starts as: the teacher with parts left out, or another model.

    Nothing given: the teacher whole. Cutting width (`ffn`) costs less accuracy than depth (`layers`); depth buys more
    latency. Up to a third of the parameters goes at once; beyond half, prune and distil in `steps`.
    """

    layers: Positive | None = None
    """how many layers to keep."""
    keep: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """exactly these layers, counted from 0 (instead of `layers`)."""
    choose: Literal["even", "block_influence", "taylor"] = "even"
    """which layers stay: `even` spread with the first and the last; those that turn their input most
    (`block_influence`, arXiv 2403.03853); those whose weights the loss feels most (`taylor`). The measures are taken
    on the calibration split (training text without one). FFN neurons and heads go by mean activation, with `taylor`
    by Taylor too."""
    ffn: PositiveFloat | None = None
    """neurons of each FFN, or (1 or less) the share of the teacher's, rounded to a multiple of 32 if it is wide."""
    heads: Positive | None = None
    """query heads; alone, they go evenly inside the key-value groups. Decoders only (and llama.cpp can't load a Qwen2
    with fewer of them)."""
    kv_heads: Positive | None = None
    """key-value groups; a group goes with its query heads."""
    vocabulary: Positive | Annotated[float, Field(gt=0, lt=1, strict=True)] | Literal["corpus"] | None = None
    """how many of the teacher's tokens to keep, by how often they occur in the train and calibration text: a number, a
    share below 1, or `corpus` for all that occur. Special tokens and the alphabet always stay; the number is rounded up
    to a multiple of 64."""
    target: TargetConfig | None = None
    """a size or speed to reach instead of `layers` and `ffn`, see `[student.target]`."""
    steps: Positive = 1
    """prune and distil in so many rounds, each part of the way and with part of the training steps."""
    source: str | None = None
    """another model (address as in `[teacher]`) to start from instead of the teacher. With another
    vocabulary it learns by `universal_logit` and `cross_entropy`, in `edgestill distill` only."""
    sha256: Sha256 | None = None
    """checksum of `source`, as in `[teacher]`."""
    config: str | None = None
    """a config.json or a folder with one (relative to the recipe): start from random weights in that shape, with the
    teacher's vocabulary, instead of from the teacher."""
    seed: int = 0
    """of the random weights of `config`."""

    @property
    def cuts(self) -> bool:
        """Whether anything is left out of what the student starts from."""
        return any(
            value is not None for value in (self.layers, self.keep, self.ffn, self.heads, self.kv_heads, self.target)
        )

    @property
    def sources(self) -> tuple[Source, ...]:
        """What has to be fetched."""
        return () if self.source is None else (Source(source=self.source, sha256=self.sha256),)

    @property
    def needs_text(self) -> bool:
        """Whether what is left out is chosen by looking at how the model treats text."""
        width = any(value is not None for value in (self.ffn, self.heads, self.kv_heads, self.target))
        return width or (self.layers is not None and self.choose != "even")

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _known_vocabulary(cls, value: object) -> object:
        fits = (
            value is None or value == "corpus"
            or (type(value) is int and value > 0) or (type(value) is float and 0 < value < 1)
        )  # fmt: skip
        if not fits:
            raise ValueError(f"{value!r} is no number of tokens, no share between 0 and 1, and not `corpus`")
        return value

    @field_validator("ffn")
    @classmethod
    def _share_or_count(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"a share of at most 1 or a whole number of neurons, not {value}")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.layers is not None and self.keep is not None:
            raise ValueError("give either `layers` or `keep`, not both")
        if self.keep is not None and list(self.keep) != sorted(set(self.keep)):
            raise ValueError("`keep` must be ascending, without repeats")
        if self.keep is not None and self.choose != "even":
            raise ValueError("`keep` names the layers already; leave `choose` out")
        if self.source is not None and self.config is not None:
            raise ValueError("give either `source` or `config`, not both")
        if self.sha256 is not None and self.source is None:
            raise ValueError("`sha256` is that of `source`, which is missing")
        if self.config is not None and self.cuts:
            raise ValueError("a `config` says the shape; leave out what cuts a teacher's")
        if self.steps > 1 and not self.cuts:
            raise ValueError("`steps` prunes in rounds: say what to prune (`layers`, `ffn`, `target`, ...)")
        return self
