"""What every runtime must keep, put to each of them in a worker: the frozen contract of Session, worker protocol and
artifact. A runtime joins by a line in ``RUNTIMES``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.artifact import ARTIFACT_FILE, TOKEN_TASKS, open_artifact
from edgestill.errors import BadInput, Unsupported, WorkerError
from edgestill.recipe import ExportConfig
from edgestill.runtimes.scoring import score
from edgestill.runtimes.sensors import FIELDS
from edgestill.runtimes.session import SessionInfo, SessionOptions
from edgestill.runtimes.torch_session import TorchSession
from edgestill.runtimes.transports.client import WorkerClient
from edgestill.runtimes.transports.local import LocalWorker

OPTIONS = SessionOptions(threads=1)
TASKS = {"feature-extraction": "tiny_bert", "text-classification": "tiny_classifier",
         "token-classification": "tiny_tagger", "text-generation": "tiny_llama"}  # fmt: skip
PROMPT = [5, 60, 90, 130, 7, 200, 31]


@dataclass(frozen=True)
class Runtime:
    """How a runtime is reached (``to=None``: the model folder itself) and how far its numbers may lie from torch's:
    absolute, on logits or embeddings of the tiny models (whose logits reach about 10). ``native``: the native runner
    instead of Python's worker, on this machine (``"host"``, or with ``"onnxruntime"``) or on an emulated core."""

    name: str
    to: str | None
    tasks: tuple[str, ...]
    tolerance: float
    backend: str
    latency: bool = True
    memory: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    native: str = ""


RUNTIMES = (
    Runtime("torch", None, tuple(TASKS), 1e-5, "cpu"),
    Runtime("onnxruntime", "onnx:fp32", tuple(TASKS), 1e-4, "CPUExecutionProvider"),
    Runtime("llama.cpp", "gguf:f32", ("feature-extraction", "text-generation"), 1e-4, "cpu", extra={"kv": "f32"}),
    Runtime("coreml", "coreml:fp16", ("feature-extraction", "text-classification", "text-generation"), 5e-2,
            "mil-interpreter", latency=False),
    Runtime("native", "gguf:f32", ("feature-extraction", "text-generation"), 1e-4, "cpu", extra={"kv": "f32"},
            native="host"),
    Runtime("native-a76", "gguf:f32", ("feature-extraction", "text-generation"), 1e-4, "cpu", extra={"kv": "f32"},
            native="cortex-a76"),
    Runtime("native-onnxruntime", "onnx:fp32", tuple(TASKS), 1e-4, "CPUExecutionProvider", native="onnxruntime"),
    Runtime("onnxruntime-web", "onnx:fp32", tuple(TASKS), 1e-4, "wasm", memory=False),
)  # fmt: skip
# The encoder's code with another head: ten seconds more for little.
SLOW = {("coreml", "text-classification"), ("torch", "text-classification")}
SLOW |= {("onnxruntime-web", task) for task in TASKS}  # a browser's start
CASES = [
    pytest.param(
        (runtime, task),
        id=f"{runtime.name}-{task}",
        marks=[pytest.mark.slow] if (runtime.name, task) in SLOW or runtime.native else [],
    )
    for runtime in RUNTIMES
    for task in runtime.tasks
]


@dataclass
class Opened:
    """A worker of the runtime under test, and torch on the same model as the reference."""

    runtime: Runtime
    task: str
    folder: Path
    worker: WorkerClient
    torch: TorchSession
    command: list[str] | None

    @property
    def info(self) -> SessionInfo:
        return self.worker.info()


@pytest.fixture(scope="module", params=CASES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    runtime, task = request.param
    model = request.getfixturevalue(TASKS[task])
    folder = model
    command = None
    if runtime.native == "onnxruntime":
        command = request.getfixturevalue("onnxruntime_command")
    elif runtime.native:
        core = runtime.native if runtime.native != "host" else ""
        command = request.getfixturevalue("native_command")(core, "dotprod")
    if runtime.to is not None:
        from edgestill.export import export

        folder = tmp_path_factory.mktemp("artifacts") / runtime.to.replace(":", "-")
        export(model, folder, ExportConfig(to=runtime.to))
    with start(request, runtime, folder, command) as worker:
        yield Opened(runtime, task, folder, worker, TorchSession(model, OPTIONS), command)


def start(
    request: pytest.FixtureRequest, runtime: Runtime, folder: Path, command: list[str] | None
) -> AbstractContextManager[WorkerClient]:
    """A worker that opens ``folder``, where the runtime runs."""
    options = SessionOptions(threads=1, extra=runtime.extra)
    if runtime.backend == "wasm":
        return request.getfixturevalue("browser_page").open_worker(folder, options)
    return LocalWorker(folder, options, timeout=120, command=command)


@pytest.fixture
def generating(opened: Opened) -> Opened:
    """The cases that generate text (conftest.py deselects the others)."""
    return opened


@pytest.fixture
def exported(opened: Opened) -> Opened:
    """The cases that open an artifact, not a model folder (conftest.py deselects the others)."""
    return opened


def rows(opened: Opened) -> list[list[int]]:
    """Four inputs of different lengths."""
    if opened.task == "text-generation":
        return [PROMPT, [11, 12, 13], [250], [40, 41, 42, 43, 44]]
    return [[2, 50, 60, 70, 81, 3], [2, 80, 3], [2, 90, 100, 3], [2, 55, 3]]


def batch(inputs: list[list[int]], pad: int = 0, length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    length = max(length, *map(len, inputs))
    ids = np.array([row + [pad] * (length - len(row)) for row in inputs], np.int64)
    return ids, np.array([[1] * len(row) + [0] * (length - len(row)) for row in inputs], np.int64)


def real(opened: Opened, output: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What a session promises: rows of real tokens where the task answers at each, everything else whole."""
    return output[mask == 1] if opened.task in TOKEN_TASKS else output


def close(opened: Opened, got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=opened.runtime.tolerance)


def test_info_says_what_runs(opened):
    info, wanted = opened.info, opened.torch.info()
    assert info.runtime
    assert info.version
    assert info.backend == opened.runtime.backend
    assert (info.task, info.vocab_size) == (opened.task, wanted.vocab_size)
    assert 0 < info.max_length <= wanted.max_length
    assert set(info.capabilities) <= {"forward", "decode", "score", "latency", "tokenize"}
    assert {"forward", "score"} <= set(info.capabilities)
    assert ("decode" in info.capabilities) == (opened.task == "text-generation")
    assert ("latency" in info.capabilities) == opened.runtime.latency
    assert all(isinstance(count, int) for count in info.placement.values())


def test_forward_has_the_tasks_shape_and_torchs_numbers(opened):
    ids, mask = batch(rows(opened))
    output, wanted = opened.worker.forward(ids, mask), opened.torch.forward(ids, mask)
    assert output.dtype == np.float32
    assert output.shape == wanted.shape
    close(opened, real(opened, output, mask), real(opened, wanted, mask))


def test_a_batch_is_its_rows(opened):
    ids, mask = batch(rows(opened))
    together = opened.worker.forward(ids, mask)
    for index, row in enumerate(rows(opened)):
        alone = opened.worker.forward(*batch([row]))[0]
        close(opened, together[index, : len(row)] if opened.task in TOKEN_TASKS else together[index], alone)


def test_padding_changes_nothing(opened):
    """Neither what stands there nor how much of it there is."""
    ids, mask = batch(rows(opened))
    base = real(opened, opened.worker.forward(ids, mask), mask)
    other, _ = batch(rows(opened), pad=17)
    np.testing.assert_array_equal(real(opened, opened.worker.forward(other, mask), mask), base)
    longer = batch(rows(opened), length=12)
    close(opened, real(opened, opened.worker.forward(*longer), longer[1]), base)


def test_calls_repeat_and_leave_nothing_behind(opened):
    """No state from one call (a KV cache, say) is seen by the next."""
    ids, mask = batch(rows(opened))
    first = real(opened, opened.worker.forward(ids, mask), mask)
    if opened.task == "text-generation":
        opened.worker.decode(PROMPT, 4)
    opened.worker.forward(*batch([rows(opened)[1]]))
    np.testing.assert_array_equal(real(opened, opened.worker.forward(ids, mask), mask), first)


def test_the_longest_input_is_taken_and_a_longer_one_refused(opened):
    limit = opened.info.max_length
    fill = [20 + index % 30 for index in range(limit + 1)]
    output = opened.worker.forward(*batch([fill[:limit]]))
    assert np.isfinite(output).all()
    with pytest.raises(BadInput, match=f"{limit + 1} tokens, the model takes {limit}"):
        opened.worker.forward(*batch([fill]))


def test_later_tokens_do_not_change_earlier_logits(generating):
    short, long = (generating.worker.forward(*batch([PROMPT[:size]]))[0] for size in (4, 7))
    close(generating, long[:4], short)


def test_decoding_is_the_argmax_of_forward(generating):
    tokens = generating.worker.decode(PROMPT, 10, logits=True)
    assert len(tokens) == 10
    assert [token.id for token in tokens] == [int(token.logits.argmax()) for token in tokens]
    assert [token.id for token in generating.worker.decode(PROMPT, 10)] == [token.id for token in tokens]
    ids = PROMPT + [token.id for token in tokens[:-1]]
    whole = generating.worker.forward(*batch([ids]))[0, len(PROMPT) - 1 :]
    close(generating, np.stack([token.logits for token in tokens]), whole)  # prefill and decode agree
    assert all(token.seconds > 0 for token in tokens)


def test_decoding_follows_torch(generating):
    """Token for token, as far as torch's own margin is larger than the runtime's tolerance."""
    wanted = list(generating.torch.decode(PROMPT, 16, logits=True))
    got = generating.worker.decode(PROMPT, 16)
    agreed = 0
    for mine, theirs in zip(got, wanted, strict=True):
        best, second = np.sort(theirs.logits)[::-1][:2]
        if best - second < 2 * generating.runtime.tolerance:
            break
        assert mine.id == theirs.id
        agreed += 1
    assert agreed >= 4


def test_a_prompt_of_one_token_and_one_new_token(generating):
    (token,) = generating.worker.decode([5], 1, logits=True)
    close(generating, token.logits, generating.worker.forward(*batch([[5]]))[0, 0])


def test_what_can_not_be_decoded_is_refused(opened):
    if opened.task != "text-generation":
        with pytest.raises(Unsupported, match="does not decode"):
            opened.worker.decode(PROMPT, 2)
        return
    with pytest.raises(BadInput, match="the model takes"):
        opened.worker.decode(PROMPT, opened.info.max_length)
    assert len(opened.worker.decode(PROMPT, opened.info.max_length - len(PROMPT))) == opened.info.max_length - len(
        PROMPT
    )


def test_score_is_the_reduction_of_forward(opened, tmp_path):
    ids, mask = batch(rows(opened))
    said = opened.torch.forward(ids, mask)
    (tmp_path / "reference.json").write_text(json.dumps({"task": opened.task}))
    name = "embeddings" if opened.task == "feature-extraction" else "logits"
    for file, array in (("ids", ids), ("mask", mask), (name, said)):
        np.save(tmp_path / f"{file}.npy", array)
    got = opened.worker.score(tmp_path, batch_size=2)

    class Replay:
        def info(self):
            return opened.info

        def forward(self, ids, mask):
            return opened.worker.forward(ids, mask)

    wanted = score(Replay(), tmp_path, batch_size=2)
    assert set(got) == set(wanted)
    for key, values in wanted.items():
        if opened.command is not None and values.dtype == np.float64:  # another exp, another order of the sum
            np.testing.assert_allclose(got[key], values, rtol=1e-9, atol=1e-11, err_msg=key)
        else:
            np.testing.assert_array_equal(got[key], values)
    if opened.task == "feature-extraction":
        assert got["cosine"].min() > 1 - 1e-3
    else:
        assert np.abs(got["kl"]).max() < max(1e-6, opened.runtime.tolerance)


def test_timings_and_memory_are_taken_on_the_worker(opened):
    ids, mask = batch(rows(opened)[:1])
    samples = opened.worker.time_forward(ids, mask, repeats=2, warmup=0, max_seconds=5)
    assert 1 <= len(samples) <= 2
    assert min(samples) > 0
    if opened.task == "text-generation":
        for sample in opened.worker.time_decode(PROMPT, 3, repeats=1, warmup=0, max_seconds=5):
            assert len(sample["tokens_s"]) == 2
            assert sample["first_s"] > 0
    told = opened.worker.memory()
    assert opened.worker.load_seconds > 0
    if not opened.runtime.memory:
        assert told["peak_rss"] is told["peak_anonymous"] is told["baseline_anonymous"] is None
        assert told["reason"]
        return
    assert told["peak_rss"] > told["peak_anonymous"] >= told["load_anonymous"] > 0
    assert told["baseline_anonymous"] > 0


def test_the_machine_and_its_sensors_are_told_where_the_worker_lists_them(opened):
    """Both are optional; what is listed keeps the page: every field there, null with a reason."""
    listed = set(opened.worker.capabilities["operations"])
    facts, sensors = opened.worker.facts(), opened.worker.sensors()
    assert (facts is None, sensors is None) == ("facts" not in listed, "sensors" not in listed)
    if facts is not None:
        assert {"system", "machine", "cpu", "cpu_flags", "cores_usable", "memory_bytes", "governor"} <= set(facts)
        assert facts["machine"] == opened.worker.capabilities["machine"]
        assert facts["cores_usable"] >= 1
        assert facts["governor"] or facts["governor_reason"]
    if sensors is not None:
        assert {*FIELDS, "time_s", "energy_range_j", "reasons"} == set(sensors)
        assert {name for name in FIELDS if sensors[name] is None} == set(sensors["reasons"])
        again = opened.worker.sensors()
        assert again["time_s"] > sensors["time_s"]
        assert all(again["energy_j"][name] is not None for name in sensors["energy_j"] or ())


def test_a_profile_says_where_the_time_goes_or_why_not(opened):
    """Optional; what is listed keeps the page. No row claims what its source can't know."""
    if "profile" not in opened.worker.capabilities["operations"]:
        return
    ids, mask = batch(rows(opened)[:1])
    generates = opened.task == "text-generation"
    found = (
        opened.worker.profile(prompt_ids=PROMPT, new_tokens=3, repeats=2)
        if generates
        else opened.worker.profile(ids, mask, repeats=2)
    )
    assert [phase.name for phase in found.phases] == (["prefill", "decode"] if generates else ["forward"])
    assert [phase.tokens for phase in found.phases] == ([len(PROMPT), 1] if generates else [ids.shape[1]])
    for phase in found.phases:
        assert bool(phase.rows) == (found.reason is None)
        assert all(row.op and row.calls >= 1 for row in phase.rows)
        assert len({(row.name, row.op, row.backend) for row in phase.rows}) == len(phase.rows)
        if opened.runtime.latency:
            assert found.source == "measured"
            assert len(phase.plain_seconds) == len(phase.profiled_seconds) == 2 * phase.passes_a_run
            assert all(row.seconds >= 0 for row in phase.rows)
            assert 0 < sum(row.seconds for row in phase.rows) <= sum(phase.profiled_seconds)
        else:
            assert found.source == "predicted"
            assert phase.plain_seconds == phase.profiled_seconds == []
            assert all(row.seconds is None and row.flops >= 0 and row.bytes >= 0 for row in phase.rows)
    # what was profiled still answers as before
    assert np.isfinite(opened.worker.forward(ids, mask)).all()


def test_an_artifact_says_what_it_is_and_is_checked(exported, tmp_path, request):
    import shutil

    artifact = open_artifact(exported.folder)
    manifest = artifact.manifest
    assert manifest.format == exported.runtime.to.partition(":")[0]
    assert manifest.quantisation == exported.runtime.to.partition(":")[2]
    assert (manifest.task, manifest.vocab_size) == (exported.task, exported.info.vocab_size)
    assert manifest.max_length == exported.info.max_length
    assert artifact.entry.exists()
    assert manifest.license == "Apache-2.0"
    assert sum(row.parameters for row in manifest.dtype_histogram.values()) > 10_000
    assert dataclasses.asdict(manifest)["lineage"]["model_id"]
    names = {file.path for file in manifest.files}
    assert {"tokenizer.json", "tensors.json"} <= names
    assert not {ARTIFACT_FILE, "verdicts.jsonl"} & names
    broken = tmp_path / "broken"
    shutil.copytree(exported.folder, broken)
    largest = max(manifest.files, key=lambda file: file.size_bytes)
    data = bytearray((broken / largest.path).read_bytes())
    data[len(data) // 2] ^= 1
    (broken / largest.path).write_bytes(data)
    with pytest.raises(BadInput, match="does not match its sha256"):
        start(request, exported.runtime, broken, exported.command)


def test_the_weights_come_back_out_of_the_payload(exported):
    """Through payload.py and grids.py alone, in the student's names and shapes."""
    from edgestill.runtimes.payload import open_payload

    artifact = open_artifact(exported.folder)
    reader = open_payload(artifact)
    state = {name: value.numpy() for name, value in exported.torch._model.state_dict().items()}
    stored = {tensor.name: tensor for tensor in artifact.tensors()}
    matrices = 0
    for name, tensor in stored.items():
        wanted = state.get(name, state.get(f"encoder.{name}"))
        assert wanted is not None, name
        got = reader.decode(tensor)
        assert got.dtype == np.float32
        assert got.shape == wanted.shape, name
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4, err_msg=name)  # float16 at worst
        matrices += wanted.ndim == 2
    assert matrices >= 12
    counted = reader.histogram()
    assert dict(counted) == dict(artifact.manifest.dtype_histogram)


def test_a_closed_worker_is_an_error(opened):
    """Last of the module's tests for each case: it ends the worker."""
    opened.worker.close()
    with pytest.raises(WorkerError, match="closed"):
        opened.worker.forward(*batch([rows(opened)[0]]))
