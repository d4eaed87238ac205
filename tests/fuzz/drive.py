"""What is done with a damaged file: every reader and every session of the house that could meet it.

Each function returns when the file was harmless and raises what the house raised. Only an ``EdgestillError`` of one
line is right.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgestill.artifact import ARTIFACT_FILE, NOT_PAYLOAD, artifact_id, open_artifact
from edgestill.errors import BadInput
from edgestill.files import hash_file, list_files

__all__ = ["drive", "preload", "reseal"]

Stage = Callable[[str], None]


def preload() -> None:
    """Import what the drivers need, once, before the process forks."""
    import coremltools  # noqa: F401
    import gguf  # noqa: F401
    import llama_cpp  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from edgestill.runtimes.llamacpp_api import engine
    from edgestill.runtimes.milproto import import_coremltools

    engine()
    import_coremltools()
    torch.set_num_threads(1)


def drive(kind: str, folder: Path, student: Path, stage: Stage) -> None:
    """Read and run ``folder``; ``stage("native")`` is called before code runs that may take the process with it."""
    if kind == "model":
        _model(folder, stage)
    else:
        _artifact(kind, folder, student, stage)


def reseal(folder: Path) -> None:
    """Make the hashes in ``artifact.json`` fit, as whoever wrote a hostile file would."""
    from edgestill.artifact import FileEntry

    path = folder / ARTIFACT_FILE
    document = json.loads(path.read_text())
    names = [str(name) for name in list_files(folder) if str(name) not in NOT_PAYLOAD]
    files = [FileEntry(name, hash_file(folder / name), (folder / name).stat().st_size) for name in names]
    document["files"] = [dataclasses.asdict(file) for file in files]
    document["artifact_id"] = artifact_id(files)
    path.write_text(json.dumps(document))


def _model(folder: Path, stage: Stage) -> None:
    from edgestill.bench.chat import read_template
    from edgestill.checkpoints import load_tokenizer, load_torch, open_model
    from edgestill.inspection import inspect_model

    errors = []
    for look in (open_model, inspect_model):
        try:
            look(folder)
        except BadInput as error:
            errors.append(error)
    open_model(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer("The film was 3 good! 🙂 </s>")
    read_template(folder)
    stage("native")
    load_torch(folder)
    if errors:
        raise errors[0]


def _artifact(kind: str, folder: Path, student: Path, stage: Stage) -> None:
    from edgestill.bench.integrity import check_histogram, check_tokenizer, check_weights
    from edgestill.runtimes.payload import open_payload
    from edgestill.runtimes.session import SessionOptions, open_session

    artifact = open_artifact(folder)
    refused = None
    try:
        payload = open_payload(artifact)
        payload.histogram()
        check_histogram(artifact, payload)
        for tensor in artifact.tensors():
            payload.decode(tensor)
        check_weights(artifact, payload, student)
    except BadInput as error:
        refused = error
    if kind == "gguf":
        _gguf(artifact.entry)
    else:
        check_tokenizer(artifact, student)
    # What the reader refuses is put before the runtime all the same: verification opens both.
    stage("native")
    session = open_session(folder, SessionOptions(1))
    try:
        info = session.info()
        ids = np.array([[1, 2, 3], [2, 1, 1]], np.int64)
        mask = np.array([[1, 1, 1], [1, 1, 0]], np.int64)
        session.forward(ids, mask)
        if "decode" in info.capabilities:
            list(session.decode([1, 2], 2))
    finally:
        session.close()
    if refused:
        raise refused


def _gguf(path: Path) -> None:
    """The reader that imports the GGUF files of others."""
    from edgestill.gguf_import import open_gguf, read_config
    from edgestill.gguf_tokenizer import build_tokenizer

    source = open_gguf(path)
    if source.metadata.get("general.architecture") == "llama":
        config = read_config(source)
        build_tokenizer(source, config["max_position_embeddings"])
