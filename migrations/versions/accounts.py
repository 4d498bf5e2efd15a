"""Steps are claimed run by run: each is on the account of one of the runs that want it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.columns import ID, where

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("run_id", ID))
    op.execute(
        "UPDATE steps SET run_id = (SELECT runs.id FROM runs JOIN run_steps ON run_steps.run_id = runs.id"
        " WHERE run_steps.step_id = steps.id ORDER BY runs.state = 'running' DESC, runs.priority DESC, runs.id LIMIT 1)"
    )
    op.drop_index("ix_steps_ready", "steps")
    op.create_index("ix_steps_ready", "steps", ["run_id", "lane", "id"], **where("state = 'ready'"))
    op.drop_column("steps", "priority")


def downgrade() -> None:
    op.add_column("steps", sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
    op.execute("UPDATE steps SET priority = coalesce((SELECT priority FROM runs WHERE runs.id = steps.run_id), 0)")
    op.drop_index("ix_steps_ready", "steps")
    op.create_index(
        "ix_steps_ready", "steps", ["lane", sa.literal_column("priority DESC"), "id"], **where("state = 'ready'")
    )
    op.drop_column("steps", "run_id")
