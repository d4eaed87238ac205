"""A way around a defect of ONNX Runtime: with exact int8 sums it loads no graph in which two nodes share a constant.

Found with 1.32 on x86 without VNNI: its pass that turns int8 weights into uint8 adds the changed constant once a node,
under one name, and fails the second time ("Attempt to replace the existing tensor"). Quantisers share zero points, so
most models are concerned. Here every node gets its own copy; weights beside the graph stay where they are.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..artifact import Artifact
from ..errors import MissingDependency
from .onnx_reader import graph_path

__all__ = ["external_folder", "unshared_graph"]

_FOLDER = "session.model_external_initializers_file_folder_path"


def external_folder(artifact: Artifact) -> tuple[str, str]:
    """The session entry, name and value, by which a graph in memory finds the weights beside its file."""
    return _FOLDER, str(graph_path(artifact).parent)


def unshared_graph(artifact: Artifact) -> bytes:
    """The artifact's graph, serialised, with a copy of each int8 constant for each node that reads it."""
    try:
        import onnx
    except ImportError:
        raise MissingDependency.package("onnx", "runtimes") from None
    model: Any = onnx.load(graph_path(artifact), load_external_data=False)
    constants = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    uses = Counter(name for node in model.graph.node for name in node.input if name in constants)
    copies = 0
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if uses[name] > 1:
                copy = model.graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = f"{name}.copy{copies}"
                node.input[place] = copy.name
                copies += 1
    return bytes(model.SerializeToString())
