"""Schedules, and the times at which they fired."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.columns import ID, TIME, where

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "schedules",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("cron", sa.Text(), nullable=False),
        sa.Column("tz", sa.Text(), nullable=False),
        sa.Column("catch_up", sa.Text(), nullable=False),
        sa.Column("overlap", sa.Text(), nullable=False),
        sa.Column("stop_at", sa.Text()),
        sa.Column("only_changed", sa.Boolean(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("considered", TIME, nullable=False),
        sa.Column("removed", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_schedules"),
    )
    op.create_index("uq_schedules_name", "schedules", ["name"], unique=True, **where("removed IS NULL"))
    op.create_table(
        "fires",
        sa.Column("id", ID, nullable=False),
        sa.Column("schedule_id", ID, nullable=False),
        sa.Column("fire_at", TIME, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("claimed_until", TIME),
        sa.Column("run_id", ID),
        sa.Column("reason", sa.Text()),
        sa.Column("decided", TIME),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_fires_run_id_runs"),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedules.id"], name="fk_fires_schedule_id_schedules"),
        sa.PrimaryKeyConstraint("id", name="pk_fires"),
        sa.UniqueConstraint("schedule_id", "fire_at", name="uq_fires_schedule_id_fire_at"),
    )
    op.create_index("ix_fires_run_id", "fires", ["run_id"])
    op.create_index("ix_fires_claimed", "fires", ["claimed_until"], **where("state = 'claimed'"))


def downgrade() -> None:
    op.drop_table("fires")
    op.drop_table("schedules")
