"""Who did what; why a run stopped; what a run has used; workers that are to take nothing more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.columns import ID, TIME, where

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", ID, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("via", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_subject", "audit", ["subject"])

    op.add_column("runs", sa.Column("reason", sa.Text()))
    op.add_column("runs", sa.Column("drain", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("runs", sa.Column("size", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("cached", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("excused", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("ranges", sa.JSON()))
    mine = "FROM run_steps WHERE run_steps.run_id = runs.id AND run_steps.first"
    op.execute(
        f"UPDATE runs SET size = (SELECT count(*) {mine}), cached = (SELECT count(*) {mine} AND run_steps.cached)"
    )
    op.create_index("ix_steps_failed", "steps", ["run_id"], **where("state IN ('failed', 'quarantined')"))
    op.add_column("workers", sa.Column("drain", sa.Boolean(), nullable=False, server_default=sa.false()))

    op.create_table(
        "run_usage",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("gpu_seconds", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_run_usage_run_id_runs"),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name="fk_run_usage_worker_id_workers"),
        sa.PrimaryKeyConstraint("run_id", "worker_id", name="pk_run_usage"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("run_usage")
    op.drop_column("workers", "drain")
    op.drop_index("ix_steps_failed", "steps")
    for column in ("ranges", "excused", "cached", "size", "drain", "reason"):
        op.drop_column("runs", column)
    op.drop_table("audit")
