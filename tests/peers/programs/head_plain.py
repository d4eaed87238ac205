"""``head_plain.py SPEC.json OUT.json``: forward and backward of a KL over full logits, by torch's own functions.

The leanest way that one writes by hand: each block of logits is dropped as soon as its logarithm stands. Also what
both sides share: a head [V, D] with states of the student and of the teacher before it.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
from resident import mark, peak


def read(argument: str) -> dict[str, Any]:
    """The spec of both sides: ``vocab_size``, ``width``, ``tokens``, ``top_k`` (0: live teacher)."""
    found: dict[str, Any] = json.loads(Path(argument).read_text())
    return found


def make(spec: dict[str, Any]) -> tuple[torch.nn.Linear, torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """Heads of student and teacher, states ``[N, D]`` of both: the same numbers in every process."""
    torch.manual_seed(0)
    heads = [torch.nn.Linear(spec["width"], spec["vocab_size"], bias=False) for _ in range(2)]
    states = [torch.randn(spec["tokens"], spec["width"]) * 2 for _ in range(2)]
    return heads[0], heads[1].requires_grad_(False), states[0].requires_grad_(), states[1]


def top(head: torch.nn.Linear, states: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a cache holds: ids and log-probabilities ``[N, k]`` of the likeliest, the log of the rest's mass ``[N]``."""
    ids, values, tails = [], [], []
    for block in states.split(64):
        log = F.log_softmax(head(block).double(), -1)
        best = log.topk(k, -1)
        ids.append(best.indices)
        values.append(best.values.float())
        tails.append(log.scatter(-1, best.indices, -torch.inf).logsumexp(-1).float())
    return torch.cat(ids), torch.cat(values), torch.cat(tails)


def live(head: torch.nn.Linear, teacher: torch.nn.Linear, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student), mean over tokens."""
    with torch.no_grad():
        target = F.log_softmax(teacher(theirs), -1)
    return F.kl_div(F.log_softmax(head(ours), -1), target, log_target=True, reduction="sum") / len(ours)


def cached(head: torch.nn.Linear, ours: torch.Tensor, kept: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The same over k + 1 buckets."""
    ids, values, tail = kept
    log = F.log_softmax(head(ours), -1)
    rest = log.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    target = torch.cat([values, tail[:, None]], -1)
    found = torch.cat([log.gather(-1, ids), rest], -1)
    return F.kl_div(found, target, log_target=True, reduction="sum") / len(ours)


def report(out: str, before: int, value: torch.Tensor, head: torch.nn.Linear, ours: torch.Tensor) -> None:
    """Value, norms of both gradients, and how far the memory rose."""
    rise = peak() - before
    assert head.weight.grad is not None
    assert ours.grad is not None
    norms = [float(grad.double().norm()) for grad in (head.weight.grad, ours.grad)]
    Path(out).write_text(json.dumps({"peak_bytes": rise, "value": float(value), "norms": norms}))


def main() -> None:
    spec = read(sys.argv[1])
    head, teacher, ours, theirs = make(spec)
    with torch.no_grad():
        kept = top(teacher, theirs, spec["top_k"]) if spec["top_k"] else ()

    def loss(head: torch.nn.Linear, ours: torch.Tensor) -> torch.Tensor:
        return cached(head, ours, kept) if kept else live(head, teacher, ours, theirs)

    few = ours[:8].detach().requires_grad_()
    if not kept:  # libraries take their workspaces before the mark
        live(head, teacher, few, theirs[:8]).backward()
    else:
        cached(head, few, tuple(part[:8] for part in kept)).backward()
    head.weight.grad = None
    before = mark()
    value = loss(head, ours)
    value.backward()
    report(sys.argv[2], before, value.detach(), head, ours)


if __name__ == "__main__":
    main()
