"""``jsd_trl.py IN.npz OUT.npz``: TRL's own ``generalized_jsd_loss`` of given logits, a value a token, in fp32."""

import os
import sys

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import numpy as np
import torch
import trl
from trl.experimental.gkd import GKDTrainer

given = np.load(sys.argv[1])
student, teacher = (torch.from_numpy(given[name]) for name in ("student", "teacher"))
found = [
    GKDTrainer.generalized_jsd_loss(
        student, teacher, beta=float(beta), temperature=float(temperature), reduction="none"
    ).sum(-1)  # its means divide by the number of rows, or also by the vocabulary
    for beta, temperature in given["settings"]
]  # fmt: skip
np.savez(sys.argv[2], values=torch.stack(found).numpy(), version=trl.__version__)
