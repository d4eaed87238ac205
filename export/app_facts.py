"""What a sample has to know about an artifact, read from its manifest, its tokenizer and its configs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..artifact import Artifact, Manifest, TensorSpec
from ..errors import Unsupported
from ..files import read_json

__all__ = ["app_facts", "chat_words", "stop_ids"]

_MESSAGE = "edgestill-puts-the-message-here"
_JAVA = {"float32": "FLOAT", "float16": "FLOAT16", "int8": "INT8", "uint8": "UINT8"}
_SWIFT = {"float32": "Float", "float16": "Float16"}
_TITLES = {"text-generation": "A chat with the model", "feature-extraction": "Embeddings of texts",
           "text-classification": "Classes of texts", "token-classification": "Labels of words"}  # fmt: skip
_REQUIREMENTS = {"onnx": "onnxruntime", "gguf": "llama-cpp-python", "coreml": "coremltools"}
_SWIFT_PACKAGES = {
    "onnx": "`microsoft/onnxruntime-swift-package-manager` (product `onnxruntime`) and "
    "`huggingface/swift-transformers` (product `Tokenizers`).",
    "gguf": "the `llama` XCFramework of a release of `ggml-org/llama.cpp`, as a binary target.",
    "coreml": "`huggingface/swift-transformers` (product `Tokenizers`).",
}


def app_facts(artifact: Artifact, language: str, out: Path) -> dict[str, Any]:
    """All that the templates name. Raises :class:`Unsupported` where ``language`` can't run this artifact."""
    manifest = artifact.manifest
    form, inputs = manifest.format, {spec.name for spec in manifest.inputs}
    generates = manifest.task == "text-generation"
    _check(manifest, language)
    stop = stop_ids(artifact)
    before, after, templated = chat_words(artifact.path) if generates else ("", "", False)
    output = manifest.outputs[0]
    minimum = manifest.minimum_runtime.get("onnxruntime", "")
    ios = manifest.minimum_runtime.get("ios", "")
    versions = manifest.lineage.get("versions", {})
    return {
        "language": language,
        "format": form,
        "title": _TITLES[manifest.task],
        "variant": artifact.path.name,
        "to": f"{form}:{manifest.quantisation}",
        "artifact_id": manifest.artifact_id[:12],
        "example": "How are you?" if generates else "a good film",
        "relative": Path(os.path.relpath(artifact.path.resolve(), out.resolve())).as_posix(),
        "entry": manifest.entry,
        "license": manifest.license,
        "max_length": manifest.max_length,
        "vocab_size": output.shape[-1] if generates else manifest.vocab_size,
        "generates": generates,
        "labels": list(manifest.labels) if manifest.task == "text-classification" else [],
        "inputs": inputs,
        "output": output.name,
        "width": output.shape[-1],
        "prefix": manifest.prompt_prefix,
        "pooling": manifest.pooling or "none",
        "normalize": manifest.normalize,
        "pool_here": form == "onnx" and manifest.pooling is not None and len(output.shape) == 3,
        "pad_id": _pad_id(artifact.path),
        "stop": "{" + ", ".join(map(str, stop)) + "}" if stop else "set()",
        "stop_list": stop,
        "before": before if templated else manifest.prompt_prefix,
        "after": after,
        "add_special": not templated,
        "chat_note": "what the chat template puts around one message" if templated
        else "the model has no chat template: it goes on with the text",
        "cache": _cache(manifest),
        "cache_java": _JAVA.get(next((spec.dtype for spec in manifest.inputs if _is_cache(spec)), "float32"), "FLOAT"),
        "mask_dtype": _mask(manifest),
        "mask_swift": _SWIFT.get(_mask(manifest), "Float"),
        "logits_swift": _SWIFT.get(output.dtype, "Float"),
        "ios": ios,
        "macos": str(int(ios) - 3) if ios.isdigit() else "",
        "minimum": minimum,
        "ort_version": versions.get("onnxruntime", minimum),
        "swift_packages": _SWIFT_PACKAGES[form],
        "requirements": _requirements(form, minimum, versions),
    }  # fmt: skip


def _check(manifest: Manifest, language: str) -> None:
    where = f"no {language} sample for {manifest.format}:{manifest.quantisation}"
    if manifest.shapes != "dynamic":
        raise Unsupported(f"{where}: its shapes are {manifest.shapes}", hint='export it with shapes = "dynamic"')
    if manifest.task == "token-classification":
        raise Unsupported(
            f"{where}: samples do not put labels of tokens together to words yet",
            hint="its output `logits [batch, length, labels]` is in the order of `labels` in artifact.json",
        )
    if manifest.format == "gguf" and manifest.task == "text-classification":
        raise Unsupported(f"{where}: llama.cpp's bindings return no class scores", hint="export onnx or coreml")
    halves = [spec.name for spec in manifest.inputs if _is_cache(spec) and spec.dtype != "float32"]
    if language == "swift" and manifest.format == "onnx" and halves:
        raise Unsupported(
            f"{where}: ONNX Runtime for Swift has no {manifest.inputs[-1].dtype} tensors, which the KV cache needs",
            hint="export coreml, gguf or an onnx variant that keeps its cache in float32",
        )


def chat_words(folder: Path) -> tuple[str, str, bool]:
    """What the chat template puts before and after one message of a user, and whether there is a template.

    The template is rendered by Transformers, in its sandbox. Raises :class:`Unsupported` when it does not show the
    message as it is.
    """
    from ..checkpoints import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        return "", "", False
    try:
        text = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": _MESSAGE}], tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as error:  # whatever a template raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unsupported(f"{folder}: the chat template can't be rendered: {reason}", hint="mend it") from None
    before, found, after = text.partition(_MESSAGE)
    if not found or _MESSAGE in after:
        raise Unsupported(f"{folder}: the chat template does not show a message once, as it is", hint="mend it")
    return before, after, True


def stop_ids(artifact: Artifact) -> list[int]:
    """Ids that end an answer, as the generation config, the config and the tokenizer name them, ascending."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (artifact.path / name).is_file():
            named = read_json(artifact.path / name).get("eos_token_id")
            found |= {item for item in (named if isinstance(named, list) else [named]) if type(item) is int}
    eos = _token_id(artifact.path, "eos_token")
    found |= {eos} if eos is not None else set()
    return sorted(item for item in found if 0 <= item < artifact.manifest.vocab_size)


def _token_id(folder: Path, which: str) -> int | None:
    """The id of a special token that ``tokenizer_config.json`` names."""
    if not (folder / "tokenizer_config.json").is_file() or not (folder / "tokenizer.json").is_file():
        return None
    named = read_json(folder / "tokenizer_config.json").get(which)
    token = named.get("content") if isinstance(named, dict) else named
    spec = read_json(folder / "tokenizer.json")
    added = {row["content"]: int(row["id"]) for row in spec.get("added_tokens", ())}
    vocabulary = spec["model"].get("vocab", {})
    found = added.get(token, vocabulary.get(token) if isinstance(vocabulary, dict) else None)
    return int(found) if found is not None else None


def _pad_id(folder: Path) -> int:
    return _token_id(folder, "pad_token") or 0


def _is_cache(spec: TensorSpec) -> bool:
    return spec.name.startswith("past_key_values.")


def _cache(manifest: Manifest) -> list[dict[str, Any]]:
    """Each cache input with the output that goes back into it, and its shape before the first token."""
    return [
        {
            "name": spec.name,
            "present": spec.name.replace("past_key_values", "present"),
            "dtype": spec.dtype,
            "empty": tuple(size if isinstance(size, int) else int(size == "batch") for size in spec.shape),
        }
        for spec in manifest.inputs
        if _is_cache(spec)
    ]


def _mask(manifest: Manifest) -> str:
    return next((spec.dtype for spec in manifest.inputs if spec.name == "causal_mask"), "float32")


def _requirements(form: str, minimum: str, versions: dict[str, str]) -> list[str]:
    least = minimum or versions.get(_REQUIREMENTS[form], "")
    runtime = _REQUIREMENTS[form] + (f">={least}" if least else "")
    return [runtime, "numpy"] if form == "gguf" else [runtime, "numpy", "tokenizers"]
