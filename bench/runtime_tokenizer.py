"""Ask the tokenizer that a GGUF carries inside itself, through llama.cpp, in a process of its own (it may abort).

The worker protocol has no such operation, since it would serve this one question of verification only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import WorkerError
from ..files import read_json

__all__ = ["runtime_tokens"]


def runtime_tokens(artifact: Path, texts: Sequence[str], *, timeout: float = 300) -> Mapping[str, list[int]]:
    """The ids that llama.cpp gives each of ``texts`` with the tokenizer inside the GGUF artifact ``artifact``.

    Raises :class:`WorkerError` when the process dies or takes longer than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        question, answer = Path(folder) / "texts.json", Path(folder) / "ids.json"
        question.write_text(json.dumps(list(texts)), encoding="utf-8")
        module = "edgestill.bench.runtime_tokenizer"  # not __name__: tests may import this file under another one
        command = [sys.executable, "-P", "-m", module, str(artifact.absolute()), str(question), str(answer)]
        try:
            ended = subprocess.run(command, capture_output=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise WorkerError(
                f"{artifact.name}: its tokenizer gave no answer within {timeout:g} s", hint="export it again"
            ) from None
        if ended.returncode or not answer.exists():
            lines = ended.stderr.decode(errors="replace").strip().splitlines()
            raise WorkerError(
                f"{artifact.name}: its tokenizer can't be asked: {lines[-1] if lines else ended.returncode}",
                hint="export it again",
            )
        return dict(zip(texts, read_json(answer), strict=True))


def _main(folder: str, question: str, answer: str) -> None:
    from ..artifact import open_artifact
    from ..runtimes.llamacpp_session import LlamaCppSession
    from ..runtimes.session import SessionOptions

    session = LlamaCppSession(open_artifact(Path(folder)), SessionOptions(1))
    ids = [session.tokenize(text) for text in read_json(Path(question))]
    Path(answer).write_text(json.dumps(ids), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
