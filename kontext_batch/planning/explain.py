"""Why each instance of a plan runs, or does not: a comparison with how the recipe ran before. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from kontext_batch.planning.params import input_identity
from kontext_batch.planning.plan import Instance, InstanceId, Plan, PlannedStep
from kontext_batch.planning.uris import file_name
from kontext_batch.recipes.loader import Recipe
from kontext_batch.recipes.source import Path

Status = Literal["run", "cached", "shared"]


class Previous(Protocol):
    """How the most recent run had an instance; `ports.StoredInstance` is one."""

    @property
    def take(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def operation(self) -> str: ...
    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def inputs(self) -> tuple[tuple[str, int, str, str], ...]:
        """(role, position, URI or '', sha256 of the source or key of the parent)."""
        ...

    @property
    def state(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Explained:
    """What becomes of one instance, and why."""

    instance: Instance
    status: Status
    """`run`: this run computes it. `cached`: it is done. `shared`: the same step stands elsewhere in this plan, or
    another run is computing it."""
    reasons: tuple[str, ...]
    """Of a `run`, most telling first; empty otherwise."""


# Parameter -> (where it is written in a recipe, what it is called), most telling first.
_WORDS: Mapping[str, tuple[str, str]] = {
    "prompt": ("prompt", "prompt"),
    "negative_prompt": ("negative_prompt", "negative prompt"),
    "model_sha256": ("model", "model"),
    "adapters": ("adapters", "adapters"),
    "seed": ("seed", "seed"),
    "target": ("frame", "size"),
    "canvas": ("fit", "canvas"),
    "labels": ("label", "labels"),
}
_ELSEWHERE = frozenset({"model_sha256", "numeric_mode", "text_length"})
"""Not written in the recipe: no line is told."""

_STATES = {
    "failed": "it failed before",
    "quarantined": "it was quarantined before",
    "skipped": "it was skipped before",
    "cancelled": "it was cancelled before",
    "done": "its picture was collected",
}


def explain(
    plan: Plan,
    previous: Mapping[InstanceId, Previous],
    *,
    done: Container[str],
    live: Container[str] = frozenset(),
    recipe: Recipe | None = None,
) -> tuple[Explained, ...]:
    """Each instance of the plan, in its order.

    `previous`: (node, axes, candidate) -> how its most recent run had it. `done`: keys whose picture is there.
    `live`: keys that another run is computing. `recipe`: for the lines of what changed; without it, those of the steps.
    """
    steps = {step.key: step for step in plan.steps}
    nodes: dict[str, str] = {}
    for instance in plan.instances:
        nodes.setdefault(instance.key, instance.node)
    seen: set[str] = set()
    explained = []
    for instance in plan.instances:
        status: Status = "run"
        reasons: tuple[str, ...] = ()
        if instance.key in done:
            status = "cached"
        elif instance.key in seen or instance.key in live:
            status = "shared"
        else:
            before = previous.get(instance.id)
            reasons = tuple(_reasons(steps[instance.key], instance, before, nodes, recipe))
        seen.add(instance.key)
        explained.append(Explained(instance, status, reasons))
    return tuple(explained)


def _reasons(
    step: PlannedStep, instance: Instance, before: Previous | None, nodes: Mapping[str, str], recipe: Recipe | None
) -> Iterator[str]:
    if before is None:
        yield "never run"
        return
    if before.key == step.key:
        yield _STATES.get(str(before.state), "it did not finish before")
        return
    found = False
    for reason in (*_changed_params(step, instance, before, recipe), *_changed_inputs(step, before, nodes)):
        found = True
        yield reason
    if not found:
        yield f"the operation {step.operation} changed"


def _changed_params(step: PlannedStep, instance: Instance, before: Previous, recipe: Recipe | None) -> Iterator[str]:
    if step.operation != before.operation:
        yield f"operation changed ({_place(step, instance, 'op', recipe)})"
        return
    old, new = before.params, step.params
    if new.get("take", 0) != old.get("take", 0):
        yield f"a new try (take {new.get('take', 0)})"
        return
    told: set[str] = set()
    for name in sorted(
        set(old) | set(new), key=lambda name: (list(_WORDS).index(name) if name in _WORDS else 99, name)
    ):
        if old.get(name) == new.get(name) or name == "model":
            continue
        field, word = _WORDS.get(name, (name, name.replace("_", " ")))
        if name == "canvas" and "target" in told:
            continue
        told.add(name)
        where = "" if name in _ELSEWHERE else _place(step, instance, field, recipe)
        yield f"{word} changed ({where})" if where else f"{word} changed"


def _changed_inputs(step: PlannedStep, before: Previous, nodes: Mapping[str, str]) -> Iterator[str]:
    old = {(role, position): (uri, identity.removeprefix("sha256:")) for role, position, uri, identity in before.inputs}
    new = {(each.role, each.position): each for each in step.inputs}
    for place in sorted(set(old) | set(new)):
        each, known = new.get(place), old.get(place)
        if each is None:
            yield f"one {place[0]} less"
        elif known is None:
            yield f"one {place[0]} more"
        elif input_identity(each).removeprefix("sha256:") != known[1]:
            if each.source is None:
                assert each.parent is not None
                yield f"{nodes.get(each.parent, 'its parent')} changed"
            elif each.source.uri == known[0]:
                yield f"input bytes changed ({file_name(each.source.uri)})"
            else:
                yield f"another input ({file_name(each.source.uri)})"


def _place(step: PlannedStep, instance: Instance, field: str, recipe: Recipe | None) -> str:
    """`spring-hero.yaml:41`: where the field is written, in the step or under defaults."""
    if recipe is not None:
        for path in (("steps", instance.node, field), ("defaults", step.operation, field), ("defaults", field)):
            at: Path = path
            if at in recipe.source.values:
                return f"{recipe.file}:{recipe.source.mark(at).line}"
    return f"{step.origin.file}:{step.origin.line}"
