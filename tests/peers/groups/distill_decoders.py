"""What distillation brings a halved language model beyond plain training on the same text."""

from __future__ import annotations

import numpy as np
from scipy.stats import t as student_t

from ..context import Context
from ..quality import train
from ..registry import Taken, figure

RECIPE = "smollm2-half"
SEEDS = 3
PEER = "the same student, text, tokens and settings with cross-entropy alone"


@figure(
    "smollm2_kd_vs_ce", group="distill", title="SmolLM2 30 -> 15 layers: held-out perplexity, distilled over plainly "
    "trained", unit="ratio", limit=1.0, peer=PEER, slow="an hour on two cores",
)  # fmt: skip
def smollm2_kd_vs_ce(context: Context, variant: str) -> Taken:
    """The interval is that between the nearest and between the farthest ends of both sides' 95 % intervals over seeds:
    it is below 1 exactly when they are separate."""
    sides: dict[str, list[dict[str, float]]] = {"forward_kl": [], "cross_entropy": []}
    steps = 0
    for seed in range(SEEDS):
        for loss, taken in sides.items():
            result = train(context, RECIPE, "decoder", loss={loss: 1.0}, seed=seed).result
            taken.append(dict(result.dev_after))
            steps = result.steps
    ends = {loss: _interval([one["cross_entropy"] for one in taken]) for loss, taken in sides.items()}
    (mean, low, high), (plain, plain_low, plain_high) = ends["forward_kl"], ends["cross_entropy"]
    fidelity = ", ".join(
        f"KL to the teacher {np.mean([one['kl'] for one in taken]):.3f} and top-1 agreement "
        f"{np.mean([one['top1_agreement'] for one in taken]):.3f} with {loss}"
        for loss, taken in sides.items()
    )
    how = (
        f"exp of the difference of mean cross-entropies, {mean:.4f} and {plain:.4f} nats a token of held-out text; "
        f"{RECIPE}.toml: {steps} steps, {SEEDS} seeds each, equal initial weights and tokens; {fidelity}; interval: "
        "from the nearest and farthest ends of both 95 % intervals over seeds (Student's t)"
    )
    interval = (float(np.exp(low - plain_high)), float(np.exp(high - plain_low)))
    return Taken(float(np.exp(mean - plain)), how, interval, void="a tiny model" if context.tiny else "")


def _interval(values: list[float]) -> tuple[float, float, float]:
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(student_t.ppf(0.975, len(values) - 1)) * spread / len(values) ** 0.5
    return mean, mean - half, mean + half
