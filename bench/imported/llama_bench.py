"""``llama-bench -o json`` and ``-o jsonl``: an object a test, with every repetition in ``samples_ts`` (tokens a
second). Fields: ``test::get_fields`` and ``json_printer`` in llama.cpp's ``tools/llama-bench/llama-bench.cpp``."""

from __future__ import annotations

from typing import Any

from ..records import Measurement
from .rows import Origin, Row, model_name, numbers

__all__ = ["is_ours", "rows"]

_TOOL = "llama-bench"


def is_ours(document: Any) -> bool:
    """Whether a JSON document has the shape."""
    tests = document if isinstance(document, list) else [document]
    return bool(tests) and all(
        isinstance(t, dict) and {"n_prompt", "n_gen", "model_filename"} <= t.keys() for t in tests
    )


def rows(document: Any, origin: Origin) -> list[Measurement]:
    """Prefill and decode speed of each test, decoding also at a depth (``-d``). A test that mixes both (``-pg``) and a
    prompt at a depth have no metric of ours."""
    found: list[Measurement] = []
    sizes: set[str] = set()
    for test in document if isinstance(document, list) else [document]:
        prompt, generated, depth = (_count(test.get(key, 0), key) for key in ("n_prompt", "n_gen", "n_depth"))
        row = _row(test, origin, prompt, generated, depth)
        if row.subject not in sizes and test.get("model_size"):
            sizes.add(row.subject)
            found.append(row("model_bytes", [float(_count(test["model_size"], "model_size"))], "exact"))
        if bool(prompt) == bool(generated) or (prompt and depth):
            continue
        metric = "prefill_tokens_per_s" if prompt else f"decode{'_at_depth' if depth else ''}_tokens_per_s"
        found.append(row(metric, numbers(test["samples_ts"], what="samples_ts")))
    return found if any(m.metric != "model_bytes" for m in found) else []


def _row(test: dict[str, Any], origin: Origin, prompt: int, generated: int, depth: int) -> Row:
    backend = _text(test, "backends") or "CPU"
    told = _text(test, "gpu_info") if "CPU" not in backend else ""
    layers = test.get("n_gpu_layers")
    return Row(
        origin, _TOOL, model_name(_text(test, "model_filename"), "model"),
        origin.device_of(told or _text(test, "cpu_info")), "llama.cpp",
        f"b{test.get('build_number', '?')} ({_text(test, 'build_commit')})", backend,
        _count(test.get("n_threads", 0), "n_threads"),
        {
            "length": prompt, "new_tokens": generated, "depth": depth, "batch_size": 1,
            "n_batch": test.get("n_batch"), "n_ubatch": test.get("n_ubatch"), "n_gpu_layers": layers,
            "flash_attn": test.get("flash_attn"), "model_type": _text(test, "model_type"),
            "test_time": _text(test, "test_time"), "repetitions": "of one process",
        },
        context=depth or prompt + generated, kv_dtype=_text(test, "type_k") or None,
    )  # fmt: skip


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 50:
        raise ValueError(f"{what} is {value!r}")
    return value


def _text(test: dict[str, Any], key: str) -> str:
    value = test.get(key, "")
    return value if isinstance(value, str) else ""
