"""The JSON Schema for editors: the real examples pass, an author's slips do not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from kontext_batch.recipes.jsonschema import brand_schema, recipe_schema
from kontext_batch.recipes.source import read_yaml
from tests.unit.recipes.recipes import BRAND, RECIPE

EXAMPLES = Path(__file__).parents[3] / "recipes" / "examples"


def plain(text: str | bytes) -> Any:
    source, problems = read_yaml(text, file="x")
    assert not problems
    return source.data


def faults(schema: dict[str, Any], data: Any) -> list[str]:
    return [error.json_path for error in Draft7Validator(schema).iter_errors(data)]


def test_the_schemas_are_draft_07() -> None:
    for schema in (recipe_schema(), brand_schema()):
        Draft7Validator.check_schema(schema)
        assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
        text = str(schema)
        for later in ("prefixItems", "$defs", "discriminator", "'const': None"):
            assert later not in text


@pytest.mark.parametrize("text", [RECIPE, (EXAMPLES / "spring-hero.yaml").read_bytes()], ids=["small", "spring-hero"])
def test_real_recipes_pass(text: str | bytes) -> None:
    assert faults(recipe_schema(), plain(text)) == []


@pytest.mark.parametrize("text", [BRAND, (EXAMPLES / "brand-acme.yaml").read_bytes()], ids=["small", "acme"])
def test_real_brand_files_pass(text: str | bytes) -> None:
    assert faults(brand_schema(), plain(text)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("versoin",), 1),
        (("version",), 2),
        (("steps", "clean", "promt"), "x"),
        (("steps", "clean", "op"), "edti"),
        (("steps", "clean", "prompt"), 12),
        (("steps", "finish", "overlay"), [{"logo": "x", "anchor": "middle"}]),
        (("defaults", "edit", "steps"), "28"),
        (("defaults", "edit", "guidence"), 2.5),
        (("matrix", "exclude"), [{}]),
        (("inputs", "item", "on_missing"), "ignore"),
        (("outputs", 0, "if_exists"), "overwrite"),
        (("steps", "the clean"), {"op": "generate", "prompt": "x"}),
        (("import",), "brand.yaml"),
    ],
)
def test_slips_do_not_pass(path: tuple[str | int, ...], value: Any) -> None:
    data = copy.deepcopy(plain(RECIPE))
    at = data
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    assert faults(recipe_schema(), data)


def test_own_keys_pass() -> None:
    data = plain(RECIPE)
    data["x-note"] = 1
    data["steps"]["clean"]["x-why"] = {"a": 1}
    assert faults(recipe_schema(), data) == []


def test_values_without_fields_and_unquoted_numbers_pass() -> None:
    data = plain(RECIPE)
    data["matrix"]["scene"] = {"terrace": None}
    data["matrix"]["locale"] = [1.5, "en"]
    assert faults(recipe_schema(), data) == []
