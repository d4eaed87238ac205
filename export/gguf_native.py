"""Work for llama.cpp that is done in a process of its own: on some inputs it aborts, and the run must outlive that.

``python -m edgestill.export.gguf_native`` reads one request as JSON from stdin and writes the answer to stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import EdgestillError, MissingDependency
from ..runtimes.llamacpp_api import LlamaModel

__all__ = ["tokenise"]

Ids = list[list[int]]


def tokenise(
    path: Path, candidates: Sequence[str | None], texts: Sequence[str], framed: Sequence[str]
) -> list[tuple[Ids, Ids] | str]:
    """Ids that llama.cpp makes of ``texts`` without special tokens around them, and of ``framed`` with them, once for
    each of ``candidates`` in place of the pre-tokenizer named in the file (``None``: the file's own).

    Where llama.cpp refuses a candidate, or aborts on it, its reason stands instead.
    """
    request = {"do": "tokenise", "path": str(path), "texts": list(texts), "framed": list(framed)}
    try:
        answers = _ask({**request, "candidates": list(candidates)})
        return [answer if isinstance(answer, str) else (answer[0], answer[1]) for answer in answers]
    except MissingDependency:
        raise
    except EdgestillError as error:  # one of them took the process down
        if len(candidates) == 1:
            return [error.message]
        return [answer for name in candidates for answer in tokenise(path, [name], texts, framed)]


def _ask(request: dict[str, Any]) -> Any:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "edgestill.export.gguf_native"],
        input=json.dumps(request), capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise EdgestillError(
            f"llama.cpp failed to {request['do']} (exit code {done.returncode}): {last[:200]}",
            hint="see whether another quantisation works, and report the model",
        )
    answer = json.loads(done.stdout)
    if "missing" in answer:
        raise MissingDependency(answer["missing"], hint=answer["hint"])
    if "error" in answer:
        raise EdgestillError(answer["error"], hint=answer["hint"])
    return answer["value"]


def _answer(request: dict[str, Any]) -> Any:
    return [_tokenise(Path(request["path"]), pre, request) for pre in request["candidates"]]


def _tokenise(path: Path, pre: str | None, request: dict[str, Any]) -> list[Ids] | str:
    try:
        model = LlamaModel(path, vocab_only=True, overrides={"tokenizer.ggml.pre": pre} if pre else None)
    except MissingDependency:
        raise
    except EdgestillError as error:
        return error.message
    plain = [model.tokenize(text, add_special=False) for text in request["texts"]]
    framed = [model.tokenize(text, add_special=True) for text in request["framed"]]
    model.close()
    return [plain, framed]


def _main() -> None:
    request = json.load(sys.stdin)
    try:
        answer = {"value": _answer(request)}
    except MissingDependency as error:
        answer = {"missing": error.message, "hint": error.hint}
    except EdgestillError as error:
        answer = {"error": error.message, "hint": error.hint}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
