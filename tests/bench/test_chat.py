"""Chat templates: the same text as Transformers, in a sandbox, and hostile ones refused in time."""

import json
import shutil

import pytest

from edgestill.artifact import ARTIFACT_FILE, open_artifact, seal_artifact
from edgestill.bench.chat import CONVERSATIONS, check_chat_template, read_template, render
from edgestill.errors import BadInput
from edgestill.export import export
from edgestill.recipe import ExportConfig

TEMPLATES = {
    "tools": "{%- if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{%- endif %}"
    "{% for message in messages %}\n  {% if message.role == 'tool' %}<r>{{ message.content }}</r>{% continue %}"
    "{% endif %}{{ bos_token }}{{ message.role }}: {{ message.content | trim }}"
    "{{ message.tool_calls | tojson if message.tool_calls }}"
    "{{ eos_token }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}",
    "strict": "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}{% generation %}{{ message['content'] }}"
    "{% endgeneration %}{% endfor %}",
    "indexes": "{{ messages[0].content }}{{ messages[-1].role }}",
}


@pytest.fixture(scope="module")
def gguf(tiny_llama, tmp_path_factory):
    return export(tiny_llama, tmp_path_factory.mktemp("a") / "gguf", ExportConfig(to="gguf:q8_0"))


def with_template(student, out, template):
    from edgestill.checkpoints import load_tokenizer

    shutil.copytree(student, out)
    tokenizer = load_tokenizer(out)
    tokenizer.chat_template = template
    (out / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(out)
    return out


def test_the_shipped_template_renders_as_transformers_does(gguf, tiny_llama):
    check = check_chat_template(gguf, tiny_llama)
    assert check.passed, check
    assert f"{len(CONVERSATIONS)} of {len(CONVERSATIONS)} conversations" in check.reason


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("to", ["gguf:f16", "onnx:int4"])
def test_other_templates_too(name, to, tiny_llama, tmp_path):
    student = with_template(tiny_llama, tmp_path / "student", TEMPLATES[name])
    check = check_chat_template(export(student, tmp_path / "a", ExportConfig(to=to)), student)
    assert check.passed, check
    assert ("refused by both" in check.reason) == (name == "strict")


def test_another_template_is_caught(gguf, tiny_llama, tmp_path):
    student = with_template(tiny_llama, tmp_path / "s", "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    check = check_chat_template(gguf, student)
    assert not check.passed
    assert check.worst_input.startswith("one question: '<|im_start|>user")
    without = shutil.copytree(tiny_llama, tmp_path / "without")
    (without / "chat_template.jinja").unlink()
    check = check_chat_template(gguf, without)
    assert (check.passed, check.reason) == (False, "the artifact has a chat template, the student has none")


def test_special_tokens_of_a_gguf_count(tiny_llama, tmp_path):
    """The template is the same and a token is not: the rendered text is what an app gets."""
    student = with_template(tiny_llama, tmp_path / "s", "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    artifact = export(student, tmp_path / "a", ExportConfig(to="onnx:fp32"))
    config = json.loads((artifact.path / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|im_start|>"
    (artifact.path / "tokenizer_config.json").write_text(json.dumps(config))
    manifest = artifact.manifest
    (artifact.path / ARTIFACT_FILE).unlink()
    check = check_chat_template(seal_artifact(artifact.path, manifest), student)
    assert not check.passed
    assert "<|im_start|>' instead of" in check.worst_input


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}", "{{ ''['__class__'] }}",
        "{{ lipsum.__globals__['os'].system('true') }}",
    ],
)  # fmt: skip
def test_what_a_sandbox_forbids_is_refused(template):
    rows = render(template, {})
    assert all(row.text is None and "Error" in row.error for row in rows) or all(row.text == "" for row in rows)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end within"),
        ("{{ 'x' * 3000000000 }}", "MemoryError"),
        ("{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "MemoryError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "can't be rendered"),
    ],
)  # fmt: skip
def test_hostile_templates_end(template, why):
    with pytest.raises(BadInput, match=why) as caught:
        render(template, {}, seconds=1)
    assert "\n" not in caught.value.message


def test_templates_that_are_none(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    (folder / "chat_template.jinja").write_bytes(b"\xff" * 10)
    with pytest.raises(BadInput, match="UTF-8"):
        read_template(folder)
    (folder / "chat_template.jinja").write_bytes(b"x" * (1 << 21))
    with pytest.raises(BadInput, match="bytes"):
        read_template(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(BadInput, match="not a text"):
        read_template(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "x"}]}')
    assert read_template(folder) == "x"


def test_an_encoder_needs_none(tiny_bert, tmp_path):
    artifact = export(tiny_bert, tmp_path / "a", ExportConfig(to="onnx:fp32"))
    assert check_chat_template(open_artifact(artifact.path), tiny_bert).reason.startswith("not applicable")
