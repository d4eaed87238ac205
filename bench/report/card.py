"""Pieces of ``MODEL_CARD.md``: text made safe for Markdown, and how to use each artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from .facts import ArtifactFacts

__all__ = ["markdown", "usage"]


def markdown(value: object) -> str:
    """``value`` on one line, with everything escaped that Markdown, HTML or a table would take for markup.

    >>> markdown("a|b <img> *x*")
    'a\\\\|b &lt;img&gt; \\\\*x\\\\*'
    """
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)


def usage(artifact: ArtifactFacts) -> str:
    """A short program (with its Markdown fence) that runs ``artifact``; paths are relative to the run folder."""
    writer: Callable[[ArtifactFacts], str] = {"onnx": _onnx, "gguf": _gguf, "coreml": _coreml}[artifact.manifest.format]
    return writer(artifact)


def _fence(language: str, code: str) -> str:
    return f"```{language}\n{code.strip()}\n```"


def _quoted(artifact: ArtifactFacts, file: str) -> str:
    """A path as a literal that Python, Swift and JSON share."""
    return json.dumps(f"{artifact.folder}/{file}", ensure_ascii=False)


def _onnx(artifact: ArtifactFacts) -> str:
    manifest = artifact.manifest
    start = f"""
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file({_quoted(artifact, "tokenizer.json")})
session = onnxruntime.InferenceSession({_quoted(artifact, manifest.entry)})
"""
    if manifest.task == "text-generation":
        return _fence("python", start + _GENERATE)
    output = manifest.outputs[0].name if manifest.outputs else "output"
    prefix = json.dumps(manifest.prompt_prefix, ensure_ascii=False)
    texts = '["a first text", "and a second one"]' if not manifest.prompt_prefix else f'[{prefix} + "a text"]'
    tail = f"labels = {json.dumps(list(manifest.labels), ensure_ascii=False)}\n" if manifest.labels else ""
    if manifest.labels:
        tail += f"print([labels[row.argmax()] for row in {output}])"
    else:
        tail += f"print({output} @ {output}.T)  # cosine similarities"
    return _fence(
        "python",
        start
        + f"""
tokenizer.enable_truncation({manifest.max_length})
tokenizer.enable_padding()
batch = tokenizer.encode_batch({texts})
feeds = {{
    "input_ids": np.array([item.ids for item in batch], dtype=np.int64),
    "attention_mask": np.array([item.attention_mask for item in batch], dtype=np.int64),
}}
({output},) = session.run([{json.dumps(output)}], feeds)
{tail}
""",
    )


_GENERATE = """
ids = tokenizer.encode("Once upon a time").ids
types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
past = {
    item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), types[item.type])
    for item in session.get_inputs()
    if item.name.startswith("past_key_values.")
}
names = [item.name for item in session.get_outputs()]
step = list(ids)
for _ in range(32):  # greedy, with the KV cache
    feeds = {"input_ids": np.array([step]), "attention_mask": np.ones((1, len(ids)), np.int64), **past}
    outputs = dict(zip(names, session.run(names, feeds)))
    past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
    step = [int(outputs["logits"][0, -1].argmax())]
    ids += step
print(tokenizer.decode(ids))
"""


def _gguf(artifact: ArtifactFacts) -> str:
    manifest = artifact.manifest
    model = _quoted(artifact, manifest.entry)
    if manifest.task == "text-generation":
        return _fence(
            "python",
            f"""
from llama_cpp import Llama

model = Llama({model}, n_ctx={min(manifest.max_length, 2048)}, verbose=False)
print(model("Once upon a time", max_tokens=32, temperature=0)["choices"][0]["text"])
""",
        )
    return _fence(
        "python",
        f"""
from llama_cpp import Llama

model = Llama({model}, embedding=True, n_ctx={manifest.max_length}, verbose=False)
print(len(model.embed({json.dumps(manifest.prompt_prefix + "a text", ensure_ascii=False)}, normalize=True)))
""",
    )


def _coreml(artifact: ArtifactFacts) -> str:
    manifest = artifact.manifest
    inputs = ", ".join(f"{spec.name} {list(spec.shape)} {spec.dtype}" for spec in manifest.inputs)
    minimum = manifest.minimum_runtime.get("ios")
    needs = f"iOS {minimum} or newer. " if minimum else ""
    return f"{needs}Inputs: {markdown(inputs)}.\n\n" + _fence(
        "swift",
        f"""
import CoreML

let compiled = try await MLModel.compileModel(at: URL(fileURLWithPath: {_quoted(artifact, manifest.entry)}))
let model = try MLModel(contentsOf: compiled)
""",
    )
