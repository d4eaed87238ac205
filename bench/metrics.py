"""Every quantity that the bench writes down: one table with unit, direction, meaning and how it is printed.

>>> METRICS["kl"].unit, METRICS["kl"].better
('nats/token', 'lower')
>>> METRICS["size_bytes"].show(22_700_000)
'22.7 MB'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ..artifact import CLASS_TASKS, Task
from ..errors import RecipeError, nearest

__all__ = ["METRICS", "Metric", "find_metric"]

_ALL: tuple[Task, ...] = get_args(Task)
_EMBEDDING: tuple[Task, ...] = ("feature-extraction",)
_CLASSES: tuple[Task, ...] = ("text-classification",)
_WORDS: tuple[Task, ...] = ("token-classification",)
_GENERATION: tuple[Task, ...] = ("text-generation",)
_DISTRIBUTION: tuple[Task, ...] = (*CLASS_TASKS, "text-generation")


@dataclass(frozen=True)
class Metric:
    """One quantity. ``format`` is a Python format specification; ``tasks`` are those that it exists for."""

    name: str
    unit: str
    better: Literal["higher", "lower"]
    format: str
    description: str
    kind: Literal["accuracy", "speed", "memory", "size", "energy", "sensor", "instructions"]
    tasks: tuple[Task, ...] = _ALL

    def show(self, value: float) -> str:
        """``value`` for a human: bytes in decimal MB or GB, ratios in per cent, else by ``format`` with the unit."""
        if self.unit == "bytes":
            return f"{value / 1e9:.2f} GB" if abs(value) >= 1e9 else f"{value / 1e6:.1f} MB"
        if self.unit == "instr":
            return f"{value / 1e6:,.2f} M"
        text = format(value, self.format)
        if self.unit in ("ratio", "fraction", "cosine", "correlation"):
            return text
        return f"{text} {self.unit}"

    def is_better(self, value: float, than: float) -> bool:
        """Whether ``value`` is strictly better ``than`` another one."""
        return value > than if self.better == "higher" else value < than


def _table(*metrics: Metric) -> Mapping[str, Metric]:
    return {metric.name: metric for metric in metrics}


METRICS: Mapping[str, Metric] = _table(
    # accuracy, all taken on the artifact in its runtime, on the same token ids as the teacher
    Metric("kl", "nats/token", "lower", ".4g", "mean KL(reference ‖ artifact) per predicted token, per example "
           "for a classifier of texts, or per token for one of tokens", "accuracy", _DISTRIBUTION),
    Metric("kl_median", "nats/token", "lower", ".4g", "median of KL(reference ‖ artifact)", "accuracy", _DISTRIBUTION),
    Metric("kl_p99", "nats/token", "lower", ".4g", "99th percentile of KL(reference ‖ artifact)", "accuracy",
           _DISTRIBUTION),
    Metric("kl_max", "nats/token", "lower", ".4g", "largest KL(reference ‖ artifact) of a token or example", "accuracy",
           _DISTRIBUTION),
    Metric("top1_agreement", "fraction", "higher", ".1%", "how often artifact and reference choose the same first "
           "token or label", "accuracy", _DISTRIBUTION),
    Metric("top5_agreement", "fraction", "higher", ".1%", "how often the reference's first token is among the "
           "artifact's five best", "accuracy", _GENERATION),
    Metric("delta_p", "fraction", "higher", "+.3%", "mean change of the probability of the true next token, artifact "
           "less reference; its percentiles show both tails", "accuracy", _GENERATION),
    Metric("delta_p_rms", "fraction", "lower", ".3%", "root of the mean square of that change", "accuracy",
           _GENERATION),
    Metric("perplexity", "perplexity", "lower", ".4g", "exp of the mean negative log-likelihood of the true next "
           "token", "accuracy", _GENERATION),
    Metric("perplexity_ratio", "ratio", "lower", ".4f", "perplexity of the artifact over that of the reference",
           "accuracy", _GENERATION),
    Metric("target_perplexity", "perplexity", "lower", ".4g", "exp of the mean negative log-likelihood of a whole "
           "cloze target", "accuracy", _GENERATION),
    Metric("cosine", "cosine", "higher", ".5f", "mean cosine of artifact and reference embeddings (only where both "
           "have the same size)", "accuracy", _EMBEDDING),
    Metric("spearman", "correlation", "higher", ".4f", "Spearman rank correlation of the cosine similarities of all "
           "pairs of sentences, artifact against reference", "accuracy", _EMBEDDING),
    Metric("sts_spearman", "correlation", "higher", ".4f", "Spearman rank correlation of the cosines of pairs of texts "
           "with the similarities that people gave them", "accuracy", _EMBEDDING),
    Metric("accuracy", "fraction", "higher", ".1%", "labels found right on held-out examples (embeddings: by a linear "
           "probe fitted on the artifact's own embeddings; text generation: choices by likelihood per byte, or the "
           "target of a cloze by greedy decoding)", "accuracy"),
    Metric("f1", "fraction", "higher", ".1%", "F1 over entities, whose first word, last word and kind must be right "
           "(CoNLL-2003)", "accuracy", _WORDS),
    Metric("accuracy_raw", "fraction", "higher", ".1%", "choices found right by plain likelihood, not divided by their "
           "length", "accuracy", _GENERATION),
    Metric("accuracy_ratio", "ratio", "higher", ".1%", "accuracy over the teacher's on the same examples", "accuracy"),
    Metric("next_token_accuracy", "fraction", "higher", ".1%", "how often the first choice is the true next token",
           "accuracy", _GENERATION),
    Metric("ece", "fraction", "lower", ".2%", "expected calibration error of the first choice (next token, class, or "
           "label of the probe), 15 bins of equal width", "accuracy"),
    # speed
    Metric("latency_ms", "ms", "lower", ".2f", "one forward pass of the timed input", "speed"),
    Metric("first_inference_ms", "ms", "lower", ".2f", "the first forward pass after loading", "speed"),
    Metric("load_ms", "ms", "lower", ".1f", "opening the artifact, files in the page cache", "speed"),
    Metric("load_cold_ms", "ms", "lower", ".1f", "opening the artifact, page cache evicted", "speed"),
    Metric("prefill_tokens_per_s", "tok/s", "higher", ".1f", "prompt tokens a second", "speed", _GENERATION),
    Metric("decode_tokens_per_s", "tok/s", "higher", ".1f", "generated tokens a second, after the first", "speed",
           _GENERATION),
    Metric("time_to_first_token_ms", "ms", "lower", ".1f", "prompt in, first token out", "speed", _GENERATION),
    Metric("token_latency_ms", "ms", "lower", ".2f", "each generated token after the first", "speed", _GENERATION),
    Metric("decode_at_depth_tokens_per_s", "tok/s", "higher", ".1f", "generated tokens a second after as many tokens "
           "as the row's context says", "speed", _GENERATION),
    Metric("import_ms", "ms", "lower", ".1f", "checking the artifact's hashes and loading the runtime's libraries, "
           "before the artifact is opened", "speed"),
    Metric("latency_p90_ms", "ms", "lower", ".2f", "90th percentile of latency", "speed"),
    Metric("latency_p95_ms", "ms", "lower", ".2f", "95th percentile of latency", "speed"),
    Metric("latency_p99_ms", "ms", "lower", ".2f", "99th percentile of latency", "speed"),
    Metric("sustained_latency_ms", "ms", "lower", ".2f", "the same inference (or generation) for a long time", "speed"),
    Metric("sustained_speed_ratio", "ratio", "higher", ".3f", "speed in the last quarter of a long run over that in "
           "the first quarter", "speed"),
    # energy and what explains a slow run; of the whole processor, not of the worker alone
    Metric("energy_per_run_j", "J", "lower", ".4g", "energy of processor and memory in one forward pass", "energy"),
    Metric("energy_per_token_j", "J", "lower", ".4g", "energy of processor and memory for one generated token, its "
           "share of the prompt included", "energy", _GENERATION),
    Metric("temperature_c", "°C", "lower", ".1f", "hottest thermal zone after the run", "sensor"),
    Metric("frequency_mhz", "MHz", "higher", ",.0f", "mean clock of the cores after the run", "sensor"),
    Metric("throttling_events", "events", "lower", ".0f", "times that the processor throttled itself in the run",
           "sensor"),
    # executed on an emulated core, which has no clock
    Metric("instructions", "instr", "lower", ",.0f", "executed instructions of one forward pass of the timed input",
           "instructions"),
    Metric("instructions_dot", "instr", "lower", ",.0f", "of these int8 dot products (SDOT, UDOT, USDOT, SUDOT)",
           "instructions"),
    Metric("instructions_mmla", "instr", "lower", ",.0f", "of these matrix products (SMMLA, UMMLA, USMMLA, BFMMLA)",
           "instructions"),
    Metric("instructions_fmla", "instr", "lower", ",.0f", "of these floating-point multiply-adds (FMLA, FMADD …)",
           "instructions"),
    Metric("instructions_load", "instr", "lower", ",.0f", "of these loads", "instructions"),
    Metric("instructions_store", "instr", "lower", ",.0f", "of these stores", "instructions"),
    Metric("instructions_other", "instr", "lower", ",.0f", "of these all others", "instructions"),
    Metric("decode_instructions", "instr", "lower", ",.0f", "executed instructions of one decoded token, after the "
           "first", "instructions", _GENERATION),
    # memory of the worker, minus that of its runtime without a model
    Metric("peak_memory_bytes", "bytes", "lower", ",.0f", "peak resident memory, baseline of the runtime subtracted",
           "memory"),
    Metric("peak_anonymous_bytes", "bytes", "lower", ",.0f", "peak anonymous memory, baseline subtracted", "memory"),
    Metric("peak_file_backed_bytes", "bytes", "lower", ",.0f", "peak file-backed (mapped) memory", "memory"),
    Metric("memory_share", "fraction", "lower", ".0%", "peak memory over what the device, or one process on it, has",
           "memory"),
    Metric("baseline_bytes", "bytes", "lower", ",.0f", "memory of the runtime before it opens the artifact", "memory"),
    Metric("load_memory_bytes", "bytes", "lower", ",.0f", "peak anonymous memory while opening the artifact, baseline "
           "subtracted", "memory"),
    Metric("run_memory_bytes", "bytes", "lower", ",.0f", "peak anonymous memory while running, baseline subtracted",
           "memory"),
    Metric("peak_rss_bytes", "bytes", "lower", ",.0f", "peak resident memory of the whole process, by the kernel's own "
           "count: what `time -v` shows", "memory"),
    # size
    Metric("download_bytes", "bytes", "lower", ",.0f", "what an app ships, each file deflated", "size"),
    Metric("model_bytes", "bytes", "lower", ",.0f", "the model's files, without tokenizer and templates", "size"),
    Metric("size_bytes", "bytes", "lower", ",.0f", "everything that ships to a device", "size"),
    Metric("bits_per_weight", "bits", "lower", ".2f", "model bytes * 8 over parameters", "size"),
)  # fmt: skip


def find_metric(name: str) -> Metric:
    """The metric called ``name``; :class:`RecipeError` with the nearest name when there is none."""
    if name not in METRICS:
        raise RecipeError(f"unknown metric {name!r}", hint=nearest(name, list(METRICS)))
    return METRICS[name]
