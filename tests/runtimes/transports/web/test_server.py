"""The HTTP server behind the page, spoken to as a browser would, and as others would."""

from __future__ import annotations

import http.client
import json
import threading
import time
from pathlib import Path

import pytest

from edgestill.artifact import FileEntry, Manifest, TensorSpec, open_artifact, seal_artifact
from edgestill.errors import UsageError
from edgestill.runtimes.transports.web.server import Launch, PageServer


@pytest.fixture
def server(fake_ort):
    server = PageServer(fake_ort)
    yield server
    server.stop()


@pytest.fixture
def launch(tmp_path):
    folder = tmp_path / 'it\'s a "model" 100%'
    folder.mkdir()
    (folder / "model 'x' #1.onnx").write_bytes(b"weights")
    spec = TensorSpec("input_ids", "int64", ("batch", "length"))
    manifest = Manifest(
        format="onnx", quantisation="fp32", task="feature-extraction", entry="model 'x' #1.onnx", inputs=(spec,),
        outputs=(spec,), shapes="dynamic", max_length=8, vocab_size=9, contents="", dtype_histogram={},
        minimum_runtime={}, lineage={},
    )  # fmt: skip
    seal_artifact(folder, manifest)
    exchange = tmp_path / "exchange"
    exchange.mkdir()
    return Launch(open_artifact(folder), exchange)


def ask(server: PageServer, method: str, path: str, body: bytes | None = None, token: str | None = None):
    port = int(server.address.split(":")[2].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, f"/{server.token if token is None else token}/{path}", body=body)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply, content


def test_the_page_is_isolated_and_only_for_who_has_the_token(server):
    reply, content = ask(server, "GET", "")
    assert reply.status == 200
    assert b"<title>edgestill</title>" in content
    assert reply.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert reply.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    for name, kind in (("worker.mjs", "text/javascript"), ("ort/ort.mjs", "text/javascript")):
        assert ask(server, "GET", name)[0].headers["Content-Type"].startswith(kind)
    for token in ("", "x", server.token[:-1], server.token + "x", "%C3%A4"):
        reply, content = ask(server, "GET", "", token=token)
        assert reply.status == 403
        assert "take the one that edgestill prints" in json.loads(content)["message"]
    assert len(server.token) >= 20


@pytest.mark.parametrize(
    "path",
    ["nothing", "../server.py", "..%2fserver.py", "page.html/../../server.py", "ort/../server.mjs", "w/1/request",
     "w/9/artifact/0", "//etc/passwd"],
)  # fmt: skip
def test_nothing_else_is_handed_out(server, path):
    assert ask(server, "GET", path)[0].status == 404
    assert ask(server, "POST", path, b"{}")[0].status == 404


def test_an_address_in_use_is_refused(server, fake_ort):
    port = int(server.address.split(":")[2].split("/")[0])
    with pytest.raises(UsageError, match=f"can't listen on 127.0.0.1:{port}"):
        PageServer(fake_ort, port=port)
    with pytest.raises(UsageError, match=r"can't listen on 192\.0\.2\.1:80"):
        PageServer(fake_ort, host="192.0.2.1", port=80)


def test_the_address_for_a_phone_is_not_the_one_listened_on(fake_ort):
    server = PageServer(fake_ort, host="0.0.0.0")
    try:
        assert "0.0.0.0" not in server.address
        assert server.address.endswith(f"/{server.token}/")
    finally:
        server.stop()


def test_one_page_at_a_time(server, launch):
    first = threading.Thread(target=ask, args=(server, "POST", "next", b'{"page": "a", "cores": 2}'))
    first.start()
    assert server.connected.wait(5)
    assert server.page == {"page": "a", "cores": 2}
    assert ask(server, "POST", "next", b'{"page": "b"}')[0].status == 409
    assert server.gone_seconds == 0
    assert server.add(launch) == "1"  # ends the question
    first.join(10)
    assert ask(server, "POST", "bye", b"b")[0].status == 204
    assert server.gone_seconds < 60  # somebody else's good-bye
    ask(server, "POST", "bye", b"a")
    assert server.gone_seconds == float("inf")
    server.end("1")
    assert json.loads(ask(server, "POST", "next", b'{"page": "b"}')[1]) == {"end": "1"}
    assert server.gone_seconds < 60


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b"x" * 5000])
def test_garbage_claims_nothing(server, body):
    assert ask(server, "POST", "next", body)[0].status in (400, 409, 413)
    assert not server.connected.is_set()


def test_a_page_that_is_loaded_anew_has_lost_its_workers(server, launch):
    number = server.add(launch)
    assert json.loads(ask(server, "POST", "next", b'{"page": "a"}')[1]) == {"start": number}
    assert not launch.ended
    server.commands.put({})
    ask(server, "POST", "next", b'{"page": "b"}')
    assert launch.ended
    assert ask(server, "POST", f"w/{number}/request", b"")[0].status == 410


def test_a_page_that_vanishes_in_the_middle_of_a_question_is_noticed(server):
    port = int(server.address.split(":")[2].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", f"/{server.token}/next", body=b'{"page": "a"}')
    assert server.connected.wait(5)
    connection.close()
    deadline = time.monotonic() + 5
    while server.gone_seconds == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.gone_seconds > 0


def test_requests_replies_and_tensors_pass(server, launch):
    number = server.add(launch)
    launch.requests.put(b'{"id": 1}\n')
    assert ask(server, "POST", f"w/{number}/request", b"")[1] == b'{"id": 1}\n'
    assert ask(server, "POST", f"w/{number}/reply", b'{"id":1}')[0].status == 204
    assert launch.replies.get(timeout=5) == b'{"id":1}'
    (launch.exchange / "c1.bin").write_bytes(b"12345678")
    assert ask(server, "GET", f"w/{number}/tensor/c1.bin")[1] == b"12345678"
    deadline = time.monotonic() + 5  # it goes when all of it was sent, so the answer may be here before
    while (launch.exchange / "c1.bin").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not (launch.exchange / "c1.bin").exists()
    assert ask(server, "GET", f"w/{number}/tensor/c1.bin")[0].status == 404
    assert ask(server, "PUT", f"w/{number}/tensor/w1.bin", b"abc")[0].status == 204
    assert (launch.exchange / "w1.bin").read_bytes() == b"abc"
    for name in ("c1.bin", "w1.txt", "w.bin", "..%2fw1.bin", "w1.bin%00"):  # not the page's to write
        assert ask(server, "PUT", f"w/{number}/tensor/{name}", b"abc")[0].status == 404
    assert ask(server, "PUT", f"w/{number}/tensor/w1.bin", b"abc")[0].status == 507  # nor twice
    assert sorted(path.name for path in launch.exchange.iterdir()) == ["w1.bin"]


def test_the_artifacts_files_go_by_number(server, launch):
    number = server.add(launch)
    manifest = json.loads(ask(server, "GET", f"w/{number}/artifact/manifest")[1])
    assert [file["path"] for file in manifest["files"]] == ["model 'x' #1.onnx"]
    assert ask(server, "GET", f"w/{number}/artifact/0")[1] == b"weights"
    for index in ("1", "-1", "x", "%C2%B2", ""):
        assert ask(server, "GET", f"w/{number}/artifact/{index}")[0].status == 404
    Path(launch.artifact.path / "model 'x' #1.onnx").unlink()
    reply, content = ask(server, "GET", f"w/{number}/artifact/0")
    assert reply.status == 404
    assert json.loads(content)["message"] == "model 'x' #1.onnx can't be read: No such file or directory"
    assert isinstance(launch.artifact.manifest.files[0], FileEntry)


def test_a_full_disk_is_told(server, launch, monkeypatch):
    """/dev/full takes nothing."""
    number = server.add(launch)
    opened = Path.open

    def full(path, mode="r", *rest, **more):
        return opened(Path("/dev/full"), "wb", 0) if path.name == "w7.bin" else opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    reply, content = ask(server, "PUT", f"w/{number}/tensor/w7.bin", b"abc")
    assert reply.status == 507
    assert json.loads(content)["kind"] == "ResourceExhausted"
    assert "No space left" in json.loads(content)["message"]


def test_what_the_worker_could_not_report_arrives(server, launch):
    number = server.add(launch)
    ask(server, "POST", f"w/{number}/failed", b'{"message": "no WebAssembly"}')
    assert launch.failure == "no WebAssembly"
    seen = []
    launch.phase = seen.append
    ask(server, "POST", f"w/{number}/phase", b"baseline")
    assert seen == ["baseline"]


def test_nothing_is_answered_after_the_end(server):
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        ask(server, "GET", "")
    server.stop()  # twice is fine
