"""The outbox: events that are to leave the system, and how far each has come on its way to each webhook.

An event is written by the transaction that gives a run its final state, so there is no one without the other. It is
addressed once to the webhooks that want it, and each such send is claimed under a token and a time limit, as a fire of
a schedule is.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.sql import among, now, now_plus, stored_text
from kontext_batch.planning.events import KEPT_FOR, ClaimedSend, Webhook, WebhookRow, name_of
from kontext_batch.ports import RunSummary

EVENTS, SENDS = t.events.c, t.event_sends.c
WAITING = SENDS.state == sa.literal_column("'waiting'")
AT_ONCE = 500
"""Events that one transaction addresses."""


def note_end(conn: sa.Connection, run: RunSummary) -> None:
    """That `run`, with its final state in it, has ended. Called by whoever writes that state."""
    assert run.finished is not None, "only a run that has ended makes an event"
    data = {
        "run": run.id,
        "state": run.state.value,
        "recipe": run.recipe,
        "recipe_sha256": run.recipe_sha256,
        "source": run.source,
        "owner": run.owner,
        "trigger": run.trigger,
        "created": run.created.isoformat(),
        "finished": run.finished.isoformat(),
        "steps": {state.value: number for state, number in run.steps.items()},
        "cached": run.cached,
        "deliveries": run.deliveries,
        "delivered": run.delivered,
        "skipped_deliveries": run.skipped_deliveries,
        "failed_deliveries": run.failed_deliveries,
    }
    values = {"uid": f"evt_{uuid4().hex}", "name": name_of(run.state), "owner": run.owner, "data": data}
    conn.execute(sa.insert(t.events).values(run_id=run.id, created=now(), **values))


def unaddressed(conn: sa.Connection) -> bool:
    return conn.execute(sa.select(EVENTS.id).where(EVENTS.addressed.is_(None)).limit(1)).first() is not None


def address_events(conn: sa.Connection, webhooks: Sequence[Webhook]) -> int:
    """Returns how many sends that makes."""
    found = conn.execute(
        sa.select(
            EVENTS.id, EVENTS.name, EVENTS.owner, (EVENTS.created < now_plus(-KEPT_FOR.total_seconds())).label("old")
        )
        .where(EVENTS.addressed.is_(None))
        .order_by(EVENTS.id)
        .limit(AT_ONCE)
        .with_for_update(skip_locked=True)
    ).all()
    sends = [
        {"event_id": row.id, "webhook": webhook.name, "state": "waiting", "tries": 0, "token": 0}
        for row in found
        for webhook in webhooks
        if not row.old and webhook.wants(row.name, row.owner)
    ]
    if sends:
        conn.execute(sa.insert(t.event_sends).values(due=now()), sends)
    conn.execute(sa.update(t.events).where(among(EVENTS.id, [row.id for row in found])).values(addressed=now()))
    return len(sends)


def _due(webhooks: Sequence[str]) -> sa.Select[tuple[int]]:
    return sa.select(SENDS.id).where(WAITING, SENDS.due <= now(), among(SENDS.webhook, webhooks))


def anything_due(conn: sa.Connection, webhooks: Sequence[str]) -> bool:
    return conn.execute(_due(webhooks).limit(1)).first() is not None


def claim_sends(conn: sa.Connection, webhooks: Sequence[str], *, limit: int, seconds: float) -> list[ClaimedSend]:
    """Those whose time has come, or whose sender was lost over them, longest due first."""
    chosen = _due(webhooks).order_by(SENDS.due, SENDS.id).limit(limit)
    if conn.dialect.name == "postgresql":
        chosen = chosen.with_for_update(skip_locked=True)
    ids = conn.scalars(chosen).all()
    conn.execute(
        sa.update(t.event_sends)
        .where(among(SENDS.id, ids))
        .values(token=SENDS.token + 1, tries=SENDS.tries + 1, due=now_plus(seconds))
    )
    rows = conn.execute(
        sa.select(
            SENDS.id, SENDS.token, SENDS.webhook, SENDS.tries, EVENTS.uid, EVENTS.name, EVENTS.created, EVENTS.data
        )
        .join(t.events, EVENTS.id == SENDS.event_id)
        .where(among(SENDS.id, ids))
        .order_by(SENDS.event_id, SENDS.id)
    )
    return [
        ClaimedSend(row.id, row.token, row.webhook, row.tries, row.uid, row.name, row.created, row.data) for row in rows
    ]


def settle_send(
    conn: sa.Connection, send_id: int, token: int, *, error: str | None, retry_in: float | None, untried: bool
) -> bool:
    """Delivered without an `error`; with one, tried again in `retry_in` seconds, or given up. `untried`: not counted.

    False when the claim has moved on.
    """
    again = error is not None and retry_in is not None
    state = "delivered" if error is None else "waiting" if again else "given_up"
    return bool(
        conn.execute(
            sa.update(t.event_sends)
            .where(SENDS.id == send_id, SENDS.token == token, WAITING)
            .values(
                state=state,
                error=None if error is None else stored_text(error),
                due=now_plus(retry_in or 0.0),
                decided=None if again else now(),
                tries=SENDS.tries - int(untried),
            )
        ).rowcount
    )


def webhook_rows(conn: sa.Connection) -> list[WebhookRow]:
    """Of every webhook that an event was addressed to, by name."""
    counts: dict[str, dict[str, int]] = {}
    query = sa.select(SENDS.webhook, SENDS.state, sa.func.count().label("number"))
    for row in conn.execute(query.group_by(SENDS.webhook, SENDS.state).order_by(SENDS.webhook)):
        counts.setdefault(row.webhook, {})[row.state] = row.number
    return [
        WebhookRow(
            name,
            found.get("waiting", 0),
            found.get("delivered", 0),
            found.get("given_up", 0),
            conn.scalar(
                sa.select(SENDS.error)
                .where(SENDS.webhook == name, SENDS.state != "delivered", SENDS.error.is_not(None))
                .order_by(SENDS.id.desc())
                .limit(1)
            ),
        )
        for name, found in counts.items()
    ]
