"""The page's own modules, run by node where it is installed (npm brings it, and npm brings onnxruntime-web)."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess

import pytest

from edgestill.runtimes.transports.web.server import PAGE

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


def run(script: str) -> object:
    done = subprocess.run(
        [NODE, "--input-type=module", "--eval", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sha256_without_the_browsers_own_is_hashlibs():
    """Pages over plain http have no crypto.subtle: lengths around the blocks of 64 and the padding's 56."""
    sizes = [0, 1, 3, 55, 56, 57, 63, 64, 65, 119, 120, 128, 1000, 70001]
    script = f"""
        import {{ sha256 }} from {json.dumps(str(PAGE / "sha256.mjs"))};
        const results = {{ own: [], theirs: [] }};
        const all = {json.dumps(sizes)}.map((n) => Uint8Array.from({{ length: n }}, (_, i) => (i * 31 + n) % 256));
        for (const bytes of all) results.theirs.push(await sha256(bytes));
        Object.defineProperty(globalThis, "crypto", {{ value: undefined }});
        for (const bytes of all) results.own.push(await sha256(bytes));
        console.log(JSON.stringify(results));
    """
    wanted = [hashlib.sha256(bytes((i * 31 + n) % 256 for i in range(n))).hexdigest() for n in sizes]
    assert run(script) == {"own": wanted, "theirs": wanted}


CASES = [
    ([1.0] * 40, {"repeats": 4, "warmup": 3, "max_seconds": 100}),
    ([9, 5, 1, 1, 1, 1, 1, *[2] * 40], {"repeats": 3, "warmup": 1, "max_seconds": 100}),
    ([1, 2] * 40, {"repeats": 5, "warmup": 3, "max_seconds": 100}),  # never steady
    ([4.0] * 40, {"repeats": 5, "warmup": 2, "max_seconds": 6}),  # out of time
    ([1.0] * 40, {"repeats": 2, "warmup": 0, "max_seconds": 100}),
]
THROWN = {
    'new RangeError("Array buffer allocation failed")': "ResourceExhausted",
    'new Error("std::bad_alloc")': "ResourceExhausted",
    'new WebAssembly.RuntimeError("memory access out of bounds")': "ResourceExhausted",
    "123456": "WorkerError",
    'new TypeError("x is not a function\\nat line 3")': "WorkerError",
}


def test_timing_follows_the_same_rules_as_everywhere():
    """Against runtimes/timing.py, with durations from a list."""
    from edgestill.runtimes.timing import time_forward

    told = run(f"""
        import {{ time }} from {json.dumps(str(PAGE / "timing.mjs"))};
        const results = [];
        for (const [durations, bounds] of {json.dumps(CASES)}) {{
            results.push(await time(async () => durations.shift(), (seconds) => seconds, bounds));
        }}
        console.log(JSON.stringify(results));
    """)

    class Nothing:
        def forward(self, ids, mask):
            return None

    for (durations, bounds), got in zip(CASES, told, strict=True):
        ticks = [0]
        for seconds in durations:
            ticks += [ticks[-1], ticks[-1] + int(seconds * 1e9)]
        clock = iter(ticks[1:])
        wanted = time_forward(Nothing(), None, None, **bounds, clock=lambda clock=clock: next(clock))
        assert got == {"samples": list(wanted.samples), "warmup": list(wanted.warmup), "stable": wanted.stable}


def test_errors_get_a_class_one_line_and_a_hint():
    told = run(f"""
        import {{ time }} from {json.dumps(str(PAGE / "timing.mjs"))};
        import {{ describe }} from {json.dumps(str(PAGE / "refused.mjs"))};
        const bounds = {{ repeats: 0, warmup: 0, max_seconds: 1 }};
        const thrown = [await time(null, null, bounds).catch((error) => error), {", ".join(THROWN)}];
        console.log(JSON.stringify(thrown.map(describe)));
    """)
    assert [error["kind"] for error in told] == ["BadInput", *THROWN.values()]
    assert told[0]["message"] == "can't time 0 repeats, 0 warm-up calls in 1 s"
    assert all("\n" not in error["message"] and error["hint"] for error in told)
