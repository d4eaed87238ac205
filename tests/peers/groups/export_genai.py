"""Our ONNX decoders in onnxruntime-genai: it opens them by their genai_config.json and says the same words."""

from __future__ import annotations

import numpy as np

from edgestill.runtimes.ort_session import OrtSession
from edgestill.runtimes.session import SessionOptions

from ..context import Context
from ..environments import ONNXRUNTIME_GENAI
from ..processes import Conversation
from ..registry import Taken, figure

VARIANTS = ("onnx:fp32", "onnx:int4", "onnx:fp32-portable")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 24, 32


@figure(
    "onnx_genai_greedy", group="export", title="our ONNX decoder in onnxruntime-genai, equal greedy tokens",
    unit="share", limit=1.0, sense="at_least", variants=VARIANTS, peer="onnxruntime-genai 0.18",
    environment=ONNXRUNTIME_GENAI, slow="it exports and decodes SmolLM2 three times",
)  # fmt: skip
def onnx_genai_greedy(context: Context, variant: str) -> Taken:
    prepared = context.environment(ONNXRUNTIME_GENAI)
    model = context.model("decoder")
    chooser = np.random.default_rng(0)
    prompts = chooser.integers(min(100, model.vocab_size // 2), model.vocab_size, (PROMPTS, PROMPT_TOKENS)).tolist()
    equal = total = 0
    with context.artifact("decoder", variant) as artifact:
        session = OrtSession(artifact, SessionOptions(threads=context.threads))
        with Conversation(prepared.python, "genai_greedy", [artifact.path], context.threads) as genai:
            for prompt in prompts:
                theirs = genai.ask({"prompt": prompt, "count": NEW_TOKENS})["ids"]
                ours = [token.id for token in session.decode(prompt, len(theirs))]
                equal += sum(a == b for a, b in zip(ours, theirs, strict=True))
                total += len(theirs)
        session.close()
    return Taken(equal / total, f"{total} tokens after {PROMPTS} random prompts, {context.model_note('decoder')}")
