"""The section ``[[export]]`` of a recipe: one artifact."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from .quantisation import Budget, Quantisation, parse_quantisation
from .recipe_base import Name, Positive, Strict

__all__ = ["ExportConfig"]


class ExportConfig(Strict):
    """`[[export]]`: one artifact."""

    to: str
    """`FORMAT:QUANTISATION`, e.g. `onnx:int4`, `gguf:q4_k_m`, `coreml:int8`; or `FORMAT@SIZE`, e.g. `gguf@60MB`: the
    types are chosen tensor by tensor, by what each costs, so that the model fits."""
    name: Name | None = None
    """folder name; by default `FORMAT-QUANTISATION`."""
    of: Literal["student", "teacher"] = "student"
    """which model to export (the teacher serves as a baseline in the same runtime)."""
    app: tuple[Literal["python", "kotlin", "swift"], ...] = ()
    """languages to write a sample in (`app/VARIANT/LANGUAGE/` of the run folder): load, tokenise, run."""
    ort: bool = False
    """ONNX: put `model.ort` with `required_operators.config` beside the graph, for small builds of ONNX Runtime.
    Then that file is what is opened, measured and shipped."""
    context_length: Positive | None = None
    """most tokens that the artifact takes; by default what the model allows (Core ML: at most 2,048)."""
    kv_cache: Literal["fp16"] | None = None
    """type of an ONNX decoder's key/value cache; by default that of its activations. `fp16` halves the memory of a
    long context. llama.cpp's cache gets its type when the file is opened, Core ML's is fp16 anyway."""
    shapes: Literal["dynamic"] | Positive | list[Positive] = "dynamic"
    """Core ML, encoders: `"dynamic"` takes any length, `[32, 128, 512]` one of these (an app pads); a single length is
    refused for now."""
    min_target: Literal["iOS16", "iOS17", "iOS18"] | None = None
    """Core ML: oldest system that must load the artifact; by default the oldest that can."""

    @field_validator("shapes")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) < 2:
            raise ValueError("give at least two lengths, or a number for a fixed one")
        return value

    @model_validator(mode="after")
    def _only_coreml(self) -> ExportConfig:
        for key, left_out in (("shapes", self.shapes == "dynamic"), ("min_target", self.min_target is None)):
            if not left_out and self.format != "coreml":
                raise ValueError(f"{key} is for coreml; {self.to} takes any length and names its own minimum runtime")
        return self

    @field_validator("to")
    @classmethod
    def _known(cls, value: str) -> str:
        return parse_quantisation(value).to

    @field_validator("kv_cache", mode="before")
    @classmethod
    def _known_cache(cls, value: object) -> object:
        if value == "int8":
            raise ValueError("ONNX Runtime's int8 cache needs scales of every key and value, which edgestill does not "
                             "measure; write fp16 or leave it out")  # fmt: skip
        return value

    @model_validator(mode="after")
    def _cache_of_onnx(self) -> Self:
        if self.kv_cache is not None and self.format != "onnx":
            raise ValueError(f"`kv_cache` is for onnx: {self.format}'s cache is not part of its file")
        return self

    @model_validator(mode="after")
    def _ort_is_onnx(self) -> Self:
        if self.ort and self.format != "onnx":
            raise ValueError(f"ort = true is for onnx, not for {self.format}")
        if self.ort and isinstance(self.parsed, Budget):
            raise ValueError(f"{self.to} with ort = true: the size of an .ort file is known only when ONNX Runtime has "
                             "made it; leave ort out, or name a type such as onnx:int8")  # fmt: skip
        return self

    @property
    def parsed(self) -> Quantisation:
        """What `to` means."""
        return parse_quantisation(self.to)

    @property
    def format(self) -> str:
        """`onnx`, `gguf` or `coreml`."""
        return self.parsed.format

    @property
    def quantisation(self) -> str:
        """What comes after the colon, or the size after the `@`."""
        return self.parsed.name

    @property
    def variant(self) -> str:
        """The artifact's folder name."""
        form = f"{self.format}-{self.quantisation}" + ("-ort" if self.ort else "")
        return self.name or ("" if self.of == "student" else "teacher-") + form
