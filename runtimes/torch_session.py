"""Runs a Transformers model folder with torch in float32: the teacher, the float student, a dequantised student.

Not device side: it may import torch and :mod:`edgestill.checkpoints`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import CLASS_TASKS
from ..checkpoints import load_torch, open_model
from ..errors import MissingDependency, Unsupported, WorkerError
from .profiling import Row, RowTable
from .session import DecodedToken, SessionInfo, SessionOptions

__all__ = ["TorchRecorder", "TorchSession"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def preload(folder: Path) -> None:
    """Import the model's code, so that a worker counts neither its time nor its memory as the model's."""
    name = open_model(folder).architecture
    importlib.import_module(f"transformers.models.{name}.modeling_{name}")


class TorchSession:
    """A :class:`edgestill.runtimes.session.Session` over a model folder; ``backend`` is ``cpu`` (the only one)."""

    def __init__(self, folder: Path, options: SessionOptions | None = None) -> None:
        try:
            import torch
        except ImportError:
            raise MissingDependency.package("torch", "distill") from None
        options = options or SessionOptions()
        if options.backend not in (None, "cpu"):
            raise Unsupported(f"torch backend {options.backend!r}", hint="known: cpu")
        torch.set_num_threads(options.threads)
        self._torch = torch
        described = open_model(folder)
        self._model: Any = load_torch(folder)
        decodes = described.task == "text-generation"
        self._info = SessionInfo(
            runtime="torch",
            version=torch.__version__,
            backend="cpu",
            task=described.task,
            capabilities=("forward", *(("decode",) if decodes else ()), "score", "latency"),
            vocab_size=described.vocab_size,
            max_length=described.max_length,
        )

    def info(self) -> SessionInfo:
        """Who runs this."""
        return self._info

    def forward(self, ids: Ints, attention_mask: Ints) -> Floats:
        """See :meth:`Session.forward`; padding keeps the position of the last real token, and nothing attends to it."""
        model, torch = self._open(), self._torch
        # Copied: a reference is mapped read-only, and torch wants what it could write to.
        tokens, mask = (torch.from_numpy(np.array(given, order="C")) for given in (ids, attention_mask))
        with torch.inference_mode():
            if self._info.task == "text-generation":
                positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
                output = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
            elif self._info.task in CLASS_TASKS:
                output = model(tokens, attention_mask=mask).logits
            else:
                output = model(tokens, mask)
        return np.ascontiguousarray(output.float().numpy())

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int, *, logits: bool = False) -> Iterator[DecodedToken]:
        """See :meth:`Session.decode`; the cache is Transformers' ``DynamicCache``."""
        from transformers import DynamicCache

        model, torch = self._open(), self._torch
        started = time.perf_counter()
        cache = DynamicCache(config=model.config)
        # Only the last position's logits are needed; a long prompt's would be the largest tensor of all.
        known = inspect.signature(model.forward).parameters
        last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        feed = list(prompt_ids)
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                output = model(torch.tensor([feed]), past_key_values=cache, use_cache=True, **last)
                row = np.ascontiguousarray(output.logits[0, -1].float().numpy())
            token = int(row.argmax())  # numpy's argmax: the lowest id among equals
            now = time.perf_counter()
            yield DecodedToken(token, now - started, row if logits else None)
            started = time.perf_counter()
            feed = [token]

    @contextlib.contextmanager
    def profiling(self) -> Iterator[TorchRecorder]:
        """Take the time of each operator with torch's own profiler."""
        self._open()
        yield TorchRecorder()

    def _open(self) -> Any:
        if self._model is None:
            raise WorkerError("the session is closed", hint="open it again")
        return self._model

    def close(self) -> None:
        """Free the model."""
        self._model = None


class TorchRecorder:
    """A :class:`edgestill.runtimes.profiling.Recorder`: ``torch.profiler``, one a pass."""

    source = "measured"
    note = "torch.profiler; a time is that of the operator itself, without what it calls"

    def __init__(self) -> None:
        self._table = RowTable()
        self._phase = ""
        self._profiler: Any = None

    def begin(self, phase: str) -> None:
        """See :class:`Recorder`."""
        from torch.profiler import ProfilerActivity, profile

        self._phase = phase
        self._profiler = profile(activities=[ProfilerActivity.CPU], with_flops=True)
        self._profiler.start()

    def end(self) -> None:
        """See :class:`Recorder`."""
        self._profiler.stop()
        for event in self._profiler.key_averages():
            self._table.add(
                self._phase, event.key, event.key, "cpu", seconds=event.self_cpu_time_total / 1e6,
                calls=int(event.count), flops=int(event.flops) or None,
            )  # fmt: skip

    def rows(self) -> dict[str, list[Row]]:
        """See :class:`Recorder`."""
        return self._table.rows()

    def engine(self) -> dict[str, Any]:
        """Nothing more."""
        return {}
