"""``plain_onnxruntime.py MODEL.onnx THREADS TASK``: ONNX Runtime as one calls it who has only its documentation.

Keys and values go from step to step as ``OrtValue``, without a copy to numpy. Imports nothing of edgestill.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import onnxruntime
from lines import serve

MODEL, THREADS = sys.argv[1], int(sys.argv[2])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = THREADS
options.log_severity_level = 3
session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
outputs = [item.name for item in session.get_outputs()]
past = {item.name: item for item in session.get_inputs() if item.name.startswith("past_key_values.")}


def value(array: np.ndarray) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def decode(prompt: list[int], count: int, head_dim: int) -> dict[str, Any]:
    """Greedy; seconds of each token after the first. ``head_dim`` where the graph itself does not say it."""
    feed = {
        name: value(np.zeros(
            (1, item.shape[1], 0, head_dim or item.shape[3]),
            np.float16 if item.type == "tensor(float16)" else np.float32,
        ))
        for name, item in past.items()
    }  # fmt: skip
    ids = np.array([prompt], np.int64)
    used = 0
    tokens, marks = [], []
    for _ in range(count):
        used += ids.shape[1]
        feed["input_ids"] = value(ids)
        feed["attention_mask"] = value(np.ones((1, used), np.int64))
        results = dict(zip(outputs, session.run_with_ort_values(None, feed), strict=True))
        token = int(results.pop("logits").numpy()[0, -1].argmax())
        tokens.append(token)
        marks.append(time.perf_counter())
        feed = {name.replace("present", "past_key_values"): result for name, result in results.items()}
        ids = np.array([[token]], np.int64)
    return {"ids": tokens, "seconds": np.diff(marks).tolist()}


def encode(row: list[int], calls: int) -> dict[str, Any]:
    """Seconds of each forward pass at batch 1."""
    ids = np.array([row], np.int64)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        (vector,) = session.run(outputs[:1], feed)
        seconds.append(time.perf_counter() - begin)
    return {"vector": vector[0].tolist(), "seconds": seconds}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if "prompt" in request:
        return decode(request["prompt"], request["count"], request.get("head_dim", 0))
    return encode(request["ids"], request["calls"])


serve(onnxruntime.__version__, answer)
