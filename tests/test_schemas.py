from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from edgestill import schemas


def test_committed_schemas_are_those_of_the_types() -> None:
    committed = {path.name: json.loads(path.read_text()) for path in schemas.FOLDER.glob("*.json")}
    assert committed == schemas.generate(), "run `make schemas`"


@pytest.mark.parametrize("name", sorted(schemas.generate()))
def test_each_is_a_valid_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schemas.generate()[name])


def test_the_recipe_page_is_that_of_the_types() -> None:
    page = Path(__file__).parent.parent / "docs/recipe.md"
    assert page.read_text() == schemas.recipe_reference(), "run `make schemas`"
