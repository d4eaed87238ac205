"""Trace and convert: from a wrapped torch model to a coremltools model. What coremltools prints is kept back."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import EdgestillError, ResourceExhausted
from ..runtimes.mil.program import Program, ValueType
from ..runtimes.milproto import import_coremltools
from ..torch_models import quiet as transformers_quiet
from .coreml_feeds import Feeds, feeds_of
from .coreml_islands import Islands, choose
from .coreml_mil import function_of, program_of
from .coreml_programs import DecoderProgram, EncoderProgram

if TYPE_CHECKING:
    from ..artifact import Task
    from .source import Source

__all__ = ["Converted", "MeasuredIslands", "Precision", "convert_decoder", "convert_encoder"]

Precision = Literal["islands", "half", "float32"]
"""``islands``: float16 with float32 where measurement shows that it is needed (the default); ``half``: all float16;
``float32``: none."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No tracer warning, no progress bar: the result is checked by executing it."""
    with transformers_quiet(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _forget_names() -> None:
    """Number operations from 0: coremltools does so after a conversion that ended well, but not after one that failed,
    and then the same model would give other names, so other bytes."""
    from coremltools.converters.mil import Builder

    Builder.name_count.clear()


@dataclass(frozen=True)
class Converted:
    """A coremltools ``model``, and which of its operations are float32 though the others are float16 (``None`` when
    that was not asked), found on the text that ``source`` names."""

    model: Any
    islands: Islands | None
    source: str


class MeasuredIslands:
    """An ``op_selector`` of coremltools that measures: shown the first operation, it runs the whole program on text."""

    def __init__(self, task: Task, feeds: Feeds) -> None:
        self._task, self._feeds = task, feeds
        self.islands: Islands | None = None
        self.source = feeds.source

    def __call__(self, operation: Any) -> bool:
        """Is ``operation`` to be float16?"""
        if self.islands is None:  # nothing is cast yet
            program = program_of(function_of(operation))
            self.islands = choose(self._short(program), self._task, self._feeds.rows, self._feeds.longest)
        return operation.name not in self.islands.names

    def _short(self, program: Program) -> Program:
        """With states as long as the text: at this stage the cache is copied whole for every layer."""
        longest = max(feed["input_ids"].shape[1] for feed in self._feeds.rows)
        states = {
            name: ValueType(kind.dtype, (*kind.shape[:3], longest, *kind.shape[4:]))
            for name, kind in program.states.items()
        }
        return dataclasses.replace(program, states=states)


def _convert(
    program: Any, example: tuple[Any, ...], precision: Precision, half: MeasuredIslands, **arguments: Any
) -> Any:
    import torch

    ct = import_coremltools()
    _forget_names()
    program.eval()
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(program, example, check_trace=False)
        try:
            return ct.convert(
                traced,
                convert_to="mlprogram",
                compute_precision={
                    "half": ct.precision.FLOAT16,
                    "float32": ct.precision.FLOAT32,
                    "islands": ct.transform.FP16ComputePrecision(op_selector=half),
                }[precision],
                skip_model_load=True,
                **arguments,
            )
        except (NotImplementedError, RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "FileWriter" in reason:  # its name for any failure to write weights
                raise ResourceExhausted(
                    f"coremltools could not write the weights below {tempfile.gettempdir()}: {reason}",
                    hint="free some room there, or set TMPDIR to a folder that has it",
                ) from error
            raise EdgestillError(
                f"coremltools {ct.__version__} can't convert the model: {reason}", hint="export to ONNX or GGUF"
            ) from error


def convert_encoder(
    source: Source,
    model: Any,
    lengths: tuple[int, ...],
    *,
    shapes: str = "dynamic",
    precision: Precision = "islands",
    ios: int = 16,
    texts: Sequence[str] = (),
) -> Converted:
    """An encoder as an ML program for ``ios``: int32 ``input_ids`` and ``attention_mask`` [1, T], float32
    ``sentence_embedding`` [1, D] or ``logits`` [1, C].

    ``shapes``: T is 1 to the last of ``lengths`` (``dynamic``), that one (``fixed``) or one of them (``enumerated``).
    The float32 islands are measured on ``texts``, see :mod:`.coreml_islands`.
    """
    import numpy as np
    import torch

    ct, folder = import_coremltools(), source.folder
    context = lengths[-1]
    length = context if shapes == "fixed" else lengths[0] if shapes == "enumerated" else min(8, context)
    example = (torch.full((1, length), 2, dtype=torch.int32), torch.ones(1, length, dtype=torch.int32))
    size: Any = (1, length)
    if shapes == "enumerated":
        size = ct.EnumeratedShapes([(1, one) for one in lengths], default=(1, length))
    elif shapes == "dynamic":
        size = (1, ct.RangeDim(lower_bound=1, upper_bound=context, default=length))
    output = "sentence_embedding" if folder.pooling is not None else "logits"
    half = MeasuredIslands(folder.task, feeds_of(source, texts, lengths, fixed=shapes != "dynamic"))
    converted = _convert(
        EncoderProgram(folder, model, context), example, precision, half,
        inputs=[ct.TensorType(name, size, np.int32) for name in ("input_ids", "attention_mask")],
        outputs=[ct.TensorType(output, dtype=np.float32)],
        minimum_deployment_target=getattr(ct.target, f"iOS{ios}"),
    )  # fmt: skip
    return Converted(converted, half.islands, half.source)


def convert_decoder(
    source: Source, model: Any, context: int, *, precision: Precision = "islands", texts: Sequence[str] = ()
) -> Converted:
    """A decoder with its KV cache as states, for iOS 18: int32 ``input_ids`` [1, q], float16 ``causal_mask``
    [1, 1, q, e], float16 ``logits`` [1, q, V] (float32 in that precision), float16 states
    ``key_cache`` and ``value_cache``.

    States are float16 in every precision: Core ML knows no others."""
    import numpy as np
    import torch

    ct, folder = import_coremltools(), source.folder
    program = DecoderProgram(folder, model, context)
    dtype = np.float32 if precision == "float32" else np.float16
    # Three new tokens after two: no two sizes are equal, so the trace can't take one for the other.
    example = (torch.full((1, 3), 2, dtype=torch.int32), torch.zeros(1, 1, 3, 5))
    query = ct.RangeDim(lower_bound=1, upper_bound=context, default=1)
    end = ct.RangeDim(lower_bound=1, upper_bound=context, default=1)
    half = MeasuredIslands(folder.task, feeds_of(source, texts, (context,)))
    converted = _convert(
        program, example, precision, half,
        inputs=[
            ct.TensorType("input_ids", (1, query), np.int32),
            ct.TensorType("causal_mask", (1, 1, query, end), dtype),
        ],
        outputs=[ct.TensorType("logits", dtype=dtype)],
        states=[
            ct.StateType(ct.TensorType(shape=program.cache_shape, dtype=np.float16), name=name)
            for name in ("key_cache", "value_cache")
        ],
        minimum_deployment_target=ct.target.iOS18,
    )  # fmt: skip
    return Converted(converted, half.islands, half.source)
