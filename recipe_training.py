"""The sections of ``[distill]`` that say how weights are trained, beside its plain keys."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from .quantisation import parse_quantisation
from .recipe_base import Positive, PositiveFloat, Strict

__all__ = ["CorrectionConfig", "LoraConfig", "QuantizedConfig"]


class LoraConfig(Strict):
    """`[distill.lora]`: train small matrices beside the weights and add them to the weights in the end."""

    rank: Positive = 16
    """inner width of the added matrices."""
    alpha: PositiveFloat = 32.0
    """their product is multiplied by `alpha / rank`."""
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """names of the linear layers that get them, e.g. `["q_proj", "v_proj"]`; by default every one inside the layers."""


class QuantizedConfig(Strict):
    """`[distill.quantized]`: train the student through the grid that ships, so that it learns to live on it.

    Forward passes and measurements are of the quantised student; float weights behind it learn. The student's folder
    holds the weights on the grid, and an export to `to` stores exactly these. With all layers kept, a model learns from
    its own float self. Not for grids whose encoder searches for scales (K- and I-quants, palettes), and not with LoRA.
    """

    to: str
    """`FORMAT:QUANTISATION` of an `[[export]]`, e.g. `onnx:int4` or `gguf:q4_0`."""

    @field_validator("to")
    @classmethod
    def _known(cls, value: str) -> str:
        return parse_quantisation(value).to


class CorrectionConfig(Strict):
    """`[distill.correct_teacher]`: teach the teacher the transfer text before it teaches (Minitron, arXiv 2408.11796).

    A copy of the teacher is fine-tuned with cross-entropy; that copy then teaches. Give `steps` or `epochs`.
    """

    steps: Positive | None = None
    """optimiser steps."""
    epochs: PositiveFloat | None = None
    """passes over the text (instead of `steps`)."""
    learning_rate: PositiveFloat = 1e-4

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        return self
