"""A step's key is what it makes, and nothing else (RECIPES.md 3); seeds are a contract."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_batch.hashing import canonical_json
from kontext_batch.planning.listing import ModelInfo
from kontext_batch.planning.params import VERSIONS, lane_of, seed_of, step_key
from kontext_batch.planning.plan import ImageInfo, Plan, StepInput
from kontext_batch.planning.planner import plan_recipe
from tests.unit.planning import world
from tests.unit.planning.world import MODELS, image, params_of, plan, step_of

ADAPTER = {"name": "look", "scale": 0.8, "sha256": "c" * 64}
PARAMS: dict[str, Any] = {
    "model": "kontext",
    "model_sha256": "a" * 64,
    "adapters": [ADAPTER],
    "prompt": "Go.",
    "negative_prompt": None,
    "true_cfg_scale": 1.0,
    "steps": 28,
    "guidance": 2.5,
    "seed": 1,
    "canvas": {"width": 1024, "height": 1024, "fit": "pad", "background": "#FFFFFF", "box": {"x": 0}},
    "target": {"width": 1024, "height": 1024},
    "references": [{"width": 1024, "height": 1024}],
    "reference_layout": "offset",
    "text_length": 512,
    "numeric_mode": "float32",
    "handoff": "pixels",
    "candidate": 1,
    "take": 0,
}
INPUTS = (
    StepInput("image", 0, image("a.jpg"), None),
    StepInput("reference", 0, None, "b2:" + "0" * 40),
    StepInput("reference", 1, image("c.jpg"), None),
)
KEY = step_key("edit", PARAMS, INPUTS)


def moved(source: ImageInfo) -> ImageInfo:
    """The same bytes somewhere else, at another time."""
    return replace(source, uri="s3://elsewhere/x.png", etag="new")


def test_the_key_is_pinned() -> None:
    """A change of this text changes every key of every database: raise the operation's version instead."""
    assert KEY == "b2:fc6c2f79e9991847394b4a72e5ffad73c1db9a4e"


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "Go!"},
        {"negative_prompt": "blurry"},
        {"true_cfg_scale": 2.0},
        {"steps": 29},
        {"guidance": 2.6},
        {"seed": 2},
        {"canvas": {**PARAMS["canvas"], "background": "#000000"}},
        {"target": {"width": 1024, "height": 1040}},
        {"references": [{"width": 1024, "height": 1040}]},
        {"reference_layout": "index"},
        {"text_length": 256},
        {"numeric_mode": "bfloat16"},
        {"handoff": "latents"},
        {"candidate": 2},
        {"take": 1},
        {"model_sha256": "b" * 64},
        {"adapters": []},
        {"adapters": [{**ADAPTER, "scale": 0.9}]},
        {"adapters": [{**ADAPTER, "sha256": "d" * 64}]},
        {"adapters": [ADAPTER, ADAPTER]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_resolved_parameter_changes_the_key(change: dict[str, Any]) -> None:
    assert step_key("edit", {**PARAMS, **change}, INPUTS) != KEY


@pytest.mark.parametrize(
    "inputs",
    [
        (replace(INPUTS[0], source=image("other.jpg")), *INPUTS[1:]),
        (INPUTS[0], replace(INPUTS[1], parent="b2:" + "1" * 40), INPUTS[2]),
        (INPUTS[0], replace(INPUTS[2], position=0), replace(INPUTS[1], position=1)),
        (replace(INPUTS[0], role="reference"), *INPUTS[1:]),
        INPUTS[:2],
        (*INPUTS, StepInput("logo", 0, image("logo.png"), None)),
    ],
    ids=["image bytes", "parent", "order of references", "role", "one reference less", "an overlay"],
)
def test_every_picture_changes_the_key(inputs: tuple[StepInput, ...]) -> None:
    assert step_key("edit", PARAMS, inputs) != KEY


def test_operation_and_its_version_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_key("generate", PARAMS, INPUTS) != KEY
    monkeypatch.setitem(VERSIONS, "edit", 2)
    assert step_key("edit", PARAMS, INPUTS) != KEY


def test_names_places_and_times_do_not_change_the_key() -> None:
    renamed = {**PARAMS, "model": "other-name", "adapters": [{**ADAPTER, "name": "other-look"}]}
    elsewhere = tuple(each if each.source is None else replace(each, source=moved(each.source)) for each in INPUTS)
    assert step_key("edit", renamed, elsewhere) == KEY


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def shuffled(value: Any, draw: Any) -> Any:
    if isinstance(value, dict):
        items = draw(st.permutations(list(value.items())))
        return {key: shuffled(each, draw) for key, each in items}
    return [shuffled(each, draw) for each in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(), JSON, max_size=6), st.data())
def test_the_order_of_keys_never_changes_a_key(params: dict[str, Any], data: st.DataObject) -> None:
    params.pop("adapters", None)
    assert step_key("finish", shuffled(params, data.draw), INPUTS) == step_key("finish", params, INPUTS)


@given(st.dictionaries(st.text(), JSON, max_size=4), st.dictionaries(st.text(), JSON, max_size=4))
def test_other_parameters_have_another_key(one: dict[str, Any], two: dict[str, Any]) -> None:
    for params in (one, two):
        params.pop("adapters", None)
        params.pop("model", None)
    same = canonical_json(one) == canonical_json(two)
    assert (step_key("finish", one, ()) == step_key("finish", two, ())) is same


# ------------------------------------------------------------------------------------------------------- in plans

RECIPE = """
inputs: {item: {table: items.csv, key: sku, files: {photo: "photos/${item.sku}.*"}}}
matrix: {scene: [sea, city]}
defaults: {edit: {model: kontext}}
steps:
  clean: {op: edit, image: "${item.photo}", prompt: Clean.}
  staged: {op: edit, image: "${clean}", prompt: "On the ${scene}."}
outputs: [{from: "${staged}", to: "out/${item}_${scene}.png"}]
"""
FILES = {"photos/A.jpg": (3000, 2000), "photos/B.jpg": (3000, 2000)}


def keys(made: Plan) -> dict[str, str]:
    return {world.label(instance): instance.key for instance in made.instances}


def test_keys_of_a_plan_do_not_depend_on_what_stands_beside() -> None:
    alone = keys(plan(RECIPE, table="sku\nA\n", files=FILES))
    more = RECIPE.replace("[sea, city]", "[ice, sea, city]")
    beside = keys(plan(more, table="sku\nB\nA\n", files=FILES))
    assert alone.items() <= beside.items()


def test_steps_may_be_renamed_and_moved_without_a_new_key() -> None:
    renamed = RECIPE.replace("clean", "cleared")
    assert set(keys(plan(renamed, table="sku\nA\n", files=FILES)).values()) == set(
        keys(plan(RECIPE, table="sku\nA\n", files=FILES)).values()
    )


def test_a_change_upstream_changes_everything_that_reads_it() -> None:
    before = keys(plan(RECIPE, table="sku\nA\n", files=FILES))
    after = keys(plan(RECIPE.replace("Clean.", "Clear."), table="sku\nA\n", files=FILES))
    assert not set(before.values()) & set(after.values())
    after = keys(plan(RECIPE.replace("On the", "At the"), table="sku\nA\n", files=FILES))
    assert before["clean A"] == after["clean A"]
    assert before["staged A sea"] != after["staged A sea"]


def test_other_weights_under_one_name_are_another_step() -> None:
    recipe = world.recipe_of(RECIPE)
    listed = world.list_inputs(recipe, table="sku\nA\n", files=FILES)
    models = {"kontext": ModelInfo("kontext", "f" * 64, 1024 * 1024, 512)}
    one = plan_recipe(recipe, listed, MODELS, base=world.BASE)
    two = plan_recipe(recipe, listed, models, base=world.BASE)
    assert not {step.key for step in one.steps} & {step.key for step in two.steps}
    assert {step.lane for step in two.steps} == {"edit/kontext/ffffffffffff/-/float32"}


def test_equal_steps_are_computed_once() -> None:
    body = RECIPE.replace("defaults: {", "defaults: {seed: 7, ")
    body = body.replace('prompt: "On the ${scene}."', "prompt: On it., if: {scene: [sea, city]}")
    made = plan(body, table="sku\nA\n", files=FILES)
    staged = [instance for instance in made.instances if instance.node == "staged"]
    assert len(staged) == 2
    assert len({instance.key for instance in staged}) == 1
    assert len(made.steps) == 2
    assert len(made.deliveries) == 2


def test_a_take_changes_its_instance_and_what_reads_it_only() -> None:
    before = plan(RECIPE, table="sku\nA\nB\n", files=FILES)
    after = plan(RECIPE, table="sku\nA\nB\n", files=FILES, takes={("clean", (("item", "A"),), 1): 2})
    changed = {name for name, key in keys(before).items() if keys(after)[name] != key}
    assert changed == {"clean A", "staged A sea", "staged A city"}
    assert params_of(after, "clean A")["take"] == 2
    assert params_of(after, "clean A")["seed"] != params_of(before, "clean A")["seed"]
    assert params_of(after, "staged A sea")["seed"] == params_of(before, "staged A sea")["seed"]


# ---------------------------------------------------------------------------------------------------------- seeds


def test_the_seed_contract_is_pinned() -> None:
    axes = (("item", "A"), ("scene", "sea"))
    assert seed_of("derive", axes, 1, 0) == 1207640395
    assert seed_of(7, axes, 1, 0) == 7
    assert seed_of(7, axes, 3, 0) == 9
    assert seed_of(2**32 - 1, axes, 2, 0) == 0


def test_a_derived_seed_follows_axes_candidate_and_take_in_any_order_of_axes() -> None:
    axes = (("item", "A"), ("scene", "sea"))
    seed = seed_of("derive", axes, 1, 0)
    assert seed_of("derive", axes[::-1], 1, 0) == seed
    others = [
        seed_of("derive", (("item", "B"), ("scene", "sea")), 1, 0),
        seed_of("derive", axes[:1], 1, 0),
        seed_of("derive", axes, 2, 0),
        seed_of("derive", axes, 1, 1),
        seed_of(7, axes, 1, 1),
        seed_of(7, axes, 2, 1),
    ]
    assert len({seed, *others}) == 7


@given(st.integers(0, 2**32 - 1) | st.just("derive"), st.integers(1, 64), st.integers(0, 5))
def test_a_seed_is_32_bits(written: str | int, candidate: int, take: int) -> None:
    assert 0 <= seed_of(written, (("a", "b"),), candidate, take) < 2**32


def test_candidates_have_seeds_of_their_own() -> None:
    made = plan(RECIPE.replace("prompt: Clean.", "prompt: Clean., candidates: 3"), table="sku\nA\n", files=FILES)
    clean = [step for step in made.steps if step.params["prompt"] == "Clean."]
    assert [step.params["candidate"] for step in clean] == [1, 2, 3]
    assert len({step.params["seed"] for step in clean}) == 3
    assert step_of(made, "staged A sea").inputs[0].parent == clean[0].key


def test_lanes() -> None:
    assert lane_of("finish", {}) == "operations"
    assert lane_of("edit", PARAMS) == "edit/kontext/aaaaaaaaaaaa/look:cccccccc@0.8/float32"
    assert lane_of("generate", {**PARAMS, "adapters": []}) == "edit/kontext/aaaaaaaaaaaa/-/float32"
