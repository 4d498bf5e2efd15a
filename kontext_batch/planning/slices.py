"""A slice of a recipe: the instances of one run, so that what is made anew is nothing that this run never had."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set

from kontext_batch.planning.listing import Listed
from kontext_batch.planning.plan import InstanceId, Plan
from kontext_batch.planning.points import axis_values
from kontext_batch.recipes.loader import Recipe

Slice = Set[InstanceId]


def only_of(
    instances: Slice, only: Mapping[str, Sequence[str]], recipe: Recipe, listed: Listed
) -> dict[str, list[str]]:
    """`only`, narrowed to the axis values that the instances name: a contact sheet has no cells besides those.

    A value that the recipe no longer has is left out; one that it never had stays, to be told.
    """
    named: dict[str, dict[str, None]] = {}
    for _, axes, _ in instances:
        for axis, key in axes:
            named.setdefault(axis, {})[key] = None
    known = axis_values(recipe, listed)
    narrowed = {axis: list(values) for axis, values in only.items()}
    for axis in named.keys() & known.keys():
        wanted = only.get(axis, known[axis])
        narrowed[axis] = [key for key in wanted if key in named[axis] or key not in known[axis]]
    return narrowed


def part_of(plan: Plan, instances: Slice) -> Plan:
    """The plan with the deliveries of these instances alone, and the steps that those need."""
    deliveries = tuple(each for each in plan.deliveries if each.instance.id in instances)
    needed = {each.key for each in deliveries}
    for step in reversed(plan.steps):  # children before their parents
        if step.key in needed:
            needed.update(each.parent for each in step.inputs if each.parent is not None)
    kept = [each for each in plan.instances if each.key in needed]
    # Two instances may share a key; a step that the recipe did not have then has no instance there.
    there = {each.key for each in kept if each.id in instances}
    return dataclasses.replace(
        plan,
        steps=tuple(step for step in plan.steps if step.key in needed),
        instances=tuple(each for each in kept if each.id in instances or each.key not in there),
        deliveries=deliveries,
    )
