"""``head_ours.py SPEC.json OUT.json``: forward and backward of our chunked loss; see ``head_plain.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from head_plain import make, read, report, top
from resident import mark

from edgestill.distill.chunked import chunked_head
from edgestill.distill.losses import LOSSES, reduce_step
from edgestill.distill.signal import Dense, Sparse

spec = read(sys.argv[1])
head, teacher, ours, theirs = make(spec)
kl = LOSSES["forward_kl"]
with torch.no_grad():
    kept = Sparse(*top(teacher, theirs, spec["top_k"])) if spec["top_k"] else None


def loss(head: torch.nn.Linear, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    count = len(ours)

    def chunk(logits: torch.Tensor, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            signal = kept.rows(begin, end) if kept else Dense(teacher(theirs[begin:end]))
        value = reduce_step(kl.values(logits, signal, torch.ones(len(logits), dtype=torch.bool)), count)
        return value, value.detach()[None]

    return chunked_head(ours, head, chunk)[0]


few = ours[:8].detach().requires_grad_()
loss(head, few, theirs[:8]).backward()
head.weight.grad = None
before = mark()
value = loss(head, ours, theirs)
value.backward()
report(sys.argv[2], before, value.detach(), head, ours)
