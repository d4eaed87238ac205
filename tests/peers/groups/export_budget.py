"""What is lost at a given size: our allocation against the best preset of llama.cpp's quantiser, in llama.cpp."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgestill.bench.reference import make_reference, window_texts
from edgestill.bench.statistics import bootstrap_interval
from edgestill.checkpoints import ModelFolder, load_tokenizer, load_torch, open_model
from edgestill.data import DataSets, load_data
from edgestill.errors import EdgestillError
from edgestill.export import export
from edgestill.export.gguf_layout import place
from edgestill.export.moments import batches, linear_names
from edgestill.export.writer import Weights
from edgestill.quantisation_gguf import FILE_TYPES
from edgestill.recipe import DataConfig, ExportConfig, load_recipe
from edgestill.runtimes.llamacpp_api import LlamaContext, LlamaModel
from edgestill.runtimes.scoring import kl_divergence, open_reference

from ..context import Context
from ..processes import PROGRAMS, launch
from ..quality import held_out_data
from ..registry import Taken, Unavailable, figure

_PRESETS = ("iq4_nl", "q4_0", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
_BUDGET, _STOCK_BYTES = "92MB", 92_500_000  # what is called 92 MB, for the peer
_WINDOW, _TOKENS, _MATRIX_TOKENS = 128, 2048, 6144


@figure(
    "gguf_92mb_kl", group="export", title="KL to the float model at 92 MB over the best stock preset's", unit="ratio",
    limit=0.5, peer="llama_model_quantize with an importance matrix of the same calibration text, no overrides",
    variants=("smollm2", "off-grid"), slow="an hour on two cores",
)  # fmt: skip
def gguf_92mb_kl(context: Context, variant: str) -> Taken:
    """``smollm2`` is read from a Q4_1 file, so that its own weights lie on that grid, which stock presets of this size
    don't use; ``off-grid`` is the same with every weight moved by a random part of that grid's step."""
    model = context.model("decoder") if variant == "smollm2" else _off_grid(context)
    text = _text(context)
    reference = make_reference(
        model.path, context.scratch / f"budget-reference-{variant}", texts=text.split("test"), window=_WINDOW,
        limit=_TOKENS, threads=context.threads,
    )  # fmt: skip
    theirs, name, size = _stock(context, model, text, reference)
    to = f"gguf@{size / 1e6:.6f}MB" if context.tiny else f"gguf@{_BUDGET}"
    out = context.scratch / "budget"
    try:
        artifact = export(
            model.path, out, ExportConfig(to=to), calibration=text.split("calibration"), dev=text.split("dev"),
            progress=context.progress,
        )  # fmt: skip
        ours, contents, bytes_ = (
            _kl(artifact.entry, reference, context.threads),
            artifact.manifest.contents,
            artifact.model_bytes,
        )
    finally:
        shutil.rmtree(out, ignore_errors=True)
    pairs = np.stack([ours, theirs], axis=1)
    interval = bootstrap_interval(pairs, lambda drawn: drawn[..., 0].mean(axis=-1) / drawn[..., 1].mean(axis=-1))
    how = (
        f"{ours.mean():.4g} nats in {bytes_ / 1e6:.2f} MB over {theirs.mean():.4g} of {name} in {size / 1e6:.2f} MB, "
        f"{len(ours)} held-out tokens, both in llama.cpp; {contents}"
    )
    return Taken(float(ours.mean() / theirs.mean()), how, interval, void=context.void if context.tiny else "")


def _text(context: Context) -> DataSets:
    if context.tiny:
        return held_out_data(context, "smollm2-half")
    data = load_recipe("smollm2").data
    web = next(text for text in data.text if text.name == "openwebtext")
    more = web.model_copy(update={"train": 0, "calibration": 64, "dev": 16, "test": 40})
    try:
        return load_data(DataConfig(text=(more,)), base=Path.cwd(), progress=context.progress)
    except EdgestillError as error:
        raise Unavailable(str(error)) from error


def _stock(
    context: Context, model: ModelFolder, text: DataSets, reference: Path
) -> tuple[npt.NDArray[np.float64], str, int]:
    """The preset that loses least among those that are not larger: its KL a token, name and bytes."""
    plain, target = context.scratch / "budget-float", context.scratch / "budget-stock.gguf"
    matrix = _matrix(context, model, text)
    best: tuple[npt.NDArray[np.float64], str, int] | None = None
    try:
        source = export(model.path, plain, ExportConfig(to="gguf:f32")).entry
        for name in _PRESETS:
            context.progress(f"llama_model_quantize: {name}")
            number = str(FILE_TYPES[name].number)
            launch([sys.executable, "-P", PROGRAMS / "quantize_llamacpp.py", source, target, number, matrix],
                   threads=context.threads)  # fmt: skip
            size = target.stat().st_size
            if size > _STOCK_BYTES:
                continue
            lost = _kl(target, reference, context.threads)
            if best is None or lost.mean() < best[0].mean():
                best = (lost, name, size)
    finally:
        shutil.rmtree(plain, ignore_errors=True)
        target.unlink(missing_ok=True)
    if best is None:
        raise Unavailable("no preset is as small as that")
    return best


def _matrix(context: Context, model: ModelFolder, text: DataSets) -> Path:
    """Mean squared inputs of each product, as llama.cpp's own tool takes them, under the names of the file."""
    import torch

    context.progress("importance matrix")
    module = load_torch(model.path)
    inputs = window_texts(
        load_tokenizer(model.path), text.split("calibration") or text.split("train"), window=_WINDOW,
        limit=_MATRIX_TOKENS,
    )  # fmt: skip
    sums: dict[str, Any] = {}
    state: dict[str, Any] = {}

    def see(name: str, given: Any) -> None:
        squares = given[state["mask"]].square().sum(dim=0)
        sums[name] = sums[name] + squares if name in sums else squares

    modules = dict(module.named_modules())
    for place_, name in linear_names(module).items():
        modules[place_].register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
    with torch.inference_mode():
        for ids, mask in batches(inputs, 4):
            state["mask"] = mask.bool()
            module(input_ids=ids, attention_mask=mask)
    weights = Weights(model.path)
    stored = {item.name: item.stored for item in place(model, {name: weights.shape(name) for name in weights})}
    tokens = int(inputs.mask.sum())
    out = context.scratch / "budget-matrix.npz"
    np.savez(out, **{stored[name]: (total / tokens).numpy() for name, total in sums.items()})
    return out


def _kl(path: Path, reference: Path, threads: int) -> npt.NDArray[np.float64]:
    """KL(float ‖ file) of each held-out token, computed by llama.cpp: one way for both sides."""
    opened = open_reference(reference)
    model = LlamaModel(path)
    context = LlamaContext(model, length=_WINDOW, batch=_WINDOW, outputs=_WINDOW, threads=threads)
    found = []
    try:
        for ids, mask, said in zip(opened.ids, opened.mask, opened.said, strict=True):
            count = int(np.asarray(mask).sum())
            context.forget()
            context.feed(np.ascontiguousarray(ids[:count], np.int32), all_logits=True)
            found.append(kl_divergence(np.asarray(said[:count]), context.logits(count)))
    finally:
        context.close()
        model.close()
    return np.concatenate(found)


def _off_grid(context: Context) -> ModelFolder:
    """Each weight of a layer moved by up to half a step of the Q4_1 block that it lies in."""
    from safetensors.numpy import load_file, save_file

    folder = context.scratch / "off-grid"
    if not folder.exists():
        shutil.copytree(context.model("decoder").path, folder)
        rng = np.random.default_rng(1)
        tensors = load_file(folder / "model.safetensors")
        for name, weight in tensors.items():
            if weight.ndim == 2 and ".layers." in name:
                blocks = weight.reshape(-1, 32)
                step = (blocks.max(axis=1) - blocks.min(axis=1)) / 15
                moved = blocks + (rng.random(blocks.shape, dtype=np.float32) - np.float32(0.5)) * step[:, None]
                tensors[name] = moved.reshape(weight.shape)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_model(folder)
