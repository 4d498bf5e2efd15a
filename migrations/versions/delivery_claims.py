"""Who is about to bring a delivery, so that several workers share the work without doing it twice."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.columns import TIME, where

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("deliveries", sa.Column("claimed_by", sa.Text(), nullable=True))
    op.add_column("deliveries", sa.Column("claimed_until", TIME, nullable=True))
    op.create_index("ix_deliveries_claimed", "deliveries", ["claimed_by"], **where("claimed_by IS NOT NULL"))
    op.create_index("ix_deliveries_pending", "deliveries", ["id"], **where("state = 'pending'"))
    op.create_index("ix_steps_account", "steps", ["run_id", "id"], **where("state IN ('blocked', 'leased', 'ready')"))


def downgrade() -> None:
    op.drop_index("ix_steps_account", "steps")
    op.drop_index("ix_deliveries_pending", "deliveries")
    op.drop_index("ix_deliveries_claimed", "deliveries")
    op.drop_column("deliveries", "claimed_until")
    op.drop_column("deliveries", "claimed_by")
