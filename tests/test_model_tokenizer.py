"""A tokenizer that its tokenizer.json describes whole is opened without torch, as the one that AutoTokenizer gives."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgestill.errors import BadInput
from edgestill.model_tokenizer import load_tokenizer

TEXTS = ["a cat", "  A  Cat\n", "<|im_start|>user", "1234 €"]


def test_it_needs_no_torch(tiny_llama: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgestill.checkpoints import load_tokenizer; "
        "load_tokenizer(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_llama)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_it_is_what_the_automatic_choice_gives(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    assert type(ours) is type(theirs)
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_another_class_is_asked_for_by_its_name(tiny_bert: Path) -> None:
    from transformers import AutoTokenizer

    assert type(load_tokenizer(tiny_bert)) is type(AutoTokenizer.from_pretrained(tiny_bert))


@pytest.mark.parametrize("described", ["[]", "{", '{"tokenizer_class": 3}'])
def test_a_broken_description_is_one_line_or_does_not_matter(tiny_llama: Path, tmp_path: Path, described: str) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    (tmp_path / "m/tokenizer_config.json").write_text(described)
    message = ""
    with contextlib.suppress(BadInput):
        try:
            load_tokenizer(tmp_path / "m")
        except BadInput as error:
            message = error.message
            raise
    assert "\n" not in message
