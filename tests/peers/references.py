"""Every loss once more, independently: scipy and numpy in float64 for values, torch's own ``kl_div`` for gradients.

Written from the definitions (papers in ``edgestill.distill.losses``), not from our code: the long way round, loops
where they are short enough. ``p`` is the teacher, ``q`` the student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from scipy.spatial import distance
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor

__all__ = ["GRADIENTS", "VALUES", "attention", "contrastive", "cosine", "gram", "relations", "states"]

Floats = npt.NDArray[np.float64]


def _kl(p: Floats, q: Floats) -> Floats:
    found: Floats = rel_entr(p, q).sum(-1)
    return found


def _jsd(p: Floats, q: Floats, beta: float) -> Floats:
    if beta in (0, 1):  # GKD's convention: the two ends are the KL divergences
        return _kl(q, p) if beta else _kl(p, q)
    if beta == 0.5:
        return np.array([distance.jensenshannon(*pair) ** 2 for pair in zip(p, q, strict=True)])
    mixture = beta * p + (1 - beta) * q
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def _alpha_beta(p: Floats, q: Floats, alpha: float, beta: float) -> Floats:
    both = alpha + beta
    if alpha == 0:
        inside = (q**beta * beta * np.log(q / p) - q**beta + p**beta) / beta**2
    elif beta == 0:
        inside = (p**alpha * alpha * np.log(p / q) - p**alpha + q**alpha) / alpha**2
    else:
        inside = -(p**alpha * q**beta - alpha / both * p**both - beta / both * q**both) / (alpha * beta)
    found: Floats = inside.sum(-1)
    return found


_DISTRIBUTIONS: dict[str, tuple[int, Callable[..., Floats]]] = {  # the power of T, and the divergence
    "forward_kl": (2, _kl),
    "reverse_kl": (2, lambda p, q: _kl(q, p)),
    "jsd": (2, _jsd),
    "skew_kl": (2, lambda p, q, alpha: _kl(p, alpha * p + (1 - alpha) * q)),
    "skew_reverse_kl": (2, lambda p, q, alpha: _kl(q, alpha * q + (1 - alpha) * p)),
    "total_variation": (1, lambda p, q: np.array([distance.cityblock(*pair) / 2 for pair in zip(p, q, strict=True)])),
    "alpha_beta": (2, _alpha_beta),
    "universal_logit": (1, lambda p, q: np.abs(np.sort(p, -1) - np.sort(q, -1)).sum(-1)),
}


def _of_distributions(
    power: int, divergence: Callable[..., Floats], student: Floats, teacher: Floats, _ids: object, temperature: float,
    *parameters: float,
) -> Floats:  # fmt: skip
    p, q = softmax(teacher / temperature, -1), softmax(student / temperature, -1)
    return temperature**power * divergence(p, q, *parameters)


def _logit_mse(student: Floats, teacher: Floats, _ids: object, _temperature: float) -> Floats:
    return np.array([distance.sqeuclidean(*pair) / len(pair[0]) for pair in zip(student, teacher, strict=True)])


def _cross_entropy(student: Floats, _teacher: Floats, ids: npt.NDArray[np.int64], _temperature: float) -> Floats:
    rows: Floats = log_softmax(student, -1)
    return np.array([-row[true] for row, true in zip(rows, ids, strict=True)])


def _bind(power: int, divergence: Callable[..., Floats]) -> Callable[..., Floats]:
    return lambda *arguments: _of_distributions(power, divergence, *arguments)


VALUES: dict[str, Callable[..., Floats]] = {
    **{name: _bind(*row) for name, row in _DISTRIBUTIONS.items()},
    "logit_mse": _logit_mse,
    "cross_entropy": _cross_entropy,
}
"""``(student [N, V], teacher [N, V], true ids [N], temperature, *parameters) -> [N]`` of the losses over logits."""


def states(student: Sequence[Floats], teacher: Sequence[Floats]) -> Floats:
    """``hidden_states``: relative squared error of each token's state, mean over layers; ``[N, D]`` each."""
    found = [
        [distance.sqeuclidean(s, t) / float(t @ t) for s, t in zip(*pair, strict=True)]
        for pair in zip(student, teacher, strict=True)
    ]
    return np.mean(found, axis=0)


def cosine(student: Floats, teacher: Floats) -> Floats:
    """``embedding_cosine``."""
    return np.array([distance.cosine(s, t) for s, t in zip(student, teacher, strict=True)])


def gram(student: Floats, teacher: Floats) -> Floats:
    """``embedding_gram``: for each text the mean, over the others, of the squared difference of cosines."""
    count = len(student)
    found = [
        [
            (distance.cosine(student[i], student[j]) - distance.cosine(teacher[i], teacher[j])) ** 2
            for j in range(count) if j != i
        ]
        for i in range(count)
    ]  # fmt: skip
    return np.mean(found, axis=1)


def attention(student: Sequence[Floats], teacher: Sequence[Floats]) -> Floats:
    """``attention_maps``: KL of a token's row, mean over heads and layers; maps ``[B, H, T, T]``, all tokens real."""
    layers = []
    for ours, theirs in zip(student, teacher, strict=True):
        texts, heads, length, _ = ours.shape
        layers.append([
            np.mean([rel_entr(theirs[b, h, t], ours[b, h, t]).sum() for h in range(heads)])
            for b in range(texts) for t in range(length)
        ])  # fmt: skip
    return np.mean(layers, axis=0)


def relations(student: Sequence[Floats], teacher: Sequence[Floats], heads: int) -> Floats:
    """``attention_relations``: queries, keys and values ``[B, T, D]`` of both (D may differ), all tokens real."""

    def rows(vectors: Floats, text: int, piece: int) -> Floats:
        width = vectors.shape[-1] // heads
        cut = vectors[text][:, piece * width : (piece + 1) * width]
        found: Floats = softmax(cut @ cut.T / np.sqrt(width), -1)
        return found

    texts, length, _ = student[0].shape
    found = np.zeros((texts, length))
    for ours, theirs in zip(student, teacher, strict=True):
        for text in range(texts):
            for piece in range(heads):
                found[text] += _kl(rows(theirs, text, piece), rows(ours, text, piece)) / heads
    return found.ravel()


def contrastive(student: Floats, teacher: Floats, temperature: float) -> Floats:
    """``contrastive_scores``: KL between the softmaxes of a text's cosines to the others."""
    found = []
    for i in range(len(student)):
        q, p = (
            softmax([(1 - distance.cosine(side[i], side[j])) / temperature for j in range(len(side)) if j != i])
            for side in (student, teacher)
        )  # fmt: skip
        found.append(rel_entr(p, q).sum())
    return np.array(found)


# ---- the same in torch, for gradients over the whole vocabulary -----------------------------------------------------


def _div(of: Tensor, to: Tensor) -> Tensor:
    """KL(of ‖ to) by torch's own function, which takes them the other way round."""
    return F.kl_div(to, of, reduction="none", log_target=True).sum(-1)


def _torch_jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    if beta in (0, 1):
        return _div(q, p) if beta else _div(p, q)
    mixture = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return beta * _div(p, mixture) + (1 - beta) * _div(q, mixture)


def _torch_alpha_beta(p: Tensor, q: Tensor, alpha: float, beta: float) -> Tensor:
    both, p, q = alpha + beta, p.exp(), q.exp()
    return -(p**alpha * q**beta - alpha / both * p**both - beta / both * q**both).sum(-1) / (alpha * beta)


_LOGS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "forward_kl": (2, _div),
    "reverse_kl": (2, lambda p, q: _div(q, p)),
    "jsd": (2, _torch_jsd),
    "skew_kl": (2, lambda p, q, alpha: _div(p, (alpha * p.exp() + (1 - alpha) * q.exp()).log())),
    "skew_reverse_kl": (2, lambda p, q, alpha: _div(q, (alpha * q.exp() + (1 - alpha) * p.exp()).log())),
    "total_variation": (1, lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2),
    "alpha_beta": (2, _torch_alpha_beta),
    "universal_logit": (1, lambda p, q: (p.exp().sort().values - q.exp().sort().values).abs().sum(-1)),
}


def _of_logs(power: int, divergence: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(student: Tensor, teacher: Tensor, _ids: Tensor, temperature: float, *parameters: float) -> Tensor:
        p, q = (F.log_softmax(logits / temperature, -1) for logits in (teacher, student))
        return temperature**power * divergence(p, q, *parameters)

    return loss


GRADIENTS: dict[str, Callable[..., Tensor]] = {
    **{name: _of_logs(*row) for name, row in _LOGS.items()},
    "logit_mse": lambda student, teacher, _ids, _temperature: (student - teacher).square().mean(-1),
    "cross_entropy": lambda student, _teacher, ids, _temperature: F.cross_entropy(student, ids, reduction="none"),
}
"""As :data:`VALUES`, on dense tensors that autograd can go through."""
