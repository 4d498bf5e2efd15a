"""What stands against running a plan. Each function gives reasons; whoever runs it raises `PlanRefused`."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from kontext_batch.planning.listing import ModelInfo
from kontext_batch.planning.params import SAMPLING
from kontext_batch.planning.plan import ImageInfo, Plan, PlannedStep


def gpu_seconds(plan: Plan, *, done: Container[str] = frozenset()) -> float:
    """Estimated seconds of what is not done yet."""
    return sum(step.gpu_seconds for step in plan.steps if step.key not in done)


def is_untimed(step: PlannedStep) -> bool:
    """Whether it makes an image of which there is no estimate: nothing like it was timed so far."""
    return step.operation in SAMPLING and not step.gpu_seconds


def budget_reasons(plan: Plan, *, done: Container[str] = frozenset()) -> tuple[str, ...]:
    """Which part of the recipe's budget the plan exceeds. `done`: keys that need no computing.

    What was never timed counts nothing, or nothing could ever be timed; but no image fits into no minutes.
    """
    reasons = []
    minutes = gpu_seconds(plan, done=done) / 60
    unknown = sum(is_untimed(step) for step in plan.steps if step.key not in done)
    budget = plan.budget.get("gpu_minutes", math.inf)
    if minutes > budget:
        reasons.append(f"an estimated {_above(minutes, budget)} GPU minutes, the budget is {budget:.12g}")
    elif unknown and budget <= 0:
        images = "1 image" if unknown == 1 else f"{unknown} images"
        reasons.append(f"{images} to sample, of which nothing was timed yet; the budget is {budget:.12g} GPU minutes")
    outputs = len(plan.deliveries)
    if "outputs" in plan.budget and outputs > plan.budget["outputs"]:
        reasons.append(f"{outputs} outputs, the budget is {plan.budget['outputs']:g}")
    return tuple(reasons)


def _above(value: float, limit: float) -> str:
    """`value` with one decimal, or with as many as show that it is above `limit`."""
    decimals = next((number for number in range(1, 13) if round(value, number) > limit), 13)
    return f"{value:.{decimals}f}"


def sources(plan: Plan) -> Mapping[str, ImageInfo]:
    """URI -> source picture, of everything that the plan reads."""
    return {each.source.uri: each.source for step in plan.steps for each in step.inputs if each.source is not None}


def changed_inputs(plan: Plan, current: Mapping[str, ImageInfo | None]) -> tuple[str, ...]:
    """Which source pictures are not what they were when the plan was made.

    `current`: URI -> what lies there now; None or left out when it is gone or unusable. A new ETag over the same bytes
    is no change.
    """
    reasons = []
    for uri, planned in sorted(sources(plan).items()):
        now = current.get(uri)
        if now is None:
            reasons.append(f"{uri} is gone or cannot be used any more")
        elif now.sha256 != planned.sha256:
            reasons.append(f"{uri} changed since the plan was made")
    return tuple(reasons)


def forgotten_inputs(plan: Plan, forgotten: Mapping[str, str]) -> tuple[str, ...]:
    """Which source pictures were taken down for good, and where the recipe reads them.

    `forgotten`: sha256 -> why.
    """
    if not forgotten:
        return ()
    reasons: dict[str, str] = {}
    for step in plan.steps:
        for each in step.inputs:
            if each.source is not None and each.source.sha256 in forgotten:
                why = forgotten[each.source.sha256]
                place = f"{step.origin.file}:{step.origin.line}"
                reasons.setdefault(each.source.uri, f"{place}: {each.source.uri} was taken down and is not read: {why}")
    return tuple(reasons[uri] for uri in sorted(reasons))


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
