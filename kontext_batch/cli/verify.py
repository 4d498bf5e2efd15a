"""`verify`: stored artifacts against their hashes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import YesOption, act, confirm

if TYPE_CHECKING:
    from kontext_batch.ports import Artifact

EVERY_SECONDS = 5.0
"""Pause between two plain lines of progress."""


def verify(
    rate: Annotated[str, typer.Option("--rate", metavar="BYTES", help="Most to read in a second: 50MB, 1GB.")] = "50MB",
    again: Annotated[
        bool, typer.Option("--again", help="Begin a new pass, though the last one is not finished.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Let what is missing or changed be made again when a run wants it.")
    ] = False,
    yes: YesOption = False,
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Read every stored artifact and compare it with its sha256. Exit code 1: some are missing, changed or unreadable.

    A pass that was stopped goes on where it was; after a finished one a new one begins. Workers may go on working. What
    is wrong stays written down until a later pass finds it mended.

    Example: kontext-batch verify --rate 20MB
    """
    from kontext_batch.recipes.fields import parse_bytes
    from kontext_batch.services import verify as verifying

    try:
        pace = verifying.Pace(parse_bytes(rate))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--rate") from error
    with common.opened(workspace) as application:
        repository, store = application.repository, application.store
        by = act(application.settings, "verify")
        since, goes_on = verifying.begin(repository, by, again=again)
        count, size = repository.unread_artifacts_size(since=since)
        if goes_on:
            output.tell(f"going on with the pass of {since:%Y-%m-%d %H:%M:%S}: {count} artifacts are left")
        with _progress(count, size) as on_read:
            verifying.Verifier(repository, store, pace, on_read).run(since)
        damaged = verifying.finish(repository, by)
        if as_json:
            output.say_json({"read": count, "bytes": size, "damaged": damaged})
        else:
            for each in damaged:
                steps = ", ".join(map(str, each.steps)) or "none"
                output.say(f"{each.problem}: {each.artifact.uri} (of step {steps})")
            output.say(f"{count} artifacts of {size} bytes were read; {len(damaged)} are not as they should be")
        if damaged and repair:
            confirm(
                f"{len(damaged)} artifacts will be forgotten unless they are only unreadable; the next run makes again "
                "what it needs, open runs that only have to deliver it fail.",
                yes=yes,
            )
            repository.note(act(application.settings, "verify", repair=True, artifacts=len(damaged)), "artifacts")
            output.tell(f"{verifying.repair(repository, store, damaged)} forgotten")
        elif damaged:
            output.tell("`verify --repair` lets what is missing or changed be made again when a run wants it")
    raise typer.Exit(1 if damaged else 0)


@contextmanager
def _progress(count: int, size: int) -> Iterator[Callable[[Artifact], None]]:
    """Within, what was read is shown: a bar on a terminal, else a line every few seconds."""
    if not sys.stderr.isatty():
        yield _lines(count, size)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("read", total=size)
        yield lambda artifact: bar.advance(task, artifact.bytes)


def _lines(count: int, size: int) -> Callable[[Artifact], None]:
    told, done, read = time.monotonic(), 0, 0

    def on_read(artifact: Artifact) -> None:
        nonlocal told, done, read
        done, read = done + 1, read + artifact.bytes
        if time.monotonic() - told >= EVERY_SECONDS:
            told = time.monotonic()
            output.tell(f"{done}/{count} artifacts, {read / 1e6:.0f} of {size / 1e6:.0f} MB")

    return on_read
