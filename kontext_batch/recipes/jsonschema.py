"""JSON Schema (draft-07) of recipes and brand files, for editors: completion and marks while one types.

Made from the models that the loader uses. What needs more than one place to be seen (names, axes, cycles) and the
values of `${...}` are left to the loader.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from kontext_batch.recipes.schema import BrandDocument, Model, RecipeDocument

DRAFT = "http://json-schema.org/draft-07/schema#"


class _Draft07(GenerateJsonSchema):
    schema_dialect = DRAFT

    def tuple_schema(self, schema: Any) -> JsonSchemaValue:
        made = super().tuple_schema(schema)
        made.pop("prefixItems", None)
        return made


def recipe_schema() -> dict[str, Any]:
    """Schema of a recipe file."""
    return _schema(RecipeDocument, "kontext-batch recipe")


def brand_schema() -> dict[str, Any]:
    """Schema of a brand file."""
    return _schema(BrandDocument, "kontext-batch brand file")


def _schema(model: type[Model], title: str) -> dict[str, Any]:
    made = model.model_json_schema(schema_generator=_Draft07, ref_template="#/definitions/{model}")
    made["definitions"] = made.pop("$defs", {})
    _mend(made)
    return {"$schema": DRAFT, **made, "title": title}


def _mend(node: Any) -> None:
    """What pydantic writes in later dialects or not at all: `x-` keys, names of keys, no `discriminator`."""
    if isinstance(node, list):
        for each in node:
            _mend(each)
        return
    if not isinstance(node, dict):
        return
    node.pop("discriminator", None)
    node.pop("title", None) if isinstance(node.get("title"), str) else None
    if node.get("type") == "object" and "properties" in node:
        node.setdefault("patternProperties", {})["^x-"] = {}
    elif node.get("type") == "object" and "patternProperties" in node:
        node.setdefault("additionalProperties", False)
    if "$ref" in node and len(node) > 1:
        # Draft-07 readers ignore what stands beside $ref.
        node["allOf"] = [{"$ref": node.pop("$ref")}]
    for each in list(node.values()):
        _mend(each)
