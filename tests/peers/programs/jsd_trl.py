"""``jsd_trl.py IN.npz OUT.npz``: TRL's own ``generalized_jsd_loss`` a value a token, in float64 and fp32."""

import os
import sys

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import numpy as np
import torch
import trl
from trl.experimental.gkd import GKDTrainer

given = np.load(sys.argv[1])
settings = [(float(beta), float(temperature)) for beta, temperature in given["settings"]]
found = {}
for kind, dtype in (("values", torch.float64), ("rounded", torch.float32)):
    student, teacher = (torch.from_numpy(given[name]).to(dtype) for name in ("student", "teacher"))
    rows = [
        GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="none").sum(-1)
        for beta, temperature in settings
    ]  # summed here: its means divide by the number of rows, or also by the vocabulary
    found[kind] = torch.stack(rows).numpy()
np.savez(sys.argv[2], version=trl.__version__, **found)
