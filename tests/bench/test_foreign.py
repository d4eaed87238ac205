"""Artifacts of other tools, bare as they come: described, their weights found again, judged; and a defect is seen."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgestill.artifact import open_artifact
from edgestill.bench.foreign import find_payload, match_weights, wrap_foreign
from edgestill.checkpoints import open_model
from edgestill.commands import VerifyRequest, verify_artifact
from edgestill.errors import BadInput, Unsupported
from edgestill.export import export
from edgestill.recipe import ExportConfig
from edgestill.stages import Observer


@pytest.fixture(scope="module")
def text(sentences, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [" ".join(sentences[i : i + 8]) for i in range(0, 128, 8)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


@pytest.fixture(scope="module")
def bert_onnx(tiny_bert, tmp_path_factory):
    """What a user of PyTorch exports: the encoder alone, tokens' states out, pooling left to the caller."""
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).eval()

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.inner(input_ids, attention_mask, token_type_ids).last_hidden_state

    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    ids = torch.ones(2, 7, dtype=torch.int64)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        Inner().eval(), (ids, ids.clone(), 0 * ids), path, dynamo=True, external_data=False, verbose=False,
        input_names=["input_ids", "attention_mask", "token_type_ids"], output_names=["last_hidden_state"],
        dynamic_shapes=(dynamic, dynamic, dynamic),
    )  # fmt: skip
    return path


def judged(artifact, model, text):
    return verify_artifact(VerifyRequest(artifact, model, text=text, threads=1), Observer()).verdict


def checks(verdict):
    return {check.name: check for check in verdict.checks}


@pytest.mark.whole
@pytest.mark.parametrize("to", ["gguf:f16", "gguf:q4_0", "onnx:int4", "onnx:fp32", "coreml:fp16"])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_a_bare_file_is_judged_as_well_as_an_artifact(model, to, text, tmp_path, request):
    """Our own payloads without artifact.json, tensors.json and tokenizer stand for those of others."""
    folder = request.getfixturevalue(model)
    artifact = export(folder, tmp_path / "a", ExportConfig(to=to))
    bare = tmp_path / artifact.entry.name
    artifact.entry.rename(bare)
    verdict = judged(bare, folder, text)
    assert verdict.failures == ()
    found = checks(verdict)
    expected = len(artifact.tensors())
    if to.startswith("gguf"):  # others fold some parameters of an encoder into others, or split what was tied
        assert found["weight_map"].reason.startswith(f"{expected} of {expected} parameters")
    assert ("not applicable" in found["tokenizer"].reason) == (not to.startswith("gguf"))
    assert "decode_parity" in found or model == "tiny_bert"


@pytest.mark.parametrize("name", ["tiny_gemma3", "tiny_gpt2"])
def test_parameters_go_by_the_names_of_their_own_architecture(name, tmp_path, request):
    """Gemma's norms are called otherwise than Llama's, and stored with 1 added."""
    folder = request.getfixturevalue(name)
    made = export(folder, tmp_path / "made", ExportConfig(to="gguf:f32"))
    bare = Path(shutil.copy(made.entry, tmp_path / "bare.gguf"))
    found = match_weights(wrap_foreign(bare, open_model(folder), tmp_path / "w"), open_model(folder))
    ours = {tensor.name: (tensor.stored, tensor.layout) for tensor in made.tensors()}
    assert {tensor.name: (tensor.stored, tensor.layout) for tensor in found} == ours


def test_an_encoder_of_pytorchs_exporter(bert_onnx, tiny_bert, text):
    verdict = judged(bert_onnx, tiny_bert, text)
    assert verdict.failures == ()
    found = checks(verdict)
    # The projections' names are lost (they are transposed constants now): they are found by value.
    assert found["weight_map"].reason == "69 of 69 parameters of the student were found in it"
    assert found["faithful"].value < 1e-9
    assert found["cosine_to_student"].value > 0.999999


def test_an_int8_encoder_of_onnxruntimes_quantiser(bert_onnx, tiny_bert, text, tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(bert_onnx, tmp_path / "int8.onnx", weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    verdict = judged(tmp_path / "int8.onnx", tiny_bert, text)
    found = checks(verdict)
    assert found["weight_map"].reason == "69 of 69 parameters of the student were found in it"
    assert found["weights_on_grid"].passed
    assert found["faithful"].passed, found["faithful"]


def test_a_defect_in_anothers_file_is_seen_and_named(bert_onnx, tiny_bert, text, tmp_path):
    import onnx

    model = onnx.load(bert_onnx)
    name = "inner.embeddings.LayerNorm.bias"
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = onnx.numpy_helper.to_array(tensor) + np.float32(0.05)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "bad.onnx")
    verdict = judged(tmp_path / "bad.onnx", tiny_bert, text)
    assert next((c.name, c.first_tensor) for c in verdict.failures) == (
        "weights_on_grid", "embeddings.LayerNorm.bias",
    )  # fmt: skip


def write_with_gguf_py(folder, path, change=lambda name, values: values):
    """``tiny_llama`` as a user of gguf-py would write it: float32, a tokenizer, no word of ours."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("someone's llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    words = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {row["content"] for row in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([word for word, _ in words])
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([int(kinds[word in special]) for word, _ in words])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, values in load_file(folder / "model.safetensors").items():
        values = change(name, values)
        if count := heads.get(name.split(".")[-2]):  # llama.cpp rotates neighbours, Transformers halves
            half = values.shape[0] // count // 2
            values = values.reshape(count, 2, half, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_written_with_gguf_py(tiny_llama, text, tmp_path):
    verdict = judged(write_with_gguf_py(tiny_llama, tmp_path / "good.gguf"), tiny_llama, text)
    assert verdict.failures == ()
    found = checks(verdict)
    assert found["weight_map"].reason == "38 of 38 parameters of the student were found in it"
    assert found["tokenizer"].value == 0
    assert found["faithful"].value < 1e-5
    assert found["kl_to_student"].value < 1e-5


def test_a_changed_weight_in_a_gguf_written_with_gguf_py_is_named(tiny_llama, text, tmp_path):
    wrong = "model.layers.1.self_attn.k_proj.weight"

    def change(name, values):
        values = values.copy()
        if name == wrong:
            values[0, 0] = 0.9
        return values

    verdict = judged(write_with_gguf_py(tiny_llama, tmp_path / "bad.gguf", change), tiny_llama, text)
    assert checks(verdict)["weights_on_grid"].first_tensor == wrong


def test_nothing_large_is_copied_and_the_original_stays(bert_onnx, tiny_bert, tmp_path):
    copy = shutil.copy(bert_onnx, tmp_path / "m.onnx")
    wrapped = wrap_foreign(tmp_path / "m.onnx", open_model(tiny_bert), tmp_path / "w")
    assert wrapped.entry.samefile(copy)
    assert open_artifact(wrapped.path).manifest.pooling_in_graph is False
    assert [spec.name for spec in wrapped.manifest.inputs] == ["input_ids", "attention_mask", "token_type_ids"]


def test_what_can_not_be_judged_is_said(tiny_bert, bert_onnx, tmp_path):
    import onnx

    model = onnx.load(bert_onnx)
    model.graph.input[2].name = "pixel_values"
    for node in model.graph.node:
        node.input[:] = ["pixel_values" if name == "token_type_ids" else name for name in node.input]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(Unsupported, match="pixel_values"):
        wrap_foreign(tmp_path / "m.onnx", open_model(tiny_bert), tmp_path / "w")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="none"):
        find_payload(tmp_path / "empty")
    (tmp_path / "g.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"m\.onnx"):
        find_payload(tmp_path)


def test_a_graph_with_a_defect_is_not_faithful(tiny_bert, text, bert_onnx, tmp_path):
    """All weights are right, the axis of a softmax is not."""
    import onnx

    model = onnx.load(bert_onnx)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    next(a for a in softmax.attribute if a.name == "axis").i = -2
    onnx.save(model, tmp_path / "bad.onnx")
    assert [c.name for c in judged(tmp_path / "bad.onnx", tiny_bert, text).failures][:1] == ["faithful"]
