"""``vocab_trim_ours.py SPEC.json``: what trimming a decoder's vocabulary to one domain removes, and what it keeps.

SPEC: ``teacher`` (model folder), ``train`` and ``held_out`` texts, ``size`` (tokens to keep), ``positions`` (how many
predictions to compare at least), ``window`` (tokens of a text at most), ``student_layers``. Prints one JSON line.

Whole teacher and trimmed copy each read each held-out text in their own tokens. A place counts as *coinciding* when
both have read the same tokens up to there, so that only the answer can differ: the teacher's favourite is agreed on
when the copy still has it. *Aligned* places are the wider circle: both end the same token at the same character there,
whatever they read before (words that fell into smaller pieces among it).
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgestill.checkpoints import load_tokenizer, load_torch, open_model
from edgestill.distill.align import align_positions, encode_spans
from edgestill.distill.coverage import measure_coverage
from edgestill.distill.student import StudentPlan, choose_layers
from edgestill.distill.vocabulary import plan_vocabulary, trim_embeddings
from edgestill.distill.vocabulary_tokenizer import trim_tokenizer
from edgestill.recipe import StudentConfig


def measure(
    teacher: Path, train: Sequence[str], held_out: Sequence[str], *, size: int, positions: int, window: int,
    student_layers: int,
) -> dict[str, Any]:  # fmt: skip
    """Shares removed (of the teacher's parameters and of a shallower student's), agreement and coverage."""
    folder, full = open_model(teacher), load_tokenizer(teacher)
    keep = plan_vocabulary(folder, full, train, size)
    trimmed = trim_tokenizer(full, keep)
    whole, cut = load_torch(teacher), load_torch(teacher)
    trim_embeddings(cut, keep)
    known = np.asarray(keep)
    coinciding: list[bool] = []
    aligned: list[bool] = []
    read = 0
    with torch.inference_mode():
        for text in held_out:
            if len(coinciding) >= positions:
                break
            theirs, ours = encode_spans(full, text), encode_spans(trimmed, text)
            if len(theirs.ids) < 2:
                continue
            first, second = theirs.ids[:window], ours.ids[:window]
            said = whole(input_ids=torch.from_numpy(first)[None]).logits[0]
            favourites = said[:, : len(full)].argmax(-1).numpy()
            answers = known[cut(input_ids=torch.from_numpy(second)[None]).logits[0].argmax(-1).numpy()]
            length = min(len(first), len(second))
            same = np.cumprod(first[:length] == known[second[:length]]).astype(bool)
            coinciding += (favourites[:length] == answers[:length])[same].tolist()
            for here, there in align_positions(ours, theirs):
                if max(here, there) < window and known[ours.ids[here]] == theirs.ids[there]:
                    aligned.append(bool(favourites[there] == answers[here]))
            read += 1
    layers = choose_layers(StudentConfig(layers=student_layers), folder.layers)
    plans = [StudentPlan.of_layers(folder, layers, vocabulary).parameters for vocabulary in ((), keep)]
    parameters = [sum(weight.numel() for weight in model.parameters()) for model in (whole, cut)]
    coverage = measure_coverage(full, trimmed, keep, held_out)
    return {
        "tokens": len(keep),
        "of": len(full),
        "removed_of_teacher": 1 - parameters[1] / parameters[0],
        "removed_of_student": 1 - plans[1] / plans[0],
        "agreement_coinciding": float(np.mean(coinciding)),
        "coinciding_positions": len(coinciding),
        "agreement_aligned": float(np.mean(aligned)),
        "aligned_positions": len(aligned),
        "texts_read": read,
        "coverage": coverage.facts() if coverage else None,
    }


if __name__ == "__main__":
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    teacher_folder = Path(spec.pop("teacher"))
    print(json.dumps(measure(teacher_folder, spec.pop("train"), spec.pop("held_out"), **spec)))
