"""`inbox list|retry`."""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import act

app = typer.Typer(name="inbox", help="Recipes that were dropped.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_drops(
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 50,
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """What was dropped into the inboxes, and what became of it.

    Example: kontext-batch inbox list
    """
    with common.opened(workspace) as application:
        rows = application.repository.drops(limit=limit)
    if as_json:
        output.say_json(rows)
        return
    output.table(
        ["drop", "state", "run", "owner", "created", "file", "reason"],
        [
            [each.id, each.state, each.run_id, each.owner, f"{each.created:%Y-%m-%d %H:%M}", each.uri, each.error]
            for each in rows
        ],
    )


@app.command()
def retry(
    drop: Annotated[
        str, typer.Argument(metavar="ID_OR_URI", help="Number of a drop, or its file.", show_default=False)
    ],
    workspace: common.WorkspaceOption = None,
) -> None:
    """Let `workers beat` act anew on a drop that has no run; of a URI, the newest one.

    Example: kontext-batch inbox retry s3://acme/inbox/spring.yaml
    """
    from kontext_batch.storage.uris import file_uri

    which: int | str = int(drop) if re.fullmatch(r"[0-9]{1,18}", drop) else drop
    if isinstance(which, str) and "://" not in which:
        which = file_uri(os.path.abspath(which))
    with common.opened(workspace) as application:
        row = application.repository.retry_drop(which, by=act(application.settings, "inbox retry"))
    output.say(f"drop {row.id} is looked at again: {row.uri}")
