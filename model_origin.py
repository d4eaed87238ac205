"""What a model is called and made of, where its source says so: name, languages, base models, data, licence terms.

It travels in ``edgestill.json`` as ``"origin"`` and ends in the files that have a place for it (GGUF's ``general.*``).
Nothing is guessed from where a folder lies. Model cards: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput, MissingDependency
from .files import read_json

if TYPE_CHECKING:
    from .checkpoints import ModelFolder

__all__ = [
    "SAMPLING", "Named", "Origin", "card_facts", "is_setting", "named_by", "origin_from_json", "origin_to_json",
    "size_label", "source_origin", "student_origin",
]  # fmt: skip

HUB = "https://huggingface.co"
_HUB_ID = re.compile(r"(?:https?://huggingface\.co/(datasets/)?)?([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)")
_URL = re.compile(r"(?:https?|ssh)://\S+")
_STUDENT = " student"
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "repetition_penalty": "penalty_repeat"}  # fmt: skip
"""How a ``generation_config.json`` calls what GGUF calls ``general.sampling.*``."""
_LONGEST_TEXT, _MOST_ITEMS, _LONGEST_FRONT = 1000, 100, 1 << 16


@dataclass(frozen=True)
class Named:
    """A model or a data set as others find it; ``repo_url`` is where it is published."""

    name: str
    organization: str | None = None
    repo_url: str | None = None


@dataclass(frozen=True)
class Origin:
    """Every field is empty where the source says nothing. ``itself`` is the model's own name; ``sampling`` holds
    recommended settings under GGUF's names (``temp top_k top_p min_p penalty_repeat``); languages are ISO codes."""

    itself: Named | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    base_models: tuple[Named, ...] = ()
    datasets: tuple[Named, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)


def size_label(parameters: int) -> str:
    """``"135M"``, ``"1.7B"``, ``"12K"``: as in the names of GGUF files."""
    for unit, letter in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.{1 if parameters < 10 * unit else 0}f}".removesuffix(".0") + letter
    return str(parameters)


def named_by(identifier: str, what: str = "") -> Named | None:
    """A hub id or an address as a name; ``None`` for anything else, a path on somebody's disk above all. ``what`` is
    ``"datasets/"`` for a data set.

    >>> named_by("HuggingFaceTB/SmolLM2-135M")
    Named(name='SmolLM2-135M', organization='HuggingFaceTB', repo_url='https://huggingface.co/HuggingFaceTB/SmolLM2-135M')
    >>> named_by("/home/me/model")
    """
    if len(identifier) > _LONGEST_TEXT:
        return None
    if match := _HUB_ID.fullmatch(identifier.rstrip("/")):
        return Named(match[3], match[2], f"{HUB}/{match[1] or what}{match[2]}/{match[3]}")
    if _URL.fullmatch(identifier):
        return Named(identifier.rstrip("/").rpartition("/")[2], None, identifier)
    return None


def student_origin(teacher: ModelFolder, start: ModelFolder, others: Iterable[ModelFolder] = ()) -> Origin:
    """What a student of ``teacher`` (and ``others``) that began as ``start`` says of itself: they are its base models.

    A start that already has the teacher as a base (an earlier round, a fresh student) is this student, not a base.
    """
    first = teacher.named
    bases = [*start.origin.base_models] if first in start.origin.base_models else [start.named, first]
    bases += [other.named for other in others]
    return Origin(
        itself=Named(first.name.removesuffix(_STUDENT) + _STUDENT),
        license_name=start.origin.license_name,
        license_link=start.origin.license_link,
        languages=teacher.origin.languages or start.origin.languages,
        base_models=tuple(dict.fromkeys(bases)),
        sampling=teacher.origin.sampling,
    )


def card_facts(source: Path) -> dict[str, Any]:
    """The front matter of a model card (``README.md``), all scalars as text; empty where there is none to be read: a
    card is written by hand, and no model needs it."""
    card = source / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text[:_LONGEST_FRONT], re.DOTALL)
    if front is None:
        return {}
    try:
        import yaml
    except ModuleNotFoundError:
        raise MissingDependency.package("PyYAML", "distill") from None
    try:
        found = yaml.load(front[1].replace("\t", "  "), Loader=yaml.BaseLoader)  # "no" stays Norwegian
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def source_origin(source: Path, config: Mapping[str, Any], address: str | None = None) -> Origin:
    """What a foreign folder says: its model card, ``generation_config.json`` and the ``_name_or_path`` it was loaded
    from when it was trained, which is a base model where the card names none. ``address`` is the one that it was
    fetched from: a hub's (``hf:org/name@commit``) names the model."""
    card = card_facts(source)
    known = re.match(r"hf:([^@!]+)", address or "")
    hub = named_by(known[1]) if known else None
    called = _first_text(card, "model_name", "name")
    bases = _named_all(card, "base_model", "base_models")
    loaded_from = config.get("_name_or_path")
    if not bases and isinstance(loaded_from, str) and (base := named_by(loaded_from)) and base != hub:
        bases = (base,)
    return Origin(
        itself=dataclasses.replace(hub, name=called or hub.name) if hub else Named(called) if called else None,
        license_name=_first_text(card, "license_name"),
        license_link=_first_text(card, "license_link"),
        languages=_texts(card, "language", "languages"),
        tags=_texts(card, "tags", "pipeline_tag"),
        base_models=bases,
        datasets=_named_all(card, "datasets", "dataset", what="datasets/"),
        sampling=_sampling(source / "generation_config.json"),
    )


def _sampling(path: Path) -> dict[str, float]:
    """Numbers that generation is recommended with, where it draws at all (``do_sample``)."""
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict) or found.get("do_sample") is False:
        return {}
    return {ours: found[name] for name, ours in SAMPLING.items() if is_setting(found.get(name))}


def is_setting(value: object) -> bool:
    """Whether ``value`` is a number that a sampler may be given."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _first_text(card: Mapping[str, Any], *keys: str) -> str | None:
    return next(iter(_texts({key: card[key] for key in keys if isinstance(card.get(key), str)}, *keys)), None)


def _texts(card: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """The texts under ``keys``, whether one or a list, each once."""
    items = [item for key in keys for item in (card[key] if isinstance(card.get(key), list) else [card.get(key)])]
    kept = (item.strip() for item in items if isinstance(item, str) and len(item) <= _LONGEST_TEXT)
    return tuple(dict.fromkeys(item for item in kept if item))[:_MOST_ITEMS]


def _named_all(card: Mapping[str, Any], *keys: str, what: str = "") -> tuple[Named, ...]:
    chosen = next((key for key in keys if key in card), "")
    return tuple(named_by(item, what) or Named(item) for item in _texts(card, chosen))


def origin_to_json(origin: Origin) -> dict[str, Any]:
    """For ``edgestill.json``: only what is known, so that a model without an origin keeps its bytes."""
    known: dict[str, Any] = _known(dataclasses.asdict(origin))
    return known


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items() if item not in (None, (), {})}
    return [_known(item) for item in value] if isinstance(value, tuple | list) else value


def origin_from_json(value: Any, path: Path) -> Origin:
    """The inverse of :func:`origin_to_json`; :class:`BadInput` naming ``path`` and what is wrong."""
    if value is None:
        return Origin()
    try:
        fields = dict(value)
        itself, sampling = fields.pop("itself", None), dict(fields.pop("sampling", {}))
        many = {key: tuple(fields.pop(key, ())) for key in ("languages", "tags", "base_models", "datasets")}
        known: dict[str, Any] = {key: tuple(_text(one, key) for one in many[key]) for key in ("languages", "tags")}
        known |= {key: tuple(_named(one, key) for one in many[key]) for key in ("base_models", "datasets")}
        known |= {key: _text(fields.pop(key), key) for key in ("license_name", "license_link") if key in fields}
        if not set(sampling) <= set(SAMPLING.values()) or not all(map(is_setting, sampling.values())):
            raise TypeError("sampling is not a few numbers")
        if fields or max(map(len, many.values())) > 2 * _MOST_ITEMS:
            raise TypeError(f"{next(iter(fields), 'a list')} is unknown or too long")
        return Origin(None if itself is None else _named(itself, "itself"), sampling=sampling, **known)
    except (TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path}: origin: {str(error)[:200]}", hint="prepare the model folder again") from None


def _named(value: Any, what: str) -> Named:
    return Named(**{key: _text(item, what) for key, item in dict(value).items()})


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value or len(value) > _LONGEST_TEXT:
        raise TypeError(f"{what} is {repr(value)[:80]}")
    return value
