"""The worker: one process that opens one artifact and runs it, told what to do over JSON lines.

``python -m edgestill.runtimes.worker [FOLDER] [--threads N] [--parent PID]`` reads requests from its standard input and
writes replies to its standard output as described in ``docs/worker-protocol.md``. Both are moved to private descriptors
first, and descriptor 1 is sent to standard error, because native libraries print. It ends when it is told to
(``close``), when its input ends, or when its parent is gone, and then leaves no exchange folder behind.

Only the standard library is imported before the thread limits stand in the environment: numpy's BLAS and OpenMP read
them once.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import queue
import select
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .service import Prepare, Service

__all__ = ["THREAD_VARIABLES", "main", "thread_environment"]

# What the runtimes' thread pools obey, if it is set before they are loaded.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_PARENT_POLL_SECONDS = 1.0
_GRACE_SECONDS = 10.0


def thread_environment(threads: int) -> dict[str, str]:
    """Environment variables that hold every numeric library to ``threads`` threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


def main(arguments: Sequence[str] | None = None, *, prepare: Prepare | None = None) -> int:
    """Serve until told to stop; the exit status. ``prepare`` replaces ``prepare_session`` (for tests)."""
    parser = argparse.ArgumentParser(prog="edgestill-worker", description="Serve one model over JSON lines.")
    parser.add_argument("folder", nargs="?", type=Path, help="what an `open` without folder opens")
    parser.add_argument("--threads", type=int, default=None, help="threads of numpy and the runtime's pools")
    parser.add_argument("--parent", type=int, default=None, help="end when this process is no longer the parent")
    parsed = parser.parse_args(arguments)
    if parsed.threads is not None:
        os.environ.update(thread_environment(parsed.threads))
    requests, replies = _private_channels()
    faulthandler.enable()  # a crash in native code leaves a trace on standard error

    from .service import Service, prepare_session

    service = Service(parsed.folder, prepare=prepare or prepare_session)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # A thread reads, so that a vanished client is noticed while a request is being worked on.
    reader = threading.Thread(
        target=_read, args=(requests, parsed.parent, lines, service), name="requests", daemon=True
    )
    reader.start()
    last = False
    while not last:
        reply, last = _answer(service, lines.get())
        _write(replies, reply)
    return 0


def _private_channels() -> tuple[int, int]:
    """Move standard input and output to descriptors that no library knows; leave /dev/null and standard error."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdout.flush()
    os.dup2(2, 1)
    return requests, replies


def _read(descriptor: int, parent: int | None, lines: queue.SimpleQueue[bytes], service: Service) -> None:
    """Put request lines into the queue until nobody is left to read an answer; then end the process at once."""
    buffer = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], _PARENT_POLL_SECONDS)
        if not ready and (parent is None or os.getppid() == parent):
            continue
        chunk = os.read(descriptor, 1 << 16) if ready else b""
        if not chunk:
            _abandon(service)
        *complete, buffer = (buffer + chunk).split(b"\n")
        for line in complete:
            lines.put(line)


def _abandon(service: Service) -> NoReturn:
    """The client is gone: remove the exchange folder that it can't remove any more, and end at once."""
    if service.exchange is not None:
        shutil.rmtree(service.exchange.folder, ignore_errors=True)
    os._exit(0)


def _answer(service: Service, line: bytes) -> tuple[dict[str, Any], bool]:
    """The reply to one request line, and whether it was the last. No error of a request ends the worker."""
    from .protocol import describe_error, unpack

    request: Mapping[str, Any] = {}
    try:
        request = unpack(line)
        if timeout := request.get("timeout_s"):
            # A C thread: ends a call that hangs with the interpreter's lock held, should the client be gone by then.
            faulthandler.dump_traceback_later(float(timeout) + _GRACE_SECONDS, exit=True)
        reply = {"id": request.get("id"), "ok": True, "result": service.handle(request)}
        return reply, request.get("op") == "close"
    except Exception as error:  # it is reported, whatever it is: the client decides
        return {"id": request.get("id"), "ok": False, "error": describe_error(error)}, False
    finally:
        faulthandler.cancel_dump_traceback_later()


def _write(descriptor: int, reply: Mapping[str, Any]) -> None:
    from .protocol import pack

    data = memoryview(pack(reply))
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    sys.exit(main())
