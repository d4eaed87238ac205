"""Reads the weights of a GGUF artifact back, as llama.cpp sees them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact, Histogram, StoredTensor
from ..errors import BadInput
from ..grids import dequantise
from .gguf_file import GgufFile

__all__ = ["GgufPayload"]


class GgufPayload:
    """The tensors of a GGUF artifact; what :func:`edgestill.runtimes.payload.open_payload` opens for the format."""

    def __init__(self, artifact: Artifact) -> None:
        self._file = GgufFile(artifact.entry)

    def stored(self, tensor: StoredTensor) -> npt.NDArray[np.float32]:
        """The values of a stored tensor in the file's own layout (rows first), dequantised.

        Raises :class:`BadInput` when the file holds another type than ``tensors.json`` claims.
        """
        found = self._file.tensors.get(tensor.stored)
        if found is None or found.grid != tensor.grid:
            actual = "no such tensor" if found is None else found.grid
            raise BadInput(
                f"{self._file.path.name}: {tensor.stored} should be {tensor.grid}, the file has {actual}",
                hint="export it again",
            )
        return dequantise(tensor.grid, self._file.raw(tensor.stored), found.shape)

    def histogram(self) -> Mapping[str, Histogram]:
        """What is stored in which type, read from the file itself."""
        return self._file.histogram()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
