"""The native runner: llama.cpp's engine and a worker in one static binary, for devices where there is no Python.

``edgestill devices build-runner`` builds it (:mod:`.build`), once for each level of a processor's instructions
(:mod:`.levels`); a transport asks :func:`find_runner` for the one that its device can run, pushes that file and starts
it. It speaks the worker protocol (``docs/worker-protocol.md``) on its standard input and output::

    runner = find_runner("aarch64", facts)        # facts: {"machine": "aarch64", "cpu_flags": ["asimddp", …]}
    edgestill-runner [FOLDER] [--threads N] [--parent PID] [--onnxruntime LIBRARY --host PROGRAM]

It opens GGUF artifacts on the CPU, and ONNX artifacts with a ``libonnxruntime.so`` that the user gives
(:func:`read_library`), which it loads in a second process: :func:`find_host`, built by :mod:`.host_build`.
"""

from .find import HOST_NAME, RUNNER_NAME, find_host, find_runner, host_folder, runner_folder
from .levels import LEVELS, Level, choose_level, level_for, machine_name, read_auxv
from .library import OrtLibrary, read_library

__all__ = [
    "HOST_NAME",
    "LEVELS",
    "RUNNER_NAME",
    "Level",
    "OrtLibrary",
    "choose_level",
    "find_host",
    "find_runner",
    "host_folder",
    "level_for",
    "machine_name",
    "read_auxv",
    "read_library",
    "runner_folder",
]
