"""Events that leave the system, and since when a step may be claimed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.columns import ID, TIME, where

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("ready_since", TIME))
    op.create_table(
        "events",
        sa.Column("id", ID, nullable=False),
        sa.Column("uid", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("run_id", ID),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("addressed", TIME),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_events_run_id_runs"),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
        sa.UniqueConstraint("uid", name="uq_events_uid"),
    )
    op.create_index("ix_events_run_id", "events", ["run_id"])
    op.create_index("ix_events_unaddressed", "events", ["id"], **where("addressed IS NULL"))
    op.create_table(
        "event_sends",
        sa.Column("id", ID, nullable=False),
        sa.Column("event_id", ID, nullable=False),
        sa.Column("webhook", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("due", TIME, nullable=False),
        sa.Column("error", sa.Text()),
        sa.Column("decided", TIME),
        sa.ForeignKeyConstraint(["event_id"], ["events.id"], name="fk_event_sends_event_id_events"),
        sa.PrimaryKeyConstraint("id", name="pk_event_sends"),
        sa.UniqueConstraint("event_id", "webhook", name="uq_event_sends_event_id_webhook"),
    )
    op.create_index("ix_event_sends_waiting", "event_sends", ["due"], **where("state = 'waiting'"))
    op.create_index("ix_event_sends_given_up", "event_sends", ["webhook"], **where("state = 'given_up'"))


def downgrade() -> None:
    op.drop_table("event_sends")
    op.drop_table("events")
    op.drop_column("steps", "ready_since")
