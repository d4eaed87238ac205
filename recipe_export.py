"""The section ``[[export]]`` of a recipe: one artifact."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from .quantisation import Quantisation, parse_quantisation
from .recipe_base import Name, Positive, Strict

__all__ = ["ExportConfig"]


class ExportConfig(Strict):
    """`[[export]]`: one artifact."""

    to: str
    """`FORMAT:QUANTISATION`, e.g. `onnx:int4`, `gguf:q4_k_m`, `coreml:int8`."""
    name: Name | None = None
    """folder name; by default `FORMAT-QUANTISATION`."""
    of: Literal["student", "teacher"] = "student"
    """which model to export (the teacher serves as a baseline in the same runtime)."""
    app: tuple[Literal["python", "kotlin", "swift"], ...] = ()
    """languages to write a sample in (`app/VARIANT/LANGUAGE/` of the run folder): load, tokenise, run."""
    context_length: Positive | None = None
    """most tokens that the artifact takes; by default what the model allows (Core ML: at most 2,048)."""

    @field_validator("to")
    @classmethod
    def _known(cls, value: str) -> str:
        return parse_quantisation(value).to

    @property
    def parsed(self) -> Quantisation:
        """What `to` means."""
        return parse_quantisation(self.to)

    @property
    def format(self) -> str:
        """`onnx`, `gguf` or `coreml`."""
        return self.to.partition(":")[0]

    @property
    def quantisation(self) -> str:
        """What comes after the colon."""
        return self.to.partition(":")[2]

    @property
    def variant(self) -> str:
        """The artifact's folder name."""
        return self.name or ("" if self.of == "student" else "teacher-") + self.to.replace(":", "-")
