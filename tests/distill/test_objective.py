from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr

from edgestill.checkpoints import load_torch, open_model
from edgestill.distill.batches import Examples, collate
from edgestill.distill.losses import attention_relations, forward_kl
from edgestill.distill.objective import Objective, Projectors, count_items
from edgestill.distill.signal import Dense, Relations
from edgestill.distill.student import StudentPlan, make_student
from edgestill.distill.teacher import Teacher
from edgestill.errors import BadInput

GENERATION = {"forward_kl": 0.9, "cross_entropy": 0.1, "hidden_states": 0.5}
EMBEDDING = {"embedding_cosine": 1.0, "hidden_states": 0.5}
INSIDE = {"hidden_states": 0.5, "attention_maps": 0.7, "attention_relations:2": 0.3}
LOGIT_LOSSES = ("forward_kl", "reverse_kl", "jsd:0.3", "skew_kl", "skew_reverse_kl:0.2", "total_variation",
                "alpha_beta", "logit_mse", "cross_entropy")  # fmt: skip
EVERY_LOGIT_LOSS = dict.fromkeys(LOGIT_LOSSES, 1.0)


def _examples(vocabulary: int, rows: int = 8) -> Examples:
    chooser = torch.Generator().manual_seed(5)
    lengths = [3, 9, 5, 2, 7, 4, 11, 6][:rows]
    ids = tuple(tuple(torch.randint(5, vocabulary, (n,), generator=chooser).tolist()) for n in lengths)
    return Examples(ids, (-100,) * rows)


def _pair(folder: Path, weights: dict[str, float], keep: tuple[int, ...] = (0, 3)) -> tuple[Objective, Teacher]:
    described = open_model(folder)
    teacher = Teacher(described, pad_id=0)
    student = make_student(described, StudentPlan.of_layers(described, keep))
    objective = Objective(student, described.task, weights, temperature=2.0, vocab_size=described.vocab_size)
    teacher.listen(keep if objective.inside else (), objective.inside)
    return objective, teacher


def _step(objective: Objective, teacher: Teacher, batches: list[dict[str, Any]]) -> tuple[float, torch.Tensor, list]:
    """Loss, raw parts and gradients of one optimiser step over ``batches``."""
    objective.zero_grad()
    counts = count_items(batches)
    total, parts = 0.0, torch.zeros(len(objective.losses))
    for batch in batches:
        loss, part = objective(batch, teacher.say(batch), counts)
        loss.backward()
        total, parts = total + float(loss.detach()), parts + part
    return total, parts, [p.grad.clone() for p in objective.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("tiny_llama", GENERATION), ("tiny_llama", INSIDE | {"jsd": 1.0}), ("tiny_llama", EVERY_LOGIT_LOSS),
     ("encoder", EMBEDDING), ("encoder", INSIDE)],
)  # fmt: skip
def test_one_pass_of_eight_is_eight_passes_of_one(kind, weights, request):
    folder = request.getfixturevalue(kind)
    objective, teacher = _pair(folder, weights)
    examples = _examples(open_model(folder).vocab_size)
    whole = _step(objective, teacher, [collate(list(examples), 0)])
    parts = _step(objective, teacher, [collate([row], 0) for row in examples])
    uneven = _step(objective, teacher, [collate([examples[i] for i in some], 0) for some in ((0,), range(1, 8))])
    assert whole[0] > 0
    for other in (parts, uneven):
        assert other[0] == pytest.approx(whole[0], rel=1e-5)
        torch.testing.assert_close(other[1], whole[1], rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(other[2], whole[2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_generation_is_the_dense_loss_with_shifted_logits(tiny_llama: Path):
    objective, teacher = _pair(tiny_llama, {"forward_kl": 1.0})
    batch = collate(list(_examples(320)), 0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, attention_mask=mask).logits for m in (objective.student, teacher.model))
        valid = mask[:, 1:].bool()  # right padding: where the next token is real, this one is
        dense = forward_kl(ours[:, :-1], Dense(theirs[:, :-1], 2.0), valid)
    value, _, _ = _step(objective, teacher, [batch])
    assert value == pytest.approx(float(dense.mean()), rel=1e-5)


def test_which_places_get_a_gradient(tiny_llama: Path):
    objective, teacher = _pair(tiny_llama, {"cross_entropy": 1.0})
    batch = collate(
        [{"index": 0, "ids": (7, 8, 9), "label": -100}, {"index": 1, "ids": (5, 6, 7, 8, 9), "label": -100}], 0
    )
    grads: list[torch.Tensor] = []
    norm = objective.student.model.norm
    hook = norm.register_forward_hook(lambda m, i, output: output.register_hook(grads.append) and None)
    _step(objective, teacher, [batch])
    hook.remove()
    touched = grads[0].abs().sum(-1) > 0
    assert touched.tolist() == [[True, True, False, False, False], [True, True, True, True, False]]


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("tiny_llama", GENERATION), ("tiny_llama", INSIDE | {"jsd": 1.0}), ("tiny_llama", EVERY_LOGIT_LOSS),
     ("encoder", EMBEDDING), ("encoder", INSIDE)],
)  # fmt: skip
def test_what_stands_in_the_padding_changes_nothing_bit_for_bit(kind, weights, request):
    objective, teacher = _pair(request.getfixturevalue(kind), weights)
    batch = collate(list(_examples(40)), 0)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 33)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    first, second = (_step(objective, teacher, [each]) for each in (batch, other))
    assert first[0] == second[0]
    words = objective.student.get_input_embeddings() if kind == "tiny_llama" else None
    for name, ours, theirs in zip(dict(objective.named_parameters()), first[2], second[2], strict=True):
        if words is None and "word_embeddings" in name:
            ours, theirs = ours[:33], theirs[:33]  # row 33 is looked up, with a gradient of zero or none
        assert torch.equal(ours, theirs), name


def test_a_single_token_batch_has_no_loss_and_no_nan(tiny_llama: Path):
    objective, teacher = _pair(tiny_llama, {"forward_kl": 1.0, "cross_entropy": 1.0})
    value, parts, grads = _step(objective, teacher, [collate([{"index": 0, "ids": (7,), "label": -100}], 0)])
    assert value == 0.0
    assert parts.tolist() == [0.0, 0.0]
    assert all(bool((grad == 0).all()) for grad in grads)


def test_padding_rows_of_the_embedding_are_not_part_of_the_loss(tiny_llama: Path):
    objective, teacher = _pair(tiny_llama, {"forward_kl": 1.0})
    batch = collate(list(_examples(200)), 0)
    objective.vocab_size = 200
    before = _step(objective, teacher, [batch])[0]
    with torch.no_grad():
        teacher.model.get_output_embeddings().weight[200:] += 100.0
    assert _step(objective, teacher, [batch])[0] == before


def test_projectors_bridge_widths_are_trained_and_never_saved(encoder: Path):
    described = open_model(encoder)
    student = make_student(described, StudentPlan.of_layers(described, (0, 3)))
    objective = Objective(student, described.task, {"hidden_states": 1.0}, teacher_width=48, seed=3)
    states = tuple(torch.randn(8, 11, 48) for _ in range(2))
    batch = collate(list(_examples(40)), 0)
    teacher = Teacher(described, (0, 3))
    said = teacher.say(batch)
    said.blocks = states
    loss, _ = objective(batch, said, count_items([batch]))
    loss.backward()
    assert [tuple(p.shape) for p in objective.projectors.parameters()] == [(48, 32), (48, 32)]
    assert all(float(p.grad.abs().sum()) > 0 for p in objective.projectors.parameters())
    assert not any("maps" in name for name in objective.student.state_dict())
    again = Objective(
        make_student(described, StudentPlan.of_layers(described, (0, 3))),
        described.task,
        {"hidden_states": 1.0},
        teacher_width=48,
        seed=3,
    )
    assert torch.equal(objective.projectors.maps[1].weight, again.projectors.maps[1].weight)


def test_equal_widths_need_no_projector():
    assert list(Projectors(3, 32, 32, 0).parameters()) == []


def test_training_has_no_dropout(encoder: Path):
    objective, _ = _pair(encoder, EMBEDDING)
    objective.train()
    assert not any(module.training for module in objective.student.modules())


def test_cross_entropy_alone_asks_no_teacher(tiny_llama: Path):
    assert not _pair(tiny_llama, {"cross_entropy": 1.0})[0].needs_teacher
    assert _pair(tiny_llama, {"forward_kl": 1.0})[0].needs_teacher


def test_the_teacher_gets_no_gradient(tiny_llama: Path):
    objective, teacher = _pair(tiny_llama, GENERATION)
    _step(objective, teacher, [collate(list(_examples(40)), 0)])
    assert all(p.grad is None for p in teacher.model.parameters())
    assert isinstance(load_torch(tiny_llama), torch.nn.Module)


def test_prompts_are_not_learnt_and_own_words_have_no_cross_entropy(tiny_llama: Path):
    objective, teacher = _pair(tiny_llama, {"forward_kl": 1.0, "cross_entropy": 1.0})
    rows = [{**row, "prompt": prompt} for row, prompt in zip(_examples(300, 3), (1, 4, 2), strict=True)]
    batch = collate(rows, 0)
    counts = count_items([batch])
    assert counts["predicted"] == (3 - 1) + (9 - 4) + (5 - 2)
    _, parts = objective(batch, teacher.say(batch), counts)
    ours, theirs = (m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach().double()
                    for m in (objective.student, teacher.model))  # fmt: skip
    entropy, divergence = [], []
    for number, row in enumerate(rows):
        for place in range(row["prompt"] - 1, len(row["ids"]) - 1):  # a double loop: what predicts the learnt tokens
            mine = torch.log_softmax(ours[number, place], -1)
            entropy.append(-mine[row["ids"][place + 1]])
            p, q = (torch.log_softmax(side[number, place] / 2.0, -1) for side in (theirs, ours))
            divergence.append(4.0 * (p.exp() * (p - q)).sum())
    assert float(parts[0]) == pytest.approx(float(torch.stack(divergence).mean()), rel=1e-5)
    assert float(parts[1]) == pytest.approx(float(torch.stack(entropy).mean()), rel=1e-5)
    own = {**batch, "learn": batch["learn"] * 2}
    _, again = objective(own, teacher.say(own), counts)
    assert (float(again[0]), float(again[1])) == (float(parts[0]), 0.0)


def test_hidden_states_are_imitated_where_tokens_are_learnt(tiny_llama: Path):
    objective, teacher = _pair(tiny_llama, {"hidden_states": 1.0})
    rows = [{**row, "prompt": 2} for row in _examples(300, 3)]
    batch = collate(rows, 0)
    counts = count_items([batch])
    assert counts["tokens"] == (3 - 2) + (9 - 2) + (5 - 2)
    everything = collate(list(_examples(300, 3)), 0)
    alone, whole = (
        objective(b, teacher.say(b), counts)[1] for b in (batch, everything)
    )  # the same divisor: fewer places, a smaller sum
    assert 0 < float(alone[0]) < float(whole[0])


def test_attention_and_relations_are_those_of_the_mapped_layers(encoder: Path):
    weights = {"attention_maps": 1.0, "attention_relations:4": 1.0, "hidden_states": 1.0}
    objective, teacher = _pair(encoder, weights, keep=(0, 2, 3))
    teacher.listen((1, 2, 2), objective.inside)
    batch = collate(list(_examples(40)), 0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    _, parts, grads = _step(objective, teacher, [batch])
    assert len(grads) > 10
    found = dict(zip(objective.losses, parts.tolist(), strict=True))
    with torch.no_grad():
        said = []
        for model in (
            load_torch(encoder),
            make_student(open_model(encoder), StudentPlan.of_layers(open_model(encoder), (0, 2, 3))),
        ):
            model.encoder.set_attn_implementation("eager")
            said.append(model.encoder(ids, mask, output_attentions=True, output_hidden_states=True))
        theirs, ours = said
        total = []
        for b, i in mask.nonzero().tolist():
            rows = [
                (theirs.attentions[layer][b, :, i], ours.attentions[place][b, :, i])
                for place, layer in enumerate((1, 2, 2))
            ]
            total.append(np.mean([rel_entr(t.double().numpy(), s.double().numpy()).sum(-1) for t, s in rows]))
        assert found["attention_maps"] == pytest.approx(np.mean(total), rel=1e-4)
        attention = [
            model.encoder.encoder.layer[layer].attention.self
            for model, layer in ((teacher.model, 2), (objective.student, 2))
        ]
        x = [theirs.hidden_states[2], ours.hidden_states[2]]
        sides = [Relations(a.query(h), a.key(h), a.value(h), 4) for a, h in zip(attention, x, strict=True)]
        expected = attention_relations(sides[1], sides[0], mask, 4).mean()
    assert found["attention_relations:4"] == pytest.approx(float(expected), rel=1e-4)


def test_parts_are_named_in_full_and_weighed(tiny_llama: Path):
    weights = {"jsd": 0.5, "jsd:0.1": 2.0, "reverse_kl": 0.25}
    objective, teacher = _pair(tiny_llama, weights)
    total, parts, _ = _step(objective, teacher, [collate(list(_examples(200)), 0)])
    assert list(objective.losses) == ["reverse_kl", "jsd:0.1", "jsd:0.5"]
    assert total == pytest.approx(0.25 * float(parts[0]) + 2.0 * float(parts[1]) + 0.5 * float(parts[2]), rel=1e-5)


def test_nan_in_the_teacher_is_one_clear_line_that_names_the_weight(encoder: Path, tmp_path: Path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(encoder, broken)
    state = load_file(broken / "model.safetensors")
    name = next(key for key in sorted(state) if key.endswith("layer.2.attention.self.key.weight"))
    state[name][3, 4] = float("nan")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"the teacher .*broken: .*layer\.2\.attention\.self\.key\.weight is not finite"):
        Teacher(open_model(broken)).load()
