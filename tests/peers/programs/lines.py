"""The conversation of peers: a JSON object a line, one answer each. Standard library only."""

import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any


class Talk:
    """Requests on stdin, answers on what was stdout. No garbage collection falls into a timed call."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # native libraries print
        gc.disable()

    def hello(self, version: str) -> None:
        """Say who is here."""
        self.write({"version": version, "edgestill": "edgestill" in sys.modules})

    def write(self, reply: dict[str, Any]) -> None:
        """Send one answer."""
        self._replies.write(json.dumps(reply) + "\n")
        self._replies.flush()

    def read(self) -> dict[str, Any] | None:
        """The next request; ``None`` at the end of the input."""
        gc.collect()
        line = sys.stdin.readline()
        return dict(json.loads(line)) if line else None


def serve(version: str, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Say who is here, then answer until the input ends."""
    talk = Talk()
    talk.hello(version)
    while (request := talk.read()) is not None:
        talk.write(answer(request))
