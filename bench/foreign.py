"""Artifacts of other tools: described from what their files say, and wrapped so that they are judged like ours.

A bare ``.gguf``, ``.onnx`` or ``.mlpackage`` becomes a temporary artifact folder: its payload linked (copied only
across file systems), its inputs and outputs read from the file, its weights found again by name or, where a tool
renamed them, by value. What can't be found is said, and the checks that need it are not applied to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..artifact import ARTIFACT_FILE, Artifact, Format, Manifest, StoredTensor, TensorSpec, seal_artifact, write_tensors
from ..errors import BadInput, EdgestillError, Unsupported
from ..gguf_names import gguf_names
from ..runtimes.payload import apply_layout, open_payload

if TYPE_CHECKING:
    from ..checkpoints import ModelFolder

__all__ = ["find_payload", "match_weights", "wrap_foreign"]

Floats = npt.NDArray[np.float32]
_FORMATS: Mapping[str, Format] = {".gguf": "gguf", ".onnx": "onnx", ".mlpackage": "coreml"}
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_SAMPLE = 4096  # values of a tensor that candidates are compared by
_ALIKE = 0.98  # cosine; 2-bit codes reach 0.97, another tensor of a trained model 0.1


def find_payload(source: Path) -> Path | None:
    """The file (or package) that a runtime would open: ``source`` itself, or the only one in that folder. ``None`` for
    an artifact folder of ours. Raises :class:`BadInput` for none and for several."""
    if source.suffix in _FORMATS and source.exists():
        return source
    if not source.is_dir() or (source / ARTIFACT_FILE).is_file():
        return None
    found = sorted(path for suffix in _FORMATS for path in source.glob(f"*{suffix}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise BadInput(
            f"{source} has no {ARTIFACT_FILE}, and of models of other tools: {names}",
            hint="name one .gguf, .onnx or .mlpackage",
        )
    return found[0]


def wrap_foreign(payload: Path, student: ModelFolder, out: Path) -> Artifact:
    """Describe ``payload`` and make the artifact folder ``out`` of it, with the weights of ``student`` found in it.

    Raises :class:`BadInput` for a damaged file and :class:`Unsupported` for inputs that we have no values for.
    """
    form = _FORMATS[payload.suffix]
    out.mkdir(parents=True)
    for source in _files(payload, form):
        _link(source, out / source.relative_to(payload.parent))
    for name in _COMPANIONS:
        if (payload.parent / name).is_file():
            _link(payload.parent / name, out / name)
    facts = {"onnx": _onnx, "gguf": _gguf, "coreml": _coreml}[form](payload, student)
    manifest = Manifest(
        format=form, quantisation="as found", task=student.task, entry=payload.name, shapes="dynamic",
        vocab_size=student.vocab_size, contents=f"made by another tool: {payload.name}", dtype_histogram={},
        minimum_runtime={}, lineage={"foreign": payload.name}, pooling=student.pooling, normalize=student.normalize,
        prompt_prefix=student.prompt_prefix, labels=student.labels,
        **{"max_length": student.max_length, "pooling_in_graph": True, **facts},
    )  # fmt: skip
    draft = Artifact(out, manifest)
    reader = open_payload(draft)
    found = reader.histogram()
    write_tensors(out, match_weights(draft, student))
    return seal_artifact(out, _replaced(manifest, found))


def _replaced(manifest: Manifest, histogram: Mapping[str, Any]) -> Manifest:
    shown = ", ".join(f"{row.tensors} x {name}" for name, row in histogram.items())
    return dataclasses.replace(manifest, dtype_histogram=histogram, contents=f"{manifest.contents} ({shown})")


def _files(payload: Path, form: Format) -> Iterator[Path]:
    """The payload and, for ONNX, the files that its tensors lie in."""
    if payload.is_dir():
        yield from (path for path in sorted(payload.rglob("*")) if path.is_file())
        return
    yield payload
    if form == "onnx":
        from ..runtimes.onnx_reader import OnnxFile

        yield from sorted({t.path for t in OnnxFile(payload).tensors.values() if t.path != payload})


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        os.link(source.resolve(), target)
        return
    shutil.copyfile(source, target)


# ---- what the files say --------------------------------------------------------------------------------------------

_FED = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def _onnx(payload: Path, student: ModelFolder) -> dict[str, Any]:
    from onnx import helper

    from ..runtimes.onnx_reader import OnnxFile

    graph = OnnxFile(payload).graph

    def specs(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                value.name, helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                tuple(d.dim_param or d.dim_value or "free" for d in value.type.tensor_type.shape.dim),
            )
            for value in values
        )  # fmt: skip

    inputs, outputs = specs(graph.input), specs(graph.output)
    strange = [s.name for s in inputs if s.name not in _FED and not s.name.startswith("past_key_values.")]
    if strange or not any(s.name == "input_ids" for s in inputs):
        raise Unsupported(
            f"{payload.name} takes {', '.join(s.name for s in inputs)}",
            hint=f"known inputs: {', '.join(_FED)}, past_key_values.N.key and .value",
        )
    wanted = {"feature-extraction": ("sentence_embedding", "last_hidden_state")}.get(student.task, ("logits",))
    chosen = next((s for name in wanted for s in outputs if s.name == name), outputs[0])
    rest = tuple(s for s in outputs if s != chosen)
    pooled = student.task != "feature-extraction" or len(chosen.shape) == 2
    return {"inputs": inputs, "outputs": (chosen, *rest), "pooling_in_graph": pooled}


def _gguf(payload: Path, student: ModelFolder) -> dict[str, Any]:
    from ..runtimes.gguf_file import GgufFile

    with GgufFile(payload) as file:
        name = str(file.metadata.get("general.architecture", ""))
        length = file.metadata.get(f"{name}.context_length", student.max_length)
    output = "logits" if student.task != "feature-extraction" else "sentence_embedding"
    return {
        "inputs": (TensorSpec("input_ids", "int32", ("batch", "length")),),
        "outputs": (TensorSpec(output, "float32", ("batch", "length")),),
        "max_length": max(1, min(int(length), student.max_length)),
    }


def _coreml(payload: Path, student: ModelFolder) -> dict[str, Any]:
    from ..runtimes.milproto import load_program

    program = load_program(payload)
    free = {None: "free"}

    def spec(name: str, kind: Any) -> TensorSpec:
        return TensorSpec(name, kind.dtype, tuple(free.get(size, size) for size in kind.shape))

    outputs = tuple(spec(name, program.output_types[name]) for name in program.outputs if name in program.output_types)
    if not outputs:
        raise Unsupported(f"{payload.name} gives nothing that it computes", hint="convert it again")
    return {"inputs": tuple(spec(name, kind) for name, kind in program.inputs.items()), "outputs": outputs}


# ---- finding the weights -------------------------------------------------------------------------------------------


def match_weights(artifact: Artifact, student: ModelFolder) -> list[StoredTensor]:
    """Where the parameters of ``student`` lie in a payload: by name, else by the nearest values of a fitting shape."""
    import safetensors

    from ..checkpoints import WEIGHTS_FILE

    reader = open_payload(artifact)
    candidates = {tensor.stored: tensor for tensor in _candidates(artifact)}
    found: list[StoredTensor] = []
    left: dict[str, Floats] = {}
    samples: dict[tuple[str, int], Floats] = {}
    with safetensors.safe_open(student.path / WEIGHTS_FILE, framework="numpy") as weights:
        by_name = _names(artifact.manifest.format, list(candidates), list(weights.keys()), student)
        for name in weights.keys():  # noqa: SIM118 (not a mapping)
            weight = np.asarray(weights.get_tensor(name), np.float32)
            stored = by_name.get(name)
            tensor = None if stored is None else _fitting(reader, name, candidates[stored], weight, student)
            if tensor is None:
                left[name] = weight
            else:
                found.append(tensor)
    taken = {tensor.stored for tensor in found}
    for stored, candidate in candidates.items():
        if stored not in taken and left:
            values = _decoded(reader, candidate)
            if values is None or values.ndim not in (1, 2):
                continue
            for turn in range(values.ndim):
                samples[stored, turn] = values.T if turn else values
    for name, weight in left.items():
        best, second = ("", 0, 0.0), 0.0
        for (stored, turn), values in samples.items():
            if stored not in taken and values.shape == weight.shape:
                alike = _cosine(weight, values)
                if alike > best[2]:
                    best, second = (stored, turn, alike), best[2]
                else:
                    second = max(second, alike)
        # Vectors of a norm are alike in all layers: only a clear case counts.
        if best[2] > _ALIKE and 1 - best[2] < 0.5 * (1 - second):
            stored, turn, _ = best
            layout: tuple[tuple[Any, ...], ...] = (("transpose",),) if turn else ()
            found.append(dataclasses.replace(candidates[stored], name=name, layout=layout))
            taken.add(stored)
    return found


def _candidates(artifact: Artifact) -> Iterator[StoredTensor]:
    """Everything in the payload that may be a weight, under its own name."""
    match artifact.manifest.format:
        case "onnx":
            from ..runtimes.onnx_constants import OnnxConstants
            from ..runtimes.onnx_reader import OnnxFile

            for name, grid, scales, zeros in OnnxConstants(OnnxFile(artifact.entry)).weights():
                yield StoredTensor(name, name, grid, (), scales, zeros)
        case "gguf":
            from ..runtimes.gguf_file import GgufFile

            with GgufFile(artifact.entry) as file:
                yield from (StoredTensor(name, name, tensor.grid) for name, tensor in file.tensors.items())
        case _:
            from ..runtimes.milproto import load_program
            from ..runtimes.payload_coreml import grid_of, stored_weights

            program = load_program(artifact.entry)
            for name, stored in stored_weights(program):
                with contextlib.suppress(EdgestillError):  # a grid that we have no name for: not found, and said so
                    grid = grid_of(stored, program)
                    if not grid.startswith(("int32", "uint16", "string", "bool")):
                        yield StoredTensor(name, name, grid)


def _names(form: Format, stored: list[str], parameters: list[str], student: ModelFolder) -> dict[str, str]:
    """Parameter -> name in the payload, as far as names tell."""
    if form == "gguf":
        called = gguf_names(student)
        there = set(stored)
        found = {}
        for name in parameters:
            module, _, kind = name.rpartition(".")
            if (tensor := f"{called.get(module, module)}.{kind}") in there:
                found[name] = tensor
        return found
    plain = {re.sub(r"[^a-z0-9]+", "_", name.lower()): name for name in stored}
    found = {}
    for name in parameters:
        short = re.sub(r"[^a-z0-9]+", "_", name.lower())
        endings = [
            p for p in plain if re.fullmatch(rf"(?:.*_)?{short}(?:_quantized|_q|_to_fp16|_quantized_to_fp16)?", p)
        ]
        if len(endings) == 1:
            found[name] = plain[endings[0]]
        elif short in plain:
            found[name] = plain[short]
    return found


def _fitting(
    reader: Any, name: str, candidate: StoredTensor, weight: Floats, student: ModelFolder
) -> StoredTensor | None:
    """The layout in which a tensor of the right name has the right shape, the nearest where several do."""
    heads = int(student.config.get("num_attention_heads", 1))
    turned = {"q_proj": heads, "k_proj": int(student.config.get("num_key_value_heads", heads))}
    layouts: list[tuple[tuple[Any, ...], ...]] = [(), (("transpose",),)]
    layouts += [(("rope_unpermute", count),) for part, count in turned.items() if f".{part}." in name]
    if student.architecture == "gemma3_text":  # its norms multiply by 1 + w, and are stored as that
        layouts.append((("add", -1),))
    values = _decoded(reader, candidate)
    if values is None:
        return None
    best: tuple[float, tuple[tuple[Any, ...], ...]] | None = None
    for layout in layouts:
        try:
            laid = apply_layout(values, layout, name=name)
        except BadInput:
            continue
        if laid.shape == weight.shape:
            alike = _cosine(weight, laid)
            if best is None or alike > best[0]:
                best = (alike, layout)
    return None if best is None else dataclasses.replace(candidate, name=name, layout=best[1])


def _decoded(reader: Any, tensor: StoredTensor) -> Floats | None:
    try:
        return np.asarray(reader.decode(tensor), np.float32)
    except EdgestillError:
        return None


def _cosine(a: Floats, b: Floats) -> float:
    step = max(1, a.size // _SAMPLE)
    x, y = a.reshape(-1)[::step].astype(np.float64), b.reshape(-1)[::step].astype(np.float64)
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else float(not x.any() and not y.any())
