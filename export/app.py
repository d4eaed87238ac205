"""A small sample for an artifact, in the language of an app: load, tokenise, run.

Written from templates and filled with the artifact's own names, shapes, types and special tokens. Decoders get a loop
around the KV cache and the words that their chat template puts around a message; encoders get their embedding (pooled
and normalised by the sample where the graph doesn't), classifiers their labels.

What there is::

               onnx                       gguf               coreml
    python     onnxruntime                llama-cpp-python   coremltools (macOS)
    kotlin     ONNX Runtime for Android   -                  -
    swift      ONNX Runtime for Swift     llama.cpp          Core ML
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from ..artifact import open_artifact
from ..errors import Unsupported, UsageError, nearest
from ..files import atomic_directory, atomic_write
from .app_facts import app_facts

__all__ = ["LANGUAGES", "Language", "check_app", "write_app"]

Language = Literal["python", "kotlin", "swift"]
LANGUAGES: tuple[str, ...] = get_args(Language)

_FOLDER = Path(__file__).parent / "templates"
_FILES = {"python": "sample.py", "kotlin": "Sample.kt", "swift": "Sample.swift"}
_TEMPLATES = {
    ("python", "onnx"): "python_onnx.py.jinja",
    ("python", "gguf"): "python_gguf.py.jinja",
    ("python", "coreml"): "python_coreml.py.jinja",
    ("kotlin", "onnx"): "kotlin_onnx.kt.jinja",
    ("swift", "onnx"): "swift_onnx.swift.jinja",
    ("swift", "gguf"): "swift_gguf.swift.jinja",
    ("swift", "coreml"): "swift_coreml.swift.jinja",
}
# Why there is none, and what to do instead.
_MISSING = {
    ("kotlin", "gguf"): (
        "llama.cpp publishes no library for Android",
        "export onnx for Android, or build llama.cpp's examples/llama.android with the NDK",
    ),
    ("kotlin", "coreml"): ("Core ML runs on Apple's systems only", "export onnx for Android"),
}


def check_app(language: str, form: str) -> None:
    """Whether there is a sample at all, before anything is exported.

    Raises :class:`UsageError` for an unknown ``language``, :class:`Unsupported` where ``form`` has no sample in it.
    """
    if language not in LANGUAGES:
        raise UsageError(f"no sample in {language!r}", hint=nearest(language, LANGUAGES))
    if (language, form) in _MISSING:
        reason, hint = _MISSING[language, form]
        raise Unsupported(f"no {language} sample for {form}: {reason}", hint=hint)


def write_app(artifact: Path, language: Language, out: Path) -> Path:
    """Write the sample for the artifact folder ``artifact`` into the folder ``out``, whole or not at all.

    Returns the sample's path: ``sample.py`` (with ``requirements.txt``), ``Sample.kt`` or ``Sample.swift``, beside a
    ``README.md`` that says how to build it in. The Python one finds the artifact by its place relative to ``out``.
    Equal artifacts and places give equal bytes.

    Raises :class:`Unsupported` for what a language has no sample for, with what to take instead, and
    :class:`edgestill.errors.BadInput` for a damaged artifact.
    """
    opened = open_artifact(artifact)
    check_app(language, opened.manifest.format)
    facts = app_facts(opened, language, out)
    template = _TEMPLATES[language, opened.manifest.format]
    with atomic_directory(out) as temporary:
        for name, source in (
            (_FILES[language], template),
            ("README.md", "README.md.jinja"),
            *((("requirements.txt", "requirements.txt.jinja"),) if language == "python" else ()),
        ):
            atomic_write(temporary / name, _render(source, language, facts))
    return out / _FILES[language]


def _render(template: str, language: str, facts: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,  # source code, not HTML
    )  # fmt: skip
    environment.filters["literal"] = lambda value: _literal(str(value), language)
    environment.filters["oneline"] = lambda value: "".join(c if c.isprintable() else " " for c in str(value))
    return environment.get_template(template).render(facts)


def _literal(text: str, language: str) -> str:
    r"""``text`` as a string literal of ``language``, whatever it holds.

    >>> _literal('a"$\n\x01', "kotlin")
    '"a\\"\\$\\n\\u0001"'
    """
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    if language == "kotlin":
        escapes["$"] = "\\$"
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else _escape(c, language)) for c in text) + '"'


def _escape(character: str, language: str) -> str:
    if language == "swift":
        return f"\\u{{{ord(character):x}}}"
    if language == "python":
        return f"\\U{ord(character):08x}"
    units = character.encode("utf-16-be", "surrogatepass")  # Kotlin counts in UTF-16
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
