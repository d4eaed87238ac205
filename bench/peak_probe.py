"""One probe of what this machine can do, in a process of its own: ``python -m edgestill.bench.peak_probe KIND …``.

Prints one JSON object: ``rates`` (bytes or operations a second, one a repetition) and ``how``. Memory: arrays far
beyond the last cache are read, copied, or combined (STREAM's triad), each thread its own part; bytes are counted as
STREAM counts them, what a cache fetches before it writes is not. Arithmetic: products of square matrices.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["PROBES", "cache_bytes", "main", "probe"]

PROBES = ("read", "copy", "triad", "float_blas", "float_onnxruntime", "int8_onnxruntime")
_WARMUP = 2
_FEWEST = 5
_SIDE = 1024
_BLOCK = 1 << 16  # floats of the triad's blocks: they stay in the second cache
_LEAST, _MOST = 64 << 20, 512 << 20

Work = tuple[Callable[[], object], float, str]


def cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache that the system tells of, else 32 MiB."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = []
    for path in root.glob("index*/size"):
        text = path.read_text(encoding="ascii", errors="replace").strip()
        if text[:-1].isdigit() and text[-1:] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=32 << 20)


def probe(kind: str, threads: int, seconds: float, size_bytes: int = 0) -> dict[str, Any]:
    """Rates of one kind of :data:`PROBES`: at least five repetitions, and as many as ``seconds`` hold.

    ``size_bytes`` of each array; by default four times the last cache, 64 to 512 MiB.
    """
    size = size_bytes or min(_MOST, max(_LEAST, 4 * cache_bytes()))
    with ThreadPoolExecutor(threads) as pool:
        work, amount, how = _memory(kind, threads, size, pool) if kind in PROBES[:3] else _arithmetic(kind, threads)
        for _ in range(_WARMUP):
            work()
        rates: list[float] = []
        end = time.perf_counter() + seconds
        while len(rates) < _FEWEST or time.perf_counter() < end:
            start = time.perf_counter()
            work()
            rates.append(amount / (time.perf_counter() - start))
    return {"kind": kind, "threads": threads, "rates": rates, "how": how}


def _memory(kind: str, threads: int, size: int, pool: ThreadPoolExecutor) -> Work:
    count = size // 4 // threads * threads
    arrays = [np.full(count, 1.5, np.float32) for _ in range({"read": 1, "copy": 2, "triad": 3}[kind])]
    parts = list(zip(*(np.split(array, threads) for array in arrays), strict=True))
    move = {"read": _read, "copy": _copy, "triad": _triad}[kind]
    what = {
        "read": "a dot product of each part with itself, in numpy's BLAS",
        "copy": "numpy.copyto, one array read and one written",
        "triad": "a = b + s * c in numpy, block by block, two arrays read and one written",
    }[kind]

    def work() -> None:
        if threads == 1:
            move(parts[0])
        else:
            list(pool.map(move, parts))

    how = f"{what}; float32, {count * 4 >> 20} MiB an array, {threads} threads, best repetition"
    return work, float(len(arrays) * count * 4), how


def _read(part: Sequence[Any]) -> None:
    np.dot(part[0], part[0])


def _copy(part: Sequence[Any]) -> None:
    np.copyto(part[1], part[0])


def _triad(part: Sequence[Any]) -> None:
    a, b, c = part
    for start in range(0, len(a), _BLOCK):
        block = slice(start, start + _BLOCK)
        np.multiply(c[block], np.float32(3), out=a[block])
        np.add(a[block], b[block], out=a[block])


def _arithmetic(kind: str, threads: int) -> Work:
    operations = 2.0 * _SIDE**3
    shape = f"{_SIDE} x {_SIDE} matrices, {threads} threads, best repetition"
    if kind == "float_blas":
        a = np.random.default_rng(0).random((_SIDE, _SIDE), np.float32)
        out = np.empty_like(a)
        return lambda: np.matmul(a, a, out=out), operations, f"numpy's BLAS, float32; {shape}"
    run = _onnxruntime_product(whole=kind == "int8_onnxruntime", threads=threads)
    name = "MatMulInteger, uint8 by int8" if kind == "int8_onnxruntime" else "MatMul, float32"
    return run, operations, f"onnxruntime's {name}; {shape}"


def _onnxruntime_product(*, whole: bool, threads: int) -> Callable[[], object]:
    """A product with a constant matrix, as weights are: the runtime packs it once."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    chooser = np.random.default_rng(0)
    if whole:
        kinds = (TensorProto.UINT8, TensorProto.INT32)
        x: Any = chooser.integers(0, 255, (_SIDE, _SIDE), np.uint8)
        weight: Any = chooser.integers(-127, 127, (_SIDE, _SIDE), np.int8)
    else:
        kinds = (TensorProto.FLOAT, TensorProto.FLOAT)
        x = chooser.random((_SIDE, _SIDE), np.float32)
        weight = chooser.random((_SIDE, _SIDE), np.float32)
    node = helper.make_node("MatMulInteger" if whole else "MatMul", ["x", "w"], ["y"])
    ends = [helper.make_tensor_value_info(n, kind, [_SIDE, _SIDE]) for n, kind in zip("xy", kinds, strict=True)]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def main(arguments: Sequence[str] | None = None) -> int:
    """One probe, one line of JSON on standard output."""
    parser = argparse.ArgumentParser(prog="edgestill-peak-probe", description="Probe memory or arithmetic once.")
    parser.add_argument("kind", choices=PROBES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--size-bytes", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        found = probe(given.kind, given.threads, given.seconds, given.size_bytes)
    except ImportError as error:
        found = {"kind": given.kind, "threads": given.threads, "reason": f"{error.name} is not installed"}
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
