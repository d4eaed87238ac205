"""One whole artifact a format is verified for real; then it is sabotaged, and the verdict must name what was done."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from edgestill.artifact import ARTIFACT_FILE, TENSORS_FILE, Manifest, artifact_id, open_artifact, seal_artifact
from edgestill.bench import verify as module
from edgestill.bench.reference import make_reference
from edgestill.bench.verify import VerifyOptions, examine
from edgestill.errors import BadInput, MissingDependency, WorkerError
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.runtimes.session import SessionInfo

OPTIONS = VerifyOptions(threads=1, device="a test", decode_tokens=6)


@pytest.fixture(scope="module")
def documents(sentences):
    return [" ".join(sentences[i : i + 8]) for i in range(0, 96, 8)]


@pytest.fixture(scope="module")
def bert_reference(tiny_bert, sentences, tmp_path_factory):
    return make_reference(tiny_bert, tmp_path_factory.mktemp("bert") / "r", texts=sentences[:24], threads=1)


@pytest.fixture(scope="module")
def tagger_reference(tiny_tagger, sentences, tmp_path_factory):
    return make_reference(tiny_tagger, tmp_path_factory.mktemp("tagger") / "r", texts=sentences[:24], threads=1)


@pytest.fixture(scope="module")
def llama_reference(tiny_llama, documents, tmp_path_factory):
    out = tmp_path_factory.mktemp("llama") / "r"
    return make_reference(tiny_llama, out, texts=documents, window=48, threads=1)


@pytest.fixture(scope="module")
def bert_fp32(tiny_bert, tmp_path_factory):
    return export(tiny_bert, tmp_path_factory.mktemp("a") / "onnx-fp32", ExportConfig(to="onnx:fp32")).path


@pytest.fixture(scope="module")
def llama_int8(tiny_llama, tmp_path_factory):
    return export(tiny_llama, tmp_path_factory.mktemp("a") / "onnx-int8", ExportConfig(to="onnx:int8")).path


def judge(folder, student, reference, tmp_path, **arguments):
    return examine(folder, student=student, references={"text": reference}, work=tmp_path, options=OPTIONS, **arguments)


def failures(verdict):
    return {check.name: check for check in verdict.failures}


def reseal(folder, **changes):
    """What a careless tool does: change a payload and write fitting hashes."""
    manifest = open_artifact(folder, check=False).manifest
    (folder / ARTIFACT_FILE).unlink()
    return seal_artifact(folder, dataclasses.replace(manifest, **changes)).path


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / folder.name)


def sabotage_model(student, out, change):
    """A copy of the student whose state dict went through ``change``; what is exported from it is wrong."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(student, out)
    state = load_file(out / "model.safetensors")
    change(state)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_good_artifact_passes_every_check(bert_fp32, tiny_bert, bert_reference, tmp_path):
    found = judge(bert_fp32, tiny_bert, bert_reference, tmp_path, teacher_references={"text": bert_reference})
    verdict = found.verdict
    assert verdict.failures == ()
    assert (verdict.level, verdict.runtime, verdict.device) == ("device_verified", "onnxruntime", "a test")
    names = {check.name for check in verdict.checks}
    assert names >= {
        "payload_hashes", "dtype_histogram", "weight_map", "weights_on_grid", "tokenizer", "finite", "faithful",
        "padding_parity", "cosine_to_student", "spearman_to_student", "cosine_to_teacher",
    }  # fmt: skip
    assert {check.question for check in verdict.checks} == {"integrity", "faithful", "loss"}
    assert found.scores["text", "student"]["embeddings"].shape == (24, 32)
    assert found.scores["text", "teacher"]["cosine"].min() > 0.9999
    assert not (tmp_path / "dequantised").exists()


def test_a_good_decoder_passes_prefill_and_decode(llama_int8, tiny_llama, llama_reference, tmp_path):
    verdict = judge(llama_int8, tiny_llama, llama_reference, tmp_path).verdict
    assert verdict.failures == ()
    parity = next(check for check in verdict.checks if check.name == "decode_parity")
    assert 0 <= parity.value <= parity.limit
    kl = next(check for check in verdict.checks if check.name == "kl_to_student")
    assert kl.low <= kl.value <= kl.high <= kl.limit


@pytest.mark.parametrize("quantisation", ["fp32", "int4"])
def test_swapped_layers_are_named(tiny_bert, bert_reference, tmp_path, quantisation):
    first = "encoder.layer.1.attention.self.query.weight"
    second = "encoder.layer.2.attention.self.query.weight"

    def swap(state):
        state[first], state[second] = state[second].copy(), state[first].copy()

    wrong = sabotage_model(tiny_bert, tmp_path / "wrong", swap)
    folder = export(wrong, tmp_path / "a", ExportConfig(to=f"onnx:{quantisation}")).path
    found = failures(judge(folder, tiny_bert, bert_reference, tmp_path).verdict)
    assert found["weights_on_grid"].first_tensor == first
    assert second not in found["weights_on_grid"].reason.split(";")[0]


@pytest.mark.parametrize(("quantisation", "factor"), [("fp32", 1.0001), ("fp16", 1.01), ("int8", 1.02), ("int4", 1.05)])
def test_a_scaled_tensor_is_named(tiny_bert, bert_reference, tmp_path, quantisation, factor):
    name = "encoder.layer.2.output.dense.weight"

    def scale(state):
        state[name] = (state[name] * np.float32(factor)).astype(np.float32)

    wrong = sabotage_model(tiny_bert, tmp_path / "wrong", scale)
    folder = export(wrong, tmp_path / "a", ExportConfig(to=f"onnx:{quantisation}")).path
    verdict = judge(folder, tiny_bert, bert_reference, tmp_path).verdict
    assert failures(verdict)["weights_on_grid"].first_tensor == name
    assert verdict.level == "failed"
    assert name in verdict.note


def test_a_wrong_weight_map_is_named(bert_fp32, tiny_bert, bert_reference, tmp_path):
    folder = copy(bert_fp32, tmp_path)
    rows = json.loads((folder / TENSORS_FILE).read_text())
    lost = "encoder.layer.3.output.dense.weight"
    kept = [row for row in rows if row["name"] != lost]
    (folder / TENSORS_FILE).write_text(json.dumps(kept))
    found = failures(judge(reseal(folder), tiny_bert, bert_reference, tmp_path).verdict)
    assert found["weight_map"].first_tensor == lost
    assert "is not mapped" in found["weight_map"].reason
    a, b = (next(row for row in rows if row["name"] == f"encoder.layer.{i}.output.dense.weight") for i in (0, 1))
    a["stored"], b["stored"] = b["stored"], a["stored"]
    (folder / TENSORS_FILE).write_text(json.dumps(rows))
    found = failures(judge(reseal(folder), tiny_bert, bert_reference, tmp_path).verdict)
    assert found["weights_on_grid"].first_tensor == "encoder.layer.0.output.dense.weight"
    assert "faithful" in found  # the map says something else than what the runtime computes


@pytest.mark.parametrize("quantisation", ["fp32", "int8"])
def test_a_graph_that_computes_something_else_is_not_faithful(tiny_llama, llama_reference, tmp_path, quantisation):
    """Every weight is right and the graph is wrong: only the comparison with its own weights can tell."""
    import onnx

    folder = export(tiny_llama, tmp_path / "a", ExportConfig(to=f"onnx:{quantisation}")).path
    model = onnx.load(folder / "model.onnx")
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    kept = [attribute for attribute in attention.attribute if attribute.name != "scale"]
    del attention.attribute[:]
    attention.attribute.extend([*kept, onnx.helper.make_attribute("scale", 1.2 * 16**-0.5)])  # heads of 16
    onnx.save(model, folder / "model.onnx")
    found = failures(judge(reseal(folder), tiny_llama, llama_reference, tmp_path).verdict)
    assert "weights_on_grid" not in found
    assert found["faithful"].value > found["faithful"].limit
    assert found["faithful"].worst_input.startswith("row ")


def test_saturating_int8_is_caught_on_any_host(tiny_llama, llama_reference, tmp_path):
    for quantisation, caught in (("int8-dynamic", False), ("int8-dynamic-per-channel", True)):
        folder = export(tiny_llama, tmp_path / quantisation, ExportConfig(to=f"onnx:{quantisation}")).path
        found = failures(judge(folder, tiny_llama, llama_reference, tmp_path).verdict)
        assert ("int16_saturation" in found) == caught
        if caught:
            assert found["int16_saturation"].first_tensor.startswith("model.layers.")


def test_a_claim_of_quantisation_is_checked(bert_fp32, tiny_bert, bert_reference, tmp_path):
    folder = copy(bert_fp32, tmp_path)
    manifest = open_artifact(folder).manifest
    histogram = {"int4-b32": next(iter(manifest.dtype_histogram.values()))}
    folder = reseal(folder, quantisation="int4", dtype_histogram=histogram)
    assert "dtype_histogram" in failures(judge(folder, tiny_bert, bert_reference, tmp_path).verdict)


def test_another_tokenizer_is_caught(bert_fp32, tiny_bert, bert_reference, tmp_path):
    folder = copy(bert_fp32, tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = failures(judge(reseal(folder), tiny_bert, bert_reference, tmp_path).verdict)
    assert set(found) == {"tokenizer"}
    assert "Hello" in found["tokenizer"].worst_input


def test_a_changed_payload_is_not_even_opened(bert_fp32, tiny_bert, bert_reference, tmp_path):
    folder = copy(bert_fp32, tmp_path)
    with (folder / "model.onnx").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    found = judge(folder, tiny_bert, bert_reference, tmp_path)
    assert set(failures(found.verdict)) == {"payload_hashes"}
    assert found.info is None
    assert "does not match its sha256" in found.verdict.note


def test_garbage_is_a_verdict_not_an_exception(bert_fp32, tiny_bert, bert_reference, tmp_path):
    folder = copy(bert_fp32, tmp_path)
    (folder / "model.onnx").write_bytes(b"garbage" * 100)
    verdict = judge(reseal(folder), tiny_bert, bert_reference, tmp_path).verdict
    assert set(failures(verdict)) >= {"payload", "runs"}
    assert (verdict.level, verdict.runtime) == ("failed", "onnxruntime")


def test_a_crash_of_the_worker_is_a_failed_verdict(bert_fp32, tiny_bert, bert_reference, tmp_path):
    def dies(folder, options):
        raise WorkerError("the worker died of signal 6: GGML_ASSERT failed", hint="")

    verdict = judge(bert_fp32, tiny_bert, bert_reference, tmp_path, open_worker=dies).verdict
    assert "GGML_ASSERT" in failures(verdict)["runs"].reason
    assert verdict.level == "failed"

    def missing(folder, options):
        raise MissingDependency.package("onnxruntime", "runtimes")

    with pytest.raises(MissingDependency):
        judge(bert_fp32, tiny_bert, bert_reference, tmp_path, open_worker=missing)


class Fake:
    """A worker that passes what a real torch model says through ``spoil``."""

    def __init__(self, folder, backend, spoil):
        from edgestill.runtimes.session import SessionOptions
        from edgestill.runtimes.torch_session import TorchSession

        self.session = TorchSession(folder, SessionOptions(1))
        self.backend = backend
        self.spoil = spoil

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session.close()

    def info(self) -> SessionInfo:
        return dataclasses.replace(self.session.info(), backend=self.backend)

    def forward(self, ids, mask):
        return self.spoil(self.session.forward(ids.copy(), mask.copy()))

    def score(self, reference, batch_size=8):
        from edgestill.runtimes.scoring import score

        return score(self, reference, batch_size=batch_size)


def test_nan_is_named_with_its_input(bert_fp32, tiny_bert, bert_reference, tmp_path):
    def spoil(output):
        output = output.copy()
        output[-1] = np.nan
        return output

    worker = lambda *_: Fake(tiny_bert, "cpu", spoil)  # noqa: E731
    verdict = judge(bert_fp32, tiny_bert, bert_reference, tmp_path, open_worker=worker).verdict
    found = failures(verdict)
    json.dumps(dataclasses.asdict(verdict), allow_nan=False)
    assert found["finite"].value == 3  # the last row of each of three batches
    assert found["finite"].worst_input.startswith("row 7")


def test_infinity_after_padding_can_be_written_down(bert_fp32, tiny_bert, bert_reference, tmp_path):
    def spoil(output):
        return output * np.float32("nan") if len(output) == 2 else output  # only the padding check sends two rows

    worker = lambda *_: Fake(tiny_bert, "cpu", spoil)  # noqa: E731
    verdict = judge(bert_fp32, tiny_bert, bert_reference, tmp_path, open_worker=worker).verdict
    assert failures(verdict)["padding_parity"].value is None
    assert "nan" in failures(verdict)["padding_parity"].reason
    json.dumps(dataclasses.asdict(verdict), allow_nan=False)


def test_what_only_an_interpreter_ran_is_said_so(bert_fp32, tiny_bert, bert_reference, tmp_path):
    worker = lambda *_: Fake(tiny_bert, "mil-interpreter", lambda x: x)  # noqa: E731
    verdict = judge(bert_fp32, tiny_bert, bert_reference, tmp_path, open_worker=worker).verdict
    assert verdict.passed
    assert verdict.level == "program_verified"
    assert "not on a Mac" in verdict.note


def test_an_artifact_of_another_tool_is_judged_as_far_as_possible(bert_fp32, tiny_bert, bert_reference, tmp_path):
    folder = copy(bert_fp32, tmp_path)
    (folder / TENSORS_FILE).unlink()
    verdict = judge(reseal(folder), tiny_bert, bert_reference, tmp_path).verdict
    assert verdict.failures == ()
    skipped = {check.name for check in verdict.checks if check.reason.startswith("not applicable")}
    assert skipped == {"weight_map", "weights_on_grid", "faithful"}
    assert any(check.name == "cosine_to_student" for check in verdict.checks)


def test_ceilings_of_the_recipe_take_the_place_of_the_default(bert_fp32, tiny_bert, bert_reference, tmp_path):
    options = dataclasses.replace(OPTIONS, ceilings={"spearman": 1.01})
    verdict = examine(
        bert_fp32, student=tiny_bert, references={"text": bert_reference}, work=tmp_path, options=options
    ).verdict
    assert set(failures(verdict)) == {"spearman_to_student"}


@pytest.mark.parametrize("to", ["gguf:q8_0", "gguf:q4_k_m"])
def test_gguf_passes_and_a_scaled_tensor_is_named(tiny_llama, llama_reference, tmp_path, to):
    folder = export(tiny_llama, tmp_path / "good", ExportConfig(to=to)).path
    assert failures(judge(folder, tiny_llama, llama_reference, tmp_path).verdict) == {}
    name = "model.layers.2.mlp.gate_proj.weight"

    def scale(state):
        state[name] = state[name] * np.float32(1.1)

    wrong = sabotage_model(tiny_llama, tmp_path / "wrong", scale)
    folder = export(wrong, tmp_path / "bad", ExportConfig(to=to)).path
    found = failures(judge(folder, tiny_llama, llama_reference, tmp_path).verdict)
    assert found["weights_on_grid"].first_tensor == name


def test_bad_arguments(tmp_path, tiny_bert, bert_fp32):
    with pytest.raises(BadInput, match="no reference"):
        examine(bert_fp32, student=tiny_bert, references={}, work=tmp_path)
    with pytest.raises(BadInput, match="not an artifact folder"):
        examine(tmp_path / "none", student=tiny_bert, references={"x": tmp_path}, work=tmp_path)


def test_the_identity_of_the_payload_stands_in_the_verdict(bert_fp32, tiny_bert, bert_reference, tmp_path):
    manifest: Manifest = open_artifact(bert_fp32).manifest
    verdict = module.verify(
        bert_fp32, student=tiny_bert, references={"text": bert_reference}, work=tmp_path, options=OPTIONS
    )
    assert verdict.artifact_id == manifest.artifact_id == artifact_id(manifest.files)
    assert verdict.subject == "onnx-fp32"


@pytest.mark.parametrize("quantisation", ["fp32", "int8"])
def test_labels_of_tokens_are_verified_and_a_shifted_head_is_found(
    tiny_tagger, tagger_reference, tmp_path, quantisation
):
    folder = export(tiny_tagger, tmp_path / "a", ExportConfig(to=f"onnx:{quantisation}")).path
    found = judge(folder, tiny_tagger, tagger_reference, tmp_path / "w",
                  teacher_references={"text": tagger_reference})  # fmt: skip
    assert not failures(found.verdict)
    names = {check.name for check in found.verdict.checks}
    assert {"faithful", "faithful_top1", "padding_parity", "longest_context", "kl_to_student"} <= names
    if quantisation == "fp32":

        def turn(state):
            state["classifier.weight"] = np.roll(state["classifier.weight"], 1, axis=0).copy()

        wrong = export(
            sabotage_model(tiny_tagger, tmp_path / "wrong", turn), tmp_path / "b", ExportConfig(to="onnx:fp32")
        )
        assert failures(judge(wrong.path, tiny_tagger, tagger_reference, tmp_path / "w2").verdict)


def test_sizes_stand_in_the_verdict_and_are_judged_where_a_limit_is_given(
    bert_fp32, tiny_bert, bert_reference, tmp_path
):
    import zlib

    files = [path for path in bert_fp32.rglob("*") if path.is_file() and path.name not in (ARTIFACT_FILE, TENSORS_FILE)]
    size = sum(path.stat().st_size for path in files)
    download = sum(len(zlib.compress(path.read_bytes(), 6)) for path in files)
    for limits, failed in (({}, set()), ({"size_bytes": size, "download_bytes": download - 1}, {"download_bytes"})):
        verdict = examine(
            bert_fp32, student=tiny_bert, references={"text": bert_reference}, work=tmp_path,
            options=dataclasses.replace(OPTIONS, ceilings=limits),
        ).verdict  # fmt: skip
        found = {check.name: check for check in verdict.checks}
        assert (found["size_bytes"].value, found["download_bytes"].value) == (size, download)
        assert set(failures(verdict)) == failed
