import json

import numpy as np
import pytest

from edgestill.bench.reference import inputs_of, make_reference, read_facts, window_texts
from edgestill.checkpoints import load_tokenizer, load_torch
from edgestill.errors import BadInput
from edgestill.runtimes.scoring import open_reference


def test_encoder_rows_are_what_the_model_says_of_each_text_alone(tiny_bert, sentences, tmp_path):
    import torch

    out = make_reference(tiny_bert, tmp_path / "r", texts=sentences[:9], max_length=10, batch_size=4, threads=1)
    opened = open_reference(out)
    tokenizer, model = load_tokenizer(tiny_bert), load_torch(tiny_bert)
    assert opened.ids.shape[1] <= 10
    for row, text in enumerate(sentences[:9]):
        one = tokenizer(text, truncation=True, max_length=10, return_tensors="pt")
        length = one["input_ids"].shape[1]
        assert opened.ids[row, :length].tolist() == one["input_ids"][0].tolist()
        assert opened.mask[row].sum() == length
        with torch.inference_mode():
            alone = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"])[0].numpy()
        np.testing.assert_allclose(opened.said[row], alone, atol=1e-5)
    assert read_facts(out)["documents"] == list(range(9))


def test_classifier_has_a_row_of_logits(tiny_classifier, sentences, tmp_path):
    opened = open_reference(make_reference(tiny_classifier, tmp_path / "r", texts=sentences[:5], threads=1))
    assert opened.said.shape == (5, 3)


def test_windows_stay_inside_their_document(tiny_llama, tmp_path):
    texts = ["a movie " * 40, "the plot " * 15, "x"]
    out = make_reference(tiny_llama, tmp_path / "r", texts=texts, window=16, threads=1)
    opened, facts = open_reference(out), read_facts(out)
    tokenizer = load_tokenizer(tiny_llama)
    assert set(facts["documents"]) == {0, 1}  # the third is too short to predict anything
    for row, document in enumerate(facts["documents"]):
        turn = facts["documents"][:row].count(document)
        expected = tokenizer(texts[document], add_special_tokens=False)["input_ids"][turn * 16 : (turn + 1) * 16]
        assert opened.ids[row, : opened.mask[row].sum()].tolist() == expected
    assert facts["inputs"]["bos"] == "none"
    assert facts["inputs"]["predicted_tokens"] == int(opened.mask.sum() - len(opened.mask))
    assert opened.said.shape[:2] == opened.ids.shape


def test_first_windows_come_before_second_ones(tiny_llama, sentences):
    tokenizer = load_tokenizer(tiny_llama)
    documents = [" ".join(sentences[i : i + 10]) for i in range(0, 60, 10)]
    inputs = window_texts(tokenizer, documents, window=17, limit=16 * 6)
    assert inputs.documents == (0, 1, 2, 3, 4, 5)
    inputs = window_texts(tokenizer, documents, window=17, limit=16 * 8)
    assert inputs.documents == (0, 0, 1, 1, 2, 3, 4, 5)
    assert inputs.facts["predicted_tokens"] == 16 * 8


def test_bos_is_prepended_where_the_tokenizer_does_it(tiny_llama):
    from tokenizers import processors

    tokenizer = load_tokenizer(tiny_llama)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"{bos} $A", f"{bos} $A {bos} $B", [(bos, tokenizer.bos_token_id)]
    )
    inputs = window_texts(tokenizer, ["the movie was good " * 20], window=16)
    assert (inputs.ids[:, 0] == tokenizer.bos_token_id).all()
    assert inputs.facts["stride"] == 15
    assert inputs.facts["bos"].startswith("prepended")


def test_the_same_question_is_not_answered_twice(tiny_bert, sentences, tmp_path):
    first = make_reference(tiny_bert, tmp_path / "r", texts=sentences[:4], threads=1)
    before = (first / "embeddings.npy").stat().st_mtime_ns
    make_reference(tiny_bert, tmp_path / "r", texts=sentences[:4], threads=1)
    assert (first / "embeddings.npy").stat().st_mtime_ns == before
    make_reference(tiny_bert, tmp_path / "r", texts=sentences[:5], threads=1)
    assert len(open_reference(first).ids) == 5


def test_a_damaged_reference_is_made_again(tiny_bert, sentences, tmp_path):
    made = make_reference(tiny_bert, tmp_path / "r", texts=sentences[:4], threads=1)
    (made / "embeddings.npy").write_bytes(b"\x93NUMPY")
    make_reference(tiny_bert, tmp_path / "r", texts=sentences[:4], threads=1)
    assert open_reference(made).said.shape[0] == 4


def test_same_bytes_from_any_folder(tiny_bert, sentences, tmp_path):
    a = make_reference(tiny_bert, tmp_path / "a", texts=sentences[:4], threads=1)
    b = make_reference(tiny_bert, tmp_path / "deep" / "b", texts=sentences[:4], threads=1)
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_another_model_answers_the_same_ids(tiny_bert, tiny_classifier, tiny_llama, sentences, tmp_path):
    student = make_reference(tiny_bert, tmp_path / "student", texts=sentences[:4], threads=1)
    other = make_reference(tiny_classifier, tmp_path / "other", ids_from=student, threads=1)
    np.testing.assert_array_equal(open_reference(other).ids, open_reference(student).ids)
    assert read_facts(other)["inputs_sha256"] == read_facts(student)["inputs_sha256"]
    assert read_facts(other)["inputs"]["text_sha256"] == read_facts(student)["inputs"]["text_sha256"]
    part = inputs_of(student, rows=2)
    assert part.ids.shape[0] == 2
    assert part.mask.sum(axis=1).max() == part.ids.shape[1]
    wide = make_reference(tiny_llama, tmp_path / "llama", texts=["a movie " * 9], threads=1)
    with pytest.raises(BadInput, match="not in the vocabulary"):
        make_reference(tiny_bert, tmp_path / "no", ids_from=wide, threads=1)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("texts", [[], ["", " "], ["x"]])
def test_too_little_text_is_one_line(tiny_llama, tmp_path, texts):
    with pytest.raises(BadInput) as caught:
        make_reference(tiny_llama, tmp_path / "r", texts=texts)
    assert caught.value.hint


def test_another_version_is_refused(tmp_path):
    (tmp_path / "reference.json").write_text(json.dumps({"schema_version": 0}))
    with pytest.raises(BadInput, match="not a reference of this version"):
        read_facts(tmp_path)
