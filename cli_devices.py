"""``edgestill devices``: what can be measured on, and what a device needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_output import Json, Threads, emit, with_progress

if TYPE_CHECKING:
    from .stages import Observer

__all__ = ["devices"]

devices = typer.Typer(no_args_is_help=True, help="Targets to measure on: boards, phones, emulators, browsers.")


@devices.callback()
def _devices() -> None:
    """Without it, a group of a single command would be that command."""


@devices.command("list")
def list_devices(as_json: Json = False) -> None:
    """The kinds of targets that `edgestill bench --target` takes, and the devices that can be predicted."""

    def work(observer: Observer) -> Any:
        from .devices import list_targets

        return list_targets()

    emit(with_progress(work), as_json)


@devices.command("show")
def show_device(
    name: Annotated[str, typer.Argument(help="A profile of `edgestill devices list`, or a .toml file of your own.")],
    as_json: Json = False,
) -> None:
    """What is documented of a device, every number with its source, and how well predictions for it hold."""
    from .devices import show_profile

    emit(show_profile(name), as_json)


@devices.command("calibrate")
def calibrate(
    subjects: Annotated[list[Path], typer.Argument(help="Artifacts of one model: a GGUF one and others.")],
    threads: Threads = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the timed input.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded in a timed generation.")] = 32,
    launches: Annotated[int, typer.Option(min=1, help="Fresh processes per subject.")] = 3,
    as_json: Json = False,
) -> None:
    """Measure here how other runtimes compare with llama.cpp, so that `--target profile:NAME` can predict them."""

    def work(observer: Observer) -> Any:
        from .devices import CalibrateRequest, calibrate_host

        return calibrate_host(CalibrateRequest(tuple(subjects), threads, length, new_tokens, launches), observer)

    emit(with_progress(work), as_json)


@devices.command("build-runner")
def build_runner(
    target: Annotated[str, typer.Option(help="Processor: aarch64 or x86_64.")] = "aarch64",
    level: Annotated[str, typer.Option(help="armv8.0, dotprod or i8mm (x86_64: avx2); all of them.")] = "all",
    out: Annotated[Path | None, typer.Option(help="Also copy the binaries to this folder.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilations at once (default: one a core).")] = None,
    as_json: Json = False,
) -> None:
    """Build the native runner: llama.cpp on the CPU in one static file, for devices without Python."""

    def work(observer: Observer) -> Any:
        from .runner_build import BuildRunnerRequest, build_runners

        return build_runners(BuildRunnerRequest(target, level, out, jobs), observer)

    emit(with_progress(work), as_json)


@devices.command("build-root")
def build_root(as_json: Json = False) -> None:
    """Build what emulated Arm cores (`--target qemu:cortex-a76`) need: an aarch64 Python with ONNX Runtime."""

    def work(observer: Observer) -> Any:
        from .emulation import BuildRootRequest, build_emulation_root

        return build_emulation_root(BuildRootRequest(), observer)

    emit(with_progress(work), as_json)
