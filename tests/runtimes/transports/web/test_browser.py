"""onnxruntime-web in a real headless Chromium: numbers, and what goes wrong in a browser."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import open_artifact, seal_artifact
from edgestill.errors import BadInput, Unsupported, WorkerError
from edgestill.files import is_alive
from edgestill.runtimes.session import SessionOptions, open_session
from edgestill.runtimes.transports.web import target as web
from edgestill.runtimes.transports.web.browser import Browser, find_browser
from edgestill.runtimes.transports.web.target import WebTarget

pytestmark = pytest.mark.slow
OPTIONS = SessionOptions(threads=1)
PRECISE = SessionOptions(threads=1, extra={"session.x64quantprecision": "1"})
IDS = np.array([[2, 50, 60, 70, 81, 3], [2, 80, 3, 0, 0, 0]], np.int64)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], np.int64)
PROMPT = [5, 60, 90, 130, 7, 200, 31]


def edited(folder: Path, target: Path, change) -> Path:
    """The artifact with another graph: ``change(onnx model)``, sealed anew."""
    import onnx

    shutil.copytree(folder, target)
    manifest = open_artifact(folder).manifest
    path = target / manifest.entry
    model = onnx.load(path)
    onnx.save(change(model) or model, path)
    seal_artifact(target, manifest)
    return target


def exact_activations(model) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0


def outputs(page, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of real tokens: in the browser, and in onnxruntime here with x86's precise integer arithmetic."""
    native = open_session(folder, PRECISE)
    per_token = native.info().task == "text-generation"
    with page.open_worker(folder, OPTIONS) as worker:
        got = worker.forward(IDS, MASK)
    wanted = native.forward(IDS, MASK)
    native.close()
    return (got[MASK == 1], wanted[MASK == 1]) if per_token else (got, wanted)


@pytest.fixture(scope="module")
def integer_model(web_export, tmp_path_factory) -> Path:
    """The tiny encoder by onnxruntime's own quantiser: MatMulInteger and DynamicQuantizeLinear, U8S8, as most int8
    models on hubs are."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = web_export("tiny_bert", "onnx:fp32")
    target = tmp_path_factory.mktemp("integer") / "tiny 'int8'"
    shutil.copytree(folder, target)
    manifest = open_artifact(folder).manifest
    quantize_dynamic(
        folder / manifest.entry, target / manifest.entry, weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )  # fmt: skip
    seal_artifact(target, dataclasses.replace(manifest, quantisation="int8"))
    return target


def test_int8_is_equal_to_x86_in_precise_mode(browser_page, integer_model):
    """Integer operators have one right answer; what is left are float32 sums (norms, softmax)."""
    import onnx

    kinds = {node.op_type for node in onnx.load(integer_model / "model.onnx").graph.node}
    assert {"MatMulInteger", "DynamicQuantizeLinear"} <= kinds
    got, wanted = outputs(browser_page, integer_model)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("to", ["onnx:int8", "onnx:int4"])
def test_weights_of_few_bits_are_computed_in_float(browser_page, web_export, tmp_path, to):
    """The WebAssembly build has no int8 kernel for MatMulNBits: it ignores accuracy_level 4 (int8 activations) and
    gives what x86 gives at level 0. So it tells nothing about the rounding of activations on ARM."""
    folder = web_export("tiny_llama", to)
    exact = edited(folder, tmp_path / "exact", exact_activations)
    got, rounded = outputs(browser_page, folder)
    exact_got, wanted = outputs(browser_page, exact)
    np.testing.assert_array_equal(got, exact_got)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
    assert np.abs(rounded - wanted).max() > 1e-2


@pytest.mark.parametrize("to", ["onnx:fp16", "onnx:fp32-portable"])
def test_decoding_is_that_of_the_native_runtime(browser_page, web_export, to):
    """Shared and growing caches, float16 and float32."""
    folder = web_export("tiny_llama", to)
    native = open_session(folder, PRECISE)
    wanted = [token.id for token in native.decode(PROMPT, 12)]
    native.close()
    with browser_page.open_worker(folder, OPTIONS) as worker:
        assert [token.id for token in worker.decode(PROMPT, 12)] == wanted


def test_bad_requests_are_answered_and_survived(browser_page, web_export):
    """As tests/runtimes/test_worker.py puts them to the Python worker."""
    with browser_page.open_worker(web_export("tiny_bert", "onnx:fp32"), OPTIONS) as worker:
        for line in (b"", b"hello", b"[1, 2]", b'{"id": 1', b"nul\0", b"\xff\xff"):
            reply = worker.exchange_line(line or b" ", "garbage")
            assert (reply["id"], reply["ok"]) == (None, False)
            assert "not a protocol message" in reply["error"]["message"]
        for fields, kind, text in (
            ({"op": "dance"}, WorkerError, 'unknown operation "dance"'),
            ({"op": "score", "reference": "x"}, WorkerError, "unknown operation"),
            ({"op": "constructor"}, WorkerError, "unknown operation"),
            ({"op": "open"}, WorkerError, "a model is open already"),
            ({"op": "hello", "protocol": 2}, WorkerError, "protocol 2, this worker 1"),
            ({"op": "hello", "protocol": True}, BadInput, "protocol is true"),
            ({"op": "forward", "ids": 3}, BadInput, "ids is 3"),
            ({"op": "forward", "ids": {"file": "x"}, "mask": {}}, WorkerError, "not a tensor reference"),
            ({"op": "decode", "prompt_ids": [1], "max_new_tokens": 1}, Unsupported, "does not decode"),
        ):
            op = fields.pop("op")
            with pytest.raises(kind, match=text):
                worker.request(op, **fields)
        for ids, mask, text in (
            ([[10**6]], [[1]], "token ids 1000000 to 1000000"),
            ([[-1]], [[1]], "token ids -1"),
            ([[1, 2]], [[0, 1]], "not ones followed by zeros"),
            ([[1, 2]], [[1]], r"ids \[1,2\] with mask \[1,1\]"),
            ([[1]], [[2]], "not ones followed by zeros"),
        ):
            with pytest.raises(BadInput, match=text):
                worker.forward(np.array(ids), np.array(mask))
        reference = worker.exchange.put(IDS)
        (worker.exchange.folder / reference["file"]).write_bytes(IDS[::-1].tobytes())
        with pytest.raises(WorkerError, match="does not match its sha256"):
            worker.request("forward", ids=reference, mask=worker.exchange.put(MASK))
        assert worker.forward(IDS, MASK).shape == (2, 32)
        assert worker.memory()["peak_wasm_heap"] >= worker.memory()["loaded_wasm_heap"] > 1 << 20
        assert worker.facts()["machine"] == "wasm32"


def test_what_the_browser_can_not_load_is_said(browser_page, web_export, tmp_path):
    folder = web_export("tiny_bert", "onnx:fp32")

    def unknown(model) -> None:
        model.graph.node[0].op_type = "Frobnicate"
        model.graph.node[0].domain = ""

    with pytest.raises(Unsupported, match=r"has no operator .*Frobnicate"):
        browser_page.open_worker(edited(folder, tmp_path / "unknown", unknown), OPTIONS)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.onnx").write_bytes(b"not a model")
    seal_artifact(broken, open_artifact(folder).manifest)
    with pytest.raises(BadInput, match="can't run it"):
        browser_page.open_worker(broken, OPTIONS)
    with pytest.raises(Unsupported, match="no backend CUDAExecutionProvider"):
        browser_page.open_worker(folder, SessionOptions(threads=1, backend="CUDAExecutionProvider"))
    with pytest.raises(BadInput, match='graph_optimization "most"'):
        browser_page.open_worker(folder, SessionOptions(threads=1, extra={"graph_optimization": "most"}))
    extra = {"graph_optimization": "basic", "session.x64quantprecision": "1"}
    with browser_page.open_worker(folder, SessionOptions(threads=1, extra=extra)) as worker:
        assert worker.forward(IDS, MASK).shape == (2, 32)


def test_an_artifact_that_changes_after_its_hashes_were_checked_is_refused(
    browser_page, web_export, tmp_path, monkeypatch
):
    folder = tmp_path / "changing"
    shutil.copytree(web_export("tiny_bert", "onnx:fp32"), folder)
    artifact = open_artifact(folder)
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)
    monkeypatch.setattr(web, "open_artifact", lambda folder: artifact)
    with pytest.raises(BadInput, match=r"model\.onnx does not match its sha256"):
        browser_page.open_worker(folder, OPTIONS)


def test_a_hanging_request_ends_the_worker_and_the_page_goes_on(browser_page, web_export):
    folder = web_export("tiny_bert", "onnx:fp32")
    with browser_page.open_worker(folder, OPTIONS) as worker:
        worker.timeout = 0.2
        with pytest.raises(WorkerError, match=r"did not answer time_forward within 0\.2 s and was ended"):
            worker.time_forward(IDS, MASK, repeats=10**9, warmup=0, max_seconds=600)
        with pytest.raises(WorkerError, match="closed"):
            worker.forward(IDS, MASK)
    with browser_page.open_worker(folder, OPTIONS) as worker:
        assert worker.forward(IDS, MASK).shape == (2, 32)


def test_a_fresh_browser_for_each_launch(web_export):
    """``--target web``: nothing of one launch is in the next, and nothing stays."""
    pids = []
    with WebTarget() as target:
        facts = target.facts()
        assert facts["browser"].split()[-1][0].isdigit()
        assert facts["cpu"]
        for threads in (1, 2):
            folder = web_export("tiny_bert", "onnx:fp32")
            with target.open_worker(folder, SessionOptions(threads=threads), cold=True) as worker:
                pids.append(worker._browser.pid)
                assert worker.forward(IDS, MASK).shape == (2, 32)
                assert len(worker.time_forward(IDS, MASK, repeats=3, warmup=0)) == 3
                assert worker.cold_load_seconds is None
                assert worker.cold_reason
            assert not is_alive(pids[-1])
    assert len(set(pids)) == 2


@pytest.mark.parametrize("victim", ["browser", "renderer"])
def test_a_browser_that_crashes_in_the_middle_is_one_clear_line(web_export, monkeypatch, victim):
    monkeypatch.setattr(web, "_GONE_SECONDS", 2.0)
    with WebTarget() as target, target.open_worker(web_export("tiny_bert", "onnx:fp32"), OPTIONS) as worker:

        def strike() -> None:
            time.sleep(1)
            pid = worker._browser.pid
            os.kill(pid if victim == "browser" else renderer_of(pid), signal.SIGKILL)

        threading.Thread(target=strike, daemon=True).start()
        with pytest.raises(WorkerError, match=r"(died of signal 9|was closed, or fell asleep,) during time_forward"):
            worker.time_forward(IDS, MASK, repeats=10**9, warmup=0, max_seconds=600)


def renderer_of(pid: int) -> int:
    """The process of that browser's group that shows the page."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == pid and b"--type=renderer" in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError("no renderer")


def test_a_page_that_is_closed_and_opened_again(web_export, monkeypatch):
    """A visitor's browser: another one, over plain http from another address (no crypto.subtle, no isolation)."""
    monkeypatch.setattr(web, "_GONE_SECONDS", 2.0)
    folder = web_export("tiny_bert", "onnx:int8")
    with WebTarget("127.0.0.1:0") as target:
        visitor = target.address.replace("127.0.0.1", "phone.test")
        phone = ["--host-resolver-rules=MAP phone.test 127.0.0.1"]
        browser = Browser(find_browser(), visitor, phone)
        worker = target.open_worker(folder, OPTIONS)
        assert target._server.page["isolated"] is False
        first = worker.forward(IDS, MASK)
        browser.close()
        with pytest.raises(WorkerError, match="the page was closed, or fell asleep, during forward"):
            worker.forward(IDS, MASK)
        browser = Browser(find_browser(), visitor, phone)
        with target.open_worker(folder, OPTIONS) as worker:
            np.testing.assert_array_equal(worker.forward(IDS, MASK), first)
        with pytest.raises(Unsupported, match="2 threads: this page is not cross-origin isolated"):
            target.open_worker(folder, SessionOptions(threads=2))
        facts = target.facts()
        assert facts["browser"].startswith(("HeadlessChrome", "Chrome"))
        assert facts["cpu"] is None
        browser.close()


def test_a_browser_ends_when_the_command_is_killed(web_export, tmp_path):
    script = """
import os, sys
from pathlib import Path
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.transports.web.target import WebTarget
worker = WebTarget().open_worker(Path(sys.argv[1]), SessionOptions(threads=1))
print(worker._browser.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    folder = web_export("tiny_bert", "onnx:fp32")
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=400)
    pid = int(done.stdout)
    deadline = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not is_alive(pid)
    # What it could not remove is removed by the next one.
    for root in {Path("/tmp"), Path("/dev/shm")}:
        for stale in root.glob("edgestill-[0-9]*-*"):
            if not is_alive(int(stale.name.split("-")[1])):
                shutil.rmtree(stale, ignore_errors=True)
