"""`webhooks list|test`."""

from __future__ import annotations

from typing import Annotated

import typer

from kontext_batch.cli import common, output

app = typer.Typer(name="webhooks", help="Where the ends of runs are told.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_webhooks(workspace: common.WorkspaceOption = None, as_json: common.JsonOption = False) -> None:
    """Webhooks of the settings, and how their events stand; those that are set no more, too.

    Example: kontext-batch webhooks list
    """
    from urllib.parse import urlsplit

    with common.opened(workspace) as application:
        configured = {each.name: each for each in application.settings.webhooks}
        stand = {row.webhook: row for row in application.repository.webhook_rows()}
    rows = []
    for name in sorted({*configured, *stand}):
        hook, row = configured.get(name), stand.get(name)
        rows.append(
            {
                "webhook": name,
                "host": None if hook is None else urlsplit(hook.url).hostname,  # the path may be a secret
                "events": [] if hook is None else list(hook.events),
                "waiting": row.waiting if row else 0,
                "delivered": row.delivered if row else 0,
                "given_up": row.given_up if row else 0,
                "last_error": row.last_error if row else None,
            }
        )
    if as_json:
        output.say_json(rows)
        return
    output.table(
        ["webhook", "host", "events", "waiting", "delivered", "given up", "last error"],
        [[each["host"] or "set no more" if key == "host" else _cell(each[key]) for key in each] for each in rows],
        right=(3, 4, 5),
    )


@app.command("test")
def send_test(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the webhook.", show_default=False)],
    workspace: common.WorkspaceOption = None,
) -> None:
    """Send an event of the type `test` now, signed as the others are. Exit code 1 when it is not taken.

    Example: kontext-batch webhooks test dam
    """
    import json
    from datetime import UTC, datetime
    from uuid import uuid4

    from kontext_batch.errors import ObjectNotFound

    with common.opened(workspace) as application:
        if name not in {each.name for each in application.settings.webhooks}:
            raise ObjectNotFound(f"there is no webhook '{name}' in the settings; `webhooks list` shows them")
        body = {"type": "test", "timestamp": datetime.now(UTC).isoformat(), "data": {}}
        application.notifier().post.post(name, f"evt_{uuid4().hex}", json.dumps(body).encode())
    output.say(f"webhook {name} has taken it")


def _cell(value: object) -> object:
    return ", ".join(value) if isinstance(value, list) else value
