"""`status` and `runs list|show|retry|cancel|pause|resume|prioritize`; `runs export` is in `export`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import YesOption, act, confirm
from kontext_batch.cli.run import outputs_text, report, shown_uri, submitted, undelivered_data, undelivered_line, work
from kontext_batch.errors import SettingsError

if TYPE_CHECKING:
    from kontext_batch.bootstrap import Application
    from kontext_batch.ports import RunSummary, StepRow
    from kontext_batch.services.prepare import Prepared

app = typer.Typer(name="runs", help="Runs of a workspace.", no_args_is_help=True, rich_markup_mode=None)
# Text, so that what is no number is told in our words, with `--json` too.
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Number of the run.", show_default=False)]


def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Left out, the newest.", show_default=False)
    ] = None,
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """How a run stands.

    Example: kontext-batch status 12 --json
    """
    from kontext_batch.services.questions import newest_run, run_number

    asked = None if run is None else run_number(run)
    with common.opened(workspace) as application:
        summary = newest_run(application.repository, asked)
    if as_json:
        output.say_json(summary)
        return
    output.say(f"run {summary.id} {summary.state}: {summary.recipe}, by {summary.owner}, from {summary.source}")
    for line in _told(summary):
        output.say(line)
    output.say(f"steps: {_steps(summary)}; {summary.cached} were cached")
    failed = f", {summary.failed_deliveries} failed" if summary.failed_deliveries else ""
    output.say(f"{outputs_text(summary)}{failed}")
    urgent = f", priority {summary.priority}" if summary.priority else ""
    output.say(f"created {summary.created:%Y-%m-%d %H:%M}{urgent}" + _finished(summary))


@app.command("list")
def list_runs(
    workspace: common.WorkspaceOption = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    as_json: common.JsonOption = False,
) -> None:
    """Runs, newest first.

    Example: kontext-batch runs list --limit 5
    """
    with common.opened(workspace) as application:
        runs = application.repository.runs(limit=limit)
    if as_json:
        output.say_json(runs)
        return
    output.table(
        ["run", "state", "recipe", "owner", "steps", "delivered", "created"],
        [
            [
                each.id,
                each.state,
                each.recipe,
                each.owner,
                _steps(each),
                f"{each.delivered}/{each.deliveries}",
                f"{each.created:%Y-%m-%d %H:%M}",
            ]
            for each in runs
        ],
        right=(0,),
    )


@app.command()
def show(
    run: RunArgument,
    workspace: common.WorkspaceOption = None,
    state: Annotated[
        str | None, typer.Option(help="Only steps in this state: failed, skipped, ...", show_default=False)
    ] = None,
    as_json: common.JsonOption = False,
) -> None:
    """A run, its steps, and what was not delivered.

    Example: kontext-batch runs show 12 --state failed
    """
    from kontext_batch.planning.states import StepState
    from kontext_batch.services.questions import run_number

    if state is not None and state not in list(StepState):
        raise typer.BadParameter(f"'{state}' is none of {', '.join(StepState)}", param_hint="--state")
    states = None if state is None else [StepState(state)]
    number = run_number(run)
    with common.opened(workspace) as application:
        summary = application.repository.run(number)
        rows = application.repository.run_steps(number, states=states)
        lost = application.repository.failed_deliveries(number)
        skipped = application.repository.skipped_deliveries(number)
    if as_json:
        left = [{"path": path, "reason": reason} for path, reason in skipped]
        output.say_json({"run": summary, "steps": rows, "undelivered": undelivered_data(lost), "skipped": left})
        return
    output.say(f"run {summary.id} {summary.state}: {summary.recipe}; {_steps(summary)}" + _finished(summary))
    for line in _told(summary):
        output.say(line)
    if rows or state is None:
        step_table(rows)
    else:
        output.say(f"no step of run {summary.id} is {state}")
    for path, error in lost:
        output.say(undelivered_line(path, error))
    for path, reason in skipped:
        output.say(f"skipped: {shown_uri(path)}: {reason}")


@app.command()
def retry(
    run: RunArgument,
    workspace: common.WorkspaceOption = None,
    failed: Annotated[bool, typer.Option("--failed", help="Everything that did not succeed.")] = False,
    only: common.OnlyOption = None,
    step: Annotated[
        list[str] | None,
        typer.Option("--step", metavar="NAME", help="Only these steps of the recipe.", show_default=False),
    ] = None,
    take: Annotated[bool, typer.Option("--take", help="Make pictures that are done anew, with another seed.")] = False,
    as_json: common.JsonOption = False,
) -> None:
    """Make failed steps again, or with --take unloved pictures, and work on them; with broker_url workers do.

    With --take standard output names the new files; so does `files` of the event `finished`.

    Example: kontext-batch runs retry 12 --only item=RX-100,scene=terrace --take
    """
    chosen = common.selection(only, None)
    if failed and (chosen.only or step):
        raise typer.BadParameter("--failed stands alone: it means everything of the run that did not succeed")
    if not (failed or chosen.only or step):
        raise typer.BadParameter("say what is made again: --failed, or --only AXIS=VALUE,..., or --step NAME")
    if failed and take:
        raise typer.BadParameter("a failed step needs no new take: --failed alone", param_hint="--take")
    from kontext_batch.services import questions

    number = questions.run_number(run)
    with common.opened(workspace) as application:
        summary = application.repository.run(number)
        if workspace is None and application.settings.database_url is None:
            _check_beside(application.workspace, summary)
    with common.opened(workspace, source=summary.source) as application:
        paths: list[str] = []
        if take:
            at = common.target_of(summary.source)
            if at.is_plan:
                raise typer.BadParameter("the run came from a plan: run its recipe first", param_hint="--take")
            within = questions.instances_of(application.repository, number)
            before = common.prepared(application, at, chosen, within=within)
            _check_models_used(before, step)
            takes = questions.next_takes(application.repository, before, step)
            ready = common.prepared(application, at, chosen, takes=takes, within=within)
            paths = [each.path for each in ready.plan.deliveries]
            number = submitted(
                application, ready, priority=summary.priority, as_json=as_json, action="runs retry --take"
            )
        else:
            keys = None if failed else questions.chosen_keys(application.repository, number, chosen.only, step)
            by = act(application.settings, "runs retry", steps="failed" if keys is None else len(keys))
            count = application.repository.retry_run(number, keys=keys, by=by)
            now = application.repository.run(number)
            waiting = application.repository.pending_deliveries(number, limit=summary.deliveries)
            _tell_again(summary, count, len(waiting), going=now.finished is None, failed=failed)
            if now.finished is not None:
                raise typer.Exit(report(application, now, paths, as_json=as_json))
        if application.settings.broker_url is not None:
            application.wake_ups.wake(application.repository.waiting_lanes())
            output.tell(f"workers compute it; `kontext-batch status {number}` says how far they are")
            raise typer.Exit
        code = work(application, number, paths, as_json=as_json, name_files=take)
    raise typer.Exit(code)


@app.command()
def cancel(
    run: Annotated[list[str], typer.Argument(metavar="RUN...", help="Numbers of runs.", show_default=False)],
    drain: Annotated[bool, typer.Option("--drain", help="Let what is being computed be finished.")] = False,
    yes: YesOption = False,
    workspace: common.WorkspaceOption = None,
) -> None:
    """Stop runs; steps that other runs want go on. What is being computed stops at its next denoise step.

    Several runs are cancelled only when you say so, or with --yes.

    Example: kontext-batch runs cancel 12 --drain
    """
    from kontext_batch.services.questions import open_run

    with common.opened(workspace) as application:
        repository = application.repository
        numbers = [open_run(repository, each).id for each in dict.fromkeys(run)]
        if len(numbers) > 1:
            confirm(f"{len(numbers)} runs will be cancelled.", yes=yes)
        by = act(application.settings, "runs cancel", drain=drain)
        for number in numbers:
            count = repository.cancel_run(number, drain=drain, by=by)
            output.say(f"run {number} is cancelled; {count} steps will not be computed")


@app.command()
def pause(run: RunArgument, workspace: common.WorkspaceOption = None) -> None:
    """Let a run begin nothing more; what is being computed is finished, what other runs want goes on.

    Example: kontext-batch runs pause 12
    """
    with _open_run(run, workspace) as (application, number):
        paused = application.repository.pause_run(number, by=act(application.settings, "runs pause"))
    output.say(f"run {number} is paused" if paused else f"run {number} is paused already")


@app.command()
def resume(
    run: RunArgument,
    budget: Annotated[
        float | None,
        typer.Option("--budget", metavar="MINUTES", min=0, help="GPU minutes of the whole run.", show_default=False),
    ] = None,
    workspace: common.WorkspaceOption = None,
) -> None:
    """Let a paused run go on; workers compute it, or `run` with its recipe.

    A run whose budget is used up needs a larger one. Failures so far no longer count against the limit.

    Example: kontext-batch runs resume 12 --budget 300
    """
    from kontext_batch.services.limits import resume as let_go_on

    with _open_run(run, workspace) as (application, number):
        details = {} if budget is None else {"gpu_minutes": budget}
        by = act(application.settings, "runs resume", **details)
        resumed = let_go_on(application.repository, number, gpu_minutes=budget, by=by)
    output.say(f"run {number} goes on" if resumed else f"run {number} is not paused")


@app.command(context_settings={"ignore_unknown_options": True})  # a negative number is no option
def prioritize(
    run: RunArgument,
    priority: Annotated[int, typer.Argument(help="Higher runs first; a new run has 0.", show_default=False)],
    workspace: common.WorkspaceOption = None,
) -> None:
    """Give an unfinished run another priority; it holds from the next batch on.

    Example: kontext-batch runs prioritize 12 5
    """
    with _open_run(run, workspace) as (application, number):
        by = act(application.settings, "runs prioritize", priority=priority)
        application.repository.prioritize_run(number, priority, by=by)
    output.say(f"run {number} has priority {priority}")


@contextmanager
def _open_run(run: str, workspace: Path | None) -> Iterator[tuple[Application, int]]:
    """The workspace, and the number of an unfinished run of it."""
    from kontext_batch.services.questions import open_run

    with common.opened(workspace) as application:
        yield application, open_run(application.repository, run).id


def _check_beside(workspace: Path, summary: RunSummary) -> None:
    """Raises `SettingsError` for a run whose recipe does not lie beside the workspace.

    A project that was moved or copied has runs of its old folder: going on with one would write there.
    """
    folder = common.folder_of(summary.source)
    if folder is not None and (folder / common.WORKSPACE).resolve() != workspace:
        raise SettingsError(
            f"run {summary.id} was made from {shown_uri(summary.source)}; run the recipe from where it lies now, "
            f"or name this workspace with --workspace to go on there"
        )


def _check_models_used(ready: Prepared, nodes: Sequence[str] | None) -> None:
    """Raises `BadParameter` when none of these steps of the recipe uses a model."""
    from kontext_batch.planning.params import SAMPLING

    sampled = {step.key for step in ready.plan.steps if step.operation in SAMPLING}
    named = [each for each in ready.plan.instances if each.node in (nodes or ())]
    if named and not any(each.key in sampled for each in named):
        nodes = sorted({each.node for each in named})
        names, use = " and ".join(f"'{name}'" for name in nodes), "uses" if len(nodes) == 1 else "use"
        raise typer.BadParameter(f"--take changes the seed of model steps; {names} {use} no model")


def _tell_again(before: RunSummary, count: int, waiting: int, *, going: bool, failed: bool) -> None:
    """What a retry comes to: `count` steps, `waiting` deliveries, or nothing at all."""
    outputs = "output" if waiting == 1 else "outputs"
    if count:
        output.tell(f"{count} {'step' if count == 1 else 'steps'} of run {before.id} will be made again")
    elif going and before.finished is None:
        output.tell(f"nothing of run {before.id} has failed so far; it goes on")
    elif going:
        what = f"step of run {before.id}" if failed else f"step that is meant of run {before.id}"
        output.tell(f"no {what} failed; {waiting} {outputs} will be delivered again")
    else:
        what = f"of run {before.id}" if failed else f"that is meant of run {before.id}"
        output.tell(f"nothing {what} failed, nothing is made again; for other pictures: --only or --step, with --take")


def step_table(rows: Sequence[StepRow]) -> None:
    """Steps, one a line."""
    from kontext_batch.planning.render import axes_text

    output.table(
        ["id", "step", "of", "state", "attempts", "key", "error"],
        [
            [
                each.id,
                each.node,
                axes_text(each.axes) + (f" #{each.candidate}" if each.candidate > 1 else ""),
                each.state,
                each.attempts,
                each.key.partition(":")[2][:12],
                each.error,
            ]
            for each in rows
        ],
        right=(0, 4),
    )


def _steps(summary: RunSummary) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(summary.steps.items())) or "none"


def _told(summary: RunSummary) -> Iterator[str]:
    """Why it stands still or was stopped, and what it has used."""
    if summary.reason:
        verb = "paused" if summary.finished is None else "stopped"
        yield f"{verb}: {summary.reason}"
    budget = summary.budget.get("gpu_minutes")
    if summary.gpu_seconds or budget is not None:
        of = "" if budget is None else f" of {budget:g}"
        yield f"sampled: {summary.gpu_seconds / 60:.2f}{of} GPU minutes"


def _finished(summary: RunSummary) -> str:
    return "" if summary.finished is None else f", finished {summary.finished:%Y-%m-%d %H:%M}"
