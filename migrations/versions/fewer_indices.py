"""No index of live steps by id: PostgreSQL read it through to find the few that are ready, and each move wrote it."""

from __future__ import annotations

from alembic import op

from migrations.columns import where

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_steps_live", "steps")


def downgrade() -> None:
    op.create_index("ix_steps_live", "steps", ["id"], **where("state IN ('blocked', 'leased', 'ready')"))
