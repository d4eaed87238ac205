"""A training loop that takes one optimiser step a request. Standard library only."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from lines import Talk


class Steps:
    """Stands in a training loop: :meth:`end` after each step waits until the next one is asked for.

    The first step warms up; after it the program says hello. What lies between two steps of the loop (logging, the
    next batch) belongs to the next step. ``others`` answers requests that are no step.
    """

    def __init__(self, version: str, others: Mapping[str, Callable[[], Any]] | None = None) -> None:
        self._talk = Talk()
        self._version = version
        self._others = dict(others or {})
        self._begin: float | None = None

    def end(self, loss: Callable[[], float]) -> None:
        """A step is done; ``loss()`` gives its loss. Ends the process at the end of the input."""
        if self._begin is None:
            self._talk.hello(self._version)
        else:
            seconds = time.perf_counter() - self._begin
            self._talk.write({"seconds": seconds, "loss": loss()})
        while True:
            request = self._talk.read()
            if request is None:
                raise SystemExit(0)
            if request["what"] == "step":
                break
            begin = time.perf_counter()
            self._others[request["what"]]()
            self._talk.write({"seconds": time.perf_counter() - begin})
        self._begin = time.perf_counter()
