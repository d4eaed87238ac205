"""``edgestill devices``: what can be measured on, and what a device needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from .cli_output import Json, emit, with_progress

if TYPE_CHECKING:
    from .stages import Observer

__all__ = ["devices"]

devices = typer.Typer(no_args_is_help=True, help="Targets to measure on: boards, phones, emulators, browsers.")


@devices.callback()
def _devices() -> None:
    """Without it, a group of a single command would be that command."""


@devices.command("list")
def list_devices(as_json: Json = False) -> None:
    """The kinds of targets that `edgestill bench --target` takes."""

    def work(observer: Observer) -> Any:
        from .devices import list_targets

        return list_targets()

    emit(with_progress(work), as_json)
