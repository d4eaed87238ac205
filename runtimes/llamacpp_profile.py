"""Time by operation of llama.cpp's graph, through the callback that its scheduler offers before and after each node.

The callback (``cb_eval`` of ``llama_context_params``) is asked for every node; who says yes gets the node computed
alone, with all threads started and awaited for it. That costs time at each node: shares are what this gives.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from typing import Any

from ..errors import MissingDependency
from .llamacpp_api import engine
from .profiling import Row, RowTable

__all__ = ["GgmlRecorder"]

# Nodes that only look at memory in another way: they are run with the next one.
_VIEWS = ("NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")


class GgmlRecorder:
    """A :class:`edgestill.runtimes.profiling.Recorder`. ``callback`` goes into the context's parameters and must live
    as long as the context."""

    source = "measured"
    note = (
        "llama.cpp ran each node alone for this (cb_eval), with a start and a wait of its threads each: small "
        "operations look larger than they are"
    )

    def __init__(self, timings: dict[str, Any]) -> None:
        self._table = RowTable()
        self._phase = ""
        self._started = 0.0
        self._timings = timings
        library = _functions()
        describe, name_of, table, clock = library.ggml_op_desc, library.ggml_get_name, self._table, time.perf_counter
        kinds: dict[bytes, str] = {}

        def watch(tensor: int, ask: bool, data: object) -> bool:
            if ask:
                wanted = describe(tensor).decode() not in _VIEWS
                self._started = clock()
                return wanted
            seconds = clock() - self._started
            raw = describe(tensor)
            op = kinds.setdefault(raw, raw.decode())
            table.add(self._phase, name_of(tensor).decode(errors="replace"), op, "cpu", seconds=seconds)
            return True

        self.callback = engine().ggml_backend_sched_eval_callback(watch)

    def begin(self, phase: str) -> None:
        """See :class:`Recorder`."""
        self._phase = phase

    def end(self) -> None:
        """See :class:`Recorder`."""

    def rows(self) -> dict[str, list[Row]]:
        """See :class:`Recorder`."""
        return self._table.rows()

    def engine(self) -> dict[str, Any]:
        """llama.cpp's own timings of the passes before, when nothing was watched, in milliseconds and tokens."""
        return self._timings


def _functions() -> Any:
    """``ggml_op_desc`` and ``ggml_get_name`` of the library that the engine uses."""
    engine()
    from llama_cpp import _ggml

    library: Any = _ggml.libggml
    with contextlib.suppress(AttributeError):
        for name in ("ggml_op_desc", "ggml_get_name"):
            function = getattr(library, name)
            function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        return library
    raise MissingDependency(
        "the installed llama.cpp does not name its operations", hint="pip install 'llama-cpp-python>=0.3.36,<0.4'"
    )
