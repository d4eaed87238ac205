"""A student of any other shape: random weights in the shape that a config.json says, with the teacher's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints import ARCHITECTURES, ModelFolder, SentenceEncoder, find_architecture, load_tokenizer, save_model
from ..errors import BadInput
from ..files import read_json
from ..model_origin import student_origin
from ..torch_models import new_model

__all__ = ["fresh_student", "read_shape"]

# What the teacher's tokenizer and classes decide, whatever the config says.
_FROM_TEACHER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id")


def read_shape(path: Path, teacher: ModelFolder) -> dict[str, Any]:
    """The config at ``path`` (a file, or a folder with a config.json) with what the teacher decides put in.

    Raises :class:`~edgestill.errors.BadInput` for what is no config and :class:`~edgestill.errors.Unsupported` for an
    architecture that can't do the teacher's task.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"[student] config: {file} does not exist", hint="pass a config.json, or a folder with one")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise BadInput(f"[student] config: {file} is not an object", hint="it is not a Transformers config")
    find_architecture(raw, file, teacher.task)
    config = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype")}
    return {**config, **{key: teacher.config[key] for key in _FROM_TEACHER if key in teacher.config}}


def fresh_student(path: Path, teacher: ModelFolder, out: Path, *, seed: int = 0) -> ModelFolder:
    """Write the model folder ``out``: the shape at ``path``, weights drawn with ``seed``, tokenizer and pooling of
    ``teacher``. The same seed gives the same bytes. Raises what :func:`read_shape` raises, and
    :class:`~edgestill.errors.ResourceExhausted` for a shape that does not fit in memory."""
    config = read_shape(path, teacher)
    model = new_model(config, teacher.task, seed, path)
    wrapped = model
    if teacher.pooling is not None:
        wrapped = SentenceEncoder(model, teacher.pooling, teacher.normalize).eval()
    row = ARCHITECTURES[config["model_type"]]
    positions = int(getattr(model.config, row.positions_key)) - row.position_offset
    return save_model(
        wrapped, load_tokenizer(teacher.path), out, teacher, max_length=min(teacher.max_length, positions),
        origin=student_origin(teacher, teacher),
    )  # fmt: skip
