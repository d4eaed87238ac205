"""Values inside an ONNX graph, of one forward pass: a temporary copy of the graph in which they are outputs.

ONNX Runtime infers their types itself, so that its own operators, which onnx knows no shapes for, are no obstacle.
Weights beside the graph are linked, not read.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact
from ..errors import BadInput, MissingDependency
from ..files import safe_join
from .onnx_reader import graph_path
from .session import Ints

__all__ = ["exposed_values"]

_TYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
}  # fmt: skip


def exposed_values(
    artifact: Artifact, ids: Ints, attention_mask: Ints, wanted: Iterable[str] | None = None, *, threads: int = 2
) -> dict[str, npt.NDArray[Any]]:
    """The values named ``wanted`` (default: everything that the top graph's nodes give) for ``ids [B, T]``, without a
    past.

    Raises :class:`BadInput` where ONNX Runtime does not take the copy, :class:`MissingDependency` without onnx or
    onnxruntime.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingDependency.package(error.name or "onnx", "runtimes") from None
    path = graph_path(artifact)
    model = onnx.load(path, load_external_data=False)
    outputs = [output.name for output in model.graph.output]
    names = list(wanted) if wanted is not None else [n for node in model.graph.node for n in node.output if n]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="edgestill-graph-") as folder:
        for location in _beside(model):
            _link(safe_join(path.parent, location), safe_join(Path(folder), location))
        copy = Path(folder) / path.name
        copy.write_bytes(model.SerializeToString())
        del model
        try:
            session = onnxruntime.InferenceSession(str(copy), options, providers=["CPUExecutionProvider"])
            values = session.run(names, _feed(session, ids, attention_mask))
        except Exception as error:  # its exceptions have no common base
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise BadInput(f"{path}: its inner values can't be read: {reason}", hint="export it again") from error
    return {name: value for name, value in zip(names, values, strict=True) if isinstance(value, np.ndarray)}


def _feed(session: Any, ids: Ints, mask: Ints) -> dict[str, Any]:
    known: dict[str, Any] = {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids),
        "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
    }  # fmt: skip
    feed = {}
    for item in session.get_inputs():
        if item.name.startswith("past_key_values."):
            value = np.zeros((len(ids), item.shape[1], 0, item.shape[3]))
        elif item.name in known:
            value = known[item.name]
        else:
            raise ValueError(f"no value for the input {item.name}")
        feed[item.name] = np.ascontiguousarray(value, _TYPES[item.type])
    return feed


def _beside(model: Any) -> list[str]:
    """The files that weights lie in, by their names in the graph."""
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return sorted({entry.value for entry in entries if entry.key == "location"})


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
