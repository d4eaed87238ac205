"""Profiles of artifacts: what is measured, what is counted, what is missing with its reason; the page and the table."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from edgestill.artifact import open_artifact
from edgestill.bench.peaks import Peak, Peaks
from edgestill.bench.profile import profile_artifact
from edgestill.bench.report.roofline import roofline_chart, write_profile_page
from edgestill.bench.traffic import count_traffic
from edgestill.errors import WorkerError
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes.transports.local import LocalWorker

IDS = np.arange(20, 32)[None]
KINDS = {
    "read": 1e10,
    "copy": 8e9,
    "triad": 7e9,
    "float_blas": 5e10,
    "float_onnxruntime": 4e10,
    "int8_onnxruntime": 2e11,
}
PEAKS = Peaks(1, "2026-01-01T00:00:00+00:00", False, {k: Peak(k, v, v / 2, 3, "as said") for k, v in KINDS.items()})


@pytest.fixture(scope="module")
def decoder(tiny_llama, tmp_path_factory):
    """The profile of a tiny decoder in ONNX, its name one that must be escaped."""
    folder = tmp_path_factory.mktemp("profile") / "a b'c"
    export(tiny_llama, folder, ExportConfig(to="onnx:fp32"))
    found = profile_artifact(
        folder, subject="<b>tiny", open_worker=LocalWorker, ids=IDS, new_tokens=4, threads=1, repeats=2, peaks=PEAKS
    )
    return folder, found


def test_a_decoder_has_operators_shares_and_a_roofline(decoder):
    folder, found = decoder
    assert (found.source, found.reason, found.runtime) == ("measured", None, "onnxruntime")
    assert [phase.name for phase in found.phases] == ["prefill", "decode"]
    traffic = count_traffic(open_artifact(folder))
    for phase in found.phases:
        assert sum(row.share for row in phase.operators) == pytest.approx(1)
        assert 0 < phase.explained <= 1
        assert [row.ms for row in phase.operators] == sorted((row.ms for row in phase.operators), reverse=True)
        products = sum(row.flops or 0 for row in phase.operators)
        # what the profiler's shapes say is what the artifact was counted to cost
        rows = 1 if phase.name == "decode" else IDS.size
        assert products == pytest.approx(rows * (traffic.body_flops + traffic.head_flops))
        assert phase.roofline.seconds * 1e3 == pytest.approx(phase.plain_ms)
        assert phase.roofline.bandwidth == KINDS["read"]
        assert phase.roofline.peak == KINDS["float_blas"]
    decode = found.phases[1]
    assert (decode.passes, decode.past) == (2 * 3, IDS.size)
    assert decode.roofline.size == traffic.bytes_of(1, past=IDS.size + 1)


def test_the_page_draws_each_phase_and_escapes_names(decoder, tmp_path):
    _, found = decoder
    write_profile_page([found], tmp_path / "profile.html")
    page = (tmp_path / "profile.html").read_text()
    write_profile_page([found], tmp_path / "again.html")
    assert page == (tmp_path / "again.html").read_text()
    assert "<b>tiny" not in page
    assert page.count('<circle class="dot"') == 2
    assert "&lt;b&gt;tiny prefill" in page
    assert "GroupQueryAttention" in page
    assert roofline_chart({}, PEAKS) == ""


def test_the_table_fits_80_columns(decoder, monkeypatch):
    from edgestill import show_profile, terminal

    stream = io.StringIO()
    console = Console(file=stream, width=80)
    monkeypatch.setattr(show_profile, "stderr", console)
    monkeypatch.setattr(show_profile, "print_table", lambda *a, **k: terminal.print_table(*a, **k, console=console))
    show_profile.show_profiles([decoder[1]])
    text = stream.getvalue()
    assert "<b>tiny, decode of 1 token after 12" in text
    tables = [line for line in text.splitlines() if not line.startswith(("this machine", "<b>tiny: onnx"))]
    assert max(map(len, tables)) <= 80
    assert "reached" in text
    assert "this machine, 1 threads, 2026-01-01: read 10 GB/s" in text


def test_what_goes_wrong_is_a_reason(tmp_path, decoder):
    def broken(folder, options, *, cold=False):
        raise WorkerError("the board is gone", hint="")

    found = profile_artifact(decoder[0], subject="x", open_worker=broken, ids=IDS, target="ssh://board")
    assert (found.reason, found.phases) == ("the board is gone", ())


@pytest.mark.whole
def test_of_a_model_folder_there_is_no_roofline(tiny_bert):
    found = profile_artifact(tiny_bert, subject="teacher", open_worker=LocalWorker, ids=IDS, threads=1, repeats=1,
                             peaks=PEAKS)  # fmt: skip
    [phase] = found.phases
    assert {"aten::addmm"} <= {row.op for row in phase.operators}
    assert phase.roofline is None
    assert "model folder" in phase.roofline_reason


@pytest.mark.slow
def test_a_core_ml_program_is_counted_and_never_timed(tiny_bert, tmp_path):
    export(tiny_bert, tmp_path / "out", ExportConfig(to="coreml:fp16"))
    found = profile_artifact(tmp_path / "out", subject="x", open_worker=LocalWorker, ids=IDS, threads=1, peaks=PEAKS)
    [phase] = found.phases
    assert found.source == "predicted"
    assert (phase.plain_ms, phase.profiled_ms, phase.roofline) == (None, None, None)
    assert all(row.ms is None for row in phase.operators)
    linear = next(row for row in phase.operators if row.op == "linear")
    traffic = count_traffic(open_artifact(tmp_path / "out"))
    biases = 4 * (5 * 32 + 64) * IDS.size
    assert linear.flops == pytest.approx(IDS.size * traffic.body_flops + biases, rel=0.02)
