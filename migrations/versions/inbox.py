"""What was dropped into an inbox, and what became of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.columns import ID, TIME, where

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "inbox",
        sa.Column("id", ID, nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.Column("stem", sa.Text(), nullable=False),
        sa.Column("modified", TIME, nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("claimed_until", TIME),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.Text()),
        sa.Column("run_id", ID),
        sa.Column("error", sa.Text()),
        sa.Column("answer", sa.Text()),
        sa.Column("cancelled_by", sa.Text()),
        sa.Column("created", TIME, nullable=False),
        sa.Column("answered", TIME),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_inbox_run_id_runs"),
        sa.PrimaryKeyConstraint("id", name="pk_inbox"),
        sa.UniqueConstraint("uri", "etag", name="uq_inbox_uri_etag"),
    )
    op.create_index("ix_inbox_stem_id", "inbox", ["stem", "id"])
    op.create_index("ix_inbox_run_id", "inbox", ["run_id"])
    op.create_index("ix_inbox_busy", "inbox", ["claimed_until"], **where("state IN ('accepted', 'claimed')"))


def downgrade() -> None:
    op.drop_table("inbox")
