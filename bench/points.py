"""Published decode speeds, ``devices/*.csv``: what a prediction is fitted on and judged by.

``points.csv`` holds the points that the error of the method is stated on, ``anchors.csv`` further ones, chosen by
rules that no result entered into: devices of at most 300 GB/s whose documented bandwidth could be read, dense
transformers only, bytes a token stated in the source, and of a vendor's table the models that ``points.csv`` has.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from ..errors import BadInput
from .profiles import DeviceProfile, find_profile

__all__ = ["FORMAT_BITS", "DecodePoint", "load_points", "parse_points"]

FORMAT_BITS: Mapping[str, float] = {
    "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "w8a8": 8.0, "w4-g32": 5.0, "Q4_K_M": 4.85, "Q4_0": 4.5, "w4a16": 4.0,
}  # fmt: skip
"""Bits a weight of the formats that points are published in: ggml's block sizes (``ggml-common.h``), Q4_K_M as
llama.cpp's quantize prints it, and the nominal width of the others."""

_COLUMNS = ("device", "model", "bytes_per_token_gb", "decode_tok_s", "source")


@dataclass(frozen=True)
class DecodePoint:
    """One published speed: ``tokens_per_s`` when ``bytes_per_token`` are read for each, at ``bits`` a weight.

    ``bandwidth`` is the documented one of the device in bytes/s; ``given``: it stands in ``points.csv``.
    """

    device: str
    processor: str
    soc: str
    model: str
    bits: float
    bytes_per_token: float
    tokens_per_s: float
    bandwidth: float
    source: str
    given: bool = False

    @property
    def log_efficiency(self) -> float:
        """Log of the share of the documented bandwidth that the weights are read with."""
        return math.log(self.bytes_per_token * self.tokens_per_s / self.bandwidth)


@cache
def load_points() -> tuple[DecodePoint, ...]:
    """All published points, those of ``points.csv`` first."""
    folder = resources.files("edgestill.bench") / "devices"
    found: list[DecodePoint] = []
    for name in ("points.csv", "anchors.csv"):
        text = (folder / name).read_text(encoding="utf-8")
        found += parse_points(text, where=f"devices/{name}", given=name == "points.csv")
    return tuple(found)


def parse_points(text: str, *, where: str, given: bool = False) -> list[DecodePoint]:
    """Rows of a CSV file; :class:`BadInput` names the line that has no source, an unknown format or no number."""
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != _COLUMNS:
        raise BadInput(f"{where}: the columns must be {','.join(_COLUMNS)}", hint="docs/prediction.md")
    found = []
    profiles: dict[str, DeviceProfile] = {}
    for number, row in enumerate(reader, start=2):
        try:
            if not (row["source"] or "").strip():
                raise ValueError("no source")
            name = row["device"]
            profile = profiles.get(name) or profiles.setdefault(name, find_profile(name))
            if profile.bandwidth is None:
                raise ValueError(f"the profile {name} has no bandwidth")
            bits = FORMAT_BITS[row["model"].split()[-1]]
            size, speed = float(row["bytes_per_token_gb"]) * 1e9, float(row["decode_tok_s"])
            if not (0 < size < math.inf and 0 < speed < math.inf):
                raise ValueError("not a positive number")
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise BadInput(f"{where}:{number}: {error}", hint="docs/prediction.md") from None
        found.append(
            DecodePoint(
                name, profile.processor, profile.soc, row["model"], bits, size, speed, profile.bandwidth.value,
                row["source"], given,
            )
        )  # fmt: skip
    return found
