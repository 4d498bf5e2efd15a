"""Why each instance of a plan runs, or does not: a comparison with how the recipe ran before. Pure.

`services.why` asks the same of steps that are stored, and answers in the same words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from kontext_batch.planning.params import input_identity
from kontext_batch.planning.plan import Instance, InstanceId, Plan, PlannedStep
from kontext_batch.planning.uris import file_name
from kontext_batch.recipes.loader import Recipe
from kontext_batch.recipes.source import Path, Source

Status = Literal["run", "cached", "shared"]


class Version(Protocol):
    """A step as one run had it."""

    @property
    def operation(self) -> str: ...
    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def inputs(self) -> tuple[tuple[str, int, str, str], ...]:
        """(role, position, URI or '', sha256 of the source or key of the parent)."""
        ...


class Previous(Version, Protocol):
    """How the most recent run had an instance; `ports.StoredInstance` is one."""

    @property
    def take(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def state(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Computed:
    """`Version` as a value."""

    operation: str
    params: Mapping[str, Any]
    inputs: tuple[tuple[str, int, str, str], ...]


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

    def place(field: str) -> str:
        where = None if recipe is None else written_at(recipe.source, instance.node, step.operation, field)
        return where or f"{step.origin.file}:{step.origin.line}"

    inputs = tuple(
        (each.role, each.position, "" if each.source is None else each.source.uri, input_identity(each))
        for each in step.inputs
    )
    yield from differences(before, Computed(step.operation, step.params, inputs), place=place, nodes=nodes)


def differences(
    before: Version, after: Version, *, place: Callable[[str], str], nodes: Mapping[str, str]
) -> tuple[str, ...]:
    """What is not as it was, most telling first; at least one thing.

    `place`: field of a recipe -> file and line where it is written. `nodes`: key of a parent -> its name in the recipe.
    """
    found = (*_changed_params(before, after, place), *_changed_inputs(before, after, nodes))
    return tuple(dict.fromkeys(found)) or (f"the operation {after.operation} changed",)


def own_differences(before: Version, after: Version, *, place: Callable[[str], str]) -> tuple[str, ...]:
    """The same without steps above that are others than before; none where nothing else differs."""
    found = (*_changed_params(before, after, place), *_changed_inputs(before, after, None))
    return tuple(dict.fromkeys(found))


def _changed_params(before: Version, after: Version, place: Callable[[str], str]) -> Iterator[str]:
    if after.operation != before.operation:
        yield f"operation changed ({place('op')})"
        return
    old, new = before.params, after.params
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
        yield f"{word} changed" if name in _ELSEWHERE else f"{word} changed ({place(field)})"


def _changed_inputs(before: Version, after: Version, nodes: Mapping[str, str] | None) -> Iterator[str]:
    """`nodes`: None leaves out parents that are others than before."""
    old, new = ({each[:2]: each[2:] for each in version.inputs} for version in (before, after))
    count = Counter((role, "more") for role, _ in set(new) - set(old))
    count.update((role, "less") for role, _ in set(old) - set(new))
    for place in sorted(set(old) & set(new)):
        known, (uri, identity) = old[place], new[place]
        if identity.removeprefix("sha256:") == known[1].removeprefix("sha256:"):
            continue
        if not uri:
            if nodes is not None:
                yield f"{nodes.get(identity, 'its parent')} changed"
        elif uri == known[0]:
            yield f"input bytes changed ({file_name(uri)})"
        else:
            yield f"another input ({file_name(uri)})"
    for (role, which), number in sorted(count.items()):
        yield f"one {role} {which}" if number == 1 else f"{number} {role}s {which}"


def written_at(source: Source, node: str, operation: str, field: str) -> str | None:
    """`spring-hero.yaml:41`: where a field of a step is written, there or under defaults; None where it is not."""
    paths: tuple[Path, ...] = (("steps", node, field), ("defaults", operation, field), ("defaults", field))
    for path in paths:
        if path in source.values:
            return f"{source.file}:{source.mark(path).line}"
    return None
