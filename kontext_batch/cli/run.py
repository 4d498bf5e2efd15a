"""`run` and `submit`: from a recipe to delivered images, or to a run that others work on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import act
from kontext_batch.errors import PlanRefused

if TYPE_CHECKING:
    from kontext_batch.bootstrap import Application
    from kontext_batch.cli.progress import Look, Progress
    from kontext_batch.planning.plan import PlannedStep
    from kontext_batch.ports import RunSummary
    from kontext_batch.services.prepare import Prepared

EXIT_DONE, EXIT_FAILURES, EXIT_INTERRUPTED = 0, 3, 130


def run(
    file: common.FileArgument,
    workspace: common.WorkspaceOption = None,
    only: common.OnlyOption = None,
    limit: common.LimitOption = None,
    priority: common.PriorityOption = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Plan FILE, compute what is not there yet, and deliver the images.

    The same command again goes on where it stopped, and finds nothing to do when all is done.

    Example: kontext-batch run spring.yaml --only item=RX-100,locale=de --limit 4
    """
    at = common.target(file)
    with common.opened(workspace, at=at) as application:
        ready = common.prepared(application, at, common.selection(only, limit))
        announce(ready, as_json=as_json)
        _tell_of_schedule(application, ready, at.shown, as_json=as_json)
        application.papers()  # a signer that cannot sign is told before anything is stored
        run_id = submitted(application, ready, priority=priority, as_json=as_json, action="run")
        paths = [each.path for each in ready.plan.deliveries]
        raise typer.Exit(work(application, run_id, paths, as_json=as_json))


def submit(
    file: common.FileArgument,
    workspace: common.WorkspaceOption = None,
    only: common.OnlyOption = None,
    limit: common.LimitOption = None,
    priority: common.PriorityOption = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Plan FILE and store the run; workers (`workers start`) compute it.

    Example: kontext-batch submit spring.yaml --priority 5
    """
    at = common.target(file)
    with common.opened(workspace, at=at) as application:
        ready = common.prepared(application, at, common.selection(only, limit))
        announce(ready, as_json=as_json)
        _tell_of_schedule(application, ready, at.shown, as_json=as_json)
        run_id = submitted(application, ready, priority=priority, as_json=as_json, action="submit")
        if as_json:
            output.event("finished", run=run_id, state="running", exit=EXIT_DONE)


def announce(ready: Prepared, *, as_json: bool) -> None:
    """What the plan comes to, before anything is paid for. Raises `PlanRefused`."""
    from kontext_batch.planning.limits import is_untimed

    states = [each.status for each in ready.explained]
    counts = {status: states.count(status) for status in ("run", "cached", "shared")}
    running = _running(ready)
    seconds = sum(step.gpu_seconds for step in running)
    unknown = sum(map(is_untimed, running))
    if as_json:
        output.event(
            "planned",
            recipe=ready.plan.recipe,
            instances=counts,
            outputs=len(ready.plan.deliveries),
            skipped=len(ready.plan.skipped),
            gpu_seconds=seconds,
            untimed=unknown,
            notes=ready.plan.notes,
        )
    else:
        about = f", about {seconds:.0f} s of sampling" if seconds else ""
        output.tell(
            f"{ready.plan.recipe}: {len(ready.plan.deliveries)} outputs; "
            f"{counts['run']} steps to run, {counts['cached']} cached, {counts['shared']} shared{about}"
        )
        if unknown:
            images = "1 image is" if unknown == 1 else f"{unknown} images are"
            output.tell(f"{images} not in the estimate: nothing was timed with their model yet")
        for row in ready.plan.skipped:
            output.tell(common.skipped_line(row))
    if ready.refusals:
        raise PlanRefused(ready.refusals)


def submitted(application: Application, ready: Prepared, *, priority: int, as_json: bool, action: str) -> int:
    """The run of this plan: the unfinished one of an earlier command, else a new one. `action`: for the records."""
    from kontext_batch.planning.limits import sources
    from kontext_batch.services.limits import resume
    from kontext_batch.services.maintain import reconcile
    from kontext_batch.services.prepare import submit as store_run
    from kontext_batch.services.questions import unfinished_run

    by = act(application.settings, action)
    application.settle(sources(ready.plan))
    run_id = unfinished_run(application.repository, ready)
    continued = run_id is not None
    if run_id is not None:
        # Asked for anew: what was blamed for earlier kills, or failed, gets another chance, as in a new run.
        reconcile(application.repository)
        resume(application.repository, run_id)
        application.repository.retry_run(run_id, by=by)
    else:
        run_id = store_run(application.repository, application.wake_ups, ready, trigger="cli", priority=priority, by=by)
    if as_json:
        output.event("submitted", run=run_id, continued=continued)
    else:
        output.tell(f"run {run_id} goes on" if continued else f"run {run_id}")
    return run_id


def work(
    application: Application, run_id: int, paths: Sequence[str], *, as_json: bool, name_files: bool = False
) -> int:
    """Work on the run until it has a final state or a signal comes; returns the exit code.

    `paths`: where it delivers to, to say where the outputs are. `name_files`: name each new file instead.
    """
    from kontext_batch.planning.states import RunState

    worker = application.worker()
    progress_of_run = _progress(partial(application.repository.run, run_id), as_json=as_json)
    with stopped_by_signals(worker.stopping), progress_of_run as progress:
        summary = worker.run_until_done(run_id, on_step=progress.on_step, on_progress=progress.on_progress)
    if summary.finished is None and summary.state is RunState.PAUSED:
        message = (
            f"the run is paused: {summary.reason}"
            if summary.reason
            else f"somebody paused the run; `kontext-batch runs resume {run_id}`, or the same command, lets it go on"
        )
        if as_json:
            output.event("paused", run=run_id, message=message, exit=EXIT_INTERRUPTED)
        else:
            output.tell(f"run {run_id}: {message}")
        return EXIT_INTERRUPTED
    if summary.finished is None:
        again = "the same command goes on where it stopped"
        if as_json:
            output.event("interrupted", run=run_id, message=again, exit=EXIT_INTERRUPTED)
        else:
            output.tell(f"run {run_id} was interrupted; nothing is lost: {again}")
        return EXIT_INTERRUPTED
    return report(application, summary, paths, as_json=as_json, name_files=name_files)


def report(
    application: Application, summary: RunSummary, paths: Sequence[str], *, as_json: bool, name_files: bool = False
) -> int:
    """How the run ended, and where its outputs are; returns the exit code."""
    from kontext_batch.planning.states import RunState, StepState

    code = EXIT_DONE if summary.state is RunState.DONE else EXIT_FAILURES
    bad = (StepState.FAILED, StepState.QUARANTINED)
    failed = [] if code == EXIT_DONE else application.repository.run_steps(summary.id, states=bad)
    folders = output_folders(paths)
    lost = application.repository.failed_deliveries(summary.id) if summary.failed_deliveries else []
    files = list(map(shown_uri, application.repository.made_files(summary.id))) if name_files else []
    if as_json:
        output.event(
            "finished",
            run=summary.id,
            state=summary.state,
            steps=summary.steps,
            cached=summary.cached,
            delivered=summary.delivered,
            deliveries=summary.deliveries,
            failures=[{"step": each.id, "node": each.node, "axes": each.axes, "error": each.error} for each in failed],
            skipped=summary.skipped_deliveries,
            undelivered=undelivered_data(lost),
            outputs=folders,
            **({"files": files} if name_files else {}),
            exit=code,
        )
        return code
    from kontext_batch.planning.render import axes_text

    for each in failed:
        output.tell(f"failed: {each.node} {axes_text(each.axes)}: {each.error}")
    for path, error in lost:
        output.tell(undelivered_line(path, error))
    counts = ", ".join(f"{count} {state}" for state, count in sorted(summary.steps.items()))
    output.tell(f"run {summary.id} {summary.state}: {counts} ({summary.cached} were cached); {outputs_text(summary)}")
    for place in files or folders:
        output.say(place)
    return code


def outputs_text(summary: RunSummary) -> str:
    """How many outputs are where the recipe wants them, and how many of those were left as they were."""
    text = f"{summary.delivered} of {summary.deliveries} outputs delivered"
    if summary.skipped_deliveries:
        text += f", {summary.skipped_deliveries} of them skipped (`kontext-batch runs show {summary.id}` says why)"
    return text


def undelivered_data(lost: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """What could not be delivered, for machines."""
    return [{"path": path, "error": error} for path, error in lost]


def undelivered_line(path: str, error: str) -> str:
    """Most errors name the file themselves."""
    return f"not delivered: {error}" if path in error else f"not delivered: {shown_uri(path)}: {error}"


def output_folders(paths: Sequence[str]) -> list[str]:
    """Where the outputs of a run are: the folder above all of them, one for each store."""
    stores: dict[str, list[str]] = {}
    for path in paths:
        scheme, _, rest = path.partition("://")
        stores.setdefault(scheme, []).append(rest)
    folders = []
    for scheme, places in stores.items():
        common_path = os.path.commonpath([os.path.dirname(each) for each in places])
        folders.append(shown_uri(f"{scheme}://{common_path}/"))
    return folders


def shown_uri(uri: str) -> str:
    from kontext_batch.storage.uris import file_path

    return file_path(uri) if uri.startswith("file:") else uri


@contextmanager
def stopped_by_signals(stopping: threading.Event) -> Iterator[None]:
    """SIGINT or SIGTERM sets `stopping`; a second one ends the process at once, and the leases run out."""

    def stop() -> None:
        if stopping.is_set():
            os._exit(EXIT_INTERRUPTED)
        stopping.set()

    with on_signals(stop):
        yield


@contextmanager
def on_signals(act: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `act`, each time."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        act()

    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _tell_of_schedule(application: Application, ready: Prepared, shown: str, *, as_json: bool) -> None:
    """That the recipe's `schedule` is not followed, unless somebody has added it, or a program reads along."""
    if as_json or not ready.has_schedule:
        return
    if all(each.recipe != ready.source for each in application.repository.schedules()):
        named = shlex.quote(shown)
        output.tell(f"note: it runs now, once; its schedule fires nothing until `kontext-batch schedules add {named}`")


def _progress(look: Look, *, as_json: bool) -> Progress:
    from kontext_batch.cli.progress import BarProgress, LineProgress

    return BarProgress(look) if not as_json and sys.stderr.isatty() else LineProgress(json=as_json, look=look)


def _running(ready: Prepared) -> list[PlannedStep]:
    keys = {each.instance.key for each in ready.explained if each.status == "run"}
    return [step for step in ready.plan.steps if step.key in keys]
