"""``plain_llamacpp.py MODEL.gguf THREADS TASK``: ``llama_cpp.Llama`` as one calls it who has only its documentation.

With flash attention, which our session leaves to llama.cpp ("auto", on for the CPU). Imports nothing of edgestill.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import llama_cpp
import numpy as np
from lines import serve

MODEL, THREADS, TASK = sys.argv[1], int(sys.argv[2]), sys.argv[3]
# as many positions as our session takes for so short a prompt
llama = llama_cpp.Llama(
    MODEL, n_ctx=512, n_batch=512, n_threads=THREADS, n_threads_batch=THREADS, n_gpu_layers=0, flash_attn=True,
    embedding=TASK == "feature-extraction", verbose=False,
)  # fmt: skip


def decode(prompt: list[int], count: int) -> dict[str, Any]:
    """Greedy; seconds of each token after the first (the prompt may still be in the cache)."""
    tokens, marks = [], []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        tokens.append(int(token))
        marks.append(time.perf_counter())
        if len(tokens) == count:
            break
    return {"ids": tokens, "seconds": np.diff(marks).tolist()}


def encode(row: list[int], calls: int) -> dict[str, Any]:
    """Seconds of each forward pass at batch 1; ``embed`` gets the ids ready made, as our session does."""
    llama.tokenize = lambda *_, **__: row
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        vector = llama.embed("", normalize=False)
        seconds.append(time.perf_counter() - begin)
    return {"vector": list(vector), "seconds": seconds}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if "prompt" in request:
        return decode(request["prompt"], request["count"])
    return encode(request["ids"], request["calls"])


serve(llama_cpp.__version__, answer)
