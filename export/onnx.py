"""The ONNX writer: a model folder in, ``model.onnx`` for ONNX Runtime out.

Graphs are written node by node (``onnx_decoder.py``, ``onnx_encoder.py``) instead of traced: seconds instead of
minutes, the fused operators that ONNX Runtime executes fastest, and the same bytes every time. Weights are quantised
with :mod:`edgestill.grids` on the way, one tensor in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architectures import supported
from ..artifact import TensorSpec
from ..checkpoints import ENCODER_TASKS, ModelFolder
from ..errors import MissingDependency, Unsupported, UsageError, nearest
from ..progress import Progress, silent
from ..quantisation_onnx import parse
from .genai_config import write_genai_config
from .onnx_file import EXTERNAL_BYTES, Spool
from .onnx_graph import MICROSOFT, Graph, Scheme
from .onnx_portable import PortableGraph
from .onnx_schemes import scheme_of
from .turned import LinearWeights
from .writer import Draft, context_length

if TYPE_CHECKING:
    from ..recipe import ExportConfig
    from .onnx_graph import InputMoments
    from .onnx_static import StaticPlan
    from .source import Source

__all__ = ["IR_VERSION", "OPSET", "draw", "write"]

OPSET = 18
IR_VERSION = 9


def write(
    source: Source,
    folder: Path,
    config: ExportConfig,
    calibration: Sequence[str] = (),
    progress: Progress = silent,
    *,
    types: Mapping[str, str] | None = None,
    static: StaticPlan | None = None,
    moments: InputMoments | None = None,
    external_bytes: int = EXTERNAL_BYTES,
) -> Draft:
    """Write ``folder/model.onnx`` (and ``model.onnx.data`` above ``external_bytes``) and say what is in it.

    ``types`` maps parameter names to names of this format's language, where a matrix is to be stored otherwise than
    ``config`` says. ``static`` is the plan of ``int8-static``, made now from ``calibration`` if it is not given. Error
    compensation (``-gptq``) needs ``calibration`` text, or ``moments`` that were measured already. Raises
    :class:`Unsupported` for a model that has no ONNX graph of ours, :class:`UsageError` for compensation without text
    or types that don't fit.
    """
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise MissingDependency.package("onnx", "export") from None
    from ..runtimes.onnx_reader import OnnxFile
    from ..runtimes.payload_onnx import histogram

    model = source.folder
    length = context_length(model, config)
    wanted = parse(config.quantisation)
    if config.kv_cache is not None and model.task != "text-generation":
        raise UsageError(f"{config.variant}: kv_cache of a {model.task} model", hint="only decoders have one")
    if wanted.portable and model.task != "text-generation":
        raise Unsupported(f"onnx:{wanted.name}: a portable graph of a {model.task} model",
                          hint=f"decoders have one: {supported('decoder')}")  # fmt: skip
    if wanted.portable and types:
        raise UsageError(f"{config.variant}: types in a portable graph", hint="it has float weights only")
    if wanted.base == "int8-static" and static is None:
        from .onnx_static import plan_static

        static = plan_static(source, calibration=calibration, progress=progress)
    scheme = scheme_of(wanted, model.task, {**(static.types if static else {}), **(types or {})})
    moments = moments or _moments(source, config, scheme, calibration, progress)
    spool = Spool(folder)
    try:
        progress(f"{config.variant}: writing the graph", 0.0)
        weights = LinearWeights(model)
        for name in types or ():
            if name not in weights:
                raise UsageError(f"types: {name!r} is no parameter of this model", hint=nearest(name, list(weights)))
        grids = static.grids if static else {}
        graph = (PortableGraph if wanted.portable else Graph)(weights, scheme, spool, moments, grids)
        shell, inputs, outputs, kv_bytes = draw(graph, model, config, length)
        target = folder / "model.onnx"
        spool.write(shell, target, external_bytes=external_bytes)
    finally:
        spool.close()
    if model.task == "text-generation":
        write_genai_config(model, folder, length, shared_cache=not wanted.portable)
    found = histogram(OnnxFile(target))
    return Draft(
        entry=target.name,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        shapes="dynamic",
        max_length=length,
        contents="; ".join(
            [describe(config.quantisation, graph), *([static.note] if static else []),
             *(["fp16 key/value cache"] if config.kv_cache else [])]
        ),
        dtype_histogram=found,
        minimum_runtime={"onnxruntime": minimum_runtime(scheme), "opset": str(OPSET),
                         "ir": str(IR_VERSION)},
        kv_cache_bytes_per_token=kv_bytes,
        pooling_in_graph=model.task == "feature-extraction",
        tensors=weights.mapped(graph.tensors),
    )  # fmt: skip


def draw(
    graph: Graph, model: ModelFolder, config: ExportConfig, length: int
) -> tuple[Any, Sequence[TensorSpec], Sequence[TensorSpec], int | None]:
    """The whole model added to ``graph``, as a ``ModelProto`` without weights (they are in the graph's spool); inputs,
    outputs and the cache's bytes a token."""
    kv_bytes = None
    if model.task == "text-generation":
        from .onnx_decoder import build_decoder

        inputs, outputs, kv_bytes = build_decoder(graph, model, length, kv_cache=config.kv_cache)
    elif model.task in ENCODER_TASKS:
        from .onnx_encoder import build_encoder

        inputs, outputs = build_encoder(graph, model, length)
    else:
        raise Unsupported(f"ONNX: no writer for the task {model.task!r}", hint="export another format")
    return _shell(graph, inputs, outputs, isinstance(graph, PortableGraph)), inputs, outputs, kv_bytes


def _moments(
    source: Source, config: ExportConfig, scheme: Scheme, calibration: Sequence[str], progress: Progress
) -> InputMoments | None:
    if all(kind.fit != "gptq" for kind in scheme.kinds()):
        return None
    if not calibration:
        raise UsageError(
            f"{config.variant}: -gptq needs calibration text", hint="give a [[data.text]] `calibration` examples"
        )  # fmt: skip
    from .onnx_moments import Moments

    return Moments(source, calibration, progress=progress)


def _shell(graph: Graph, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], portable: bool) -> Any:
    """The ModelProto without weights: no path, no time, no version of a tool stands in it."""
    from onnx import TensorProto, helper

    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
    infos = [
        [helper.make_tensor_value_info(spec.name, types[spec.dtype], list(spec.shape)) for spec in specs]
        for specs in (inputs, outputs)
    ]
    body = helper.make_graph(graph.nodes, "edgestill", *infos)
    opsets = [helper.make_opsetid("", OPSET), *([] if portable else [helper.make_opsetid(MICROSOFT, 1)])]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgestill")


def describe(quantisation: str, graph: Graph) -> str:
    """What is really inside, by weight matrix: ``"int4-b32 (29 of 30 matrices), int8-b32 (1)"``."""
    matrices = [tensor for tensor in graph.tensors if len(graph.weights.shape(tensor.name)) == 2]
    counts: dict[str, int] = {}
    for tensor in matrices:
        counts[tensor.grid] = counts.get(tensor.grid, 0) + 1
    parts = [f"{grid} ({count} of {len(matrices)} weight matrices)" for grid, count in sorted(counts.items())]
    return f"{quantisation}: " + ", ".join(parts) + "".join(_fallen(graph))


def _fallen(graph: Graph) -> Iterator[str]:
    """What rows of an odd length led to: ``"; 3 fell back to blocks of 32 (1.20 MB): rows not divisible by 128"``."""
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for asked, taken, filled, size_bytes in graph.fallen:
        groups.setdefault((asked, taken, filled), []).append(size_bytes)
    for (asked, taken, filled), sizes in sorted(groups.items()):
        what = f"fell back to blocks of {taken}" if taken != asked else f"stored in blocks of {taken}"
        filling = ", the last of a row filled up" if filled else ""
        yield f"; {len(sizes)} {what}{filling} ({sum(sizes) / 1e6:,.2f} MB): rows not divisible by {asked}"


def minimum_runtime(scheme: Scheme) -> str:
    """Oldest ONNX Runtime that was seen to run such a file as 1.32 does (1.20.1, 1.21.1, 1.22.1, 1.23.2 were tried).

    Before 1.23, GatherBlockQuantized knows no 8-bit codes.
    """
    return "1.20" if all(kind.way == "float" for kind in scheme.kinds()) else "1.23"
