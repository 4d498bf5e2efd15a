"""The tables of the main job."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.columns import ID, TIME, where

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "artifacts",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("media_type", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("collected_at", TIME),
        sa.PrimaryKeyConstraint("sha256", name="pk_artifacts"),
    )
    op.create_index("ix_artifacts_uri", "artifacts", ["uri"])

    op.create_table(
        "inputs",
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("format", sa.Text(), nullable=False),
        sa.Column("problem", sa.Text()),
        sa.Column("seen", TIME, nullable=False),
        sa.PrimaryKeyConstraint("uri", name="pk_inputs"),
    )
    op.create_table(
        "models",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("layout", sa.Text(), nullable=False),
        sa.Column("licence", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", "name", name="pk_models"),
    )
    op.create_table(
        "runs",
        sa.Column("id", ID, nullable=False),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("recipe_sha256", sa.Text(), nullable=False),
        sa.Column("recipe_text", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("trigger", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("selection", sa.JSON(), nullable=False),
        sa.Column("budget", sa.JSON(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("finished", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
    op.create_index("ix_runs_recipe", "runs", ["recipe"])

    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("process_started", sa.Float(precision=53), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("engine", sa.JSON(), nullable=False),
        sa.Column("registered", TIME, nullable=False),
        sa.Column("heartbeat", TIME, nullable=False),
        sa.Column("retired", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )
    op.create_table(
        "batches",
        sa.Column("id", ID, nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("model_sha256", sa.Text()),
        sa.Column("numeric_mode", sa.Text(), nullable=False),
        sa.Column("libraries", sa.JSON(), nullable=False),
        sa.Column("committed", TIME, nullable=False),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name="fk_batches_worker_id_workers"),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
    )
    op.create_index("ix_batches_lane_id", "batches", ["lane", "id"])

    op.create_table(
        "steps",
        sa.Column("id", ID, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("deps_left", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("asked", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("batch_limit", sa.Integer()),
        sa.Column("not_before", TIME),
        sa.Column("lease_owner", sa.Text()),
        sa.Column("lease_token", sa.Integer(), nullable=False),
        sa.Column("lease_until", TIME),
        sa.Column("error", sa.Text()),
        sa.CheckConstraint("(state = 'leased') = (lease_owner IS NOT NULL)", name=op.f("ck_steps_lease")),
        sa.CheckConstraint("deps_left >= 0", name=op.f("ck_steps_deps_left")),
        sa.ForeignKeyConstraint(["lease_owner"], ["workers.id"], name="fk_steps_lease_owner_workers"),
        sa.PrimaryKeyConstraint("id", name="pk_steps"),
        sa.UniqueConstraint("key", name="uq_steps_key"),
    )
    op.create_index("ix_steps_leased", "steps", ["lease_owner"], **where("state = 'leased'"))
    op.create_index("ix_steps_live", "steps", ["id"], **where("state IN ('blocked', 'leased', 'ready')"))
    op.create_index(
        "ix_steps_ready", "steps", ["lane", sa.literal_column("priority DESC"), "id"], **where("state = 'ready'")
    )

    op.create_table(
        "attempts",
        sa.Column("id", ID, nullable=False),
        sa.Column("step_id", ID, nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("asked", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("batch_id", ID),
        sa.Column("started", TIME, nullable=False),
        sa.Column("ended", TIME),
        sa.Column("outcome", sa.Text()),
        sa.Column("error_class", sa.Text()),
        sa.Column("error", sa.Text()),
        sa.Column("timings", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="fk_attempts_batch_id_batches"),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name="fk_attempts_step_id_steps"),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name="fk_attempts_worker_id_workers"),
        sa.PrimaryKeyConstraint("id", name="pk_attempts"),
        sa.UniqueConstraint("step_id", "token", name="uq_attempts_step_id_token"),
    )
    op.create_index("ix_attempts_batch_id", "attempts", ["batch_id"])
    op.create_index("uq_attempts_ok", "attempts", ["step_id", "asked"], unique=True, **where("outcome = 'ok'"))

    op.create_table(
        "batch_members",
        sa.Column("batch_id", ID, nullable=False),
        sa.Column("step_id", ID, nullable=False),
        sa.Column("joined", sa.Integer(), nullable=False),
        sa.Column("left", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="fk_batch_members_batch_id_batches"),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name="fk_batch_members_step_id_steps"),
        sa.PrimaryKeyConstraint("batch_id", "step_id", name="pk_batch_members"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_batch_members_step_id", "batch_members", ["step_id"])

    op.create_table(
        "edges",
        sa.Column("child", ID, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("parent", ID, nullable=False),
        sa.ForeignKeyConstraint(["child"], ["steps.id"], name="fk_edges_child_steps"),
        sa.ForeignKeyConstraint(["parent"], ["steps.id"], name="fk_edges_parent_steps"),
        sa.PrimaryKeyConstraint("child", "role", "position", name="pk_edges"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_edges_parent_child", "edges", ["parent", "child"])

    op.create_table(
        "run_steps",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("step_id", ID, nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("axes", sa.Text(), nullable=False),
        sa.Column("candidate", sa.Integer(), nullable=False),
        sa.Column("take", sa.Integer(), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("first", sa.Boolean(), nullable=False),
        sa.Column("cached", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_run_steps_run_id_runs"),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name="fk_run_steps_step_id_steps"),
        sa.PrimaryKeyConstraint("run_id", "ordinal", name="pk_run_steps"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_run_steps_step_id_run_id", "run_steps", ["step_id", "run_id"])

    op.create_table(
        "step_outputs",
        sa.Column("step_id", ID, nullable=False),
        sa.Column("slot", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["sha256"], ["artifacts.sha256"], name="fk_step_outputs_sha256_artifacts"),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name="fk_step_outputs_step_id_steps"),
        sa.PrimaryKeyConstraint("step_id", "slot", name="pk_step_outputs"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_step_outputs_sha256", "step_outputs", ["sha256"])

    op.create_table(
        "step_params",
        sa.Column("step_id", ID, nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name="fk_step_params_step_id_steps"),
        sa.PrimaryKeyConstraint("step_id", name="pk_step_params"),
    )
    op.create_table(
        "step_sources",
        sa.Column("step_id", ID, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name="fk_step_sources_step_id_steps"),
        sa.PrimaryKeyConstraint("step_id", "role", "position", name="pk_step_sources"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_step_sources_sha256", "step_sources", ["sha256"])

    op.create_table(
        "uploads",
        sa.Column("id", ID, nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("step_id", ID, nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name="fk_uploads_step_id_steps"),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
    )
    op.create_index("ix_uploads_step_id_token", "uploads", ["step_id", "token"])
    op.create_index("ix_uploads_uri", "uploads", ["uri"])

    op.create_table(
        "deliveries",
        sa.Column("id", ID, nullable=False),
        sa.Column("run_id", ID, nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("step_id", ID, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("if_exists", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text()),
        sa.Column("delivered_path", sa.Text()),
        sa.Column("version", sa.Integer()),
        sa.Column("error", sa.Text()),
        sa.Column("delivered", TIME),
        sa.ForeignKeyConstraint(
            ["run_id", "ordinal"],
            ["run_steps.run_id", "run_steps.ordinal"],
            name="fk_deliveries_run_id_ordinal_run_steps",
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_deliveries_run_id_runs"),
        sa.ForeignKeyConstraint(["sha256"], ["artifacts.sha256"], name="fk_deliveries_sha256_artifacts"),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name="fk_deliveries_step_id_steps"),
        sa.PrimaryKeyConstraint("id", name="pk_deliveries"),
        sa.UniqueConstraint("run_id", "path", name="uq_deliveries_run_id_path"),
    )
    op.create_index("ix_deliveries_run_id_state", "deliveries", ["run_id", "state"])
    op.create_index("ix_deliveries_step_id", "deliveries", ["step_id"])


def downgrade() -> None:
    for table in (
        "deliveries",
        "uploads",
        "step_sources",
        "step_params",
        "step_outputs",
        "run_steps",
        "edges",
        "batch_members",
        "attempts",
        "steps",
        "batches",
        "workers",
        "runs",
        "models",
        "inputs",
        "artifacts",
    ):
        op.drop_table(table)
