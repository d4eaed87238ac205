"""The tokenizer of a model folder, without torch where Transformers can do without it."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BadInput, MissingDependency

__all__ = ["load_tokenizer", "open_tokenizer", "quiet"]

# Classes that a tokenizer.json describes whole. Transformers' automatic choice would take the same one, but imports
# every model's configuration for it, and torch with that: seconds, and 300 MB.
_WHOLE = ("TokenizersBackend", "PreTrainedTokenizerFast")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, log line or warning of Transformers inside the block; what was set before is restored."""
    from transformers.utils import logging as hub

    level, bar = hub.get_verbosity(), hub.is_progress_bar_enabled()
    hub.set_verbosity_error()
    hub.disable_progress_bar()
    torch_log = logging.getLogger("torch.distributed.elastic.multiprocessing.redirects")
    torch_level = torch_log.level
    torch_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_log.setLevel(torch_level)
        hub.set_verbosity(level)
        if bar:
            hub.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a model folder (right padding), from local files only."""
    if not (folder / "tokenizer.json").is_file():
        raise BadInput(f"{folder} has no tokenizer.json", hint="save the model's fast tokenizer beside it")
    return open_tokenizer(folder)


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of any folder of Transformers, with a ``tokenizer.json`` or without."""
    try:
        with quiet():
            tokenizer = _class(folder).from_pretrained(folder, local_files_only=True, use_fast=True)
        if not callable(getattr(tokenizer, "encode", None)):
            raise ValueError("no tokenizer came out")
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError(f"model_max_length is {str(tokenizer.model_max_length)[:40]!r}")
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare exceptions and panics of the tokenizers library, validation errors of the hub
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(
            f"{folder}: the tokenizer does not load: {reason}", hint="save it again, or fetch again"
        ) from None
    tokenizer.padding_side = "right"
    return tokenizer


def _class(folder: Path) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependency.package("transformers", "distill") from None
    try:
        described = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        described = {}
    whole = isinstance(described, dict) and described.get("tokenizer_class") in _WHOLE
    return transformers.PreTrainedTokenizerFast if whole and "auto_map" not in described else transformers.AutoTokenizer
