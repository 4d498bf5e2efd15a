"""Care for a workspace: `doctor`, `gc`, `db upgrade|check|verify` and `workers start|beat`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import YesOption, act, confirm
from kontext_batch.cli.run import on_signals, stopped_by_signals
from kontext_batch.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kontext_batch.bootstrap import Application
    from kontext_batch.planning.inbox import Place

db = typer.Typer(name="db", help="The database.", no_args_is_help=True, rich_markup_mode=None)
workers = typer.Typer(name="workers", help="Processes that compute.", no_args_is_help=True, rich_markup_mode=None)


def doctor(workspace: common.WorkspaceOption = None, as_json: common.JsonOption = False) -> None:
    """Check each part that the settings name. Exit code 1: something needs care, and the line says what to do.

    Looked at are workspace, disk space, database, store, conditional writes, broker, inboxes and their queue, content
    filter, C2PA signer, tokens, webhooks, metrics, models, device, and whether each model fits into the device's
    memory. `warn` is no failure: it works within limits, which it names.

    To find out, a small object is written and removed, the content filter is run with a plain grey picture, and the
    signer signs one.

    Example: kontext-batch doctor --workspace spring/kontext-out
    """
    from kontext_batch.cli.checks import all_checks

    checks = list(all_checks(common.chosen_workspace(workspace), named=workspace is not None))
    if as_json:
        output.say_json(checks)
    else:
        for each in checks:
            mark = "FAIL" if not each.ok else "warn" if each.warned else "ok  "
            advice = f"\n     {each.advice}" if each.advice and mark != "ok  " else ""
            output.say(f"{mark} {each.name}: {each.found}{advice}")
    raise typer.Exit(0 if all(each.ok for each in checks) else 1)


def gc(
    workspace: common.WorkspaceOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    keep_bytes: Annotated[
        int | None,
        typer.Option(min=0, help="Bytes of artifacts to keep; left out, cache_limit.", show_default=False),
    ] = None,
    days: Annotated[
        float | None,
        typer.Option(min=0, help="Days to keep intermediates; left out, keep_intermediates_days.", show_default=False),
    ] = None,
    yes: YesOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Remove intermediates that nobody wants any more, artifacts above the size limit, and uploads of nobody.

    Intermediates, which no recipe delivers, go keep_intermediates_days after they were last wanted. Above the size
    limit go those that can be computed again, what is delivered last of all. What a hold names stays, and so does what
    a step or a delivery still needs. What a takedown has left is deleted too.

    Artifacts are removed only when you say so, or with --yes.

    Example: kontext-batch gc --dry-run --keep-bytes 1000000000
    """
    from dataclasses import replace

    from kontext_batch.services.maintain import reconcile
    from kontext_batch.services.retention import collect_garbage

    with common.opened(workspace) as application:
        repository, store = application.repository, application.store
        policy = application.policy()
        if keep_bytes is not None:
            policy = replace(policy, keep_bytes=keep_bytes)
        if days is not None:
            policy = replace(policy, intermediate_days=days)
        if not dry_run:
            reconcile(repository)
        gone = collect_garbage(repository, store, policy, dry_run=True)
        if not dry_run:
            if gone.artifacts:
                confirm(f"{gone.artifacts} artifacts of {gone.bytes} bytes will be removed.", yes=yes)
            rules = {"keep_bytes": policy.keep_bytes, "intermediate_days": policy.intermediate_days}
            by = act(application.settings, "gc", **rules, artifacts=gone.artifacts, bytes=gone.bytes)
            if gone.artifacts or gone.orphans or gone.taken_down:
                repository.note(by, "artifacts")
            gone = collect_garbage(repository, store, policy, admit=application.admit)
    if as_json:
        output.say_json(gone)
        return
    verb = "would be removed" if dry_run else "removed"
    for amount, rule in ((gone.by_age, "intermediates not wanted for long"), (gone.by_size, "above the size limit")):
        if amount.artifacts:
            output.say(f"{rule}: {amount.artifacts} artifacts of {amount.bytes} bytes")
    if gone.taken_down:
        output.say(f"left from takedowns: {gone.taken_down} objects")
    output.say(f"{gone.artifacts} artifacts of {gone.bytes} bytes and {gone.orphans} orphaned uploads {verb}")


@db.command()
def upgrade(workspace: common.WorkspaceOption = None) -> None:
    """Create the tables, or bring them to this version's.

    Example: kontext-batch db upgrade --workspace kontext-out
    """
    from kontext_batch.lineage import migrate
    from kontext_batch.lineage.tables import REVISION

    url = _url(workspace)
    found = migrate.current(url)
    migrate.upgrade(url)
    if found not in (None, REVISION):
        with common.opened(workspace) as application:
            by = act(application.settings, "db upgrade", old=found, new=REVISION)
            application.repository.note(by, "database")
    output.say("the database is up to date")


@db.command()
def check(workspace: common.WorkspaceOption = None) -> None:
    """Whether the database is at this version's revision. Exit code 2 when it is not.

    Example: kontext-batch db check
    """
    from kontext_batch.lineage import migrate

    migrate.check(_url(workspace))
    output.say("the database is up to date")


@db.command()
def verify(
    workspace: common.WorkspaceOption = None,
    objects: Annotated[
        bool, typer.Option("--objects", help="List the store too: whether every picture is where it should be.")
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Let what is missing be made again when a run wants it; with --objects.")
    ] = False,
    yes: YesOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Whether the database keeps its own rules, and the store what the database names. Exit code 1 when it does not.

    What is missing is forgotten only when you say so, or with --yes.

    Example: kontext-batch db verify --objects
    """
    from kontext_batch.services.maintain import compare_store

    if forget and not objects:
        raise typer.BadParameter("what is missing is found with --objects", param_hint="--forget")
    with common.opened(workspace) as application:
        broken = application.repository.verify()
        prefix = application.artifact_keys.prefix
        missing, unknown = compare_store(application.repository, application.store, prefix) if objects else ([], [])
        if as_json:
            output.say_json({"broken": broken, "missing": missing, "unknown": unknown})
        else:
            for each in broken:
                output.say(f"broken: {each.table} {each.id}: {each.rule}")
            for uri in missing:
                output.say(f"missing: {uri}")
            found = f"{len(broken)} rows break a rule"
            output.say(f"{found}, {len(missing)} objects are missing, {len(unknown)} are unknown" if objects else found)
        if forget and (lost := [name.sha256 for name in map(application.artifact_keys.parse, missing) if name]):
            confirm(
                f"{len(lost)} missing object{'s' if len(lost) > 1 else ''} will be forgotten; the next run makes again "
                "what it needs, open runs that only have to deliver it fail.",
                yes=yes,
            )
            by = act(application.settings, "db verify", forget=True, artifacts=len(lost))
            application.repository.lost_artifacts(lost, by=by)
    raise typer.Exit(1 if broken or missing else 0)


@workers.command()
def start(
    workspace: common.WorkspaceOption = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="Compute steps of models, on cuda:0, cpu, ...; without --operations nothing else.",
            show_default=False,
        ),
    ] = None,
    operations: Annotated[
        bool,
        typer.Option("--operations", help="Compute Pillow steps and deliver; without --device nothing else."),
    ] = False,
    metrics_port: common.MetricsPortOption = None,
) -> None:
    """Work on everything that is ready until stopped; without --device or --operations on steps of every kind.

    With broker_url in the settings it is a Celery worker that waits to be rung, else it looks for work all the time.
    SIGTERM or Ctrl-C: what is sampled is finished within grace_seconds. A second one: it is given back at the next
    denoise step.

    Example: kontext-batch workers start --device cuda:0
    """
    from kontext_batch.settings import load_settings
    from kontext_batch.workers.process import Duties

    duties = Duties(
        workspace=str(common.chosen_workspace(workspace)),
        device=device,
        edits=device is not None or not operations,
        operations=operations or device is None,
        metrics_port=metrics_port,
    )
    settings = load_settings()
    if duties.edits:  # a worker without its device would fail everybody's steps
        from kontext_batch.editor import chosen_device

        chosen_device(device or settings.device, compiled=settings.compile)
    if duties.operations:  # and one that cannot sign would fail everybody's deliveries
        from kontext_batch.bootstrap.adapters import signer_of

        signer_of(settings)
    if settings.broker_url is not None:
        from kontext_batch.workers.start import serve_rings

        raise typer.Exit(serve_rings(settings, duties))
    with common.opened(workspace) as application:
        worker = application.worker(edits=duties.edits, operations=duties.operations, device=device)
        worker.pulse = application.pulse()
        with (
            application.served(worker.pulse, port=metrics_port),
            on_signals(lambda: worker.end(settings.grace_seconds)),
        ):
            output.tell("working; Ctrl-C stops")
            worker.serve()
    output.tell("stopped; nothing is held any more")


@workers.command()
def beat(
    workspace: common.WorkspaceOption = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 5.0,
    metrics_port: common.MetricsPortOption = None,
) -> None:
    """Fire schedules, watch inboxes, keep runs within limits, return what lost workers held and ring, until stopped.

    It tells webhooks of runs that end, and removes what `gc` removes by age, a part at a time, and what takedowns left.
    Several may run at once: each time of a schedule, each drop becomes one run.

    Example: kontext-batch workers beat --workspace kontext-out
    """
    import threading
    from contextlib import ExitStack
    from functools import cache

    from kontext_batch.errors import InfrastructureError
    from kontext_batch.report.aside import ReportsAside
    from kontext_batch.services.limits import enforce
    from kontext_batch.services.maintain import reconcile
    from kontext_batch.services.prepare import Planner
    from kontext_batch.services.schedules import Scheduler
    from kontext_batch.services.watch import Watch

    stopping = threading.Event()
    output.tell("beating; Ctrl-C stops")
    with stopped_by_signals(stopping), common.opened(workspace) as application, ExitStack() as served:
        watcher = application.watcher(served.enter_context(ReportsAside(application.report_writer())))
        pulse, watch, notifier = application.pulse(), Watch(application.repository), application.notifier()
        collector = application.collector()
        served.enter_context(application.served(pulse, port=metrics_port))
        served.enter_context(pulse.working())
        while not stopping.is_set():
            pulse.beat()
            with ExitStack() as opened:

                def planner(uri: str, opened: ExitStack = opened) -> Planner:
                    return opened.enter_context(common.opened(workspace, source=uri)).planner()

                @cache
                def fresh(opened: ExitStack = opened) -> Application:  # knows the models of now
                    return opened.enter_context(common.opened(workspace))

                def inbox_planner(
                    place: Place, more: Sequence[str], fresh: Callable[[], Application] = fresh
                ) -> Planner:
                    return fresh().inbox_planner(place, more)

                try:
                    reconcile(application.repository)
                    application.repository.finish_runs()  # whose last step no worker ended: it was lost once too often
                    application.wake_ups.wake(application.repository.waiting_lanes())
                    for run_id, reason in enforce(application.repository, application.limits()):
                        output.tell(f"run {run_id} is paused: {reason}")
                    for run_id in Scheduler(application.repository, application.wake_ups, planner).tick():
                        output.tell(f"run {run_id}")
                    for run_id in watcher.tick(inbox_planner):
                        output.tell(f"run {run_id}")
                    notifier.tick()
                    collector.tick()
                    watch.tick()
                except InfrastructureError as error:  # a database that is restarted comes back
                    output.tell(f"{error}; trying again")
            stopping.wait(every)
    output.tell("stopped")


def _url(workspace: Path | None) -> str:
    """The database of the settings or of the workspace. Raises `SettingsError` when there is no workspace."""
    from kontext_batch.bootstrap import DATABASE
    from kontext_batch.settings import load_settings

    settings = load_settings()
    if settings.database_url is not None:
        return settings.database_url
    folder = common.chosen_workspace(workspace).resolve()
    if not folder.is_dir():
        raise SettingsError(f"{folder}: there is no workspace here; name one with --workspace DIR")
    return f"sqlite:///{folder / DATABASE}"
