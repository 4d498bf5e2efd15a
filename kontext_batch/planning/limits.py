"""What stands against running a plan. Each function gives reasons; whoever runs it raises `PlanRefused`."""

from __future__ import annotations

from collections.abc import Container, Mapping

from kontext_batch.planning.listing import ModelInfo
from kontext_batch.planning.params import SAMPLING
from kontext_batch.planning.plan import ImageInfo, Plan


def gpu_seconds(plan: Plan, *, done: Container[str] = frozenset()) -> float:
    """Estimated seconds of what is not done yet."""
    return sum(step.gpu_seconds for step in plan.steps if step.key not in done)


def budget_reasons(plan: Plan, *, done: Container[str] = frozenset()) -> tuple[str, ...]:
    """Which part of the recipe's budget the plan exceeds. `done`: keys that need no computing."""
    reasons = []
    minutes = gpu_seconds(plan, done=done) / 60
    if "gpu_minutes" in plan.budget and minutes > plan.budget["gpu_minutes"]:
        reasons.append(f"an estimated {minutes:.1f} GPU minutes, the budget is {plan.budget['gpu_minutes']:g}")
    outputs = len(plan.deliveries)
    if "outputs" in plan.budget and outputs > plan.budget["outputs"]:
        reasons.append(f"{outputs} outputs, the budget is {plan.budget['outputs']:g}")
    return tuple(reasons)


def sources(plan: Plan) -> Mapping[str, ImageInfo]:
    """URI -> source picture, of everything that the plan reads."""
    return {each.source.uri: each.source for step in plan.steps for each in step.inputs if each.source is not None}


def changed_inputs(plan: Plan, current: Mapping[str, ImageInfo | None]) -> tuple[str, ...]:
    """Which source pictures are not what they were when the plan was made.

    `current`: URI -> what lies there now; None or left out when it is gone. A new ETag over the same bytes is none.
    """
    reasons = []
    for uri, planned in sorted(sources(plan).items()):
        now = current.get(uri)
        if now is None:
            reasons.append(f"{uri} is gone")
        elif now.sha256 != planned.sha256:
            reasons.append(f"{uri} changed since the plan was made")
    return tuple(reasons)


def changed_models(plan: Plan, models: Mapping[str, ModelInfo]) -> tuple[str, ...]:
    """Which models are not registered with the weights that the plan was made for."""
    wanted = {(step.params["model"], step.params["model_sha256"]) for step in plan.steps if step.operation in SAMPLING}
    reasons = []
    for name, sha256 in sorted(wanted):
        if name not in models:
            reasons.append(f"model '{name}' is not registered here")
        elif models[name].sha256 != sha256:
            reasons.append(f"model '{name}' has other weights than the plan was made for")
    return tuple(reasons)
