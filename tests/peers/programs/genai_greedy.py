"""``genai_greedy.py FOLDER``: onnxruntime-genai opens an artifact by its genai_config.json and decodes greedily.

Imports nothing of edgestill.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import onnxruntime_genai
from lines import serve

model = onnxruntime_genai.Model(sys.argv[1])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """``{prompt, count}`` -> ``{ids}``; it ends earlier where the model ends."""
    prompt, count = request["prompt"], request["count"]
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    ids: list[int] = []
    while not generator.is_done() and len(ids) < count:
        generator.generate_next_token()
        ids.append(int(generator.get_next_tokens()[0]))
    return {"ids": ids}


serve(onnxruntime_genai.__version__, answer)
