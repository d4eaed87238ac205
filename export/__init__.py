"""Exporters: a model folder in, a sealed artifact folder out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import Progress, silent

if TYPE_CHECKING:
    from ..artifact import Artifact, Format
    from ..checkpoints import ModelFolder
    from ..recipe import ExportConfig
    from .writer import Draft

__all__ = ["export"]

# Whose versions the lineage names.
PACKAGES: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxruntime"),
    "gguf": ("gguf", "llama-cpp-python"),
    "coreml": ("coremltools", "torch", "transformers"),
}


def export(
    model: Path,
    out: Path,
    config: ExportConfig,
    *,
    calibration: Sequence[str] = (),
    lineage: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Write the model folder ``model`` as one artifact folder ``out``, in the format and quantisation of ``config``.

    ``calibration`` are texts for an importance matrix, where the quantisation uses one. ``lineage`` is added to the
    manifest's own (``model_id``, ``versions``). ``out`` appears whole or not at all, replacing what stood there; the
    same model and config give the same bytes wherever the folders lie. An artifact is not yet a verified one:
    :mod:`edgestill.bench.verify` judges it.

    Raises :class:`edgestill.errors.Unsupported` for a task or architecture that the format has no writer for,
    :class:`edgestill.errors.BadInput` for a damaged model folder, :class:`edgestill.errors.MissingDependency` and
    :class:`edgestill.errors.ResourceExhausted`.
    """
    from .. import __version__
    from ..artifact import Artifact, Manifest, seal_artifact, write_tensors
    from ..checkpoints import open_model
    from ..files import atomic_directory
    from . import writer

    folder = open_model(model)
    writer.check_room(out, 2 * folder.size_bytes + (64 << 20))
    form, write = _writer(config.format)
    with atomic_directory(out) as temporary:
        draft = write(folder, temporary, config, calibration, progress)
        if config.ort:
            from .onnx_ort import write_ort

            progress(f"{config.variant}: converting to .ort")
            draft.entry = write_ort(temporary, draft.entry)
        progress(f"{config.variant}: sealing")
        writer.copy_companions(folder, temporary)
        write_tensors(temporary, draft.tensors)
        sealed = seal_artifact(
            temporary,
            Manifest(
                format=form,
                quantisation=config.quantisation,
                task=folder.task,
                entry=draft.entry,
                inputs=draft.inputs,
                outputs=draft.outputs,
                shapes=draft.shapes,
                max_length=draft.max_length,
                vocab_size=folder.vocab_size,
                contents=draft.contents,
                dtype_histogram=draft.dtype_histogram,
                minimum_runtime=draft.minimum_runtime,
                lineage={
                    **(lineage or {}),
                    "model_id": folder.model_id,
                    "versions": {"edgestill": __version__, **writer.versions("numpy", *PACKAGES[form])},
                },
                license=folder.license,
                kv_cache_bytes_per_token=draft.kv_cache_bytes_per_token,
                pooling=folder.pooling,
                normalize=folder.normalize,
                pooling_in_graph=draft.pooling_in_graph,
                prompt_prefix=folder.prompt_prefix,
                labels=folder.labels,
            ),
        )
    return Artifact(out, sealed.manifest)


def _writer(form: str) -> tuple[Format, Callable[[ModelFolder, Path, ExportConfig, Sequence[str], Progress], Draft]]:
    if form == "onnx":
        from . import onnx

        return "onnx", onnx.write
    if form == "gguf":
        from . import gguf

        return "gguf", gguf.write
    from . import coreml

    return "coreml", coreml.write
