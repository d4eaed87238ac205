"""The README's commands run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import jsonschema
import pytest

from edgestill import cli
from edgestill.recipe import parse_recipe
from edgestill.schemas import FOLDER

ROOT = Path(__file__).parent.parent


def commands() -> list[list[str]]:
    """Each `edgestill …` line of the README's sh blocks, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("edgestill ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.whole
def test_every_command_of_the_readme_works(
    tiny_bert: Path,
    sentences: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In their order, in one folder, `my-model` being a plain Transformers folder; their documents fit the schemas."""
    found = commands()
    assert {command[0] for command in found} >= {"doctor", "init", "plan", "run", "export", "verify", "bench"}
    shutil.copytree(tiny_bert, tmp_path / "my-model", ignore=shutil.ignore_patterns("edgestill.json"))
    (tmp_path / "my-text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    monkeypatch.chdir(tmp_path)
    for command in found:
        if "somebody-elses.gguf" in command:
            shutil.copyfile(tmp_path / "runs/my-model/artifacts/gguf-q8_0/model.gguf", "somebody-elses.gguf")
        documented = command[0] in ("run", "plan", "export", "verify", "bench", "doctor")
        monkeypatch.setattr(sys, "argv", ["edgestill", *command, *(["--json"] if documented else [])])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capfd.readouterr()
        assert not stop.value.code, f"edgestill {shlex.join(command)}: {printed.err}"
        if documented:
            schema = json.loads((FOLDER / f"{command[0]}.json").read_text())
            jsonschema.validate(json.loads(printed.out), schema)
    assert (tmp_path / "runs/my-model/report.html").exists()


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    blocks = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([a-z-]+)", blocks, re.MULTILINE)
    assert targets[:2] == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def examples() -> list[str]:
    """Each toml block of the page on distillation; what is commented out in it counts, too."""
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/distillation.md").read_text(), re.DOTALL)
    written = []
    for block in blocks:
        losses = re.findall(r"^(?:# )?(loss = .*?\})", block, re.MULTILINE)
        written += [block, *(f"[distill]\n{loss}" for loss in losses)]
    return written


@pytest.mark.parametrize("example", examples())
def test_every_example_of_the_page_on_distillation_is_a_valid_recipe(example: str) -> None:
    head = 'name = "example"\n[teacher]\nsource = "model"\n'
    text = '[[data.text]]\nname = "words"\nsource = "words.txt"\ntrain = 10\n'
    loss = "" if "[distill]\n" in example else "[distill]\nloss = { forward_kl = 1.0 }\n"
    recipe = parse_recipe(head + text + loss + example, Path("example.toml"))
    assert recipe.distill is not None
