"""edgestill's own worker around a model that costs more: ``worker_slow_ours.py SHARE [worker's arguments]``.

After each forward pass it burns SHARE of the processor time that the pass took, as a worse kernel would.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from edgestill.runtimes import worker
from edgestill.runtimes.service import prepare_session


class Slow:
    """A session with something to pay on top."""

    def __init__(self, session: Any, share: float) -> None:
        self._session = session
        self._share = share

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def forward(self, ids: Any, attention_mask: Any) -> Any:
        begin = time.thread_time()
        output = self._session.forward(ids, attention_mask)
        now = time.thread_time()
        end = now + self._share * (now - begin)
        while time.thread_time() < end:
            pass
        return output


def main() -> int:
    share = float(sys.argv[1])

    def prepare(folder: Path, options: Any) -> Any:
        load = prepare_session(folder, options)
        return lambda: Slow(load(), share)

    return worker.main(sys.argv[2:], prepare=prepare)


if __name__ == "__main__":
    sys.exit(main())
