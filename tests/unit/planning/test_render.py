"""A plan is data: what is written comes back, and what was changed by hand does not."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_batch.errors import RecipeError
from kontext_batch.planning.params import step_key
from kontext_batch.planning.plan import (
    ImageInfo,
    Instance,
    Origin,
    Plan,
    PlannedDelivery,
    PlannedStep,
    SkippedRow,
    StepInput,
)
from kontext_batch.planning.render import axes_text, plan_as_data, plan_from_data
from tests.unit.planning.world import plan

RECIPE = """
inputs: {item: {table: items.csv, key: sku, files: {photo: "photos/${item.sku}.*"}, on_missing: skip}}
matrix: {scene: [sea, city]}
defaults: {edit: {model: kontext}}
steps:
  clean: {op: edit, image: "${item.photo}", prompt: Clean., candidates: 2}
  staged: {op: edit, image: "${clean}", prompt: "On the ${scene}."}
  finish: {op: finish, image: "${staged}", overlay: [{logo: "${brand.logos.mono}"}]}
outputs: [{from: "${finish}", to: "out/${item}_${scene}.${ext}"}]
budget: {outputs: 10}
"""


def made() -> Plan:
    return plan(RECIPE, table="sku\nA\nB\n", files={"photos/A.jpg": (3000, 2000)})


def through_json(data: Any) -> Any:
    return json.loads(json.dumps(data))


def test_a_plan_comes_back_as_it_was() -> None:
    assert plan_from_data(through_json(plan_as_data(made())), file="plan.json") == made()


TEXT = st.text(max_size=8)
SOURCES = st.builds(ImageInfo, TEXT, TEXT, TEXT, st.integers(0), st.integers(1), st.integers(1), TEXT)
ORIGINS = st.builds(Origin, TEXT, st.integers(0), st.integers(0))
PARAMS = st.dictionaries(
    TEXT.filter(lambda key: key != "adapters"), TEXT | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan that hangs together."""
    steps: dict[str, PlannedStep] = {}
    for _ in range(draw(st.integers(0, 4))):
        parents = draw(st.lists(st.sampled_from(sorted(steps)), max_size=2)) if steps else []
        logos = draw(st.lists(SOURCES, max_size=2))
        inputs = (
            *(StepInput("image", index, None, key) for index, key in enumerate(parents)),
            *(StepInput("logo", index, source, None) for index, source in enumerate(logos)),
        )
        operation, params = draw(st.sampled_from(["edit", "finish"])), draw(PARAMS)
        key = step_key(operation, params, inputs)
        seconds = draw(st.floats(0, 1e6))
        steps.setdefault(key, PlannedStep(key, operation, params, inputs, draw(TEXT), draw(ORIGINS), seconds))
    axes = st.lists(st.tuples(TEXT, TEXT), max_size=2).map(tuple)
    instances = tuple(Instance(draw(TEXT), draw(axes), draw(st.integers(1, 9)), key) for key in steps)
    deliveries = tuple(PlannedDelivery(draw(TEXT), each.key, draw(TEXT), each, draw(ORIGINS)) for each in instances)
    skipped = draw(st.lists(st.builds(SkippedRow, TEXT, TEXT, TEXT, TEXT, st.integers(0)), max_size=2).map(tuple))
    budget = draw(st.dictionaries(TEXT, st.floats(0, 1e9), max_size=2))
    notes = draw(st.lists(TEXT, max_size=2).map(tuple))
    return Plan(
        draw(TEXT), draw(TEXT), draw(TEXT), tuple(steps.values()), instances, deliveries, skipped, notes, budget
    )


@given(plans())
def test_any_plan_comes_back_as_it_was(any_plan: Plan) -> None:
    assert plan_from_data(through_json(plan_as_data(any_plan)), file="plan.json") == any_plan


def refused(change: Any) -> str:
    data = copy.deepcopy(through_json(plan_as_data(made())))
    changed = change(data)
    with pytest.raises(RecipeError) as error:
        plan_from_data(data if changed is None else changed, file="plan.json")
    return str(error.value)


def test_a_prompt_changed_by_hand_is_refused() -> None:
    assert "was changed after planning" in refused(lambda data: data["steps"][0]["params"].update(prompt="Other."))


def test_an_input_changed_by_hand_is_refused() -> None:
    assert "was changed after planning" in refused(lambda data: data["sources"][0].update(sha256="0" * 64))


def test_steps_out_of_order_are_refused() -> None:
    assert "does not come before it" in refused(lambda data: data["steps"].reverse())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: [], "this is no plan"),
        (lambda data: {"steps": []}, "this is no plan"),
        (lambda data: data.update(format=99), "a plan of format 99"),
        (lambda data: data["operations"].update(edit=0), "other versions of the operations"),
        (lambda data: data.pop("owner"), "the plan is damaged"),
        (lambda data: data["deliveries"][0].update(instance=10**6), "the plan is damaged"),
        (lambda data: data["sources"].clear(), "the plan is damaged"),
        (lambda data: data["steps"][0].update(params=3), "is damaged"),
        (lambda data: data["steps"][0].update(operation="melt"), "is damaged"),
        (lambda data: data["instances"][0].update(key="b2:none"), "which the plan does not have"),
    ],
)
def test_damaged_plans_are_refused_in_one_sentence(change: Any, said: str) -> None:
    def apply(data: Any) -> Any:
        result = change(data)
        return result if result == [] or (isinstance(result, dict) and list(result) == ["steps"]) else None

    message = refused(apply)
    assert said in message
    assert message.startswith("plan.json")


def test_axes_read_like_a_selection() -> None:
    assert axes_text((("item", "A"), ("locale", "de"))) == "item=A locale=de"
