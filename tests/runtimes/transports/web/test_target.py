"""The target without a browser: what is refused before one starts."""

from __future__ import annotations

import dataclasses

import pytest

from edgestill.artifact import Manifest, TensorSpec, seal_artifact
from edgestill.errors import BadInput, MissingDependency, Unsupported, UsageError, WorkerError
from edgestill.runtimes.session import SessionOptions
from edgestill.runtimes.targets import open_target
from edgestill.runtimes.transports.web import target as web
from edgestill.runtimes.transports.web.browser import BROWSER_VARIABLE, Browser, find_browser
from edgestill.runtimes.transports.web.target import WebTarget

OPTIONS = SessionOptions(threads=1)


@pytest.fixture
def artifact(tmp_path):
    def make(form: str = "onnx"):
        folder = tmp_path / 'it\'s "one"'
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"weights")
        spec = TensorSpec("input_ids", "int64", ("batch", "length"))
        manifest = Manifest(
            format="onnx", quantisation="fp32", task="feature-extraction", entry="model.onnx", inputs=(spec,),
            outputs=(spec,), shapes="dynamic", max_length=8, vocab_size=9, contents="", dtype_histogram={},
            minimum_runtime={}, lineage={},
        )  # fmt: skip
        seal_artifact(folder, dataclasses.replace(manifest, format=form))
        return folder

    return make


def test_the_name_says_where():
    with open_target("web") as target:
        assert (target.name, target.source, target.address) == ("web", "measured", None)
    assert WebTarget("0.0.0.0:8000").name == "web:0.0.0.0:8000"


@pytest.mark.parametrize("address", ["8000", "phone", "0.0.0.0:", "0.0.0.0:99999", "host:80/x", "a b:80", ":80"])
def test_another_address_is_refused(address):
    with pytest.raises(UsageError, match="target web:") as told:
        WebTarget(address)
    assert "web:0.0.0.0:8000" in told.value.hint


def test_only_onnx_runs_in_a_browser(artifact, tmp_path):
    with pytest.raises(Unsupported, match="this artifact is gguf"):
        WebTarget().open_worker(artifact("gguf"), OPTIONS)
    with pytest.raises(Unsupported, match="ONNX artifacts only"):
        WebTarget().open_worker(tmp_path, OPTIONS)


def test_a_changed_artifact_is_refused(artifact):
    folder = artifact()
    (folder / "model.onnx").write_bytes(b"weightz")
    with pytest.raises(BadInput, match="does not match its sha256"):
        WebTarget().open_worker(folder, OPTIONS)


def test_no_browser_is_said_with_the_package_that_has_it(artifact, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(BROWSER_VARIABLE, raising=False)
    monkeypatch.setattr("edgestill.runtimes.transports.web.browser._MAC", ())
    with pytest.raises(MissingDependency, match="no Chromium") as told:
        WebTarget().open_worker(artifact(), OPTIONS)
    assert "apt install chromium" in told.value.hint
    monkeypatch.setenv(BROWSER_VARIABLE, "no-such-browser")
    with pytest.raises(MissingDependency, match="EDGESTILL_BROWSER is no-such-browser"):
        find_browser()


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo '[1:2:ERROR] Missing X server' >&2; exit 7", "ended with status 7 .*Missing X server"),
        ("kill -9 $$", "died of signal 9"),
    ],
)
def test_a_browser_that_can_not_run_is_one_clear_line(artifact, tmp_path, monkeypatch, fake_ort, script, told):
    browser = tmp_path / 'browser\'s "home"'
    browser.write_text(f"#!/bin/sh\n{script}\n")
    browser.chmod(0o755)
    monkeypatch.setenv(BROWSER_VARIABLE, str(browser))
    monkeypatch.setattr(web, "ort_web_files", lambda: fake_ort)
    with pytest.raises(WorkerError, match=told) as found:
        WebTarget().open_worker(artifact(), OPTIONS)
    assert "\n" not in found.value.message


def test_a_browser_that_shows_nothing_is_given_up_and_ended(artifact, tmp_path, monkeypatch, fake_ort):
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\necho $$ > '{tmp_path}/pid'\nexec sleep 600\n")
    browser.chmod(0o755)
    monkeypatch.setenv(BROWSER_VARIABLE, str(browser))
    monkeypatch.setattr(web, "ort_web_files", lambda: fake_ort)
    monkeypatch.setattr(web, "_START_SECONDS", 1.0)
    with pytest.raises(WorkerError, match="did not show the page within 1 s"):
        WebTarget().open_worker(artifact(), OPTIONS)
    from edgestill.files import is_alive

    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_nobody_opens_the_page(artifact, monkeypatch, fake_ort):
    monkeypatch.setattr(web, "ort_web_files", lambda: fake_ort)
    monkeypatch.setattr(web, "_VISIT_SECONDS", 0.3)
    told = []
    with WebTarget("127.0.0.1:0", ask=told.append) as target:
        with pytest.raises(WorkerError, match=r"no browser opened http://127\.0\.0\.1:\d+/\S+/ within 0.3 s"):
            target.open_worker(artifact(), OPTIONS)
        assert told == [f"open {target.address} in the browser that is to be measured"]


def test_a_path_that_is_no_program_is_said(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(WorkerError, match=r"can't start .*text: Permission denied"):
        Browser(tmp_path / "text", "about:blank")
