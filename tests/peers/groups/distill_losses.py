"""Whether the losses are right: against independent implementations, and in chunks against dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgestill.distill.chunked import chunked_head
from edgestill.distill.losses import LOSSES, Loss, reduce_step
from edgestill.distill.signal import Attention, Dense, Embedding, Hidden, Labels, Relations, Sparse
from edgestill.errors import EdgestillError
from edgestill.loss_names import parse_loss

from .. import references
from ..context import Context
from ..environments import TRL
from ..processes import PROGRAMS, launch
from ..registry import Taken, figure

# Each loss over logits, with its default parameters and with others, the ends of their ranges among them.
NAMES = (
    "forward_kl", "reverse_kl", "jsd", "jsd:0", "jsd:0.1", "jsd:0.9", "jsd:1", "skew_kl", "skew_kl:0", "skew_kl:0.5",
    "skew_reverse_kl", "skew_reverse_kl:0", "skew_reverse_kl:0.5", "total_variation", "alpha_beta", "alpha_beta:1:0",
    "alpha_beta:0:1", "alpha_beta:0.5:0.5", "logit_mse", "cross_entropy", "universal_logit",
)  # fmt: skip
LOGIT_LOSSES = dict.fromkeys(name.partition(":")[0] for name in NAMES)
TEMPERATURES = (1.0, 2.0)
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
CHUNKED_TEMPERATURE = 2.0
JUMPS = {"universal_logit"}
"""The gradient jumps wherever sorted probabilities are equal, and by rounding they often are: float64 only."""
TOP_K = 64
_LIMIT, _CHUNKED_LIMIT = 1e-6, 1e-5


class Error(NamedTuple):
    """A deviation and what deviates."""

    value: float
    what: str


# ---- values ---------------------------------------------------------------------------------------------------------


@figure(
    "loss_reference", group="distill", title="largest error of a loss in fp32", unit="nats", limit=_LIMIT,
    peer="scipy in float64; TRL's generalized_jsd_loss", environment=TRL,
)  # fmt: skip
def loss_reference(context: Context, variant: str) -> Taken:
    """Error of a token's value, relative where the value is above 1; the largest over losses, tokens and settings."""
    vocab_size = 500 if context.tiny else 49_152
    errors = [*_logit_errors(vocab_size), *_feature_errors()]
    missing = set(LOSSES) - {parse_loss(error.what.split()[0]).name for error in errors}
    if missing:
        names = ", ".join(sorted(missing))
        raise EdgestillError(f"no independent reference for {names}", hint="add it to references.py")
    beside, rounded, version = _beside_trl(context, vocab_size)
    worst = max([*errors, *beside])
    how = (
        f"largest over {len(errors)} settings of {len(LOSSES)} losses against scipy in float64 (worst: {worst.what}), "
        f"and {len(beside)} settings of jsd against TRL {version}'s generalized_jsd_loss in float64 (worst "
        f"{max(beside).value:.2g}; in fp32 TRL's own is {rounded:.2g} away from that); vocabulary {vocab_size:,}; "
        "relative where a value is above 1"
    )
    return Taken(worst.value, how)


def _logits(vocab_size: int, rows: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a sure and of an unsure teacher, of students near and far, and true ids."""
    torch.manual_seed(0)
    sharpness = torch.linspace(0.5, 5, rows)[:, None]
    distance = torch.tensor([0.1, 1.0, 3.0]).repeat(rows // 3)[:, None]
    teacher = torch.randn(rows, vocab_size) * sharpness
    student = teacher + torch.randn(rows, vocab_size) * distance
    return student, teacher, torch.randint(vocab_size, (rows,))


def _logit_errors(vocab_size: int) -> Iterator[Error]:
    student, teacher, ids = _logits(vocab_size)
    wide = student.double().numpy(), teacher.double().numpy(), ids.numpy()
    every = torch.ones(len(ids), dtype=torch.bool)
    for loss, temperature in _settings():
        signal = Labels(ids) if loss.signal is Labels else Dense(teacher, temperature)
        known = references.VALUES[loss.name.partition(":")[0]](*wide, temperature, *loss.parameters)
        yield _compare(loss.values(student, signal, every), known, f"{loss.name} at T = {temperature:g}")


def _settings(
    names: Sequence[str] = NAMES, temperatures: Sequence[float] = TEMPERATURES
) -> Iterator[tuple[Loss, float]]:
    for name in names:
        spec = parse_loss(name)
        for temperature in temperatures if LOSSES[spec.name].temperature_power else (1.0,):
            yield LOSSES[spec.name].bind(spec), temperature


def _feature_errors() -> Iterator[Error]:
    torch.manual_seed(0)
    states: list[tuple[Tensor, ...]] = [tuple(torch.randn(2, 9, 64) for _ in range(3)) for _ in range(2)]
    tokens = torch.ones(2, 9, dtype=torch.bool)
    ours = LOSSES["hidden_states"].values(states[0], Hidden(states[1]), tokens)
    known = references.states(*([_rows(state) for state in side] for side in states))
    yield _compare(ours, known, "hidden_states")
    first, second = torch.randn(2, 16, 48)
    for name, reference in (("embedding_cosine", references.cosine), ("embedding_gram", references.gram)):
        found = LOSSES[name].values(first, Embedding(second), torch.ones(16, dtype=torch.bool))
        yield _compare(found, reference(_rows(first), _rows(second)), name)
    for temperature in (0.05, 0.5):
        loss = LOSSES["contrastive_scores"].bind(parse_loss(f"contrastive_scores:{temperature}"))
        found = loss.values(first, Embedding(second), torch.ones(16, dtype=torch.bool))
        yield _compare(found, references.contrastive(_rows(first), _rows(second), temperature), loss.name)
    maps = [[torch.randn(2, 4, 9, 9).softmax(-1) for _ in range(2)] for _ in range(2)]
    found = LOSSES["attention_maps"].values(maps[0], Attention(tuple(maps[1])), tokens)
    known = references.attention(*([one.double().numpy() for one in side] for side in maps))
    yield _compare(found, known, "attention_maps")
    parts = [[torch.randn(2, 9, width) for _ in range(3)] for width in (24, 48)]
    for heads in (2, 3):
        loss = LOSSES["attention_relations"].bind(parse_loss(f"attention_relations:{heads}"))
        found = loss.values(Relations(*parts[0], heads=2), Relations(*parts[1], heads=4), tokens)
        known = references.relations(*([one.double().numpy() for one in side] for side in parts), heads)
        yield _compare(found, known, loss.name)


def _rows(tensor: Tensor) -> Any:
    return tensor.reshape(-1, tensor.shape[-1]).double().numpy()


def _compare(found: Tensor, known: Any, what: str) -> Error:
    """The largest error of a token. A value that is no number is the largest of all."""
    errors = np.abs(found.double().numpy() - known) / np.maximum(1, np.abs(known))
    worst = float(np.max(errors))
    return Error(worst if np.isfinite(worst) else float("inf"), what)


def _beside_trl(context: Context, vocab_size: int) -> tuple[list[Error], float, str]:
    """Our fp32 values against TRL's function in float64, how far its fp32 values are from that, and its version."""
    student, teacher, ids = _logits(vocab_size)
    settings = [(beta, temperature) for beta in BETAS for temperature in TEMPERATURES]
    given, answer = context.scratch / "jsd-in.npz", context.scratch / "jsd-out.npz"
    np.savez(given, student=student.numpy(), teacher=teacher.numpy(), settings=np.array(settings))
    prepared = context.environment(TRL)
    context.progress("TRL's generalized_jsd_loss")
    launch([prepared.python, "-P", PROGRAMS / "jsd_trl.py", given, answer], threads=context.threads)
    found = np.load(answer)
    errors = []
    for (beta, temperature), theirs in zip(settings, found["values"], strict=True):
        loss = LOSSES["jsd"].bind(parse_loss(f"jsd:{beta:g}"))
        ours = loss.values(student, Dense(teacher, temperature), torch.ones(len(ids), dtype=torch.bool))
        # Ours carries the factor T² of the gradient's size, theirs does not.
        errors.append(_compare(ours / temperature**2, theirs, f"jsd:{beta:g} against TRL"))
    own = max(
        _compare(torch.from_numpy(one), known, "").value
        for one, known in zip(found["rounded"], found["values"], strict=True)
    )
    return errors, own, str(found["version"])


# ---- chunks ---------------------------------------------------------------------------------------------------------


@figure(
    "chunked_equals_dense", group="distill", title="largest error of the chunked loss in value and gradient",
    unit="ratio", limit=_CHUNKED_LIMIT,
    peer="the dense loss: torch's own functions in float64, the whole batch as one in fp32",
)  # fmt: skip
def chunked_equals_dense(context: Context, variant: str) -> Taken:
    """Relative errors of the value, the gradient by the states and by the head (each in proportion to its largest)."""
    vocab_size, width, tokens = (500, 32, 40) if context.tiny else (49_152, 576, 64)
    rows = tokens // 3 + 1  # three chunks, the last one shorter
    errors = []
    made = _head(vocab_size, width, tokens)
    for loss, temperature in _settings(tuple(LOGIT_LOSSES), (CHUNKED_TEMPERATURE,)):
        for sparse in (False, True):
            if sparse and not _exact_buckets(loss):
                continue
            what = f"{loss.name} at T = {temperature:g}, {'cached' if sparse else 'live'}"
            context.progress(f"chunked and dense: {what}")
            errors += _chunked_errors(loss, temperature, sparse, rows, made, what)
    worst = max(errors)
    how = (
        f"largest over values and both gradients, {len(errors)} comparisons; worst: {worst.what}; "
        f"head {vocab_size:,} x {width}, {tokens} tokens in chunks of {rows}; live teacher, and top {TOP_K} + tail "
        "against the dense loss over the same buckets"
    )
    return Taken(worst.value, how)


def _exact_buckets(loss: Loss) -> bool:
    return Sparse in loss.takes and loss.takes[Sparse].how != "refused"


class Made(NamedTuple):
    """Weights of the head ``[V, D]``, states ``[N, D]``, the teacher's logits ``[N, V]``, true ids ``[N]``."""

    weight: Tensor
    states: Tensor
    teacher: Tensor
    ids: Tensor


Gradients = tuple[Tensor, ...]
"""Value, gradient by the states, gradient by the head."""


def _head(vocab_size: int, width: int, tokens: int) -> Made:
    """Head, states of the student, logits of the teacher, true ids. Logits have a spread of about 2."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocab_size, bias=False)
    torch.nn.init.normal_(head.weight, std=2 * width**-0.5)
    states, teacher = torch.randn(tokens, width), torch.randn(tokens, vocab_size) * 2
    with torch.no_grad():
        # Where both give a token the same probability, total variation has no gradient and rounding would pick a side.
        logs = [F.log_softmax(logits / CHUNKED_TEMPERATURE, -1) for logits in (teacher, head(states))]
        gap = logs[0] - logs[1]
        teacher += torch.where(gap.abs() < 0.01, 0.04 * gap.sign(), 0.0)
    return Made(head.weight.detach(), states, teacher, torch.randint(vocab_size, (tokens,)))


def _chunked_errors(
    loss: Loss, temperature: float, sparse: bool, rows: int, made: Made, what: str
) -> list[Error]:  # fmt: skip
    """In float64 against torch's own functions, which shows the formula; in fp32 against the whole batch as one."""
    kept = _kept(made.teacher, temperature) if sparse else None
    wide = Made(*(part.double() if part.is_floating_point() else part for part in made))
    pairs = [("float64", _chunked(loss, temperature, kept, rows, wide), _by_torch(loss, temperature, kept, wide))]
    if loss.name not in JUMPS:
        pairs.append(("fp32", _chunked(loss, temperature, kept, rows, made), _dense(loss, temperature, kept, made)))
    places = ("value", "gradient of the states", "gradient of the head")
    return [
        Error(float((one.double() - other.double()).abs().max() / other.abs().max()), f"{what}, {place}, {kind}")
        for kind, ours, known in pairs
        for one, other, place in zip(ours, known, places, strict=True)
    ]


def _by_torch(loss: Loss, temperature: float, kept: Sparse | None, made: Made) -> Gradients:
    weight, states, teacher, ids = made
    weight, hidden = weight.clone().requires_grad_(), states.clone().requires_grad_()
    student = hidden @ weight.T
    if kept is not None:
        # Logits over the buckets whose softmax at T is that of the merged tokens.
        teacher = torch.cat([kept.log_probs, kept.tail[:, None]], -1).to(student.dtype) * temperature
        log = F.log_softmax(student / temperature, -1)
        rest = log.scatter(-1, kept.ids, -torch.inf).logsumexp(-1, keepdim=True)
        student = torch.cat([log.gather(-1, kept.ids), rest], -1) * temperature
    reference = references.GRADIENTS[loss.name.partition(":")[0]]
    value = reference(student, teacher, ids, temperature, *loss.parameters).mean()
    return (value.detach(), *torch.autograd.grad(value, (hidden, weight)))


def _dense(loss: Loss, temperature: float, kept: Sparse | None, made: Made) -> Gradients:
    weight, hidden = made.weight.clone().requires_grad_(), made.states.clone().requires_grad_()
    value = _value(loss, temperature, kept, made, hidden @ weight.T, 0, len(hidden))
    return (value.detach(), *torch.autograd.grad(value, (hidden, weight)))


def _chunked(loss: Loss, temperature: float, kept: Sparse | None, rows: int, made: Made) -> Gradients:
    def chunk(logits: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        value = _value(loss, temperature, kept, made, logits, begin, end)
        return value, value.detach()[None]

    head = torch.nn.Linear(*made.weight.shape[::-1], bias=False, dtype=made.weight.dtype)
    head.weight = torch.nn.Parameter(made.weight)
    hidden = made.states.clone().requires_grad_()
    value, _ = chunked_head(hidden, head, chunk, rows)
    return (value.detach(), *torch.autograd.grad(value, (hidden, head.weight)))


def _value(
    loss: Loss, temperature: float, kept: Sparse | None, made: Made, logits: Tensor, begin: int, end: int
) -> Tensor:  # fmt: skip
    """What the rows ``begin:end`` add to the mean over all tokens."""
    signal: Dense | Sparse | Labels = Dense(made.teacher[begin:end], temperature)
    if loss.signal is Labels:
        signal = Labels(made.ids[begin:end])
    elif kept is not None:
        signal = kept.rows(begin, end)
    return reduce_step(loss.values(logits, signal, torch.ones(len(logits), dtype=torch.bool)), len(made.ids))


def _kept(teacher: Tensor, temperature: float) -> Sparse:
    """The likeliest tokens and the exact mass of the others."""
    log = F.log_softmax(teacher.double() / temperature, -1)
    best = log.topk(TOP_K, -1)
    tail = log.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    return Sparse(best.indices, best.values.float(), tail.float(), temperature)
