"""The tokenizer of a model folder, without torch where Transformers can do without it."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import BadInput, MissingDependency

__all__ = ["PlainTokenizer", "load_tokenizer", "load_tokenizer_lightly", "open_tokenizer", "quiet"]

# Classes that a tokenizer.json describes whole. Transformers' automatic choice would take the same one, but imports
# every model's configuration for it, and torch with that: seconds, and 300 MB.
_WHOLE = ("TokenizersBackend", "PreTrainedTokenizerFast")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# What such a folder may say beside its tokenizer.json without changing the ids of a text, and files that would.
_HARMLESS = {"backend", "clean_up_tokenization_spaces", "model_max_length", "padding_side", "tokenizer_class",
             "truncation_side", *(f"{role}_token" for role in _ROLES)}  # fmt: skip
_CHANGING = ("added_tokens.json", "additional_chat_templates", "chat_template.json", "special_tokens_map.json")
_PATCHED_FROM = 100_000  # tokens from which on Transformers looks for a pre-tokenizer that it corrects


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


class PlainTokenizer:
    """What Transformers' tokenizer of such a folder does, by the ``tokenizers`` library alone: a second less to import.

    The part of its interface that a file's description needs; the ids of special roles are ``None`` where they aren't.
    """

    def __init__(self, backend: Any, special: Mapping[str, str], chat_template: str | None) -> None:
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        named = {role: special.get(f"{role}_token") for role in _ROLES}
        ids = {role: None if text is None else backend.token_to_id(text) for role, text in named.items()}
        self.bos_token_id, self.eos_token_id, self.unk_token_id = ids["bos"], ids["eos"], ids["unk"]
        self.sep_token_id, self.pad_token_id = ids["sep"], ids["pad"]
        self.cls_token_id, self.mask_token_id = ids["cls"], ids["mask"]

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Id -> ``tokenizers.AddedToken``."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def get_vocab(self) -> dict[str, int]:
        """Text -> id, added tokens included."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def convert_ids_to_tokens(self, index: int) -> str | None:
        """The text of one id."""
        found: str | None = self.backend_tokenizer.id_to_token(index)
        return found

    def __call__(
        self, text: str | list[str], *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, Any]:
        """``{"input_ids": …}`` of one text or of several; ``verbose`` is there for Transformers' sake."""
        several = [text] if isinstance(text, str) else text
        found = self.backend_tokenizer.encode_batch(several, add_special_tokens=add_special_tokens)
        ids = [row.ids for row in found]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def load_tokenizer_lightly(folder: Path) -> Any:
    """:class:`PlainTokenizer` where ``tokenizer.json`` describes the whole tokenizer, else
    :func:`load_tokenizer` (which also says what is wrong with a damaged one)."""
    return _plain(folder) or load_tokenizer(folder)


def _plain(folder: Path) -> PlainTokenizer | None:
    try:
        import tokenizers

        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if said["tokenizer_class"] not in _WHOLE or not said.keys() <= _HARMLESS:
            return None
        if any((folder / name).exists() for name in _CHANGING):
            return None
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if backend.post_processor is None or backend.truncation or backend.padding:
            return None
        special = {key: text for key, text in said.items() if key.endswith("_token") and text is not None}
        added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        if not set(special.values()) <= added or backend.get_vocab_size() > _PATCHED_FROM:
            return None
        template = folder / "chat_template.jinja"
        return PlainTokenizer(backend, special, template.read_text("utf-8") if template.is_file() else None)
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # panics of the tokenizers library, too
        return None


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
