"""``edgestill devices list`` shows every kind of target."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import Histogram, Manifest, seal_artifact
from edgestill.bench.measure import Subject
from edgestill.bench.predicted import predicted_rows
from edgestill.bench.profiles import profile_names
from edgestill.benchmark import BenchRequest, BenchResult, bench_subjects
from edgestill.devices import CalibrateRequest, calibrate_host, list_targets, show_profile
from edgestill.errors import UsageError
from edgestill.runtimes.targets import SCHEMES
from edgestill.show import show
from edgestill.stages import Observer

TOKENIZER = """{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
"post_processor": null, "decoder": null, "truncation": null, "padding": null,
"model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "the": 1}, "unk_token": "[UNK]"}}"""


def decoder(folder: Path) -> Path:
    import gguf

    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((256, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "tokenizer.json").write_text(TOKENIZER)
    manifest = Manifest(
        format="gguf", quantisation="f16", task="text-generation", entry="model.gguf", inputs=(), outputs=(),
        shapes="dynamic", max_length=4096, vocab_size=256, contents="f16", minimum_runtime={}, lineage={},
        dtype_histogram={"f16": Histogram(1, 16384, 32768)}, kv_cache_bytes_per_token=128,
    )  # fmt: skip
    seal_artifact(folder, manifest)
    return folder


def test_all_kinds_are_listed() -> None:
    kinds = list_targets().kinds
    assert [kind.address for kind in kinds] == [kind.form for kind in SCHEMES.values()]
    assert all(kind.description for kind in kinds)


def test_documented_devices_are_listed_with_what_is_known_of_them() -> None:
    lines = {line.name: line for line in list_targets().profiles}
    assert list(lines) == profile_names()
    assert (lines["raspberry-pi-5-4gb"].memory, lines["raspberry-pi-5-4gb"].points) == ("4 GB", 3)
    assert lines["raspberry-pi-4-4gb"].bandwidth is None


def test_a_sheet_names_the_source_of_every_number() -> None:
    sheet = show_profile("profile:radxa-orion-o6")
    assert sheet.profile.bandwidth is not None
    assert "docs.radxa.com" in sheet.profile.bandwidth.source
    assert len(sheet.points) == 4
    assert all(point.source for point in sheet.points)
    assert set(sheet.errors) == {"decode", "prefill", "memory"}


def test_tables_fit_and_keep_predictions_apart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    subject = Subject("a", decoder(tmp_path / "a"))
    rows = predicted_rows([subject], "raspberry-pi-5-4gb", length=64, new_tokens=8)
    measured = dataclasses.replace(rows[0], source="measured", target="host")
    for result in (list_targets(), show_profile("oneplus-12"), show_profile("raspberry-pi-4-4gb")):
        show(result)
    show(BenchResult((*rows, measured), ()))
    text = capsys.readouterr().err
    assert "predicted, not measured: Raspberry Pi 5, 4 GB" in text
    assert "fits:" in text
    assert "mean errors: decode" in text
    assert text.index("predicted, not measured") < text.index("median, against a")


def test_calibrating_needs_two_runtimes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="compares runtimes"):
        calibrate_host(CalibrateRequest((decoder(tmp_path / "a"),)), Observer())


def test_a_profile_is_a_target_and_predictions_are_never_compared_as_measurements(tmp_path: Path) -> None:
    for name in ("a", "b"):
        decoder(tmp_path / name)
    subjects = (tmp_path / "a", tmp_path / "b")
    request = BenchRequest(subjects, target=("profile:oneplus-12", "profile:nope"), length=64, new_tokens=8)
    result = bench_subjects(request, Observer())
    predicted = [row for row in result.measurements if row.source == "predicted"]
    assert {row.target for row in predicted} == {"profile:oneplus-12"}
    assert {row.subject for row in predicted} == {"a", "b"}
    assert list(result.problems) == ["profile:nope"]
    assert {comparison.metric for comparison in result.comparisons} <= {
        "download_bytes", "model_bytes", "size_bytes", "bits_per_weight",
    }  # fmt: skip
