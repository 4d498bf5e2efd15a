"""Who is about to bring a delivery, so that several workers share the work without doing it twice."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TIME = sa.Text().with_variant(sa.DateTime(timezone=True), "postgresql")


def upgrade() -> None:
    op.add_column("deliveries", sa.Column("claimed_by", sa.Text(), nullable=True))
    op.add_column("deliveries", sa.Column("claimed_until", TIME, nullable=True))
    held = sa.text("claimed_by IS NOT NULL")
    op.create_index("ix_deliveries_claimed", "deliveries", ["claimed_by"], sqlite_where=held, postgresql_where=held)
    pending = sa.text("state = 'pending'")
    op.create_index("ix_deliveries_pending", "deliveries", ["id"], sqlite_where=pending, postgresql_where=pending)
    live = sa.text("state IN ('blocked', 'leased', 'ready')")
    op.create_index("ix_steps_account", "steps", ["run_id", "id"], sqlite_where=live, postgresql_where=live)


def downgrade() -> None:
    op.drop_index("ix_steps_account", "steps")
    op.drop_index("ix_deliveries_pending", "deliveries")
    op.drop_index("ix_deliveries_claimed", "deliveries")
    op.drop_column("deliveries", "claimed_until")
    op.drop_column("deliveries", "claimed_by")
