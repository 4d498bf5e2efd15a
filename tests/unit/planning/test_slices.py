"""A plan within the instances of an earlier run."""

from __future__ import annotations

from typing import Any

from kontext_batch.planning.plan import Plan
from kontext_batch.planning.planner import plan_recipe
from kontext_batch.planning.slices import Slice, only_of, part_of
from tests.unit.planning.world import BASE, MODELS, list_inputs, recipe_of, text, tree

RECIPE = """
inputs: {item: {table: items.csv, key: sku, files: {photo: "photos/${item.sku}.*"}, on_missing: skip}}
matrix: {scene: [sea, city]}
defaults: {edit: {model: kontext}}
steps:
  staged: {op: edit, image: "${item.photo}", prompt: "On the ${scene}."}
  sheet: {op: contact_sheet, images: "${staged}", on: [scene]}
outputs:
  - {from: "${staged}", to: "out/${item}_${scene}.${ext}"}
  - {from: "${sheet}", to: "out/${scene}.${ext}"}
"""
FILES = {f"photos/{name}.jpg": (3000, 2000) for name in "ABC"}
TABLE = "sku\nA\nB\nC\n"


def made(within: Slice | None = None, files: Any = FILES, **options: Any) -> Plan:
    recipe = recipe_of(RECIPE)
    listed = list_inputs(recipe, table=TABLE, files=files)
    if within is not None:
        options["only"] = only_of(within, options.get("only", {}), recipe, listed)
    plan = plan_recipe(recipe, listed, MODELS, base=BASE, **options)
    return plan if within is None else part_of(plan, within)


def slice_of(plan: Plan) -> Slice:
    return {(each.node, each.axes, each.candidate) for each in plan.instances}


def test_a_slice_of_a_run_is_what_the_run_was() -> None:
    for only in ({}, {"item": ["A", "C"]}, {"scene": ["sea"], "item.sku": ["B"]}):
        for limit in (None, 1, 2):
            before = made(only=only, limit=limit)
            assert tree(made(slice_of(before))) == tree(before)


def test_a_narrower_choice_within_a_slice() -> None:
    before = made(only={"item": ["A", "B"], "scene": ["sea"]})
    assert tree(made(slice_of(before), only={"item": ["A", "C"]})) == text("""
        staged A sea <- photos/A.jpg
        sheet sea <- staged A sea
        out/A_sea.png <= staged A sea
        out/sea.jpg <= sheet sea
    """)
    assert made(slice_of(before), only={"item": ["C"]}).deliveries == ()


def test_what_the_recipe_no_longer_has_is_left_out() -> None:
    before = made(only={"item": ["A", "B"]})
    rest = {path: size for path, size in FILES.items() if "A" not in path}
    assert tree(made(slice_of(before), files=rest)) == tree(made(only={"item": ["B"]}))
