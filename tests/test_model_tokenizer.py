"""A tokenizer that its tokenizer.json describes whole is opened without torch, as the one that AutoTokenizer gives."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgestill.errors import BadInput
from edgestill.model_tokenizer import PlainTokenizer, load_tokenizer, load_tokenizer_lightly

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


def test_the_light_one_answers_as_transformers_does_and_does_not_import_it(tiny_llama: Path) -> None:
    light, whole = load_tokenizer_lightly(tiny_llama), load_tokenizer(tiny_llama)
    assert isinstance(light, PlainTokenizer)
    for special in (True, False):
        for text in (TEXTS, TEXTS[0], ""):
            ours, theirs = (one(text, add_special_tokens=special, verbose=False)["input_ids"] for one in (light, whole))
            assert ours == theirs
    assert light.get_vocab() == whole.get_vocab()
    assert light.chat_template == whole.chat_template
    assert light.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()
    assert {i: str(t) for i, t in light.added_tokens_decoder.items()} == {
        i: str(t) for i, t in whole.added_tokens_decoder.items()
    }
    for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        assert getattr(light, f"{role}_token_id") == getattr(whole, f"{role}_token_id"), role
    assert [light.convert_ids_to_tokens(i) for i in (0, 5)] == whole.convert_ids_to_tokens([0, 5])
    code = (
        "import sys; from pathlib import Path; from edgestill.model_tokenizer import load_tokenizer_lightly; "
        "load_tokenizer_lightly(Path(sys.argv[1])); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_llama)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize(
    "change",
    [{"add_bos_token": True}, {"eos_token": "<new>"}, {"tokenizer_class": "LlamaTokenizer"}, {"cls_token": {}}],
)
def test_what_a_config_adds_is_left_to_transformers(
    change: dict[str, object], tiny_llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with contextlib.suppress(BadInput):
        assert not isinstance(load_tokenizer_lightly(folder), PlainTokenizer)


def test_a_damaged_one_is_the_same_clear_line(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(BadInput, match="the tokenizer does not load"):
        load_tokenizer_lightly(folder)
