"""What is asked of a workspace: which run goes on, which steps are meant, where a picture comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kontext_batch.errors import ObjectNotFound
from kontext_batch.planning.states import RunState
from kontext_batch.ports import AttemptRow, Repository, RunSummary, SourceInput, StepRow
from kontext_batch.services.prepare import Prepared


def unfinished_run(repository: Repository, prepared: Prepared) -> int | None:
    """The newest unfinished run of exactly this plan: the same command goes on with it. None when there is none."""
    plan = prepared.plan
    wanted = [(each.node, each.axes, each.candidate, each.key) for each in plan.instances]
    for run in repository.runs():
        same = run.recipe_sha256 == plan.recipe_sha256 and run.source == prepared.source
        if run.state is RunState.RUNNING and same:
            steps = [(each.node, each.axes, each.candidate, each.key) for each in repository.run_steps(run.id)]
            if steps == wanted and run.deliveries == len(plan.deliveries):
                return run.id
    return None


def newest_run(repository: Repository, run_id: int | None = None) -> RunSummary:
    """The run asked for, else the newest. Raises `ObjectNotFound`."""
    if run_id is not None:
        return repository.run(run_id)
    runs = repository.runs(limit=1)
    if not runs:
        raise ObjectNotFound("there is no run in this workspace yet; start one with `kontext-batch run FILE`")
    return runs[0]


def found_steps(repository: Repository, text: str, *, run_id: int | None = None) -> Sequence[StepRow]:
    """Steps by id (`12`), key or its prefix, name in the recipe, delivered path or hash of the picture.

    Raises `ObjectNotFound` when nothing is meant.
    """
    found: Sequence[StepRow] = ()
    if text.isascii() and text.isdigit():
        found = repository.steps_by_id([int(text)])
    found = found or repository.find_steps(text, run_id=run_id)
    if not found:
        raise ObjectNotFound(f"no step is known as '{text}': give its number, key, name or the path of an output")
    return found


def one_step(repository: Repository, text: str) -> StepRow:
    """Exactly one step. Raises `ObjectNotFound` when none or several are meant."""
    found = found_steps(repository, text)
    if len(found) > 1:
        some = ", ".join(f"{each.id} ({each.node})" for each in found[:8])
        raise ObjectNotFound(f"'{text}' means {len(found)} steps; give the number of one of them: {some} ...")
    return found[0]


@dataclass(frozen=True, slots=True)
class Link:
    """One step in the chain above a picture, with all that it read."""

    step: StepRow
    parents: tuple[tuple[str, int], ...]
    """(role, step id)."""
    sources: tuple[SourceInput, ...]
    attempts: tuple[AttemptRow, ...]


def chain(repository: Repository, step: StepRow) -> Sequence[Link]:
    """The step and everything above it, the step first, each step once."""
    edges = repository.ancestors(step.id)
    order = list(dict.fromkeys([step.id, *(child for child, _, _ in edges), *(parent for _, parent, _ in edges)]))
    rows = {row.id: row for row in repository.steps_by_id(order)} | {step.id: step}
    return [
        Link(
            rows[each],
            tuple((role, parent) for child, parent, role in edges if child == each),
            tuple(repository.step_sources(each)),
            tuple(repository.attempts(each)),
        )
        for each in order
    ]
