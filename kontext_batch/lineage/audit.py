"""Who did what: a row for each act of a person, in the transaction that changes something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.sql import now, stored_text
from kontext_batch.ports import Act, AuditRow

AUDIT = t.audit.c
P = ParamSpec("P")
T = TypeVar("T")


def acted(
    conn: sa.Connection,
    by: Act | None,
    subject: str | Callable[[T], str],
    work: Callable[Concatenate[sa.Connection, P], T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Do `work` and write down who did it; nothing is written when it says False, that is: nothing changed.

    `subject`: what was acted upon, or how it is called once it is there.
    """
    result = work(conn, *args, **kwargs)
    if by is not None and result is not False:
        note(conn, by, subject if isinstance(subject, str) else subject(result))
    return result


def note(conn: sa.Connection, by: Act, *subjects: str) -> None:
    """A row for each subject."""
    for subject in subjects:
        conn.execute(
            sa.insert(t.audit).values(
                at=now(),
                who=stored_text(by.who),
                via=by.via,
                action=by.action,
                subject=stored_text(subject),
                details=dict(by.details),
            )
        )


def audit(conn: sa.Connection, *, subject: str | None, limit: int) -> list[AuditRow]:
    query = sa.select(t.audit).order_by(AUDIT.id.desc()).limit(limit)
    if subject is not None:
        query = query.where(AUDIT.subject == subject)
    return [
        AuditRow(row.id, row.at, row.who, row.via, row.action, row.subject, row.details) for row in conn.execute(query)
    ]
