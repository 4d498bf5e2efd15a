"""A plan as data: JSON that gives the same plan back, and the counts that `plan` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kontext_batch.errors import Problem, RecipeError
from kontext_batch.planning.explain import Explained
from kontext_batch.planning.params import SAMPLING, VERSIONS, step_key
from kontext_batch.planning.plan import (
    Axes,
    ImageInfo,
    Instance,
    Origin,
    Plan,
    PlannedDelivery,
    PlannedStep,
    SkippedRow,
    StepInput,
)

FORMAT = 1
"""Of the JSON; raised when an old program could not read it right."""


def plan_as_data(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; `plan_from_data` gives an equal plan back."""
    sources: dict[ImageInfo, int] = {}
    numbers: dict[Instance, int] = {instance: number for number, instance in enumerate(plan.instances)}
    return {
        "format": FORMAT,
        "operations": dict(VERSIONS),
        "recipe": plan.recipe,
        "recipe_sha256": plan.recipe_sha256,
        "owner": plan.owner,
        "budget": dict(plan.budget),
        "notes": list(plan.notes),
        "skipped": [asdict(row) for row in plan.skipped],
        "steps": [_step_data(step, sources) for step in plan.steps],
        "instances": [_instance_data(instance) for instance in plan.instances],
        "deliveries": [
            {
                "path": each.path,
                "if_exists": each.if_exists,
                "instance": numbers[each.instance],
                "origin": _origin_data(each.origin),
            }
            for each in plan.deliveries
        ],
        "sources": [asdict(source) for source in sources],
    }


def _step_data(step: PlannedStep, sources: dict[ImageInfo, int]) -> dict[str, Any]:
    inputs = []
    for each in step.inputs:
        data: dict[str, Any] = {"role": each.role, "position": each.position}
        if each.source is not None:
            data["source"] = sources.setdefault(each.source, len(sources))
        else:
            data["parent"] = each.parent
        inputs.append(data)
    return {
        "key": step.key,
        "operation": step.operation,
        "params": dict(step.params),
        "inputs": inputs,
        "lane": step.lane,
        "origin": _origin_data(step.origin),
        "gpu_seconds": step.gpu_seconds,
    }


def _origin_data(origin: Origin) -> list[Any]:
    return [origin.file, origin.line, origin.column]


def _instance_data(instance: Instance) -> dict[str, Any]:
    return {
        "node": instance.node,
        "axes": [list(each) for each in instance.axes],
        "candidate": instance.candidate,
        "key": instance.key,
    }


def plan_from_data(data: Any, *, file: str) -> Plan:
    """The plan that `plan_as_data` wrote. `file`: how problems name it.

    Raises `RecipeError` when it is no plan, was made by another version, or was changed by hand: every step's key is
    computed again.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        what = (
            "no plan"
            if not isinstance(data, Mapping) or "format" not in data
            else f"a plan of format {data['format']!r}"
        )
        raise _wrong(file, f"this is {what}; format {FORMAT} is read here: plan anew")
    if data.get("operations") != dict(VERSIONS):
        raise _wrong(file, "the plan was made for other versions of the operations: plan anew")
    try:
        plan = _plan(data)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _wrong(file, f"the plan is damaged ({type(error).__name__}: {error}): plan anew") from error
    _check(plan, file)
    return plan


def _wrong(file: str, message: str) -> RecipeError:
    return RecipeError([Problem(file, 0, 0, "", message)])


def _plan(data: Mapping[str, Any]) -> Plan:
    sources = [ImageInfo(**each) for each in data["sources"]]
    instances = tuple(
        Instance(each["node"], tuple((axis, key) for axis, key in each["axes"]), each["candidate"], each["key"])
        for each in data["instances"]
    )
    return Plan(
        recipe=data["recipe"],
        recipe_sha256=data["recipe_sha256"],
        owner=data["owner"],
        steps=tuple(_step(each, sources) for each in data["steps"]),
        instances=instances,
        deliveries=tuple(
            PlannedDelivery(
                each["path"],
                instances[each["instance"]].key,
                each["if_exists"],
                instances[each["instance"]],
                Origin(*each["origin"]),
            )
            for each in data["deliveries"]
        ),
        skipped=tuple(SkippedRow(**each) for each in data["skipped"]),
        notes=tuple(data["notes"]),
        budget=dict(data["budget"]),
    )


def _step(data: Mapping[str, Any], sources: Sequence[ImageInfo]) -> PlannedStep:
    inputs = tuple(
        StepInput(
            each["role"],
            each["position"],
            sources[each["source"]] if "source" in each else None,
            each.get("parent"),
        )
        for each in data["inputs"]
    )
    return PlannedStep(
        data["key"],
        data["operation"],
        data["params"],
        inputs,
        data["lane"],
        Origin(*data["origin"]),
        data["gpu_seconds"],
    )


def _check(plan: Plan, file: str) -> None:
    known: set[str] = set()
    for step in plan.steps:
        try:
            sound = step_key(step.operation, step.params, step.inputs) == step.key
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise _wrong(file, f"step {step.key} is damaged ({error!r}): plan anew") from error
        if not sound:
            raise _wrong(file, f"step {step.key} was changed after planning: plan anew")
        for each in step.inputs:
            if each.parent is not None and each.parent not in known:
                raise _wrong(file, f"step {step.key} reads {each.parent}, which does not come before it: plan anew")
        known.add(step.key)
    stray = next((each.key for each in plan.instances if each.key not in known), None)
    if stray is not None:
        raise _wrong(file, f"an instance names the step {stray}, which the plan does not have: plan anew")


@dataclass(frozen=True, slots=True)
class NodeCount:
    """One step of the recipe, counted over its instances."""

    node: str
    operation: str
    instances: int
    run: int
    cached: int
    shared: int
    samples: int
    """Pictures that a model has to make: those of `run`; 0 for Pillow operations."""
    gpu_seconds: float
    """Estimate for those of `run`."""
    reasons: tuple[tuple[str, int], ...]
    """Why they run, most frequent first."""


def count_nodes(plan: Plan, explained: Sequence[Explained]) -> tuple[NodeCount, ...]:
    """Counts by step of the recipe, parents first."""
    steps = {step.key: step for step in plan.steps}
    nodes: dict[str, list[Explained]] = {}
    for each in explained:
        nodes.setdefault(each.instance.node, []).append(each)
    counts = []
    for node, instances in nodes.items():
        status = [each.status for each in instances]
        running = [steps[each.instance.key] for each in instances if each.status == "run"]
        reasons: dict[str, int] = {}
        for each in instances:
            for reason in each.reasons[:1]:
                reasons[reason] = reasons.get(reason, 0) + 1
        counts.append(
            NodeCount(
                node,
                steps[instances[0].instance.key].operation,
                len(instances),
                status.count("run"),
                status.count("cached"),
                status.count("shared"),
                sum(step.operation in SAMPLING for step in running),
                sum(step.gpu_seconds for step in running),
                tuple(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
            )
        )
    return tuple(counts)


def axes_text(axes: Axes) -> str:
    """`item=RX-100 scene=terrace`, as `--only` takes it."""
    return " ".join(f"{axis}={key}" for axis, key in axes)
