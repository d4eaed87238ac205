"""What is documented of a device: profiles in ``devices/*.toml``, where every number names its source.

A field without a source is refused, not believed::

    title = "Raspberry Pi 5, 16 GB"
    kind = "board"                  # phone | board | computer
    processor = "cpu"               # cpu | gpu | npu: what runs the model
    soc = "bcm2712"                 # two profiles of one chip are never strangers to each other
    fitted_as = "raspberry-pi-5-16gb"   # optional: the profile whose published speeds hold here too

    [memory]                        # likewise [process_memory]: the most that one process may use
    value = 16
    unit = "GB"
    source = "https://…"

    [bandwidth]                     # of the memory, as the data sheet says
    value = 17.07
    unit = "GB/s"
    source = "https://…"

    [[prefill]]                     # published prompt speeds: how much a device computes
    model = "Llama 2 7B"
    parameters = 6.74e9
    format = "Q4_0"
    prompt_tokens = 109
    tokens_per_s = 8.10
    source = "https://…"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import BadInput, UsageError, nearest

__all__ = ["ComputeAnchor", "DeviceProfile", "Fact", "find_profile", "load_profile", "profile_names"]

Processor = Literal["cpu", "gpu", "npu"]
_LONGEST_FILE = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Sourced(_Strict):
    source: str = Field(min_length=1)

    @field_validator("source")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if len(value.split()) == 0 or value.strip().lower() in ("?", "unknown", "guess", "estimate", "todo", "none"):
            raise ValueError("a source names a page, a document or a measurement")
        return value


class _FactFile(_Sourced):
    value: float = Field(gt=0)
    unit: str


class _AnchorFile(_Sourced):
    model: str
    parameters: float = Field(gt=0)
    format: str
    prompt_tokens: int = Field(gt=0)
    tokens_per_s: float = Field(gt=0)


_UNITS: Mapping[str, Mapping[str, float]] = {
    "memory": {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6},
    "process_memory": {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6},
    "bandwidth": {"GB/s": 1e9, "MB/s": 1e6},
}


class _ProfileFile(_Strict):
    title: str = Field(min_length=1)
    kind: Literal["phone", "board", "computer"]
    processor: Processor
    soc: str = Field(min_length=1)
    fitted_as: str | None = None
    memory: _FactFile | None = None
    process_memory: _FactFile | None = None
    bandwidth: _FactFile | None = None
    prefill: list[_AnchorFile] = []

    @model_validator(mode="after")
    def _units(self) -> _ProfileFile:
        for name, known in _UNITS.items():
            found = getattr(self, name)
            if found is not None and found.unit not in known:
                raise ValueError(f"{name}: unknown unit {found.unit!r} (known: {', '.join(known)})")
        return self


@dataclass(frozen=True)
class Fact:
    """A documented number: ``value`` in ``unit`` (``bytes`` or ``bytes/s``), ``shown`` as its file has it."""

    value: float
    unit: str
    shown: str
    source: str


@dataclass(frozen=True)
class ComputeAnchor:
    """A published prompt speed: ``tokens_per_s`` for a prompt of ``prompt_tokens`` through ``parameters`` weights."""

    model: str
    parameters: float
    format: str
    prompt_tokens: int
    tokens_per_s: float
    source: str


@dataclass(frozen=True)
class DeviceProfile:
    """What is documented of a device; what is not is ``None``. ``fitted_as`` names where its published speeds stand."""

    name: str
    title: str
    kind: str
    processor: Processor
    soc: str
    fitted_as: str
    memory: Fact | None
    process_memory: Fact | None
    bandwidth: Fact | None
    prefill: tuple[ComputeAnchor, ...]


def profile_names() -> list[str]:
    """The names of the profiles that come with edgestill, sorted."""
    folder = resources.files("edgestill.bench") / "devices"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def find_profile(name: str) -> DeviceProfile:
    """The profile called ``name``, or the one in a file whose path ends in ``.toml``.

    Raises :class:`UsageError` with the nearest name for an unknown one, :class:`BadInput` for a file that is none.
    """
    if name.endswith(".toml"):
        path = Path(name)
        try:
            if path.stat().st_size > _LONGEST_FILE:
                raise BadInput(f"{path} is no device profile: {path.stat().st_size} bytes", hint="pass a profile")
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BadInput(f"{path} does not exist", hint="edgestill devices list") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{path} can't be read: {error}", hint="pass a device profile") from None
        return load_profile(path.stem, text, where=str(path))
    known = profile_names()
    if name not in known:
        hint = nearest(name, known) if name else f"profile:NAME, NAME one of {', '.join(known)}"
        raise UsageError(f"no device profile {name!r}", hint=f"{hint}; edgestill devices list shows all")
    text = (resources.files("edgestill.bench") / "devices" / f"{name}.toml").read_text(encoding="utf-8")
    return load_profile(name, text, where=f"devices/{name}.toml")


def load_profile(name: str, text: str, *, where: str) -> DeviceProfile:
    """Read a profile; :class:`BadInput` names the field that lacks a source, or is otherwise wrong."""
    try:
        raw = _ProfileFile.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(f"{where} is not valid TOML: {error}", hint="docs/prediction.md shows a profile") from None
    except ValidationError as error:
        raise BadInput(f"{where}: {_explain(error)}", hint="docs/prediction.md shows a profile") from None
    facts = {key: _fact(getattr(raw, key), _UNITS[key]) for key in _UNITS}
    anchors = tuple(ComputeAnchor(**anchor.model_dump()) for anchor in raw.prefill)
    return DeviceProfile(
        name, raw.title, raw.kind, raw.processor, raw.soc, raw.fitted_as or name, prefill=anchors, **facts
    )


def _fact(raw: _FactFile | None, units: Mapping[str, float]) -> Fact | None:
    if raw is None:
        return None
    unit = "bytes/s" if raw.unit.endswith("/s") else "bytes"
    return Fact(raw.value * units[raw.unit], unit, f"{raw.value:g} {raw.unit}", raw.source)


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing" and first["loc"][-1] == "source":
        return f"{field.removesuffix('.source')} has no source: a number without one is refused, not guessed"
    if first["type"] == "extra_forbidden":
        known = _fields(first["loc"])
        return f"unknown key {field!r}: {nearest(str(first['loc'][-1]), known)}"
    return f"{field}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def _fields(location: Sequence[Any]) -> list[str]:
    if len(location) == 1:
        return list(_ProfileFile.model_fields)
    return list((_AnchorFile if location[0] == "prefill" else _FactFile).model_fields)
