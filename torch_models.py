"""Model folders as torch modules: loading, pooling, saving. The torch side of :mod:`edgestill.checkpoints`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle  # for the name of its error only
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .architectures import ARCHITECTURES, complete_config
from .artifact import CLASS_TASKS, Pooling, Task
from .checkpoints import (
    FACTS_FILE,
    SCHEMA_VERSION,
    WEIGHTS_FILE,
    ModelFolder,
    open_model,
)
from .errors import BadInput, MissingDependency, ResourceExhausted
from .files import atomic_directory
from .model_origin import origin_to_json
from .model_tokenizer import load_tokenizer, open_tokenizer, quiet

try:
    import torch
    import transformers
    from safetensors.torch import save_file
    from torch import Tensor, nn
except ModuleNotFoundError as missing:
    raise MissingDependency.package(missing.name or "torch", "distill") from None

__all__ = [
    "SentenceEncoder", "load_tokenizer", "load_torch", "model_class", "new_model", "quiet", "save_model",
    "write_folder",
]  # fmt: skip

# What a config or tokenizer_config must not carry on: where it lay, who wrote it, code to run.
_LOCAL_CONFIG_KEYS = ("_name_or_path", "name_or_path", "transformers_version", "auto_map", "_commit_hash")
_LOCAL_TOKENIZER_KEYS = (*_LOCAL_CONFIG_KEYS, "tokenizer_file", "vocab_file", "merges_file", "local_files_only",
                         "is_local", "special_tokens_map_file", "files_loaded")  # fmt: skip


class SentenceEncoder(nn.Module):  # type: ignore[misc]
    """A text encoder with its pooling: token ids in, one vector a text out.

    ``encoder`` is the Transformers model. Pooling as sentence-transformers defines it: ``mean`` over real tokens,
    ``cls`` the first token, ``last`` the last real one (right padding); then, with ``normalize``, length 1.
    """

    def __init__(self, encoder: nn.Module, pooling: Pooling, normalize: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.normalize = normalize

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed ``input_ids`` [B, T] with ``attention_mask`` [B, T] (1 = real token): float [B, D]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.pool(hidden, attention_mask)

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Reduce token states [B, T, D] to one vector a text [B, D]."""
        if self.pooling == "mean":
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        elif self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            last = attention_mask.sum(1) - 1
            pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        return nn.functional.normalize(pooled, p=2.0, dim=1) if self.normalize else pooled


def model_class(task: Task) -> Any:
    """The Transformers auto class of a task."""
    return {
        "feature-extraction": transformers.AutoModel,
        "text-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
        "text-generation": transformers.AutoModelForCausalLM,
    }[task]


def extra_arguments(architecture: str, task: Task) -> dict[str, Any]:
    """A sentence encoder leaves BERT's pooler out: nothing reads it, and it would be shipped."""
    leave_out = task == "feature-extraction" and ARCHITECTURES[architecture].has_pooler
    return {"add_pooling_layer": False} if leave_out else {}


def load_torch(folder: Path) -> nn.Module:
    """The model of a folder in fp32, ``eval()``, on the CPU; a :class:`SentenceEncoder` for embeddings.

    Reads local files only and prints nothing. Raises what :func:`edgestill.checkpoints.open_model` raises, and
    :class:`BadInput` when weights are missing or have another shape than the config says.
    """
    described = open_model(folder)
    check_allocation(described.config, described.task, described.parameters, folder)
    with quiet(), _loading(folder):
        model, info = model_class(described.task).from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported just below, in one line
            **extra_arguments(described.architecture, described.task),
        )
    check_loaded(info, folder)
    model.eval()
    if described.pooling is None:
        return model
    return SentenceEncoder(model, described.pooling, described.normalize).eval()


@contextlib.contextmanager
def _loading(where: Path) -> Iterator[None]:
    """Whatever Transformers and the safetensors library raise for a folder is one :class:`BadInput`."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt, SystemExit, BadInput):
        raise
    except BaseException as error:  # SafetensorError, validation errors of the hub library, panics of Rust code
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(f"{where}: the model does not load: {reason}", hint="prepare it again") from None


def build_model(config: dict[str, Any], state: dict[str, Tensor], task: Task, where: Path) -> Any:
    """The Transformers model of ``config`` with the weights ``state`` (fp32), its names mapped to this version's.

    Weights that the task's model does not have (another head, a pooler) are dropped; missing ones are
    :class:`BadInput`.
    """
    check_allocation(config, task, sum(tensor.numel() for tensor in state.values()), where)
    with quiet():
        typed = _typed_config(config, where)
        arguments = extra_arguments(config["model_type"], task)
        loader = _class_for(typed, task)
        model, info = loader.from_pretrained(
            None, config=typed, state_dict=state, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True, **arguments,
        )  # fmt: skip
    check_loaded(info, where)
    return model.eval()


def new_model(config: dict[str, Any], task: Task, seed: int, where: Path) -> Any:
    """The Transformers model of ``config`` with random weights drawn with ``seed`` (fp32, ``eval()``).

    Raises :class:`BadInput` for a config that makes no model and :class:`ResourceExhausted` for one that is too big.
    """
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        typed = _typed_config(config, where)
        try:
            model = _class_for(typed, task)(typed, **extra_arguments(config["model_type"], task))
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ZeroDivisionError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if "allocate memory" in reason or "out of memory" in reason:
                raise ResourceExhausted(f"{where}: not enough memory for this shape", hint="make it smaller") from None
            raise BadInput(f"{where}: it makes no model: {reason}", hint="check its sizes") from None
    return model.float().eval()


def check_allocation(config: dict[str, Any], task: Task, stored: int, where: Path) -> None:
    """A model needs no more parameters than are ``stored``: checked without memory, on torch's meta device.

    Else a forged size in config.json would make Transformers allocate what it does not find in the file.
    """
    with quiet(), torch.device("meta"):
        typed = _typed_config(config, where)
        try:
            empty = _class_for(typed, task)(typed, **extra_arguments(config["model_type"], task))
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ZeroDivisionError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BadInput(f"{where}: config.json makes no model: {reason}", hint="fetch the model again") from None
    needed = sum(parameter.numel() for parameter in empty.parameters())
    if needed > stored:
        raise BadInput(
            f"{where}: config.json describes {needed} parameters, the weights hold {stored}",
            hint="config and weights are not of the same model, or weights are missing",
        )


def _typed_config(config: dict[str, Any], where: Path) -> Any:
    clean = {key: value for key, value in config.items() if key not in _LOCAL_CONFIG_KEYS}
    try:
        return transformers.AutoConfig.for_model(**clean)
    except Exception as error:  # Transformers validates configs with an exception of its hub library
        reason = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
        raise BadInput(f"{where / 'config.json'}: {reason}", hint="fetch the model again") from None


def _class_for(config: Any, task: Task) -> Any:
    """The concrete class of ``config`` for ``task`` (``AutoModelForX`` can't load from a state dict)."""
    return model_class(task)._model_mapping[type(config)]


def load_torch_file(path: Path) -> dict[str, Tensor]:
    """A state dict from a torch file, by ``weights_only``: nothing in the file is executed.

    Raises :class:`BadInput` for a truncated file and for one that holds more than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError:
        raise BadInput(
            f"{path} needs more than weights_only to load", hint="convert it to safetensors where you trust it"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"{path} is truncated or not a torch file: {reason}", hint="fetch it again") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(f"{path} is not a state dict", hint="save model.state_dict(), or use safetensors")
    return state


def load_source_tokenizer(root: Path, lower_case: bool = False) -> Any:
    """The fast tokenizer of a foreign folder; ``lower_case``: its user lower-cases first (sentence-transformers)."""
    if not any((root / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")):
        raise BadInput(f"{root} has no tokenizer", hint="copy tokenizer.json of the model into it")
    tokenizer = open_tokenizer(root)
    if lower_case:
        from tokenizers import normalizers

        backend = tokenizer.backend_tokenizer
        rest = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
    return tokenizer


def check_loaded(info: dict[str, Any], where: Path) -> None:
    """Turn Transformers' loading report into one error."""
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(str(item) for item in info.get(kind) or ()):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            what = {"missing_keys": "weights are missing", "mismatched_keys": "weights have another shape"}
            raise BadInput(
                f"{where}: {what.get(kind, 'weights do not load')}: {found[0]}{more}",
                hint="config and weights are not of the same model",
            )


def save_model(model: nn.Module, tokenizer: Any, out: Path, like: ModelFolder, **changes: Any) -> ModelFolder:
    """Write a model folder, whole or not at all, and open it.

    ``model`` is a :class:`SentenceEncoder` or a Transformers model whose ``config`` is true (layers cut, …). What the
    weights don't say comes from ``like``; ``changes`` replaces its fields ``task pooling normalize max_length license
    prompt_prefix origin``. Same weights, same bytes: no path, time or version is written.
    """
    facts = dataclasses.replace(like, **changes)
    with atomic_directory(out) as folder:
        write_folder(model, tokenizer, folder, facts)
    return open_model(out)


def write_folder(model: nn.Module, tokenizer: Any, folder: Path, facts: ModelFolder) -> None:
    """Fill ``folder`` with config, weights, tokenizer and ``edgestill.json``."""
    inner: Any = model.encoder if isinstance(model, SentenceEncoder) else model
    config = {key: value for key, value in inner.config.to_diff_dict().items() if key not in _LOCAL_CONFIG_KEYS}
    row = ARCHITECTURES[config["model_type"]]
    for key in row.size_keys:
        config[key] = getattr(inner.config, key)  # a diff leaves out what happens to be the default
    config = complete_config(config)
    config["tie_word_embeddings"] = bool(getattr(inner.config, "tie_word_embeddings", False))
    config.update(architectures=[type(inner).__name__], dtype="float32")
    if facts.task in CLASS_TASKS:
        config["id2label"] = {str(key): label for key, label in inner.config.id2label.items()}
        config["label2id"] = {label: int(key) for key, label in inner.config.id2label.items()}
    _write_json(folder / "config.json", config)
    save_file(_weights(inner), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_tokenizer(tokenizer, folder, facts.max_length)
    known: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "task": facts.task,
        "pooling": facts.pooling,
        "normalize": facts.normalize,
        "max_length": facts.max_length,
        "license": facts.license,
        "prompt_prefix": facts.prompt_prefix,
    }
    if origin := origin_to_json(facts.origin):
        known["origin"] = origin
    _write_json(folder / FACTS_FILE, known)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """fp32 parameters and persistent buffers by name, tied ones once (under the first name)."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    persistent = model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if id(tensor) in seen or not tensor.is_floating_point():
            continue
        seen.add(id(tensor))
        found[name] = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return found


def _write_tokenizer(tokenizer: Any, folder: Path, max_length: int) -> None:
    """The tokenizer's files without truncation, padding or paths; ``model_max_length`` is the model's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BadInput("the tokenizer is not a fast one", hint="save it as tokenizer.json with the tokenizers library")
    truncation, padding, longest = backend.truncation, backend.padding, tokenizer.model_max_length
    backend.no_truncation()
    backend.no_padding()
    tokenizer.model_max_length = max_length
    try:
        with quiet():
            tokenizer.save_pretrained(folder)
    finally:
        tokenizer.model_max_length = longest
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {key: value for key, value in config.items() if key not in _LOCAL_TOKENIZER_KEYS})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
