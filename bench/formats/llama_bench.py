"""JSON as ``llama-bench -o json`` prints it: one object a test, for tools that read llama.cpp's results.

Fields and their order are those of llama-bench (llama.cpp, ``tools/llama-bench``, at the engine commit of
llama-cpp-python 0.3.36). What does not exist here, or is not known, is ``null``: nothing is made up.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from ..records import Measurement
from .results import Results

__all__ = ["FIELDS", "to_llama_bench"]

FIELDS = (
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size",
    "model_n_params", "n_batch", "n_ubatch", "n_threads", "cpu_mask", "cpu_strict", "poll", "type_k", "type_v",
    "n_gpu_layers", "n_cpu_moe", "split_mode", "main_gpu", "no_kv_offload", "flash_attn", "devices", "tensor_split",
    "tensor_buft_overrides", "load_mode", "lazy_mode", "embeddings", "no_op_offload", "no_host", "repack",
    "fit_target", "fit_min_ctx", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts",
    "stddev_ts", "samples_ns", "samples_ts",
)  # fmt: skip

_TESTS = ("prefill_tokens_per_s", "decode_tokens_per_s", "decode_at_depth_tokens_per_s")


def to_llama_bench(results: Results) -> str:
    """A test for each prefill and each decode speed that was taken; of rows without them, ``[]``."""
    sizes = {(row.subject, row.metric): row.summary.value for row in results.measurements if row.summary}
    tests = [
        _test(row, sizes) for row in results.measurements if row.metric in _TESTS and row.summary and any(row.samples)
    ]
    return json.dumps(tests, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _test(row: Measurement, sizes: dict[tuple[str, str], float]) -> dict[str, Any]:
    """What llama-bench calls ``ppN`` (prefill of N tokens) or ``tgN @ dM`` (N tokens decoded after M)."""
    speeds = [float(value) for launch in row.samples for value in launch]
    length = int(row.protocol.get("length") or row.context or 0)
    prefill = row.metric == "prefill_tokens_per_s"
    # The first token of a generation is the prompt's: the speed is of those after it.
    tokens = length if prefill else max(1, int(row.protocol.get("new_tokens") or 1) - 1)
    depth = 0 if prefill else int(row.context or 0) if row.metric == "decode_at_depth_tokens_per_s" else length
    times = [round(tokens / speed * 1e9) for speed in speeds]
    size, bits = sizes.get((row.subject, "model_bytes")), sizes.get((row.subject, "bits_per_weight"))
    kv = row.kv_dtype or next((name[3:] for name in row.placement if name.startswith("kv:")), None)
    engine = row.runtime == "llama.cpp"
    known = {
        "build_commit": f"{row.runtime} {row.runtime_version}".strip(),
        "cpu_info": str(row.environment.get("cpu") or row.device),
        "gpu_info": "",
        "backends": "CPU" if engine and row.backend == "cpu" else f"{row.runtime}:{row.backend}",
        "model_filename": row.subject,
        "model_size": None if size is None else int(size),
        "model_n_params": round(size * 8 / bits) if size and bits else None,
        "n_threads": row.threads,
        "type_k": kv,
        "type_v": kv,
        "n_gpu_layers": 0 if engine and row.backend == "cpu" else None,
        "embeddings": False,
        "n_prompt": tokens if prefill else 0,
        "n_gen": 0 if prefill else tokens,
        "n_depth": depth,
        "avg_ns": round(statistics.fmean(times)),
        "stddev_ns": round(statistics.stdev(times)) if len(times) > 1 else 0,
        "avg_ts": statistics.fmean(speeds),
        "stddev_ts": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        "samples_ns": times,
        "samples_ts": speeds,
    }
    return {name: known.get(name) for name in FIELDS}
