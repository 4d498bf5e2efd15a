"""What explains pictures: weights by step, photos by place, members by place, holds, tombstones, signed files."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

from migrations.columns import ID, TIME, where

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

AT_ONCE = 1000
"""Steps that are looked at together."""


def upgrade() -> None:
    op.create_table(
        "step_materials",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("step_id", ID, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name="fk_step_materials_step_id_steps"),
        sa.PrimaryKeyConstraint("sha256", "step_id", name="pk_step_materials"),
        sqlite_with_rowid=False,
    )
    _fill()
    op.create_table(
        "holds",
        sa.Column("id", ID, nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("placed", TIME, nullable=False),
        sa.Column("released", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_holds"),
    )
    op.create_index("uq_holds_subject", "holds", ["subject"], unique=True, **where("released IS NULL"))
    op.create_table(
        "tombstones",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("deleted", TIME, nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("sha256", "uri", name="pk_tombstones"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_tombstones_source", "tombstones", ["source"])
    op.create_index("ix_step_sources_sha256_step_id", "step_sources", ["sha256", "step_id"])
    op.drop_index("ix_step_sources_sha256", "step_sources")
    op.create_index("ix_step_sources_uri_sha256", "step_sources", ["uri", "sha256"])
    op.add_column("batch_members", sa.Column("place", sa.Integer(), nullable=True))
    op.add_column("artifacts", sa.Column("verified", TIME, nullable=True))
    op.add_column("artifacts", sa.Column("problem", sa.Text(), nullable=True))
    op.add_column("deliveries", sa.Column("file_sha256", sa.Text(), nullable=True))
    op.add_column("deliveries", sa.Column("withdrawn", TIME, nullable=True))
    op.create_index("ix_deliveries_file_sha256", "deliveries", ["file_sha256"], **where("file_sha256 IS NOT NULL"))


def downgrade() -> None:
    op.drop_index("ix_deliveries_file_sha256", "deliveries")
    op.drop_column("deliveries", "withdrawn")
    op.drop_column("deliveries", "file_sha256")
    op.drop_column("artifacts", "problem")
    op.drop_column("artifacts", "verified")
    op.drop_column("batch_members", "place")
    op.drop_index("ix_step_sources_uri_sha256", "step_sources")
    op.create_index("ix_step_sources_sha256", "step_sources", ["sha256"])
    op.drop_index("ix_step_sources_sha256_step_id", "step_sources")
    op.drop_index("ix_tombstones_source", "tombstones")
    op.drop_table("tombstones")
    op.drop_index("uq_holds_subject", "holds")
    op.drop_table("holds")
    op.drop_table("step_materials")


def _fill() -> None:
    """Of the steps that are there."""
    conn = op.get_bind()
    after = 0
    while rows := conn.execute(
        sa.text("SELECT step_id, params FROM step_params WHERE step_id > :after ORDER BY step_id LIMIT :most"),
        {"after": after, "most": AT_ONCE},
    ).all():
        after = rows[-1].step_id
        found = {}
        for row in rows:
            params = json.loads(row.params) if isinstance(row.params, str) else row.params
            for adapter in params.get("adapters") or ():
                found[adapter["sha256"], row.step_id] = "adapter"
            if params.get("model_sha256"):
                found[params["model_sha256"], row.step_id] = "model"
        if found:
            conn.execute(
                sa.text("INSERT INTO step_materials (sha256, step_id, kind) VALUES (:sha256, :step_id, :kind)"),
                [{"sha256": sha256, "step_id": step_id, "kind": kind} for (sha256, step_id), kind in found.items()],
            )
