"""Why each instance runs, and what a plan counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from kontext_batch.planning.explain import Computed, Explained, Previous, differences, explain
from kontext_batch.planning.limits import (
    budget_reasons,
    changed_inputs,
    changed_models,
    gpu_seconds,
    sources,
)
from kontext_batch.planning.params import input_identity
from kontext_batch.planning.plan import Axes, Plan, StepInput
from kontext_batch.planning.planner import plan_recipe
from kontext_batch.planning.render import NodeCount, count_nodes
from tests.unit.planning.world import BASE, MODELS, image, label, list_inputs, plan, recipe_of

RECIPE = """
inputs: {item: {table: items.csv, key: sku, files: {photo: "photos/${item.sku}.*"}}}
matrix: {scene: [sea, city]}
defaults:
  edit: {model: kontext, steps: 20}
steps:
  clean: {op: edit, image: "${item.photo}", prompt: Clean.}
  staged:
    op: edit
    image: ${clean}
    prompt: On the ${scene}.
  finish: {op: finish, image: "${staged}", size: 500x500}
outputs: [{from: "${finish}", to: "out/${item}_${scene}.${ext}"}]
budget: {gpu_minutes: 1, outputs: 1}
"""
FILES = {"photos/A.jpg": (3000, 2000)}


@dataclass(frozen=True)
class Stored:
    """What the database keeps of an instance."""

    take: int
    key: str
    operation: str
    params: Mapping[str, Any]
    inputs: tuple[tuple[str, int, str, str], ...]
    state: str = "done"


def stored_input(each: StepInput) -> tuple[str, int, str, str]:
    """(role, position, URI, identity)."""
    uri = each.source.uri if each.source is not None else ""
    return each.role, each.position, uri, input_identity(each).removeprefix("sha256:")


def stored(made: Plan, state: str = "done") -> dict[tuple[str, Axes, int], Previous]:
    """The plan as its run left it behind."""
    steps = {step.key: step for step in made.steps}
    return {
        (each.node, each.axes, each.candidate): Stored(
            steps[each.key].params.get("take", 0),
            each.key,
            steps[each.key].operation,
            steps[each.key].params,
            tuple(stored_input(one) for one in steps[each.key].inputs),
            state,
        )
        for each in made.instances
    }


def planned(body: str = RECIPE, **options: Any) -> Plan:
    return plan(body, **({"table": "sku\nA\n", "files": FILES} | options))


def told(after: Plan, before: Plan, body: str = RECIPE) -> dict[str, str]:
    """Instance -> its first reason, or its status."""
    explained = explain(after, stored(before), done={step.key for step in before.steps}, recipe=recipe_of(body))
    return {label(each.instance): each.reasons[0] if each.reasons else each.status for each in explained}


def test_a_first_run_has_never_run() -> None:
    made = planned()
    assert explain(made, {}, done=())[0] == Explained(made.instances[0], "run", ("never run",))


def test_the_same_plan_again_is_cached() -> None:
    assert set(told(planned(), planned()).values()) == {"cached"}


def test_a_changed_prompt_is_told_with_its_line_and_its_readers_with_the_step() -> None:
    body = RECIPE.replace("On the", "At the")
    assert told(planned(body), planned(), body) == {
        "clean A": "cached",
        "staged A sea": "prompt changed (r.yaml:15)",
        "staged A city": "prompt changed (r.yaml:15)",
        "finish A sea": "staged changed",
        "finish A city": "staged changed",
    }


def test_a_setting_of_the_defaults_is_told_with_its_line() -> None:
    body = RECIPE.replace("steps: 20", "steps: 21")
    assert told(planned(body), planned(), body)["clean A"] == "steps changed (r.yaml:9)"


def test_changed_bytes_and_other_files_are_told_by_name() -> None:
    recipe = recipe_of(RECIPE)
    listed = list_inputs(recipe, table="sku\nA\n", files=FILES)
    row = listed.rows["item"][0]
    before = plan_recipe(recipe, listed, MODELS, base=BASE)

    def after(uri: str) -> Plan:
        changed = type(row)(row.key, row.fields, row.file, row.line, {"photo": image(uri, content="new bytes")})
        return plan_recipe(recipe, type(listed)({"item": (changed,)}, {}, ()), MODELS, base=BASE)

    assert told(after("photos/A.jpg"), before)["clean A"] == "input bytes changed (A.jpg)"
    assert told(after("photos/A.png"), before)["clean A"] == "another input (A.png)"


def test_another_model_seed_size_take_or_background() -> None:
    before = planned()
    cases = {
        ("size: 500x500", "size: 600x500"): ("finish A sea", "size changed (r.yaml:16)"),
        ("defaults:\n", "defaults:\n  seed: 3\n"): ("clean A", "seed changed (r.yaml:9)"),
        ("prompt: Clean.", 'prompt: Clean., frame: "1:1"'): ("clean A", "size changed (r.yaml:11)"),
        ("steps: 20", 'steps: 20, background: "#000000"'): ("clean A", "canvas changed (r.yaml:11)"),
        ("steps: 20", "steps: 20, reference_layout: index"): ("clean A", "cached"),
    }
    for (old, new), (name, reason) in cases.items():
        body = RECIPE.replace(old, new)
        assert told(planned(body), before, body)[name] == reason
    taken = planned(takes={("clean", (("item", "A"),), 1): 1})
    assert told(taken, before)["clean A"] == "a new try (take 1)"
    body = RECIPE.replace("model: kontext", "model: tiny")
    assert told(planned(body), before, body)["clean A"] == "model changed"


def test_another_operation_or_more_pictures() -> None:
    before = planned()
    body = RECIPE.replace(
        'finish: {op: finish, image: "${staged}"',
        'finish: {op: finish, overlay: [{logo: "${brand.logos.mono}"}], image: "${staged}"',
    )
    reasons = [each.reasons for each in explain(planned(body), stored(before), done={s.key for s in before.steps})][-1]
    assert reasons == ("overlay changed (r.yaml:16)", "one logo more")
    body = RECIPE.replace('{op: edit, image: "${item.photo}", prompt: Clean.}', '{op: finish, image: "${item.photo}"}')
    assert told(planned(body), before, body)["clean A"] == "operation changed (r.yaml:11)"


def test_pictures_of_a_sheet_are_counted_and_a_step_above_is_named_once() -> None:
    def sheet(*cells: str) -> Computed:
        return Computed("contact_sheet", {}, tuple(("cell", at, "", key) for at, key in enumerate(cells)))

    nodes = {"k1": "staged", "k2": "staged"}
    told = differences(sheet("a", "b", "c", "d", "e"), sheet("k1", "k2"), place=lambda _: "r.yaml:1", nodes=nodes)
    assert told == ("staged changed", "3 cells less")


@pytest.mark.parametrize(
    ("state", "reason"),
    [("failed", "it failed before"), ("skipped", "it was skipped before"), ("ready", "it did not finish before"),
     ("done", "its picture was collected"), ("quarantined", "it was quarantined before")],
)  # fmt: skip
def test_a_known_key_that_is_not_done_says_why(state: str, reason: str) -> None:
    made = planned()
    assert {each.reasons for each in explain(made, stored(made, state), done=())} == {(reason,)}


def test_what_another_place_computes_is_shared() -> None:
    body = (
        RECIPE.replace("defaults:\n", "defaults:\n  seed: 3\n")
        .replace("On the ${scene}.", "On it.")
        .replace("image: ${clean}\n", "image: ${clean}\n    if: {scene: [sea, city]}\n")
    )
    made = planned(body)
    explained = explain(made, {}, done=())
    assert [(label(each.instance), each.status) for each in explained] == [
        ("clean A", "run"),
        ("staged A sea", "run"),
        ("staged A city", "shared"),
        ("finish A sea", "run"),
        ("finish A city", "shared"),
    ]
    live = explain(made, {}, done=(), live={made.steps[0].key})
    assert live[0].status == "shared"


def test_counts_by_step() -> None:
    before = planned()
    body = RECIPE.replace("On the", "At the")
    made = planned(body, default_seconds=2.0)
    counts = count_nodes(made, explain(made, stored(before), done={before.steps[0].key}, recipe=recipe_of(body)))
    assert counts == (
        NodeCount("clean", "edit", 1, 0, 1, 0, 0, 0, ()),
        NodeCount("staged", "edit", 2, 2, 0, 0, 2, 4.0, (("prompt changed (r.yaml:15)", 2),)),
        NodeCount("finish", "finish", 2, 2, 0, 0, 0, 0, (("staged changed", 2),)),
    )


# ----------------------------------------------------------------------------------------------------------- limits


def test_a_budget_counts_what_is_not_done() -> None:
    made = planned(default_seconds=25.0)
    assert gpu_seconds(made) == 75.0
    assert budget_reasons(made) == (
        "an estimated 1.2 GPU minutes, the budget is 1",
        "2 outputs, the budget is 1",
    )
    assert budget_reasons(made, done={made.steps[0].key}) == ("2 outputs, the budget is 1",)
    assert (
        budget_reasons(planned(RECIPE.replace("budget: {gpu_minutes: 1, outputs: 1}", ""), default_seconds=9e9)) == ()
    )


def with_minutes(minutes: float, **options: Any) -> Plan:
    budget = f"budget: {{gpu_minutes: {minutes}}}"
    return planned(RECIPE.replace("budget: {gpu_minutes: 1, outputs: 1}", budget), **options)


def test_a_budget_of_no_minutes_holds_while_nothing_was_timed() -> None:
    made = with_minutes(0)
    told = "3 images to sample, of which nothing was timed yet; the budget is 0 GPU minutes"
    assert budget_reasons(made) == (told,)
    images = [step.key for step in made.steps if step.operation == "edit"]
    assert budget_reasons(made, done=images[1:]) == (told.replace("3 images", "1 image"),)
    assert budget_reasons(made, done=images) == ()
    assert budget_reasons(with_minutes(0.001)) == ()


def test_an_estimate_is_told_with_the_digits_that_show_it_above_the_budget() -> None:
    for minutes, seconds, told in (
        (0, 0.002, "an estimated 0.0001 GPU minutes, the budget is 0"),
        (60, 1200.2, "an estimated 60.01 GPU minutes, the budget is 60"),
        (1234567, 3e7, "an estimated 1500000.0 GPU minutes, the budget is 1234567"),
    ):
        assert budget_reasons(with_minutes(minutes, default_seconds=seconds)) == (told,)


def test_inputs_that_changed_since_the_plan() -> None:
    made = planned()
    uri, planned_image = next(iter(sources(made).items()))
    assert uri == BASE + "photos/A.jpg"
    assert changed_inputs(made, {uri: planned_image}) == ()
    other = image("photos/A.jpg", content="other")
    assert changed_inputs(made, {uri: other}) == (f"{uri} changed since the plan was made",)
    assert changed_inputs(made, {}) == (f"{uri} is gone or cannot be used any more",)
    assert changed_inputs(made, {uri: None}) == (f"{uri} is gone or cannot be used any more",)


def test_models_that_changed_since_the_plan() -> None:
    made = planned()
    assert changed_models(made, MODELS) == ()
    assert changed_models(made, {}) == ("model 'kontext' is not registered here",)
    assert changed_models(made, {"kontext": MODELS["tiny"]}) == (
        "model 'kontext' has other weights than the plan was made for",
    )
