"""`plan`: what a recipe comes to, and what stands against it, before anything is paid for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.errors import PlanRefused

if TYPE_CHECKING:
    from kontext_batch.services.prepare import Prepared

MOST_SKIPPED = 20
"""Skipped rows that are printed one by one."""


def plan(
    file: common.FileArgument,
    workspace: common.WorkspaceOption = None,
    only: common.OnlyOption = None,
    limit: common.LimitOption = None,
    why: Annotated[bool, typer.Option("--why", help="Say for each step that runs why it does.")] = False,
    as_json: common.JsonOption = False,
) -> None:
    """Say what `run FILE` would compute, and why; nothing is computed. Exit code 5: something stands against it.

    With --json the plan itself, which `run plan.json` takes: keep it beside the recipe.

    Example: kontext-batch plan spring.yaml --only locale=de --why
    """
    at = common.target(file)
    with common.opened(workspace, at=at) as application:
        ready = common.prepared(application, at, common.selection(only, limit))
    if as_json:
        from kontext_batch.planning.render import plan_as_data

        output.say_json(plan_as_data(ready.plan))
    else:
        _print(ready, why=why)
    if ready.refusals:
        if as_json:  # standard output is the plan alone
            for reason in ready.refusals:
                output.tell(f"refused: {reason}")
            raise typer.Exit(5)
        raise PlanRefused(ready.refusals)


def _print(ready: Prepared, *, why: bool) -> None:
    from kontext_batch.planning.render import axes_text, count_nodes

    made = ready.plan
    owner = f" of {made.owner}" if made.owner else ""
    output.say(f"{made.recipe}{owner}, revision {made.recipe_sha256[:12]}")
    counts = count_nodes(made, ready.explained)
    rows: list[list[object]] = [
        [each.node, each.operation, each.run, each.cached, each.shared, each.samples, _seconds(each.gpu_seconds)]
        for each in counts
    ]
    columns = zip(*((each.run, each.cached, each.shared, each.samples) for each in counts), strict=True)
    total: list[object] = [sum(column) for column in columns]
    rows.append(["total", "", *total, _seconds(sum(each.gpu_seconds for each in counts))])
    output.table(["step", "operation", "run", "cached", "shared", "samples", "est. s"], rows, right=(2, 3, 4, 5, 6))
    if why:
        for each in ready.explained:
            if each.status == "run":
                name = f"{each.instance.node} {axes_text(each.instance.axes)}".strip()
                number = f" #{each.instance.candidate}" if each.instance.candidate > 1 else ""
                output.say(f"{name}{number}: {'; '.join(each.reasons)}")
    else:
        for node in counts:
            for reason, times in node.reasons[:3]:
                output.say(f"{node.node} runs {times} time{'s' if times > 1 else ''}: {reason}")
    for row in made.skipped[:MOST_SKIPPED]:
        output.say(common.skipped_line(row))
    if len(made.skipped) > MOST_SKIPPED:
        output.say(f"... and {len(made.skipped) - MOST_SKIPPED} more rows skipped")
    for note in made.notes:
        output.say(f"note: {note}")
    output.say(f"{len(made.deliveries)} outputs" + _budget(ready))


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds else "-"


def _budget(ready: Prepared) -> str:
    budget = ready.plan.budget
    return "; budget: " + ", ".join(f"{name} {value:g}" for name, value in budget.items()) if budget else ""
