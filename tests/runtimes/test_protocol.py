"""Messages and tensor files: what one side writes the other reads, and nothing else passes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgestill import errors
from edgestill.errors import BadInput, EdgestillError, MissingDependency, ResourceExhausted, WorkerError
from edgestill.runtimes.protocol import DTYPES, Exchange, describe_error, exchange_root, pack, rebuild_error, unpack


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Exchange, Exchange]:
    return Exchange(tmp_path, "c"), Exchange(tmp_path, "w")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_tensors_arrive_as_they_were_sent(sides, tmp_path, dtype, shape):
    client, worker = sides
    array = (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)
    got = worker.take(client.put(array))
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    np.testing.assert_array_equal(got, array)
    assert list(tmp_path.iterdir()) == []  # taken is removed


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(width=32)))
def test_any_float_keeps_its_bits(tmp_path_factory, array):
    folder = tmp_path_factory.mktemp("exchange")
    got = Exchange(folder, "w").take(Exchange(folder, "c").put(array))
    assert got.tobytes() == np.ascontiguousarray(array).tobytes()


def test_the_file_is_raw_row_major_little_endian_and_the_hash_is_its_sha256(sides, tmp_path):
    reference = sides[0].put(np.arange(6, dtype=">i4").reshape(2, 3).T)
    data = (tmp_path / reference["file"]).read_bytes()
    assert data == b"".join(value.to_bytes(4, "little") for value in (0, 3, 1, 4, 2, 5))
    assert reference == {
        "file": "c1.bin",
        "dtype": "int32",
        "shape": [3, 2],
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def test_a_damaged_tensor_is_refused(sides, tmp_path):
    client, worker = sides
    reference = client.put(np.arange(4.0))
    path = tmp_path / reference["file"]
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(WorkerError, match="sha256"):
        worker.take(reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [5]}, "do not fit"),
        ({"shape": [1 << 40]}, "do not fit"),
        ({"shape": [-4]}, "unknown dtype or shape"),
        ({"shape": "x"}, "not a tensor reference"),
        ({"dtype": "object"}, "unknown dtype"),
        ({"dtype": "float64"}, "do not fit"),
        ({"file": "gone.bin"}, "missing"),
        ({"file": None}, "missing"),
    ],
)
def test_a_wrong_reference_is_refused_before_reading(sides, change, message):
    client, worker = sides
    reference = client.put(np.arange(4, dtype=np.float32))
    with pytest.raises(WorkerError, match=message):
        worker.take({**reference, **change})


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "a/../../b", ""])
def test_a_reference_can_not_leave_the_exchange_folder(sides, file):
    reference = sides[0].put(np.arange(4, dtype=np.float32))
    with pytest.raises(BadInput, match="unsafe path"):
        sides[1].take({**reference, "file": file})


def test_objects_can_not_be_sent(sides):
    with pytest.raises(WorkerError, match="object"):
        sides[0].put(np.array([{}]))


def test_messages_are_one_line_of_strict_json():
    message = {"id": 1, "op": "decode", "text": "line\nbreak ü"}
    line = pack(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert unpack(line) == message
    with pytest.raises(ValueError, match="JSON compliant"):
        pack({"x": float("nan")})


@pytest.mark.parametrize("line", [b"", b"llama_model_loader: loaded\n", b"[1]\n", b"\xff\xfe\n", b"[" * 100_000])
def test_what_is_no_message_is_named(line):
    with pytest.raises(WorkerError, match="not a protocol message"):
        unpack(line)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_of_the_tree_arrives_as_itself(name):
    kind: type[EdgestillError] = getattr(errors, name)
    try:
        raise kind("it broke", hint="mend it")
    except EdgestillError as error:
        sent = unpack(pack(describe_error(error)))
    got = rebuild_error(sent)
    assert type(got) is kind
    assert (got.message, got.hint, got.exit_code) == ("it broke", "mend it", kind.exit_code)
    assert any("test_protocol" in note for note in got.__notes__)  # the worker's trace, for --debug


def test_the_install_line_survives():
    got = rebuild_error(describe_error(MissingDependency.package("onnxruntime", "runtimes")))
    assert "pip install 'edgestill[runtimes]'" in str(got)


def test_foreign_errors_become_errors_of_the_tree():
    got = rebuild_error(describe_error(RuntimeError("tensor 'x'\nnot found")))
    assert type(got) is WorkerError
    assert got.message == "RuntimeError: tensor 'x' not found"
    assert type(rebuild_error(describe_error(MemoryError()))) is ResourceExhausted


@pytest.mark.parametrize("sent", [None, "boom", {"kind": "SystemExit", "message": "x"}, {"kind": "nearest"}, {}])
def test_an_unknown_error_kind_is_a_worker_error(sent):
    assert type(rebuild_error(sent)) is WorkerError


def test_exchange_folders_lie_in_roomy_shared_memory_or_the_temp_folder(monkeypatch):
    import os
    import tempfile

    assert exchange_root() in (Path("/dev/shm"), Path(tempfile.gettempdir()))
    small = os.statvfs_result((4096, 4096, 0, 100, 100, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    assert exchange_root() == Path(tempfile.gettempdir())
