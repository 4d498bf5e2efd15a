"""What is asked of a workspace: which run goes on, which steps are meant, why they ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kontext_batch.errors import ObjectNotFound
from kontext_batch.planning.params import SAMPLING
from kontext_batch.planning.plan import Axes, InstanceId
from kontext_batch.planning.states import OPEN_RUNS
from kontext_batch.ports import Repository, RunSummary, StepRow
from kontext_batch.services.prepare import Prepared, earlier_takes

HISTORY = 50
"""Runs that are looked through for how a step was before."""
LARGEST_NUMBER = 2**63 - 1
"""Of a run or step: a database refuses larger ones with an error instead of finding nothing."""

LONGEST_NAME = 10_000
"""Of what steps are looked for by: longer than any path, and short enough for a pattern of SQLite."""


def number(text: str) -> int | None:
    """The number that `text` is; None when it can be none of a run or step."""
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(LARGEST_NUMBER)):
        return None
    return int(text) if int(text) <= LARGEST_NUMBER else None


def run_number(text: str) -> int:
    """The number of a run, as one types it. Raises `ObjectNotFound`."""
    found = number(text)
    if found is None:
        raise ObjectNotFound(f"there is no run '{text[:80]}': the number of a run is expected, as `runs list` shows it")
    return found


def batch_number(text: str) -> int:
    """The number of a batch, as one types it. Raises `ObjectNotFound`."""
    found = number(text)
    if found is None:
        raise ObjectNotFound(f"there is no batch '{text[:80]}': its number is expected, as `steps logs` shows it")
    return found


def open_run(repository: Repository, text: str) -> RunSummary:
    """The unfinished run of that number. Raises `ObjectNotFound`, for one that has ended too."""
    summary = repository.run(run_number(text))
    if summary.finished is not None:
        raise ObjectNotFound(f"run {summary.id} has ended already: {summary.state}")
    return summary


def unfinished_run(repository: Repository, prepared: Prepared) -> int | None:
    """The newest unfinished run of exactly this plan: the same command goes on with it. None when there is none."""
    plan = prepared.plan
    wanted = [(each.node, each.axes, each.candidate, each.key) for each in plan.instances]
    for run in repository.runs():
        same = run.recipe_sha256 == plan.recipe_sha256 and run.source == prepared.source
        if run.state in OPEN_RUNS and same:
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
    step_id = number(text)
    if step_id is not None:
        found = repository.steps_by_id([step_id])
    if not found and len(text) <= LONGEST_NAME and _is_text(text):
        found = repository.find_steps(text, run_id=run_id)
    if not found:
        raise ObjectNotFound(f"no step is known as '{text[:80]}': give its number, key, name or the path of an output")
    return found


def _is_text(text: str) -> bool:
    """Whether a database can hold it; the name of a file may be any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def run_that_wanted(repository: Repository, uri: str) -> int | None:
    """The newest run that has an output at `uri`; None where none of the last ones has."""
    if not repository.find_steps(uri):  # mostly: one question instead of one for each run
        return None
    runs = repository.runs(limit=HISTORY)
    return next((run.id for run in runs if repository.find_steps(uri, run_id=run.id)), None)


def chosen_keys(
    repository: Repository, run_id: int, only: Mapping[str, Sequence[str]], nodes: Sequence[str] | None
) -> list[str]:
    """Keys of the run's steps that `--only` and `--step` mean. Raises `ObjectNotFound` when that is none."""
    rows = repository.run_steps(run_id)
    keys = [row.key for row in rows if _means(row.node, row.axes, only, nodes)]
    if not keys:
        raise ObjectNotFound(f"run {run_id} has no step that --only and --step mean; see `runs show {run_id}`")
    return keys


def instances_of(repository: Repository, run_id: int) -> frozenset[InstanceId]:
    """What the run is made of."""
    return frozenset((row.node, row.axes, row.candidate) for row in repository.run_steps(run_id))


def next_takes(repository: Repository, ready: Prepared, nodes: Sequence[str] | None) -> Mapping[InstanceId, int]:
    """The next take for each sampled instance that was selected; shared steps above that name fewer axes stay.

    Raises `ObjectNotFound` when that is none.
    """
    sampled = {step.key for step in ready.plan.steps if step.operation in SAMPLING}
    before = earlier_takes(repository.latest_instances(ready.plan.recipe))
    only = {axis.partition(".")[0]: () for axis in ready.selection.only}
    takes = {
        each.id: before.get(each.id, 0) + 1
        for each in ready.plan.instances
        if each.key in sampled and _means(each.node, each.axes, only, nodes)
    }
    if not takes:
        raise ObjectNotFound("nothing that a model makes is meant by --only and --step")
    return takes


def _means(node: str, axes: Axes, only: Mapping[str, Sequence[str]], nodes: Sequence[str] | None) -> bool:
    """Whether an instance names every axis of `only` with one of its values; no values: any."""
    values = dict(axes)
    named = all(axis in values and (not wanted or values[axis] in wanted) for axis, wanted in only.items())
    return named and (not nodes or node in nodes)
