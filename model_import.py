"""Any Transformers folder, sentence-transformers folder or GGUF file -> a clean model folder.

Weights are read safely (checked safetensors, or torch files that need nothing but ``weights_only``), made float32 and
checked for NaN; config and tokenizer lose what is local to the machine that wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from .artifact import CLASS_TASKS, Pooling, Task
from .checkpoints import (
    FACTS_FILE,
    Architecture,
    ModelFolder,
    TensorHeader,
    check_sizes,
    find_architecture,
    open_model,
    positions,
    read_config,
    read_safetensors_header,
)
from .errors import BadInput, MissingDependency, Unsupported
from .files import atomic_directory, read_json, safe_join
from .model_origin import Origin, card_facts, origin_from_json, source_origin
from .progress import Progress, silent

__all__ = [
    "SourceFacts",
    "check_tokenizer",
    "find_weights",
    "gguf_inside",
    "infer_task",
    "license_of",
    "prepare_model",
    "read_source_facts",
    "spdx",
]

# Where a checkpoint's weights may lie, best first.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause", "cc-by-4.0": "CC-BY-4.0",
         "cc-by-nc-4.0": "CC-BY-NC-4.0", "cc0-1.0": "CC0-1.0", "gpl-3.0": "GPL-3.0-only"}  # fmt: skip
# A bare language-model encoder (what is published as a base model) is used as a sentence encoder, its head dropped.
_HEADLESS = ("Model", "ForMaskedLM", "ForPreTraining")
_PROBES = (
    "The quick brown fox.", "  two  blanks\n\n and\ttabs ", "naïve café — “quotes” … 12345 3.14", "日本語 русский 🙂🏽",
    "def f(x):\n    return x**2  # <|im_end|> [SEP] </s>", "",
)  # fmt: skip


@dataclass(frozen=True)
class SourceFacts:
    """What a source folder says beyond config and weights. ``root`` is the folder that holds config.json."""

    root: Path
    pooling: Pooling | None = None
    normalize: bool = False
    max_length: int | None = None
    prompt_prefix: str = ""
    lower_case: bool = False
    task: str | None = None
    license: str | None = None
    origin: Origin | None = None


def prepare_model(
    source: Path,
    out: Path,
    *,
    task: str | None = None,
    license: str | None = None,
    address: str | None = None,
    progress: Progress = silent,
) -> ModelFolder:
    """Turn ``source`` into the model folder ``out`` (whole or not at all) and open it.

    ``source`` is a Transformers folder, a sentence-transformers folder, a GGUF file or a folder that holds just one.
    ``task`` is inferred (sentence-transformers or bare encoder -> feature-extraction, ``*ForSequenceClassification``,
    ``*ForCausalLM``) unless given; ``license`` (SPDX) is read from the model card unless given. ``address`` is where
    it was fetched from: a hub's address names the model. The same source gives the same bytes in any folder.
    Raises :class:`BadInput` and :class:`Unsupported`.
    """
    if not source.exists():
        raise BadInput(f"{source} does not exist", hint="pass a Transformers folder or a .gguf file")
    if gguf := gguf_inside(source):
        from .gguf_import import import_gguf

        if task not in (None, "text-generation"):
            raise Unsupported(f"{gguf}: task {task!r} from a GGUF file", hint="a GGUF is read for text-generation")
        return import_gguf(gguf, out, license=license, progress=progress)
    if source.is_file():
        raise BadInput(f"{source} is not a model", hint="pass a Transformers folder or a .gguf file")
    return _prepare_folder(source, out, task, license, address, progress)


def gguf_inside(source: Path) -> Path | None:
    """The GGUF file that ``source`` is, or that the folder ``source`` holds as its only model."""
    if source.is_file():
        with source.open("rb") as stream:
            return source if source.suffix == ".gguf" or stream.read(4) == b"GGUF" else None
    if (source / "config.json").exists() or (source / "modules.json").exists():
        return None
    found = sorted(source.glob("*.gguf"))
    if len(found) > 1:
        raise BadInput(f"{source} holds {len(found)} GGUF files", hint=f"name one, e.g. {found[0]}")
    return found[0] if found else None


def _prepare_folder(
    source: Path, out: Path, task: str | None, license: str | None, address: str | None, progress: Progress
) -> ModelFolder:
    facts = read_source_facts(source)
    config = read_config(facts.root)
    row = find_architecture(config, facts.root)
    chosen = infer_task(config, row, facts, task)
    find_architecture(config, facts.root, chosen)
    if chosen == "feature-extraction" and facts.pooling is None:
        facts = replace(facts, pooling="mean")
    files, header = find_weights(facts.root)
    try:
        from . import torch_models
    except ModuleNotFoundError as error:
        raise MissingDependency.package(error.name or "torch", "distill") from None
    progress("reading weights", 0.0)
    state, header = _read_weights(files, header)
    check_sizes(config, row, header, facts.root)
    if chosen in CLASS_TASKS:
        _check_labels(config, facts.root)
    progress("building the model", 0.4)
    model = torch_models.build_model(config, state, chosen, facts.root)  # type: ignore[arg-type]
    del state
    tokenizer = torch_models.load_source_tokenizer(facts.root, facts.lower_case)
    longest = [positions(config, row), facts.max_length or 1 << 30, _tokenizer_limit(tokenizer)]
    pooling = facts.pooling if chosen == "feature-extraction" else None
    described = ModelFolder(
        path=out, config={}, architecture=config["model_type"], task=chosen, pooling=pooling,  # type: ignore[arg-type]
        normalize=facts.normalize and pooling is not None, max_length=min(longest), vocab_size=0, layers=0,
        hidden_size=0, license=license or facts.license or license_of(source, config), labels=(), parameters=0,
        size_bytes=0, prompt_prefix=facts.prompt_prefix, origin=facts.origin or source_origin(source, config, address),
    )  # fmt: skip
    progress("writing the model folder", 0.7)
    with atomic_directory(out) as folder:
        torch_models.write_folder(model, tokenizer, folder, described)
        check_tokenizer(tokenizer, torch_models.load_tokenizer(folder), source)
    progress("model folder written", 1.0)
    return open_model(out)


def check_tokenizer(before: Any, after: Any, source: Path) -> None:
    """The saved tokenizer must do what the source's did; they differ when a class rebuilds its pre-tokenizer."""
    for text in _PROBES:
        if before(text)["input_ids"] != after(text)["input_ids"]:
            raise Unsupported(
                f"{source}: its tokenizer changes when it is saved (on {text[:20]!r})",
                hint="save it as tokenizer.json with the tokenizers library",
            )


def read_source_facts(source: Path) -> SourceFacts:
    """Facts from an edgestill folder, a sentence-transformers folder or, with none of them, nothing."""
    if (source / FACTS_FILE).is_file():
        own = _object(source / FACTS_FILE)
        types = {"max_length": int, "normalize": bool}
        for name in ("pooling", "normalize", "max_length", "prompt_prefix", "task", "license"):
            if own.get(name) is not None and type(own[name]) is not types.get(name, str):
                raise BadInput(f"{source / FACTS_FILE}: {name} is {repr(own[name])[:80]}", hint="prepare it again")
        names = ("pooling", "normalize", "max_length", "prompt_prefix", "task", "license")
        origin = origin_from_json(own.get("origin"), source / FACTS_FILE)
        known = {name: own[name] for name in names if own.get(name) is not None}
        return SourceFacts(source, origin=origin, **known)
    pooling_folder, root, normalize = source / "1_Pooling", source, False
    if (source / "modules.json").is_file():
        try:
            modules = [
                (str(row["type"]).rpartition(".")[2], str(row["path"])) for row in read_json(source / "modules.json")
            ]
        except (TypeError, KeyError):
            raise BadInput(
                f"{source / 'modules.json'} is not a list of modules", hint="fetch the model again"
            ) from None
        strange = [kind for kind, _ in modules if kind not in ("Transformer", "Pooling", "Normalize")]
        kinds = [kind for kind, _ in modules]
        if strange or kinds[:2] != ["Transformer", "Pooling"] or len(kinds) > 3:
            raise Unsupported(
                f"{source}: sentence-transformers modules {', '.join(kinds)}",
                hint="supported: Transformer, Pooling and, at the end, Normalize",
            )
        root = safe_join(source, modules[0][1]) if modules[0][1] else source
        pooling_folder = safe_join(source, modules[1][1])
        normalize = "Normalize" in kinds
    elif not pooling_folder.is_dir():
        return SourceFacts(source)
    limits = _object(root / "sentence_bert_config.json", needed=False)
    own = _object(source / "config_sentence_transformers.json", needed=False)
    prompts = own.get("prompts") or {}
    length, chosen = limits.get("max_seq_length"), own.get("default_prompt_name")
    if not isinstance(prompts, dict) or not isinstance(chosen, str | None) or type(length) not in (int, type(None)):
        raise BadInput(f"{source}: max_seq_length or prompts are not what they should be", hint="fetch the model again")
    return SourceFacts(
        root=root,
        pooling=_pooling(_object(pooling_folder / "config.json"), source),
        normalize=normalize,
        max_length=length,
        prompt_prefix=str(prompts.get(chosen, "")),
        lower_case=bool(limits.get("do_lower_case")),
        task="feature-extraction",
    )


def _object(path: Path, *, needed: bool = True) -> dict[str, Any]:
    """The JSON object in a file; an empty one for a file that is not ``needed`` and not there."""
    if not needed and not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise BadInput(f"{path} is not an object", hint="fetch the model again")
    return found


def _pooling(config: Mapping[str, Any], source: Path) -> Pooling:
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
             "lasttoken": "last"}  # fmt: skip
    if mode := config.get("pooling_mode"):
        chosen = [mode] if isinstance(mode, str) else list(mode)
    else:
        chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    found = [names.get(item, item) for item in chosen]
    if len(found) != 1 or found[0] not in get_args(Pooling):
        raise Unsupported(f"{source}: pooling {' + '.join(map(str, found)) or 'none'}", hint="mean, cls or last token")
    return found[0]  # type: ignore[return-value]


def infer_task(config: Mapping[str, Any], row: Architecture, facts: SourceFacts, asked: str | None) -> str:
    """The task asked for, or what the folder says, or what the class in ``architectures`` is for."""
    if asked or facts.task:
        return str(asked or facts.task)
    name = str((config.get("architectures") or [""])[0])
    if name.endswith("ForSequenceClassification"):
        return "text-classification"
    if name.endswith("ForTokenClassification"):
        return "token-classification"
    if name.endswith(("ForCausalLM", "LMHeadModel")) or (row.family == "decoder" and not name):
        return "text-generation"
    if row.family == "encoder" and (not name or name.endswith(_HEADLESS)):
        return "feature-extraction"
    raise Unsupported(
        f"{facts.root}: {name} is for {_foreign_task(name)}, which edgestill does not do",
        hint=f"tasks: {', '.join(get_args(Task))}",
    )


def _foreign_task(name: str) -> str:
    """What optimum's TasksManager calls the task of a Transformers class; its name when nobody knows."""
    try:
        import transformers
        from optimum.exporters.tasks import TasksManager

        return str(TasksManager.infer_task_from_model(getattr(transformers, name)))
    except (ImportError, AttributeError, ValueError, KeyError):
        return f"something unknown ({name})"


def _check_labels(config: Mapping[str, Any], where: Path) -> None:
    if config.get("problem_type") in ("regression", "multi_label_classification"):
        raise Unsupported(f"{where}: a {config['problem_type']} head", hint="single-label classifiers are supported")
    names = config.get("id2label")
    if names is not None and (not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names))))):
        raise BadInput(f"{where / 'config.json'}: id2label does not count from 0", hint="number the labels 0, 1, 2 …")
    if names is not None and len(names) < 2:
        raise Unsupported(f"{where}: a classifier with {len(names)} label", hint="two labels or more are needed")


def find_weights(root: Path) -> tuple[list[Path], dict[str, TensorHeader]]:
    """The files that hold the weights, and what their headers say (empty for torch files)."""
    header: dict[str, TensorHeader] = {}
    for name in (*_SAFETENSORS, *_TORCH_FILES):
        path = root / name
        if not path.is_file():
            continue
        if name.endswith(".json"):
            index = read_json(path)
            shards = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(shards, dict) or not shards:
                raise BadInput(f"{path} has no weight_map", hint="fetch the model again")
            files = [_shard(root, name, shard) for shard in sorted(map(str, set(shards.values())))]
        else:
            files = [path]
        for file in files:
            if not file.is_file():
                raise BadInput(f"{file} is missing, {name} lists it", hint="fetch the model again")
            if name in _SAFETENSORS:
                header.update(read_safetensors_header(file))
        return files, header
    raise BadInput(f"{root} holds no weights", hint=f"expected {_SAFETENSORS[0]}, a sharded one, or {_TORCH_FILES[0]}")


def _shard(root: Path, index: str, name: str) -> Path:
    """A shard lies beside its index (a link there is fine: hub caches link to their blobs)."""
    if PurePosixPath(name).name != name or name in ("", ".", "..") or "\\" in name:
        raise BadInput(f"{root / index} names the shard {name!r}", hint="shards lie beside their index")
    return root / name


def _read_weights(files: list[Path], header: dict[str, TensorHeader]) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    """State dict in fp32, and the header (for torch files made from what was read)."""
    import torch
    from safetensors.torch import load_file

    from .torch_models import load_torch_file

    state: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(file) if header else load_torch_file(file)
        for name, tensor in part.items():
            if not tensor.is_floating_point():
                if tensor.dtype in (torch.int8, torch.uint8):
                    raise Unsupported(f"{file}: {name} is {tensor.dtype}: quantised", hint="use the float checkpoint")
                continue  # position_ids and the like: buffers that the model makes itself
            if tensor.element_size() < 2:
                raise Unsupported(f"{file}: {name} is {tensor.dtype}: quantised", hint="use the float checkpoint")
            state[name] = tensor.to(torch.float32)
            if not bool(torch.isfinite(state[name]).all()):
                raise BadInput(f"{file}: {name} holds NaN or infinite values", hint="the checkpoint is damaged")
    return state, header or {name: TensorHeader("F32", tuple(t.shape)) for name, t in state.items()}


def _tokenizer_limit(tokenizer: Any) -> int:
    limit = tokenizer.model_max_length
    return int(limit) if 0 < limit < 1 << 30 else 1 << 30


def license_of(source: Path, config: Mapping[str, Any]) -> str | None:
    """The SPDX id in the model card's front matter, or in the config."""
    name = card_facts(source).get("license") or config.get("license")
    return spdx(name) if isinstance(name, str) else None


def spdx(name: str) -> str:
    """A hub's lower-case licence name as its SPDX id.

    >>> spdx("apache-2.0")
    'Apache-2.0'
    """
    return _SPDX.get(name.lower(), name)
