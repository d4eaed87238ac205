"""The conversation of the plain runtimes: a JSON object a line, one answer each. Standard library only."""

import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(version: str, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Say who is here, then answer until the input ends. No garbage collection falls into a timed call."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # native libraries print
    gc.disable()

    def write(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    write({"version": version, "edgestill": "edgestill" in sys.modules})
    for line in sys.stdin:
        write(answer(json.loads(line)))
        gc.collect()
