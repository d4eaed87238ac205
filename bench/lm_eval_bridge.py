"""Any artifact (or model folder) as a model of lm-evaluation-harness: ``--model edgestill``.

lm-eval finds models in a table of its own; nothing outside can add to it but code that is imported before. So there are
two ways in: ``edgestill lm-eval …``, which registers the model and then *is* lm-eval's command line, and in Python
``lm_eval.simple_evaluate(model=edgestill_model(artifact=PATH), …)``. The model runs in our worker, in the runtime that
ships; windows and contexts are cut as lm-eval's own ``hf`` model cuts them.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput, EdgestillError, MissingDependency, Unsupported, UsageError
from ..runtimes.precision import scoring_options
from .likelihood import likelihoods

__all__ = ["ArtifactModel", "edgestill_model", "register", "run_lm_eval"]

_FIRST_BLOCK = 32  # tokens that are generated before stop sequences are looked for; doubled each time
_BATCH_SIZE = 8
_COMMANDS = ("run", "ls", "list", "validate")


class ArtifactModel:
    """What lm-eval asks of a model, by our worker. :func:`register` joins it with lm-eval's ``TemplateLM``, which
    splits contexts from continuations.

    ``device`` and ``max_batch_size`` are what lm-eval passes to every model, a GPU unasked; artifacts run on the CPU.
    Raises :class:`Unsupported` for a model that does not generate text, and for sampling: decoding is greedy.
    """

    cache_hook: Any

    def __init__(
        self,
        artifact: str,
        threads: int | str = 2,
        batch_size: int | str | None = None,
        max_length: int | str | None = None,
        max_gen_toks: int | str = 256,
        device: str | None = None,
        max_batch_size: object = None,
    ) -> None:
        from ..checkpoints import load_tokenizer
        from ..runtimes.transports.local import LocalWorker

        super().__init__()
        folder = Path(artifact).expanduser()
        if not folder.is_dir():
            raise BadInput(f"{folder} is not a folder", hint="--model_args artifact=FOLDER: an artifact, or a model")
        self.batch_size = _positive("batch_size", batch_size, _BATCH_SIZE)
        self.max_gen_toks = _positive("max_gen_toks", max_gen_toks, 256)
        options = scoring_options(folder, _positive("threads", threads, 2))
        longest = None if max_length is None else _positive("max_length", max_length, 0)
        self.tokenizer: Any = load_tokenizer(folder)
        self.worker = LocalWorker(folder, options)
        info = self.worker.info()
        if info.task != "text-generation":
            self.worker.close()
            raise Unsupported(f"{folder.name} is for {info.task}", hint="lm-eval asks models that generate text")
        self.max_length = min(info.max_length, longest or info.max_length)
        self._folder = folder

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: BOS, else end of text."""
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval keeps prepared requests apart."""
        return self._folder.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **ignored: Any
    ) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless the text begins with one or it is said."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            options = {"add_special_tokens": False}
        ids = [int(token) for token in self.tokenizer.encode(string, **options)]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, by the template that ships."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        """``(log-likelihood, would greedy decoding write it)`` of each continuation; an empty one is certain."""
        asked = [(context, continuation) for _, context, continuation in requests if continuation]
        with _bar(len(asked), "likelihoods", disable_tqdm) as advance:
            found = iter(
                likelihoods(
                    self.worker, asked, max_length=self.max_length, batch_size=self.batch_size, progress=advance
                )
            )
        results = []
        for key, _, continuation in requests:
            result = (0.0, True)
            if continuation:
                one = next(found)
                result = (one.logprob, one.greedy)
            results.append(result)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each by itself: every token predicted once, with as much before it as
        disjoint windows of ``max_length`` leave."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        texts = [request.args[0] for request in requests]
        windows, owners = [], []
        for owner, text in enumerate(texts):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            ):  # fmt: skip
                context, continuation = make_disjoint_window(pair)
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to a stop sequence, end of text or ``max_gen_toks`` tokens."""
        texts = []
        with _bar(len(requests), "generations", disable_tqdm) as advance:
            for number, (context, options) in enumerate(request.args for request in requests):
                texts.append(self._generate(context, *self._limits(dict(options))))
                self.cache_hook.add_partial("generate_until", (context, options), texts[-1])
                advance("", (number + 1) / len(requests))
        return texts

    def _limits(self, options: dict[str, Any]) -> tuple[list[str], int]:
        """Stop sequences and the most tokens; what would need sampling is refused."""
        until = options.pop("until", None) or []
        count = self.max_gen_toks
        for name in ("max_completion_tokens", "max_tokens", "max_new_tokens", "max_gen_toks"):  # the last one wins
            if (given := options.pop(name, None)) is not None:
                count = _positive(name, given, count)
        sampled = options.pop("do_sample", None)
        temperature = float(options.pop("temperature", 0) or 0)
        if sampled or (sampled is None and temperature > 0):
            raise Unsupported("sampling: our worker decodes greedily", hint="--gen_kwargs do_sample=false")
        if count >= self.max_length:
            raise UsageError(f"{count} tokens to generate, the model takes {self.max_length}",
                             hint="--gen_kwargs max_gen_toks=N, or max_gen_toks=N in --model_args")  # fmt: skip
        stops = [until] if isinstance(until, str) else list(until)
        return [*stops, self.tok_decode([self.eot_token_id], skip_special_tokens=False)], count

    def _generate(self, context: str, stops: Sequence[str], count: int) -> str:
        prompt = self.tok_encode(context, left_truncate_len=self.max_length - count) or [self.prefix_token_id]
        written: list[int] = []
        block, ended = _FIRST_BLOCK, False
        while len(written) < count and not ended:
            new = [token.id for token in self.worker.decode([*prompt, *written], min(block, count - len(written)))]
            if self.eot_token_id in new:
                new, ended = new[: new.index(self.eot_token_id)], True
            written += new
            text = self.tok_decode(written)
            ended = ended or any(stop in text for stop in stops if stop)
            block *= 2
        text = self.tok_decode(written)
        for stop in stops:
            if stop:
                text = text.split(stop)[0]
        return text


def register() -> type:
    """Put the model into lm-eval's table under the name ``edgestill``, once, and return its class.

    Raises :class:`MissingDependency` without lm-eval.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        raise MissingDependency.package(error.name or "lm_eval", "lm-eval") from None
    if "edgestill" not in model_registry:
        model_registry.register("edgestill", target=types.new_class("EdgestillLM", (ArtifactModel, TemplateLM)))
    found: type = model_registry.get("edgestill")
    return found


def edgestill_model(**options: Any) -> Any:
    """A model to hand to ``lm_eval.simple_evaluate``; options as of :class:`ArtifactModel`."""
    return register()(**options)


def run_lm_eval(arguments: Sequence[str]) -> None:
    """lm-eval's own command line with our model in its table, and as its default model."""
    register()
    from lm_eval.__main__ import cli_evaluate

    given = list(arguments)
    asks = {"-h", "--help"} & set(given) or (given and given[0] in _COMMANDS[1:])
    named = any(word in ("--model", "-M") or word.startswith("--model=") for word in given)
    if given and not asks and not named:
        given += ["--model", "edgestill"]
    before = sys.argv
    sys.argv = ["lm-eval", *given]
    try:
        cli_evaluate()
    except (EdgestillError, KeyboardInterrupt):
        raise
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(
            f"lm-eval ended with {words[:300]}", hint="edgestill lm-eval --help; --debug shows the trace"
        ) from error
    finally:
        sys.argv = before


class _bar:  # noqa: N801  (used like a function)
    """``with _bar(total, what, quiet) as progress``: lm-eval's kind of progress bar for our kind of progress."""

    def __init__(self, total: int, what: str, quiet: bool) -> None:
        self._total, self._what, self._quiet = total, what, quiet

    def __enter__(self) -> Any:
        from tqdm import tqdm

        self._shown: Any = tqdm(total=self._total, desc=self._what, disable=self._quiet)

        def progress(message: str, fraction: float | None = None) -> None:
            self._shown.update(round((fraction or 0) * self._total) - self._shown.n)

        return progress

    def __exit__(self, *_: object) -> None:
        self._shown.close()


def _positive(name: str, value: object, default: int) -> int:
    """A whole number from ``--model_args``, where everything may be text."""
    if value is None or str(value).startswith("auto"):
        return default
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise UsageError(f"{name}={value!r} is not a positive whole number", hint=f"--model_args …,{name}={default}")
    return number
