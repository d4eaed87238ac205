"""Read the weights back out of an artifact's payload, in the student's own layout: what verification stands on.

A reader of the format (``payload_onnx``, ``payload_gguf``, ``payload_coreml``) gives each stored tensor dequantised by
:mod:`edgestill.grids`; here the layout steps of :class:`edgestill.artifact.StoredTensor` turn it into the parameter
that it stands for. Nothing of an exporter is used, so that a mistake there can't hide itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact, Histogram, StoredTensor
from ..errors import BadInput, Unsupported, nearest
from ..grids import InputGrid

__all__ = ["PayloadReader", "StoredPayload", "apply_layout", "open_payload"]

Floats = npt.NDArray[np.float32]


class StoredPayload(Protocol):
    """What a format's reader gives."""

    def stored(self, tensor: StoredTensor) -> npt.NDArray[Any]:
        """The dequantised values of ``tensor.stored`` as the payload arranges them, before the layout steps."""
        ...

    def histogram(self) -> Mapping[str, Histogram]:
        """What is stored in which type, counted in the file itself."""
        ...


class PayloadReader:
    """An opened payload."""

    def __init__(self, payload: StoredPayload) -> None:
        self._payload = payload

    def decode(self, tensor: StoredTensor) -> Floats:
        """The float32 parameter that ``tensor`` stores, in the student's shape. :class:`BadInput` for a layout that
        does not fit."""
        with _damage(tensor.name):
            values = np.asarray(self._payload.stored(tensor), np.float32)
        return np.ascontiguousarray(apply_layout(values, tensor.layout, name=tensor.name))

    def input_grid(self, tensor: StoredTensor) -> InputGrid:
        """The fixed grid of what the matrix ``tensor`` is multiplied with; :class:`BadInput` where there is none."""
        with _damage(tensor.name):
            found = getattr(self._payload, "input_grid", lambda _: None)(tensor)
        if not isinstance(found, InputGrid):
            raise BadInput(f"{tensor.name}: no fixed grid of its inputs is in the payload", hint="export it again")
        return found

    def histogram(self) -> dict[str, Histogram]:
        """What is stored in which type, counted in the file itself."""
        with _damage("the payload"):
            return dict(self._payload.histogram())


def open_payload(artifact: Artifact) -> PayloadReader:
    """Open the payload of an artifact of any format."""
    match artifact.manifest.format:
        case "onnx":
            from .payload_onnx import OnnxPayload

            return PayloadReader(OnnxPayload(artifact))
        case "gguf":
            from .payload_gguf import GgufPayload

            return PayloadReader(GgufPayload(artifact))
        case "coreml":
            from .payload_coreml import CoremlPayload

            return PayloadReader(CoremlPayload(artifact))
        case other:
            raise Unsupported(f"can't read weights out of format {other!r}", hint="known: onnx, gguf, coreml")


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    """What numpy and Python raise for a file whose parts do not fit together becomes one :class:`BadInput`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"{what} can't be read back: {reason}", hint="export it again") from None


def apply_layout(values: Floats, steps: Sequence[Sequence[Any]], *, name: str = "tensor") -> Floats:
    """Apply layout steps in order: ``["transpose"]`` (reverse the axes), ``["reshape", d0, d1, …]``,
    ``["slice", axis, start, stop]``, ``["rope_unpermute", heads]``, ``["add", whole number]`` (a norm that multiplies
    by 1 + w is stored as that sum in GGUF).

    ``rope_unpermute`` undoes the order that llama.cpp keeps the rows of q and k in: GGUF interleaves the two halves of
    each head's rotary dimensions, Transformers keeps them apart. ``heads`` is the number of (key-value) heads.
    """
    for step in steps:
        operation = str(step[0]) if step else ""
        try:
            values = _STEPS[operation](values, *(int(argument) for argument in step[1:]))
        except KeyError:
            raise BadInput(
                f"{name}: unknown layout step {operation!r}", hint=nearest(operation, list(_STEPS))
            ) from None
        except (TypeError, ValueError, IndexError) as error:
            raise BadInput(
                f"{name}: layout step {list(step)} does not fit {list(values.shape)}: {error}", hint="export it again"
            ) from None
    return values


def _reshape(values: Floats, *shape: int) -> Floats:
    if min(shape, default=1) < 0 or math.prod(shape) != values.size:
        raise ValueError(f"{values.size} values")
    return values.reshape(shape)


def _slice(values: Floats, axis: int, start: int, stop: int) -> Floats:
    if not (0 <= axis < values.ndim and 0 <= start < stop <= values.shape[axis]):
        raise ValueError("outside the tensor")
    return values[(slice(None),) * axis + (slice(start, stop),)]


def _rope_unpermute(values: Floats, heads: int) -> Floats:
    rows, *rest = values.shape
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"{rows} rows in {heads} heads")
    return values.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(values.shape)


def _add(values: Floats, amount: int) -> Floats:
    return values + np.float32(amount)


def _transpose(values: Floats) -> Floats:
    return values.T


_STEPS: Mapping[str, Any] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "slice": _slice,
    "rope_unpermute": _rope_unpermute,
    "add": _add,
}
