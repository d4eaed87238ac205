"""Exporters: a model folder in, a sealed artifact folder out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EdgestillError, UsageError
from ..progress import Progress, silent

if TYPE_CHECKING:
    from ..artifact import Artifact, Format
    from ..quantisation import Budget
    from ..recipe import ExportConfig
    from .allocate_space import Chosen
    from .source import Source
    from .writer import Draft

    Writer = Callable[[Source, Path, Sequence[str], Progress], Draft]

__all__ = ["export"]

# Whose versions the lineage names.
PACKAGES: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxruntime"),
    "gguf": ("gguf", "llama-cpp-python"),
    "coreml": ("coremltools", "torch", "transformers"),
}


def export(
    model: Path | Source,
    out: Path,
    config: ExportConfig,
    *,
    calibration: Sequence[str] = (),
    dev: Sequence[str] = (),
    types: Mapping[str, str] | None = None,
    work: Path | None = None,
    lineage: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Write the model folder ``model`` as one artifact folder ``out``, in the format and quantisation of ``config``.

    Several artifacts of one model share what is read and measured of it, and a single load, when ``model`` is a
    :class:`.source.Source`; each is the same as from a call of its own, byte for byte.

    ``calibration`` are texts for an importance matrix, where the quantisation uses one. ``types`` gives parameters, by
    their names in the model folder, other types of the same format. A size in place of a quantisation (``gguf@60MB``)
    chooses all types (:mod:`.allocate`): by what each costs on ``calibration``, the whole judged on ``dev``, with what
    was measured kept in the folder ``work``. ``lineage`` is added to the manifest's own (``model_id``, ``versions``).
    ``out`` appears whole or not at all, replacing what stood there; the same model and config give the same bytes
    wherever the folders lie. An artifact is not yet a verified one: :mod:`edgestill.bench.verify` judges it.

    Raises :class:`edgestill.errors.Unsupported` for a task or architecture that the format has no writer for,
    :class:`edgestill.errors.UsageError` for a budget below the smallest possible size,
    :class:`edgestill.errors.BadInput` for a damaged model folder, :class:`edgestill.errors.MissingDependency` and
    :class:`edgestill.errors.ResourceExhausted`.
    """
    from .. import __version__
    from ..artifact import Artifact, Manifest, seal_artifact, write_tensors
    from ..checkpoints import open_model
    from ..files import atomic_directory
    from ..quantisation import Budget
    from . import writer
    from .source import Source

    source = model if isinstance(model, Source) else Source(open_model(model))
    folder = source.folder
    writer.check_room(out, 2 * folder.size_bytes + (64 << 20))
    source.check()
    budget = config.parsed
    chosen: Chosen | None = None
    if isinstance(budget, Budget):
        from .allocate import allocate

        if types:
            raise UsageError(f"{config.to} chooses the types itself", hint="give a quantisation, or no types")
        chosen = allocate(source, config, budget, calibration=calibration, dev=dev, work=work, progress=progress)
    form, write = _writer(config, types, chosen, dev, work)
    with atomic_directory(out) as temporary:
        draft = write(source, temporary, calibration, progress)
        if config.ort:
            from .onnx_ort import write_ort

            progress(f"{config.variant}: converting to .ort")
            draft.entry = write_ort(temporary, draft.entry)
        progress(f"{config.variant}: sealing")
        writer.copy_companions(folder, temporary)
        write_tensors(temporary, draft.tensors)
        chats = folder.task != "text-generation" or writer.has_chat_template(folder)
        lacking = "" if chats else "; no chat template"
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
                contents=(chosen.note if chosen else draft.contents) + lacking,
                dtype_histogram=draft.dtype_histogram,
                minimum_runtime=draft.minimum_runtime,
                lineage={
                    **(lineage or {}),
                    "model_id": source.model_id,
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
        if isinstance(budget, Budget):
            _check_size(sealed, budget)
    return Artifact(out, sealed.manifest)


def _check_size(artifact: Artifact, budget: Budget) -> None:
    if artifact.model_bytes > budget.budget_bytes:
        raise EdgestillError(
            f"{budget.to}: the model came out at {artifact.model_bytes:,} bytes", hint="report this, with the model"
        )


def _writer(
    config: ExportConfig, types: Mapping[str, str] | None, chosen: Chosen | None, dev: Sequence[str], work: Path | None
) -> tuple[Format, Writer]:
    """The writer of a format, told what this artifact is to be."""
    told: Mapping[str, Any] = {"types": types}
    if chosen is not None:
        config = config.model_copy(update={"to": chosen.to, "name": config.variant})
        told = {"types": chosen.types, **chosen.told}
    if config.format == "gguf":
        from . import gguf

        return "gguf", lambda source, out, texts, tell: gguf.write(source, out, config, texts, tell, **told)
    if config.format == "onnx":
        from . import onnx

        if config.quantisation == "int8-static":
            from .onnx_static import plan_static

            return "onnx", lambda source, out, texts, tell: onnx.write(
                source, out, config, texts, tell, **told,
                static=plan_static(source, calibration=texts, dev=dev, work=work, progress=tell),
            )  # fmt: skip
        return "onnx", lambda source, out, texts, tell: onnx.write(source, out, config, texts, tell, **told)
    from . import coreml

    return "coreml", lambda source, out, texts, tell: coreml.write(source, out, config, texts, tell, **told)
