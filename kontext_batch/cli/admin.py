"""`workers list|drain`, `batches show` and `audit list`: who works, what was computed together, who did what."""

from __future__ import annotations

from typing import Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import YesOption, act, confirm

audit = typer.Typer(name="audit", help="Who did what.", no_args_is_help=True, rich_markup_mode=None)
batches = typer.Typer(name="batches", help="Steps computed together.", no_args_is_help=True, rich_markup_mode=None)


def list_workers(
    workspace: common.WorkspaceOption = None,
    every: Annotated[bool, typer.Option("--all", help="Those that have ended too.")] = False,
    as_json: common.JsonOption = False,
) -> None:
    """Workers: where they run, how long ago they were heard of, how many steps they hold.

    Example: kontext-batch workers list --json
    """
    with common.opened(workspace) as application:
        rows = application.repository.worker_rows(retired=every)
    if as_json:
        output.say_json(rows)
        return
    output.table(
        ["worker", "host", "pid", "device", "heard of", "holds", "state"],
        [
            [
                each.id,
                each.host,
                each.pid,
                each.device,
                f"{each.heartbeat_age:.0f} s ago",
                each.held,
                "ended" if each.retired is not None else "draining" if each.draining else "at work",
            ]
            for each in rows
        ],
        right=(2, 4, 5),
    )


def drain(
    worker: Annotated[
        str | None, typer.Argument(metavar="[WORKER]", help="As `workers list` names it.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All workers of this database.")] = False,
    yes: YesOption = False,
    workspace: common.WorkspaceOption = None,
) -> None:
    """Let a worker finish what it holds, take nothing more, and end.

    Example: kontext-batch workers drain gpu1-4711-9a0b3c4d
    """
    if (worker is None) is not every:
        raise typer.BadParameter("name one worker, or say --all", param_hint="WORKER")
    with common.opened(workspace) as application:
        if every:
            confirm("All workers of this database will end.", yes=yes)
        told = application.repository.drain_workers(worker, by=act(application.settings, "workers drain"))
    for each in told:
        output.say(f"worker {each} finishes what it holds and ends")
    if not told:
        output.say("no worker is at work that was not told before")


@batches.command()
def show(
    batch: Annotated[str, typer.Argument(metavar="BATCH", help="Its number, as `steps logs` names it.")],
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """A batch: its steps and the denoise steps at which they joined and left, device, numeric mode, libraries, times.

    Example: kontext-batch batches show 31
    """
    from kontext_batch.services.questions import batch_number

    with common.opened(workspace) as application:
        found = application.repository.batch(batch_number(batch))
    if as_json:
        output.say_json(found)
        return
    output.say(f"batch {found.id} of {found.lane}, committed {found.committed:%Y-%m-%d %H:%M:%S}")
    output.say(f"  worker {found.worker_id} on {found.device}, {found.numeric_mode}")
    if found.model_sha256 is not None:
        output.say(f"  model sha256 {found.model_sha256}")
    if found.libraries:
        output.say("  " + ", ".join(f"{name} {version}" for name, version in sorted(found.libraries.items())))
    output.table(
        ["step", "key", "joined", "left", "outcome", "seconds"],
        [
            [
                each.step_id,
                each.key.partition(":")[2][:12],
                each.joined,
                each.left,
                each.outcome,
                ", ".join(f"{name} {seconds:.2f}" for name, seconds in each.timings.items()),
            ]
            for each in found.members
        ],
        right=(0, 2, 3),
    )


@audit.command("list")
def list_audit(
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Only what was done to this run.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 50,
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """What people did, and when: the newest first.

    Example: kontext-batch audit list --run 12
    """
    from kontext_batch.services.questions import run_number

    subject = None if run is None else f"run:{run_number(run)}"
    with common.opened(workspace) as application:
        rows = application.repository.audit(subject=subject, limit=limit)
    if as_json:
        output.say_json(rows)
        return
    output.table(
        ["time", "who", "via", "action", "of", "details"],
        [
            [
                f"{each.at:%Y-%m-%d %H:%M:%S}",
                each.who,
                each.via,
                each.action,
                each.subject,
                ", ".join(f"{name}={value}" for name, value in each.details.items()),
            ]
            for each in rows
        ],
    )
