"""Our Core ML programs, executed as they are written, against torch: exactly in float32, the same words in float16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgestill.checkpoints import load_tokenizer, load_torch
from edgestill.runtimes.coreml_session import MilSession, causal_mask
from edgestill.runtimes.mil.interpreter import Interpreter
from edgestill.runtimes.milproto import load_program
from edgestill.runtimes.session import SessionOptions

from ..context import Context
from ..models import Kind
from ..quality import held_out_data
from ..registry import Taken, figure

_POSITIONS, _EXACT_POSITIONS, _WINDOW, _SENTENCES = 2000, 512, 500, 64
_TINY_WINDOW = 32
_MIDWAY = 2e-6  # of the largest key or value of a layer: what float32 sums in another order differ by
_SLOW = "five minutes: SmolLM2 is converted and executed"

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@figure(
    "mil_fp32", group="export", title="largest difference of Core ML programs in float32 from torch", unit="difference",
    limit=1e-5, peer="transformers in torch, float32", slow=_SLOW,
)  # fmt: skip
def mil_fp32(context: Context, variant: str) -> Taken:
    """Of unit vectors the difference itself; of logits (which reach 30) the difference over the largest of them."""
    vectors = _vectors(context)
    logits, taken = _logits(context)
    how = (
        f"{vectors:.2g} between vectors of length 1 ({_sentences(context)} texts, {context.model_note('encoder')}); "
        f"{logits:.2g} of the largest logit ({_exact(context)} positions in windows of {_window(context)}, "
        f"{context.model_note('decoder')}; in torch, too, keys and values are rounded to float16, since Core ML has no "
        f"other states: {taken} of them, which lie midway between two, to the side that the program took); interpreter "
        "of the saved package"
    )
    return Taken(max(vectors, logits), how, void=context.void if context.tiny else "")


@figure(
    "mil_fp16_top1", group="export", title="Core ML in float16, the same first choice as torch in float32",
    unit="share", limit=0.995, sense="at_least", peer="transformers in torch, float32", slow=_SLOW,
)  # fmt: skip
def mil_fp16_top1(context: Context, variant: str) -> Taken:
    equal = total = 0
    closest: list[float] = []
    with _session(context, "decoder", "coreml:fp16") as session:
        model = load_torch(context.model("decoder").path)
        for ids in _windows(context, _positions(context)):
            want, got = _torch_logits(model, ids), _ours(session, ids)
            chosen = got.argmax(-1)
            same = want.argmax(-1) == chosen
            equal, total = equal + int(same.sum()), total + len(same)
            closest += (want.max(-1) - want[np.arange(len(chosen)), chosen])[~same].tolist()
        overflow = session.first_overflow
    where = f"; float16 is left by {overflow.kind} {overflow.name}" if overflow else "; nothing leaves float16"
    apart = f", where torch's logits differ by at most {max(closest):.2g}" if closest else ""
    how = (
        f"{equal} of {total} positions of held-out web text in windows of {_window(context)}{apart}{where}; "
        f"{context.model_note('decoder')}, interpreter of the saved package"
    )
    return Taken(equal / total, how, void=context.void if context.tiny else "")


def _positions(context: Context) -> int:
    return 2 * _TINY_WINDOW if context.tiny else _POSITIONS


def _exact(context: Context) -> int:
    return 2 * _TINY_WINDOW if context.tiny else _EXACT_POSITIONS


def _window(context: Context) -> int:
    return _TINY_WINDOW if context.tiny else _WINDOW


def _sentences(context: Context) -> int:
    return 8 if context.tiny else _SENTENCES


@contextlib.contextmanager
def _session(context: Context, kind: Kind, to: str) -> Iterator[MilSession]:
    """A session over an artifact that is exported now and removed afterwards."""
    with context.artifact(kind, to) as artifact:
        session = MilSession(artifact, SessionOptions())
        yield session
        session.close()


def _vectors(context: Context) -> float:
    """The largest difference between sentence embeddings."""
    import torch

    torch.set_num_threads(context.threads)
    model = load_torch(context.model("encoder").path)
    tokenizer = load_tokenizer(context.model("encoder").path)
    worst = 0.0
    with _session(context, "encoder", "coreml:fp32") as session:
        longest = session.info().max_length
        for text in held_out_data(context, "minilm-hour").split("test")[: _sentences(context)]:
            ids = np.asarray([tokenizer.encode(text, truncation=True, max_length=longest)])
            with torch.inference_mode():
                want = model(torch.tensor(ids), torch.ones(1, ids.shape[1], dtype=torch.long)).numpy()
            worst = max(worst, float(np.abs(session.forward(ids, np.ones_like(ids)) - want).max()))
    return worst


def _logits(context: Context) -> tuple[float, int]:
    """The largest difference between logits, over the largest logit of torch; and how many keys and values were midway
    between two float16 numbers."""
    worst = largest = 0.0
    taken = 0
    with context.artifact("decoder", "coreml:fp32") as artifact:
        interpreter = Interpreter(load_program(artifact.entry))
        model = load_torch(context.model("decoder").path)
        for ids in _windows(context, _exact(context)):
            state, length = interpreter.new_state(), ids.shape[1]
            got = interpreter.run({"input_ids": ids, "causal_mask": causal_mask(length, length)}, state)["logits"][0]
            cache = _half_cache(state)
            want = _torch_logits(model, ids, cache)
            worst = max(worst, float(np.abs(got - want).max()))
            largest = max(largest, float(np.abs(want).max()))
            taken += cache.midway
    return worst / largest, taken


def _half_cache(state: Mapping[str, Floats]) -> Any:
    """A cache of transformers that rounds to float16. The last digits of float32 decide to which side what lies midway
    (within ``_MIDWAY`` of the largest) goes: there ``state``, the program's own cache, is followed."""
    import torch
    from transformers import DynamicCache

    class HalfCache(DynamicCache):
        midway = 0

        def update(self, key_states: Any, value_states: Any, layer_idx: int, *rest: Any, **more: Any) -> Any:
            pair = []
            for name, exact in (("key_cache", key_states), ("value_cache", value_states)):
                own = exact.half().float()
                theirs = torch.from_numpy(state[name][layer_idx][:, :, : exact.shape[2]])
                tied = (own != theirs) & ((exact - (own + theirs) / 2).abs() <= _MIDWAY * exact.abs().max())
                tied &= (own - theirs).abs() <= 2.0**-10 * own.abs()  # neighbours
                self.midway += int(tied.sum())
                pair.append(torch.where(tied, theirs, own))
            return super().update(pair[0], pair[1], layer_idx, *rest, **more)

    return HalfCache()


def _windows(context: Context, positions: int) -> Iterator[Ints]:
    """``positions`` tokens of held-out text in windows ``[1, T]``, texts one after the other."""
    tokenizer = load_tokenizer(context.model("decoder").path)
    ids: list[int] = []
    for text in held_out_data(context, "smollm2-half").split("test"):
        ids += tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= positions:
            break
    assert len(ids) >= positions, f"the held-out text has {len(ids)} tokens, not {positions}"
    for begin in range(0, positions, _window(context)):
        yield np.asarray([ids[begin : min(begin + _window(context), positions)]])


def _ours(session: MilSession, ids: Ints) -> Floats:
    return session.forward(ids, np.ones_like(ids))[0]


def _torch_logits(model: Any, ids: Ints, cache: Any = None) -> Floats:
    """Logits ``[T, V]`` of transformers' own model."""
    import torch

    with torch.inference_mode():
        output = model(torch.tensor(ids), past_key_values=cache, use_cache=cache is not None)
        found: Floats = output.logits[0].float().numpy()
    return found
