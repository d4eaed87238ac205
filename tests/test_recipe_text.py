from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.recipe import RECIPES, Recipe, load_recipe, parse_recipe
from edgestill.recipe_text import dump_recipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_survive_the_round_trip(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(dump_recipe(recipe), path) == recipe


@given(st.text(), st.dictionaries(st.text(min_size=1), st.text(), max_size=3), st.floats(0.001, 1e300))
def test_any_text_survives_the_round_trip(text: str, where: dict[str, str], weight: float) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "description": text,
            "teacher": {"source": text},
            "data": {
                "text": [{"name": "t", "source": "s", "train": 1}],
                "task": [{"name": "q", "source": text, "where": where}],
            },
            "distill": {"loss": {"forward_kl": weight}},
            "gates": {key: {"max": weight} for key in where},
            "export": [{"to": "onnx:int8"}, {"to": "gguf:q8_0", "name": "b"}],
        }
    )
    assert parse_recipe(dump_recipe(recipe), Path("x.toml")) == recipe
