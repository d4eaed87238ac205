"""``kl_onnxruntime.py MODEL.onnx THREADS REFERENCE HEAD_DIM``: how far a graph is from float logits.

Answers one request, ``{}``, with the KL divergence (nats) of each predicted token of the reference folder, in float64,
and the share of equal first choices. Any graph with ``input_ids``, ``attention_mask`` and an empty cache will do.
Imports nothing of edgestill.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import onnxruntime
from lines import serve

MODEL, THREADS, REFERENCE, HEAD_DIM = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
_ROWS = 32  # reduced at a time


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def answer(_: dict[str, Any]) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
    empty = {
        item.name: np.zeros((1, item.shape[1], 0, HEAD_DIM), np.float32)
        for item in session.get_inputs() if item.name.startswith("past_key_values.")
    }  # fmt: skip
    names = {item.name for item in session.get_inputs()}
    ids, mask, said = (np.load(REFERENCE / f"{name}.npy", mmap_mode="r") for name in ("ids", "mask", "logits"))
    divergences: list[float] = []
    windows: list[int] = []
    agreed = 0
    for row in range(len(ids)):
        length = int(mask[row].sum())
        feed = {"input_ids": np.array(ids[row : row + 1, :length]), "attention_mask": np.ones((1, length), np.int64)}
        if "position_ids" in names:
            feed["position_ids"] = np.arange(length)[None]
        (logits,) = session.run(["logits"], feed | empty)
        for start in range(0, length - 1, _ROWS):
            rows = slice(start, min(start + _ROWS, length - 1))
            own, float_ = log_softmax(logits[0, rows]), log_softmax(np.array(said[row, rows]))
            found = (np.exp(float_) * (float_ - own)).sum(axis=-1)
            divergences += found.tolist()
            windows += [row] * len(found)
            agreed += int((own.argmax(axis=-1) == float_.argmax(axis=-1)).sum())
    return {"kl": divergences, "window": windows, "top1": agreed / len(divergences)}


serve(onnxruntime.__version__, answer)
