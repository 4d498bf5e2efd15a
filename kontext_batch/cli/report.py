"""`report`: one folder to look at a run with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import act
from kontext_batch.cli.run import shown_uri

if TYPE_CHECKING:
    from kontext_batch.bootstrap import Application


def report(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Left out, the newest.", show_default=False)
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FOLDER",
            help="Where to: a folder or an s3:// prefix. Left out, reports/run-N of the workspace.",
            show_default=False,
        ),
    ] = None,
    link: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=7 * 24 * 3600,
            metavar="SECONDS",
            help="Of a bucket: write a link to the report that works so long for anybody who has it; at most 7 days.",
            show_default=False,
        ),
    ] = None,
    workspace: common.WorkspaceOption = None,
) -> None:
    """Write a page to look at a run with: every picture beside its photo, each step, what failed and why.

    It is one folder of plain files that a browser opens from a disk or a bucket; it loads nothing from elsewhere. Small
    copies of all pictures are in it, and the prompts. The same command again goes on where it stopped, brings the
    report up to date, and takes away what it does not show any more.

    Example: kontext-batch report 12 --to s3://acme-review/spring
    """
    from kontext_batch.report.write import title_of
    from kontext_batch.services.questions import newest_run, run_number

    asked = None if run is None else run_number(run)
    with common.opened(workspace) as application:
        summary = newest_run(application.repository, asked)
        application.admit([summary.source])
        folder = _folder(application, to, summary.id)
        if link is not None and not folder.startswith("s3:"):
            raise typer.BadParameter("only a bucket has links; name one with --to s3://...", param_hint="--link")
        writer, into = application.report_writer(), application.store_at(folder)
        with _progress() as on_progress:
            written = writer.write(summary.id, folder, into, on_progress=on_progress)
        if written.missing:
            count = len(written.missing)
            output.tell(f"{count} {'picture' if count == 1 else 'pictures'} cannot be shown; the report says why")
        shared = None
        if link is not None:
            shared = writer.share(written, folder, into, title=title_of(summary), seconds=link)
            # Before anybody has it; the link itself is a credential and is kept nowhere.
            by = act(application.settings, "report", seconds=link, folder=folder)
            application.repository.note(by, f"run:{summary.id}")
    output.say(shown_uri(written.index))
    if shared is not None:
        output.say(shared)


def _folder(application: Application, to: str | None, run_id: int) -> str:
    """URI of the report's folder, ending in `/`."""
    from kontext_batch.storage.uris import file_uri

    if to is not None and "://" in to:
        return to.rstrip("/") + "/"
    path = Path(os.path.abspath(to)) if to is not None else application.workspace / "reports" / f"run-{run_id}"
    return file_uri(path) + "/"


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("report"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("report", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
