"""Is an artifact what it says it is? Hashes, types, the weight map, every weight on its grid, the tokenizer."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..artifact import Artifact
from ..errors import EdgestillError, MissingDependency, Unsupported
from .limits import GridLimit, compensated_limit, grid_limit, is_budget
from .records import Check
from .runtime_tokenizer import runtime_tokens

__all__ = [
    "LLAMA_CPP_DIFFERS",
    "NASTY_TEXTS",
    "WeightError",
    "check_histogram",
    "check_sizes",
    "check_tokenizer",
    "check_weights",
    "weight_error",
]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

NASTY_TEXTS = (
    "Hello, World!", "  two  spaces and\ttabs\n\nand lines \r\n", "naïve café — “quotes” … ½ ﬁ", "ÀÉÎ İstanbul ß ẞ",
    "日本語のテキスト 中文", "السلام عليكم שלום", "🙂👩‍👩‍👧‍👦🇩🇪", "e\u0301 vs \u00e9, \u200b\u00a0\ufeff",
    "[CLS] [SEP] [MASK] <s> </s> <|endoftext|> <|im_start|>user", "3.14159 1,000,000 0x1F 2026-11-24",
    "don't can't I'll they've", "!?#$%&*()_+-=[]{}|;:'\",.<>/\\`~", "\x00\x07\x1b", "", " ", "\n",
    "https://example.org/a?b=c&d=e#f user@example.org", "CamelCaseWord snake_case_word kebab-case",
    "ｆｕｌｌｗｉｄｔｈ", "def f(x):\n    return {**x, 'a': [1, 2][0] or 3.5e-7}  # y != z\n\tpass\n",
    "for (int i = 0; i < n; ++i) {\r\n\t*p->next = &a[i] << 2;\r\n}\r\n",
    "<a href='x'>&nbsp;</a> <!-- --> $HOME \\n %s",
)  # fmt: skip


# What llama.cpp's WordPiece does otherwise than the tokenizers library, whatever the file (seen in 0.3.36).
LLAMA_CPP_DIFFERS = {
    "한국어 문장": "Hangul (it does not decompose syllables)",
    "a" * 300: "words over 100 letters (it has no limit)",
}


@dataclass(frozen=True)
class WeightError:
    """How far a stored tensor is from its float weight, each as a share of what its grid allows (1 is the limit):
    the worst weight, the root mean square, and the common factor that a wrong scale would leave."""

    largest: float
    rms: float
    gain: float

    @property
    def worst(self) -> float:
        """The largest of the three."""
        return max(self.largest, self.rms, self.gain)

    @property
    def what(self) -> str:
        """Which of the three is worst."""
        names = {self.largest: "largest error", self.rms: "mean error", self.gain: "scale"}
        return names[self.worst]


def check_histogram(artifact: Artifact, payload: Any) -> Check:
    """The types that ``artifact.json`` claims are those in the file."""
    claimed = {name: (row.tensors, row.parameters, row.size_bytes) for name, row in
               artifact.manifest.dtype_histogram.items()}  # fmt: skip
    found = {name: (row.tensors, row.parameters, row.size_bytes) for name, row in payload.histogram().items()}
    differing = sorted(name for name in claimed.keys() | found.keys() if claimed.get(name) != found.get(name))
    reason = "the types read back from the payload are those of artifact.json"
    if differing:
        name = differing[0]
        reason = f"{name}: artifact.json says {claimed.get(name)} (tensors, parameters, bytes), file {found.get(name)}"
    return Check("dtype_histogram", "integrity", not differing, float(len(differing)), 0.0, unit="types", reason=reason)


def check_weights(artifact: Artifact, payload: Any, student: Path, *, complete: bool = True) -> list[Check]:
    """The weight map is complete, and every stored weight lies where its grid must put the student's.

    Two checks: ``weight_map`` (each parameter once; a tied embedding may be stored twice, and a vector of ones or
    zeros may be left out, since a converter may drop a multiplication by 1) and ``weights_on_grid``,
    whose value is the worst share of the grid's rounding bound, whose ``first_tensor`` is the first that breaks it,
    in the model's order. ``complete=False``: of an artifact of another tool, a parameter that was not found by name or
    value is told and not held against it.
    """
    from ..checkpoints import WEIGHTS_FILE, open_model, read_safetensors_header

    folder = open_model(student)
    header = read_safetensors_header(student / WEIGHTS_FILE)
    tensors = sorted(artifact.tensors(), key=lambda tensor: _natural(tensor.name))
    counts = Counter(tensor.name for tensor in tensors)
    head = "lm_head.weight"
    tied = {folder.embeddings_path} if folder.task == "text-generation" and head not in header else set()
    known = set(header) | ({head} if tied else set())
    lost = set(header) - set(counts)
    with _student_weights(student / WEIGHTS_FILE) as weights:
        lost = {name for name in lost if not _changes_nothing(weights.get_tensor(name))}
    told = sorted(lost, key=_natural) if not complete and len(lost) < len(header) else []
    problems = [(name, "is not mapped") for name in sorted(lost - set(told), key=_natural)]
    problems += [(name, "is not a parameter of the student") for name in sorted(set(counts) - known, key=_natural)]
    problems += [(name, f"is mapped {n} times") for name, n in sorted(counts.items())
                 if n > (2 if name in tied else 1)]  # fmt: skip
    reason = "every parameter of the student is stored once"
    if not complete:
        reason = f"{len(header) - len(lost)} of {len(header)} parameters of the student were found in it"
    if told:
        reason += f"; not applicable to {told[0]}" + (f" and {len(told) - 1} more" if told[1:] else "")
    if problems:
        reason = f"{problems[0][0]} {problems[0][1]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
    first = problems[0][0] if problems else None
    checks = [_check("weight_map", not problems, float(len(problems)), 0.0, "parameters", reason, first)]
    worst, worst_name, broken, why = 0.0, "", "", ""
    compensated = is_budget(artifact.manifest.quantisation)
    with _student_weights(student / WEIGHTS_FILE) as weights:
        for tensor in tensors:
            name = folder.embeddings_path if tensor.name == head and head not in header else tensor.name
            if name not in header:
                continue
            problem, share = _judge(payload, tensor, weights.get_tensor(name), name in folder.turned, compensated)
            if share > worst:
                worst, worst_name = share, tensor.name
            if share > 1 and not broken:
                broken, why = tensor.name, problem
    reason = "stored weights are the student's, rounded to their grid"
    if broken:
        reason = f"{broken}: {why}" + (f"; the worst is {worst_name}" if worst_name != broken else "")
    unit = "share of the rounding bound"
    checks.append(_check("weights_on_grid", not broken, min(worst, 1e9), 1.0, unit, reason, broken or None))
    return checks


def weight_error(grid: str, weight: Floats, decoded: Floats, *, compensated: bool = False) -> WeightError:
    """``decoded`` against ``weight`` (same shape), by the limits of ``grid``; wider ones where codes are
    ``compensated`` (:func:`.limits.compensated_limit`).

    Raises :class:`Unsupported` for an unknown grid.
    """
    limit = grid_limit(grid)
    if limit is None:
        raise Unsupported(f"no rounding bound is known for the grid {grid!r}", hint="is it a newer artifact?")
    if compensated:
        limit = compensated_limit(limit)
    wide, near = weight.astype(np.float64), decoded.astype(np.float64)
    error = np.abs(near - wide)
    if not np.isfinite(error).all():
        return WeightError(np.inf, np.inf, np.inf)
    if limit.sparse:
        dropped = _dropped(wide, near, limit)
        if dropped > 1:
            return WeightError(dropped, 0.0, 0.0)
        wide = np.where(near == 0, 0.0, wide)
        kept = _of_kept(wide, near, limit)
        return dataclasses.replace(kept, largest=max(kept.largest, dropped))
    return _of_kept(wide, near, limit)


def _of_kept(wide: Doubles, near: Doubles, limit: GridLimit) -> WeightError:
    error = np.abs(near - wide)
    if limit.bits == 0:
        allowed = np.abs(wide) * limit.relative + limit.absolute
        if not allowed.any():
            return WeightError(np.inf if error.any() else 0.0, 0.0, 0.0)
        return WeightError(float((error / np.maximum(allowed, 1e-300)).max(initial=0)), 0.0, 0.0)
    if not wide.any():
        return WeightError(np.inf if error.any() else 0.0, 0.0, 0.0)
    steps = _steps(np.abs(wide), limit) + limit.absolute
    if limit.palette:
        largest = _off_the_nearest(wide, near, limit)
    else:
        largest = float((error / np.maximum(steps, 1e-30)).max()) / limit.largest
    rms = float(np.sqrt((error**2).mean() / (steps**2).mean())) / limit.rms
    power = float((wide**2).mean())
    noise = float((error**2).mean()) / power  # relative, squared
    gain = float((wide * near).mean()) / power
    # Rounding errors of weights that lie on another grid already (a student made from a GGUF) do not average out:
    # in 8 bits SmolLM2's embeddings shrink by 0.0015 as a whole.
    allowed_gain = 5 * np.sqrt(noise / wide.size) + noise + 0.25 / (1 << limit.bits - 1)
    return WeightError(largest, rms, abs(gain - 1) / allowed_gain)


def _dropped(wide: Doubles, near: Doubles, limit: GridLimit) -> float:
    """Of a sparse tensor: the largest weight that became 0, as a share of what may: the weight at the sparsity's rank
    (and half a percent, since the name of the grid is rounded), or what rounds to 0 on the grid of what is kept."""
    gone = np.abs(wide[near == 0])
    rank = min(wide.size - 1, math.ceil(wide.size * (limit.sparse + 0.5) / 100))
    threshold = float(np.partition(np.abs(wide).reshape(-1), rank)[rank]) * (1 + 2.0**-10)
    if limit.bits and not limit.palette:
        threshold = max(threshold, float(_steps(np.abs(wide), limit).max()) * limit.largest)
    return float(gone.max(initial=0) / max(threshold, 1e-30))


def _off_the_nearest(wide: Doubles, near: Doubles, limit: GridLimit) -> float:
    """How much farther the worst weight lies from its value than from the nearest one of its table, as a share of what
    rounding a float16 table explains; infinite when a table has more values than its bits can name."""
    tall = limit.rows if limit.rows > 0 else len(wide)
    worst = 0.0
    for first in range(0, len(wide), tall):
        part, found = wide[first : first + tall].reshape(-1), near[first : first + tall].reshape(-1)
        if limit.sparse:
            part, found = part[found != 0], found[found != 0]
        table = np.unique(found)
        if len(table) > 1 << limit.bits:
            return np.inf
        if len(table):
            place = np.searchsorted(table, part).clip(1, max(1, len(table) - 1))
            least = np.minimum(np.abs(part - table[place - 1]), np.abs(part - table[np.minimum(place, len(table) - 1)]))
            slack = np.abs(part) * 2.0**-10 + 2.0**-24
            worst = max(worst, float(((np.abs(part - found) - least) / slack).max()))
    return worst


def check_sizes(artifact: Artifact, limits: Mapping[str, float]) -> list[Check]:
    """Bytes on the device and bytes to download, judged where ``limits`` names ``size_bytes`` or ``download_bytes`` and
    stated elsewhere."""
    parameters = sum(row.parameters for row in artifact.manifest.dtype_histogram.values())
    bits = f", {artifact.model_bytes * 8 / parameters:.2f} bits a weight" if parameters else ""
    found = {
        "size_bytes": (artifact.size_bytes, f"of them the model {artifact.model_bytes:,}{bits}"),
        "download_bytes": (artifact.download_bytes(), f"{len(artifact.shipped)} files, each deflated"),
    }
    checks = []
    for name, (size, reason) in found.items():
        limit = limits.get(name)
        judged = "stated, not judged" if limit is None else "limit from the recipe's gates"
        checks.append(Check(name, "integrity", limit is None or size <= limit, float(size), limit, unit="bytes",
                            reason=f"{reason}; {judged}"))  # fmt: skip
    return checks


def check_tokenizer(artifact: Artifact, student: Path) -> Check:
    """The tokenizer that ships gives the student's ids on awkward texts.

    A GGUF carries its own inside the model file and is asked through llama.cpp; elsewhere the ``tokenizer.json`` beside
    the payload counts. What llama.cpp itself is known to split otherwise (:data:`LLAMA_CPP_DIFFERS`) is told in the
    reason and not held against the artifact.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise MissingDependency.package("tokenizers", "distill") from None
    texts = (*NASTY_TEXTS, *LLAMA_CPP_DIFFERS)
    student_tokenizer = _plain(Tokenizer, student / "tokenizer.json")
    expected = {text: student_tokenizer.encode(text).ids for text in texts}
    known: Mapping[str, str] = {}
    if artifact.manifest.format == "gguf":
        found, known = runtime_tokens(artifact.path, texts), LLAMA_CPP_DIFFERS
    else:
        if not (artifact.path / "tokenizer.json").is_file():
            return Check("tokenizer", "integrity", False, reason="the artifact has no tokenizer.json")
        try:
            shipped = _plain(Tokenizer, artifact.path / "tokenizer.json")
            found = {text: shipped.encode(text).ids for text in texts}
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the tokenizers library raises bare exceptions, and Rust's panics
            reason = f"tokenizer.json does not load: {' '.join(str(error).split())[:300]}"
            return Check("tokenizer", "integrity", False, reason=reason)
    differing = [text for text in texts if list(found[text]) != expected[text]]
    wrong = [text for text in differing if text not in known]
    reason = f"equal ids on {len(texts) - len(differing)} of {len(texts)} awkward texts"
    if len(wrong) < len(differing):
        excuses = sorted({known[text] for text in differing if text in known})
        reason += f"; llama.cpp itself differs on {', '.join(excuses)}"
    return Check("tokenizer", "integrity", not wrong, float(len(wrong)), 0.0, unit="texts", reason=reason,
                 worst_input=repr(wrong[0])[:80] if wrong else None)  # fmt: skip


def _check(name: str, passed: bool, value: float, limit: float, unit: str, reason: str, first: str | None) -> Check:
    return Check(name, "integrity", passed, value, limit, unit=unit, reason=reason, first_tensor=first)


def _plain(tokenizer_class: Any, path: Path) -> Any:
    tokenizer = tokenizer_class.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _judge(payload: Any, tensor: Any, weight: Floats, turned: bool, compensated: bool) -> tuple[str, float]:
    """What is wrong with one stored tensor, and its share of the bound. Blocks run along a linear layer's rows, also
    where the student has the matrix ``turned`` over."""
    if grid_limit(tensor.grid) is None:
        return f"no rounding bound is known for the grid {tensor.grid!r}", np.inf
    try:
        decoded = payload.decode(tensor)
    except (EdgestillError, KeyError, ValueError, IndexError) as error:
        return f"it can't be read back: {error}", np.inf
    if decoded.shape != weight.shape:
        return f"it is stored as {list(decoded.shape)}, the student has {list(weight.shape)}", np.inf
    shift = sum(int(step[1]) for step in tensor.layout if step[0] == "add")
    if shift:  # judged as it is stored: 1 + w is rounded at the size of 1, not of w
        weight, decoded = weight - np.float32(shift), decoded - np.float32(shift)
    if turned:
        weight, decoded = weight.T, decoded.T
    found = weight_error(tensor.grid, weight, decoded, compensated=compensated)
    return f"{found.what} is {min(found.worst, 1e9):.3g} times what {tensor.grid} allows", found.worst


def _changes_nothing(weight: Floats) -> bool:
    """A scale of ones or an offset of zeros."""
    return weight.ndim == 1 and bool((weight == 1).all() or (weight == 0).all())


def _steps(magnitude: npt.NDArray[np.float64], limit: GridLimit) -> npt.NDArray[np.float64]:
    """The step of each weight's block, in the weight's shape."""
    divisor = (1 << limit.bits - 1) - 1
    if limit.block < 0:
        return np.full_like(magnitude, magnitude.max(initial=0) / divisor)
    if limit.rows != 1:
        tall = limit.rows if limit.rows > 0 else len(magnitude)
        tops = magnitude.reshape(-1, tall * magnitude[0].size).max(axis=1)
        return np.repeat(tops, tall * magnitude[0].size).reshape(magnitude.shape) / max(divisor, 1)
    if limit.block == 0:
        rows = magnitude.reshape(len(magnitude), -1)
        return np.broadcast_to(rows.max(axis=1)[:, None], rows.shape).reshape(magnitude.shape) / divisor
    columns = magnitude.shape[-1]
    steps = _tops(magnitude.reshape(-1, columns), limit.block) / divisor
    if limit.outer:
        steps = steps + _tops(magnitude.reshape(-1, columns), 256) * limit.outer
    return steps.reshape(magnitude.shape)


def _tops(rows: npt.NDArray[np.float64], block: int) -> npt.NDArray[np.float64]:
    """The largest value of each block of columns, repeated over the block."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % block)))
    tops = padded.reshape(len(rows), -1, block).max(axis=2)
    return np.asarray(np.repeat(tops, block, axis=1)[:, : rows.shape[1]])


def _student_weights(path: Path) -> Any:
    try:
        import safetensors
    except ModuleNotFoundError:
        raise MissingDependency.package("safetensors", "distill") from None
    return safetensors.safe_open(path, framework="numpy")


def _natural(name: str) -> list[Any]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
