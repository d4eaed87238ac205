from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from edgestill.checkpoints import load_tokenizer
from edgestill.distill.batches import Examples, collate, encode, plan_batches
from edgestill.distill.objective import count_items

LENGTHS = np.random.default_rng(0).integers(3, 40, size=64)


def test_an_epoch_takes_every_example_once():
    plan = plan_batches(LENGTHS, 8, 2, 4, seed=0)
    assert [len(batch) for batch in plan] == [8] * 8
    assert sorted(row for batch in plan for row in batch) == list(range(64))


def test_the_plan_is_decided_by_its_seed():
    assert plan_batches(LENGTHS, 8, 1, 20, 1) == plan_batches(LENGTHS, 8, 1, 20, 1)
    assert plan_batches(LENGTHS, 8, 1, 20, 1) != plan_batches(LENGTHS, 8, 1, 20, 2)


def test_accumulation_sees_the_same_steps():
    whole, parts = plan_batches(LENGTHS, 8, 1, 12, 0), plan_batches(LENGTHS, 1, 8, 12, 0)
    assert [[row for part in parts[8 * step : 8 * step + 8] for row in part] for step in range(12)] == whole


def test_batches_hold_texts_of_like_length():
    def padded(plan: list[list[int]]) -> int:
        return sum(int(LENGTHS[batch].max()) * len(batch) for batch in plan)

    plan = plan_batches(LENGTHS, 8, 1, 8, 0)
    shuffled = np.random.default_rng(0).permutation(64).reshape(-1, 8).tolist()
    assert padded(plan) < 0.8 * padded(shuffled)


def test_fewer_examples_than_a_step_needs_go_round():
    plan = plan_batches([5, 6, 7], 4, 2, 3, 0)
    assert [len(batch) for batch in plan] == [4] * 6
    counts = np.bincount([row for batch in plan for row in batch])
    assert counts.tolist() == [8, 8, 8]


def test_masks_go_by_length_and_not_by_id():
    pad = 2  # the same id as a real end-of-text token, as in many decoders
    batch = collate([{"index": 0, "ids": (5, 2, 2), "label": -100}, {"index": 1, "ids": (2,), "label": 1}], pad)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"].tolist() == [[5, 2, 2], [2, 2, 2]]
    assert count_items([batch, batch]) == {"predicted": 4, "tokens": 8, "examples": 4, "labelled": 2}


def test_long_texts_are_windows_for_decoders_and_cut_for_encoders(tiny_llama: Path, tiny_bert: Path):
    text = "the film was good and the plot was slow " * 6
    decoder, encoder = load_tokenizer(tiny_llama), load_tokenizer(tiny_bert)
    ids = decoder(text)["input_ids"]
    windows = encode([text], decoder, "text-generation", 16)
    assert [token for window in windows.ids for token in window] == ids[: sum(windows.lengths)]
    assert all(length == 16 for length in windows.lengths[:-1])
    cut = encode([text, "good"], encoder, "feature-extraction", 16, labels=[1, 0])
    assert cut.lengths.tolist() == [16, 3]
    assert cut.labels == (1, 0)


def test_a_single_token_has_nothing_to_predict(tiny_llama: Path):
    decoder = load_tokenizer(tiny_llama)
    assert len(encode(["", "a", "the good film"], decoder, "text-generation", 16)) == 1


def test_a_prompt_prefix_stands_before_each_text(tiny_bert: Path):
    encoder = load_tokenizer(tiny_bert)
    with_prefix = encode(["film"], encoder, "feature-extraction", 16, prefix="good ")
    assert with_prefix == encode(["good film"], encoder, "feature-extraction", 16)


def test_digest_names_the_content():
    one, other = Examples(((1, 2), (3,)), (-100, -100)), Examples(((1,), (2, 3)), (-100, -100))
    assert one.digest() == Examples(((1, 2), (3,)), (-100, -100)).digest() != other.digest()
    assert isinstance(torch.utils.data.DataLoader(one), torch.utils.data.DataLoader)


def test_prompts_make_a_mask_of_what_is_learnt():
    examples = Examples(((5, 6, 7), (8, 9)), (-100, -100), (1, 2))
    batch = collate(list(examples), 0)
    assert batch["learn"].tolist() == [[0, 1, 1], [0, 0, 0]]
    plain = Examples(examples.ids, examples.labels)
    assert "learn" not in collate(list(plain), 0)
    assert plain.digest() != examples.digest()
