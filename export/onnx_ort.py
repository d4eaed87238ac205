"""The ``.ort`` format beside an ONNX file: what small builds of ONNX Runtime load, with the list of what they need.

ONNX Runtime itself rewrites the graph and writes it (the "extended" level: nothing of it depends on the processor), and
its own tool lists the operators and types that are left. Two conversions differ only in the order of one table, which
a hash map with a random seed decides; :func:`canonical` sorts it, so that equal models give equal bytes.

The format: flatbuffers, schema ``ort.fbs`` of ONNX Runtime, ``docs/ORT_Format_Update_in_1.13.md`` there for the table.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import EdgestillError, MissingDependency, ResourceExhausted, Unsupported

__all__ = ["CONFIG_FILE", "ORT_FILE", "canonical", "write_ort"]

ORT_FILE = "model.ort"
CONFIG_FILE = "required_operators.config"
_MOST_BYTES = 2**31 - 1  # flatbuffers count in signed 32 bits
_VERSION, _MODEL, _RESOLVER = 0, 1, 3  # slots of InferenceSession
_ALIGN = 64


def write_ort(folder: Path, entry: str) -> str:
    """Convert ``folder/entry`` (ONNX) to ``folder/model.ort`` and write ``required_operators.config``.

    Returns the new file's name. Needs about three times the model in memory. Raises :class:`Unsupported` for a model of
    2 GB or more, which the format can't hold, and :class:`MissingDependency` without onnxruntime.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency.package("onnxruntime", "export") from None
    source, target = folder / entry, folder / ORT_FILE
    size = sum(path.stat().st_size for path in folder.glob(f"{entry}*"))
    if size > _MOST_BYTES:
        raise Unsupported(
            f"the .ort format holds 2 GB at most, the model has {size / 1e9:.1f}",
            hint="leave ort out, or quantise more",
        )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        reason = str(error).strip().splitlines()[0][:300]
        if "Failed to save" in reason:
            raise ResourceExhausted(
                f"onnxruntime could not save {target}", hint="free some room, then run the same command again"
            ) from error
        raise EdgestillError(f"onnxruntime can't write {ORT_FILE}: {reason}", hint="leave ort out") from error
    canonical(target)
    _write_config(target, folder / CONFIG_FILE)
    return ORT_FILE


def canonical(path: Path) -> None:
    """Rewrite the front of an ``.ort`` file: its table of kernel type strings sorted, the model as it is.

    A flatbuffer is built from its end: the model was written first and lies behind the table. Offsets are relative, so
    a front that is built against a stand-in of the same alignment fits before it.
    """
    import flatbuffers
    import onnxruntime.tools.ort_format_model  # noqa: F401 - puts the generated classes on the path
    from ort_flatbuffers_py.fbs import InferenceSession as Root

    raw = path.read_bytes()
    root: Any = Root.InferenceSession.GetRootAs(raw, 0)
    at = root._tab.Indirect(root._tab.Offset(4 + 2 * _MODEL) + root._tab.Pos)
    begin = min(at, at - flatbuffers.encode.Get(flatbuffers.packer.soffset, raw, at))
    kept = len(raw) - begin
    resolver, version = root.KernelTypeStrResolver(), root.OrtVersion().decode()
    entries = _entries(resolver)

    builder = flatbuffers.Builder(1024)
    stand_in = kept % _ALIGN + _ALIGN
    builder.Bytes = bytearray(stand_in)
    builder.head = 0
    builder.minalign = 16
    table = _resolver(builder, entries)
    name = builder.CreateString(version)
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(_VERSION, name, 0)
    builder.PrependUOffsetTRelativeSlot(_MODEL, len(raw) - at - kept + stand_in, 0)
    builder.PrependUOffsetTRelativeSlot(_RESOLVER, table, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"ORTM")
    front = bytes(builder.Output())[:-stand_in]
    with path.open("wb") as out:
        out.write(front)
        out.write(memoryview(raw)[begin:])


def _entries(resolver: Any) -> list[tuple[bytes, list[tuple[bytes, list[tuple[int, int]]]]]]:
    """(operator, [(type string, [(input or output, index)])]), sorted."""
    found = []
    for i in range(resolver.OpKernelTypeStrArgsLength()):
        entry = resolver.OpKernelTypeStrArgs(i)
        rows = []
        for j in range(entry.KernelTypeStrArgsLength()):
            row = entry.KernelTypeStrArgs(j)
            args = [row.Args(k) for k in range(row.ArgsLength())]
            rows.append((row.KernelTypeStr(), sorted((arg.ArgType(), arg.Index()) for arg in args)))
        found.append((entry.OpId(), sorted(rows)))
    return sorted(found)


def _resolver(builder: Any, entries: list[tuple[bytes, list[tuple[bytes, list[tuple[int, int]]]]]]) -> int:
    """The table KernelTypeStrResolver, whose keys the reader searches by halving: sorted by its strings."""
    operators = []
    for operator, rows in entries:
        strings = []
        for string, args in rows:
            numbers = []
            for kind, index in args:
                builder.StartObject(2)
                builder.PrependInt8Slot(0, kind, 0)
                builder.PrependUint32Slot(1, index, 0)
                numbers.append(builder.EndObject())
            strings.append(_pair(builder, string, _vector(builder, numbers)))
        operators.append(_pair(builder, operator, _vector(builder, strings)))
    every = _vector(builder, operators)
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, every, 0)
    return int(builder.EndObject())


def _pair(builder: Any, key: bytes, vector: int) -> int:
    name = builder.CreateString(key.decode())
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, name, 0)
    builder.PrependUOffsetTRelativeSlot(1, vector, 0)
    return int(builder.EndObject())


def _vector(builder: Any, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _write_config(model: Path, target: Path) -> None:
    """Operators with their types, as ``--include_ops_by_config`` and ``--enable_reduced_operator_type_support`` of
    ONNX Runtime's build take them."""
    from onnxruntime.tools.ort_format_model.utils import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    raw = target.with_suffix(".raw")
    create_config_from_models([model], raw, True)
    lines = [
        line for line in raw.read_text().splitlines() if line and not line.startswith("#")
    ]  # paths of this machine
    raw.unlink()
    target.write_text("# Operators and types of model.ort\n" + "\n".join(lines) + "\n")
