"""A real worker around a toy session in plain numpy: what the worker's tests start, as a script.

What the session does is chosen by the model folder's file ``behaviour`` (one word), so that a test can make it hang,
crash or print at a chosen place.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from edgestill.errors import BadInput
from edgestill.runtimes import worker
from edgestill.runtimes.session import DecodedToken, SessionInfo

VOCABULARY = 11


class Toy:
    """Logits that depend on the last token and its place: argmax is (token + place) mod vocabulary."""

    def __init__(self, folder: Path, options) -> None:
        self.behaviour = (folder / "behaviour").read_text().strip()
        self.threads = os.environ.get("OMP_NUM_THREADS", "unset")
        self._do("load")

    def _do(self, place: str) -> None:
        verb, _, where = self.behaviour.partition("@")
        if where != place:
            return
        match verb:
            case "abort":
                print("ggml.c:1: GGML_ASSERT(ne == 1) failed", file=sys.stderr, flush=True)
                os.abort()
            case "kill":
                os.kill(os.getpid(), 9)
            case "exit":
                os._exit(3)
            case "hang":
                time.sleep(600)
            case "hold":  # a native call that hangs with the interpreter's lock held
                ctypes.PyDLL(None).sleep(600)
            case "child":
                subprocess.Popen(["sleep", "600"])
                time.sleep(600)
            case "print":
                os.write(1, b"llama_model_loader: loaded\n")
                print("and from Python", flush=True)
            case "input":
                raise BadInput("the weights are torn", hint="export it again")
            case "raise":
                raise ZeroDivisionError("division by zero")
            case "memory":
                raise MemoryError

    def info(self) -> SessionInfo:
        return SessionInfo("toy", "1.0", f"threads={self.threads}", "text-generation",
                           ("forward", "decode", "score", "latency"), VOCABULARY, 64, {"cpu": 3})  # fmt: skip

    def forward(self, ids, attention_mask):
        self._do("forward")
        best = (ids + np.arange(ids.shape[1])) % VOCABULARY
        logits = np.eye(VOCABULARY, dtype=np.float32)[best] * 4
        return logits.astype(np.float64) if self.behaviour == "double" else logits

    def decode(self, prompt_ids, max_new_tokens, *, logits=False):
        self._do("decode")
        ids = list(prompt_ids)
        for _ in range(max_new_tokens):
            row = self.forward(np.array([ids]), None)[0, -1]
            ids.append(int(row.argmax()))
            yield DecodedToken(ids[-1], 0.001, row if logits else None)

    def close(self) -> None:
        self._do("close")


if __name__ == "__main__":
    sys.exit(worker.main(sys.argv[1:], prepare=lambda folder, options: lambda: Toy(folder, options)))
