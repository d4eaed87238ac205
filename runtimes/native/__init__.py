"""The native runner: llama.cpp's engine and a worker in one static binary, for devices where there is no Python.

``edgestill devices build-runner`` builds it (:mod:`.build`), once for each level of a processor's instructions
(:mod:`.levels`); a transport asks :func:`find_runner` for the one that its device can run, pushes that file and starts
it. It speaks the worker protocol (``docs/worker-protocol.md``) on its standard input and output::

    runner = find_runner("aarch64", facts)        # facts: {"machine": "aarch64", "cpu_flags": ["asimddp", …]}
    edgestill-runner [FOLDER] [--threads N] [--parent PID]

It opens GGUF artifacts on the CPU, nothing else.
"""

from .find import RUNNER_NAME, find_runner, runner_folder
from .levels import LEVELS, Level, choose_level, level_for, read_auxv

__all__ = [
    "LEVELS",
    "RUNNER_NAME",
    "Level",
    "choose_level",
    "find_runner",
    "level_for",
    "read_auxv",
    "runner_folder",
]
