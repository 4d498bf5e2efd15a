"""How everything stands, for the metrics of the beat: what costs little at a million finished steps.

Only live steps are counted, by their partial index. What is finished is counted by the workers that finish it.
"""

from __future__ import annotations

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.graph import open_run
from kontext_batch.lineage.sql import in_state, now, seconds_between
from kontext_batch.planning.states import LIVE, RunState, StepState
from kontext_batch.ports import Standing

STEPS, RUNS, WORKERS = t.steps.c, t.runs.c, t.workers.c


def standing(conn: sa.Connection) -> Standing:
    waits = sa.and_(
        in_state(STEPS.state, StepState.READY),
        RUNS.state == sa.literal_column(f"'{RunState.RUNNING.value}'"),
        STEPS.ready_since <= now(),
    )
    oldest = sa.func.min(sa.case((waits, STEPS.ready_since)))
    steps = conn.execute(
        sa.select(
            STEPS.lane,
            STEPS.state,
            sa.func.count().label("number"),
            seconds_between(oldest, now()).label("age"),
        )
        .select_from(t.steps.outerjoin(t.runs, RUNS.id == STEPS.run_id))
        .where(in_state(STEPS.state, *LIVE))
        .group_by(STEPS.lane, STEPS.state)
    ).all()
    runs = conn.execute(sa.select(RUNS.state, sa.func.count().label("number")).where(open_run()).group_by(RUNS.state))
    pending = sa.select(sa.func.count()).where(
        t.deliveries.c.run_id.in_(sa.select(RUNS.id).where(open_run())), t.deliveries.c.state == "pending"
    )
    workers = conn.execute(
        sa.select(
            sa.func.count().label("number"),
            sa.func.max(seconds_between(WORKERS.heartbeat, now())).label("silent"),
        ).where(WORKERS.retired.is_(None))
    ).one()
    sends = sa.select(t.event_sends.c.webhook, t.event_sends.c.state, sa.func.count().label("number"))
    unsent = sends.where(t.event_sends.c.state.in_([sa.literal_column("'waiting'"), sa.literal_column("'given_up'")]))
    return Standing(
        steps={(row.lane, StepState(row.state)): row.number for row in steps},
        queue_age={row.lane: max(0.0, row.age or 0.0) for row in steps if row.state == StepState.READY},
        runs={RunState(row.state): row.number for row in runs},
        pending_deliveries=conn.execute(pending).scalar_one(),
        workers=workers.number,
        longest_silence=max(0.0, workers.silent or 0.0),
        sends={
            (row.webhook, row.state): row.number
            for row in conn.execute(unsent.group_by(t.event_sends.c.webhook, t.event_sends.c.state))
        },
    )
