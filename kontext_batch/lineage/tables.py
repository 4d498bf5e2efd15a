"""The tables (DESIGN.md section 4). A change here needs a migration: a test compares the two.

Times are the database's, in UTC. JSON columns hold canonical JSON.
"""

from __future__ import annotations

import sqlalchemy as sa

from kontext_batch.lineage.sql import AxesText, UtcTime, in_state
from kontext_batch.planning.states import LIVE, StepState

REVISION = "0009"
"""The migration that makes these tables."""

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> sa.Column[int]:
    """A number that the database gives out, ascending."""
    return sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True)


def _ref(name: str, target: str, *, primary_key: bool = False, nullable: bool = False) -> sa.Column[int]:
    kind = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    return sa.Column(name, kind, sa.ForeignKey(target), primary_key=primary_key, nullable=nullable)


def _partial(name: str, *columns: sa.ColumnElement[object], where: sa.ColumnElement[bool]) -> sa.Index:
    return sa.Index(name, *columns, sqlite_where=where, postgresql_where=where)


runs = sa.Table(
    "runs",
    metadata,
    _id(),
    sa.Column("recipe", sa.Text, nullable=False),
    sa.Column("recipe_sha256", sa.Text, nullable=False),
    sa.Column("recipe_text", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("trigger", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("selection", sa.JSON, nullable=False),
    sa.Column("budget", sa.JSON, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # planning.states.RunState
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("finished", UtcTime),  # set with a final state, cleared by a retry
    sa.Column("reason", sa.Text),  # why the system paused or cancelled it; cleared when it goes on
    # Cancelled, but what was leased at that moment is finished.
    sa.Column("drain", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("size", sa.Integer, nullable=False, server_default="0"),  # its distinct steps
    sa.Column("cached", sa.Integer, nullable=False, server_default="0"),  # those of them that were done already
    # Failed steps that do not count against its limit: there when somebody last let it go on.
    sa.Column("excused", sa.Integer, nullable=False, server_default="0"),
    # Its distinct steps as [first id, last id], where that is a short list: to count them without `run_steps`.
    sa.Column("ranges", sa.JSON(none_as_null=True)),
    sa.Index(None, "recipe"),
)

steps = sa.Table(
    "steps",
    metadata,
    _id(),  # a parent's id is smaller than its children's
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("operation", sa.Text, nullable=False),
    sa.Column("lane", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # planning.states.StepState
    # How many distinct parents are not done; kept while blocked, 0 while ready or leased, without meaning otherwise.
    sa.Column("deps_left", sa.Integer, nullable=False),
    sa.Column("asked", sa.Integer, nullable=False),  # 1 at first; one more each time a final step is asked for anew
    sa.Column("attempts", sa.Integer, nullable=False),  # tries begun since it was asked for; a release takes one back
    sa.Column("losses", sa.Integer, nullable=False),  # workers lost with it since it was asked for
    sa.Column("batch_limit", sa.Integer),  # 1 after a loss: claimed alone; half a batch that was too big
    sa.Column("not_before", UtcTime),
    sa.Column("lease_owner", sa.Text, sa.ForeignKey("workers.id")),
    sa.Column("lease_token", sa.Integer, nullable=False),  # grows with each claim, for ever: the fence
    sa.Column("lease_until", UtcTime),
    sa.Column("error", sa.Text),  # the last fault; cleared when done or asked anew
    # Its account: of the open runs that want it a running one, of the highest priority, the oldest. No foreign key:
    # SQLite can add none to a table that is there.
    sa.Column("run_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite")),
    sa.Column("ready_since", UtcTime),  # from when it might have been claimed, while ready
    sa.UniqueConstraint("key"),
    sa.CheckConstraint("deps_left >= 0", name="deps_left"),
    sa.CheckConstraint("(state = 'leased') = (lease_owner IS NOT NULL)", name="lease"),
)
_partial(
    "ix_steps_ready",
    steps.c.run_id,
    steps.c.lane,
    steps.c.id,
    where=in_state(steps.c.state, StepState.READY),
)
_partial("ix_steps_leased", steps.c.lease_owner, where=in_state(steps.c.state, StepState.LEASED))
_partial("ix_steps_failed", steps.c.run_id, where=in_state(steps.c.state, StepState.FAILED, StepState.QUARANTINED))
_partial("ix_steps_account", steps.c.run_id, steps.c.id, where=in_state(steps.c.state, *LIVE))

# Apart from `steps`: that row is rewritten with each move and read by the hundred thousand, so it stays small.
step_params = sa.Table(
    "step_params",
    metadata,
    _ref("step_id", "steps.id", primary_key=True),
    sa.Column("params", sa.JSON, nullable=False),
)

step_sources = sa.Table(
    "step_sources",
    metadata,
    _ref("step_id", "steps.id", primary_key=True),
    sa.Column("role", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("uri", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Index(None, "sha256", "step_id"),
    sa.Index(None, "uri", "sha256"),
    sqlite_with_rowid=False,
)

# Weights that a step is computed with.
step_materials = sa.Table(
    "step_materials",
    metadata,
    sa.Column("sha256", sa.Text, primary_key=True),
    _ref("step_id", "steps.id", primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),  # model, adapter
    sqlite_with_rowid=False,
)

edges = sa.Table(
    "edges",
    metadata,
    _ref("child", "steps.id", primary_key=True),
    sa.Column("role", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    _ref("parent", "steps.id"),
    sa.Index(None, "parent", "child"),
    sqlite_with_rowid=False,
)

run_steps = sa.Table(
    "run_steps",
    metadata,
    _ref("run_id", "runs.id", primary_key=True),
    sa.Column("ordinal", sa.Integer, primary_key=True),  # place of the instance in the plan
    _ref("step_id", "steps.id"),
    sa.Column("node", sa.Text, nullable=False),
    sa.Column("axes", AxesText, nullable=False),
    sa.Column("candidate", sa.Integer, nullable=False),
    sa.Column("take", sa.Integer, nullable=False),
    sa.Column("file", sa.Text, nullable=False),
    sa.Column("line", sa.Integer, nullable=False),
    sa.Column("first", sa.Boolean, nullable=False),  # the first instance of its step in this run: counts the step
    sa.Column("cached", sa.Boolean, nullable=False),  # the step was done already
    sa.Index(None, "step_id", "run_id"),
    sqlite_with_rowid=False,
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("sha256", sa.Text, primary_key=True),
    sa.Column("uri", sa.Text, nullable=False),
    sa.Column("media_type", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("collected_at", UtcTime),  # its bytes were removed; the row stays for the lineage
    sa.Column("verified", UtcTime),  # when its bytes were last read and compared with its hash
    sa.Column("problem", sa.Text),  # what was found then; NULL: nothing
    sa.Index(None, "uri"),
)

step_outputs = sa.Table(
    "step_outputs",
    metadata,
    _ref("step_id", "steps.id", primary_key=True),
    sa.Column("slot", sa.Text, primary_key=True),
    sa.Column("sha256", sa.Text, sa.ForeignKey("artifacts.sha256"), nullable=False),
    sa.Index(None, "sha256"),
    sqlite_with_rowid=False,
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("process_started", sa.Float(53), nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("engine", sa.JSON, nullable=False),
    sa.Column("registered", UtcTime, nullable=False),
    sa.Column("heartbeat", UtcTime, nullable=False),
    sa.Column("retired", UtcTime),  # said goodbye, or was found gone
    sa.Column("drain", sa.Boolean, nullable=False, server_default=sa.false()),  # told to take nothing more
)

# A row for each worker, so that their commits do not wait for one another.
run_usage = sa.Table(
    "run_usage",
    metadata,
    _ref("run_id", "runs.id", primary_key=True),
    sa.Column("worker_id", sa.Text, sa.ForeignKey("workers.id"), primary_key=True),
    sa.Column("gpu_seconds", sa.Float(53), nullable=False),  # of sampling, as measured
    sqlite_with_rowid=False,
)

batches = sa.Table(
    "batches",
    metadata,
    _id(),
    sa.Column("worker_id", sa.Text, sa.ForeignKey("workers.id"), nullable=False),
    sa.Column("lane", sa.Text, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("model_sha256", sa.Text),
    sa.Column("numeric_mode", sa.Text, nullable=False),
    sa.Column("libraries", sa.JSON, nullable=False),
    sa.Column("committed", UtcTime, nullable=False),
    sa.Index(None, "lane", "id"),
)

batch_members = sa.Table(
    "batch_members",
    metadata,
    _ref("batch_id", "batches.id", primary_key=True),
    _ref("step_id", "steps.id", primary_key=True),
    sa.Column("joined", sa.Integer, nullable=False),  # denoise step of the batch
    sa.Column("left", sa.Integer, nullable=False),
    sa.Column("place", sa.Integer),  # how many had joined the batch before it
    sa.Index(None, "step_id"),
    sqlite_with_rowid=False,
)

attempts = sa.Table(
    "attempts",
    metadata,
    _id(),
    _ref("step_id", "steps.id"),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Column("asked", sa.Integer, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("worker_id", sa.Text, sa.ForeignKey("workers.id"), nullable=False),
    _ref("batch_id", "batches.id", nullable=True),
    sa.Column("started", UtcTime, nullable=False),
    sa.Column("ended", UtcTime),
    sa.Column("outcome", sa.Text),  # ok, error, retry, released, lost, fenced; NULL while it runs
    sa.Column("error_class", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("timings", sa.JSON, nullable=False),
    sa.UniqueConstraint("step_id", "token"),
    sa.Index(None, "batch_id"),
)
_ok = attempts.c.outcome == sa.literal_column("'ok'")
# The database itself refuses to commit a step twice.
sa.Index("uq_attempts_ok", attempts.c.step_id, attempts.c.asked, unique=True, sqlite_where=_ok, postgresql_where=_ok)

uploads = sa.Table(
    "uploads",
    metadata,
    _id(),
    sa.Column("uri", sa.Text, nullable=False),
    _ref("step_id", "steps.id"),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # intent, committed, orphaned, deleted
    sa.Column("created", UtcTime, nullable=False),
    sa.Index(None, "step_id", "token"),
    sa.Index(None, "uri"),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    _id(),
    _ref("run_id", "runs.id"),
    sa.Column("ordinal", sa.Integer, nullable=False),  # of the instance in run_steps
    _ref("step_id", "steps.id"),
    sa.Column("path", sa.Text, nullable=False),  # as the recipe wants it
    sa.Column("if_exists", sa.Text, nullable=False),
    # waiting (for its step), pending (to be delivered now), delivered, skipped (`error` says why), failed
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, sa.ForeignKey("artifacts.sha256")),  # what was delivered
    sa.Column("delivered_path", sa.Text),  # where it lies, with its version
    sa.Column("version", sa.Integer),
    sa.Column("error", sa.Text),
    sa.Column("delivered", UtcTime),
    sa.Column("claimed_by", sa.Text),  # the worker that is about to bring it, until then
    sa.Column("claimed_until", UtcTime),
    sa.Column("file_sha256", sa.Text),  # of what lies at `delivered_path`, where that is more than the artifact: signed
    sa.Column("withdrawn", UtcTime),  # its file was taken away
    sa.UniqueConstraint("run_id", "path"),
    sa.ForeignKeyConstraint(["run_id", "ordinal"], ["run_steps.run_id", "run_steps.ordinal"]),
    sa.Index(None, "run_id", "state"),
    sa.Index(None, "step_id"),
)
_signed = deliveries.c.file_sha256.is_not(None)
sa.Index("ix_deliveries_file_sha256", deliveries.c.file_sha256, sqlite_where=_signed, postgresql_where=_signed)
_held = deliveries.c.claimed_by.is_not(None)
sa.Index("ix_deliveries_claimed", deliveries.c.claimed_by, sqlite_where=_held, postgresql_where=_held)
_pending = deliveries.c.state == sa.literal_column("'pending'")
sa.Index("ix_deliveries_pending", deliveries.c.id, sqlite_where=_pending, postgresql_where=_pending)

inputs = sa.Table(
    "inputs",
    metadata,
    sa.Column("uri", sa.Text, primary_key=True),
    sa.Column("etag", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("format", sa.Text, nullable=False),
    sa.Column("problem", sa.Text),
    sa.Column("seen", UtcTime, nullable=False),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("sha256", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("layout", sa.Text, nullable=False),
    sa.Column("licence", sa.Text, nullable=False),
)

schedules = sa.Table(
    "schedules",
    metadata,
    _id(),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("recipe", sa.Text, nullable=False),  # its URI
    sa.Column("cron", sa.Text, nullable=False),
    sa.Column("tz", sa.Text, nullable=False),
    sa.Column("catch_up", sa.Text, nullable=False),  # planning.schedules.CatchUp
    sa.Column("overlap", sa.Text, nullable=False),  # planning.schedules.Overlap
    sa.Column("stop_at", sa.Text),  # HH:MM of the zone
    sa.Column("only_changed", sa.Boolean, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("paused", sa.Boolean, nullable=False),
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("considered", UtcTime, nullable=False),  # its times up to here have their rows in `fires`
    sa.Column("removed", UtcTime),  # the row stays for the fires that name it
)
_kept = schedules.c.removed.is_(None)
sa.Index("uq_schedules_name", schedules.c.name, unique=True, sqlite_where=_kept, postgresql_where=_kept)

fires = sa.Table(
    "fires",
    metadata,
    _id(),
    _ref("schedule_id", "schedules.id"),
    sa.Column("fire_at", UtcTime, nullable=False),
    # claimed (somebody plans it), run, skipped, missed, refused; `reason` says why there is no run
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("token", sa.Integer, nullable=False),  # grows with each claim: the fence
    sa.Column("claimed_until", UtcTime),
    _ref("run_id", "runs.id", nullable=True),
    sa.Column("reason", sa.Text),
    sa.Column("decided", UtcTime),
    sa.UniqueConstraint("schedule_id", "fire_at"),
    sa.Index(None, "run_id"),
)
_claimed = fires.c.state == sa.literal_column("'claimed'")
sa.Index("ix_fires_claimed", fires.c.claimed_until, sqlite_where=_claimed, postgresql_where=_claimed)

inbox = sa.Table(
    "inbox",
    metadata,
    _id(),
    sa.Column("uri", sa.Text, nullable=False),
    sa.Column("etag", sa.Text, nullable=False),
    sa.Column("stem", sa.Text, nullable=False),  # the URI without its ending: that of the answers
    sa.Column("modified", UtcTime, nullable=False),  # by the clock of its store
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # planning.inbox.DropState
    sa.Column("token", sa.Integer, nullable=False),  # grows with each claim: the fence
    sa.Column("claimed_until", UtcTime),  # of a seen one when it may be claimed, of an accepted one its next answer
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("sha256", sa.Text),  # of its bytes, once they were read
    _ref("run_id", "runs.id", nullable=True),
    sa.Column("error", sa.Text),
    sa.Column("answer", sa.Text),  # hash of the status that was written last
    sa.Column("cancelled_by", sa.Text),  # mark of the file that cancelled its run
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("answered", UtcTime),
    sa.UniqueConstraint("uri", "etag"),
    sa.Index(None, "stem", "id"),
    sa.Index(None, "run_id"),
)
_busy = inbox.c.state.in_([sa.literal_column(f"'{state}'") for state in ("accepted", "claimed")])
sa.Index("ix_inbox_busy", inbox.c.claimed_until, sqlite_where=_busy, postgresql_where=_busy)
events = sa.Table(
    "events",
    metadata,
    _id(),
    sa.Column("uid", sa.Text, nullable=False),  # what receivers know it by
    sa.Column("name", sa.Text, nullable=False),  # planning.events.name_of
    sa.Column("owner", sa.Text, nullable=False),
    _ref("run_id", "runs.id", nullable=True),
    sa.Column("data", sa.JSON, nullable=False),
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("addressed", UtcTime),  # since when it has its rows in `event_sends`
    sa.UniqueConstraint("uid"),
    sa.Index(None, "run_id"),
)
_new = events.c.addressed.is_(None)
sa.Index("ix_events_unaddressed", events.c.id, sqlite_where=_new, postgresql_where=_new)

event_sends = sa.Table(
    "event_sends",
    metadata,
    _id(),
    _ref("event_id", "events.id"),
    sa.Column("webhook", sa.Text, nullable=False),  # its name; URL and secret are never in the database
    sa.Column("state", sa.Text, nullable=False),  # waiting, delivered, given_up
    sa.Column("tries", sa.Integer, nullable=False),  # begun
    sa.Column("token", sa.Integer, nullable=False),  # grows with each claim: the fence
    sa.Column("due", UtcTime, nullable=False),  # when it may be claimed; moved ahead by a claim
    sa.Column("error", sa.Text),  # of the last try
    sa.Column("decided", UtcTime),
    sa.UniqueConstraint("event_id", "webhook"),
)
_waiting = event_sends.c.state == sa.literal_column("'waiting'")
_given_up = event_sends.c.state == sa.literal_column("'given_up'")
sa.Index("ix_event_sends_waiting", event_sends.c.due, sqlite_where=_waiting, postgresql_where=_waiting)
sa.Index("ix_event_sends_given_up", event_sends.c.webhook, sqlite_where=_given_up, postgresql_where=_given_up)

audit = sa.Table(
    "audit",
    metadata,
    _id(),
    sa.Column("at", UtcTime, nullable=False),
    sa.Column("who", sa.Text, nullable=False),  # the user of the system, the name of a token, or the owner of an inbox
    sa.Column("via", sa.Text, nullable=False),  # cli, cli+token, inbox
    sa.Column("action", sa.Text, nullable=False),  # as the command is called: `runs cancel`
    sa.Column("subject", sa.Text, nullable=False),  # `run:12`, `schedule:nightly`, ...
    sa.Column("details", sa.JSON, nullable=False),
    sa.Index(None, "subject"),
)

# What `gc` may not take.
holds = sa.Table(
    "holds",
    metadata,
    _id(),
    sa.Column("subject", sa.Text, nullable=False),  # `run:12`, `step:7`, `photo:<sha256>`, `picture:<sha256>`
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("placed", UtcTime, nullable=False),
    sa.Column("released", UtcTime),  # the row stays for whoever asks what was held
)
_standing = holds.c.released.is_(None)
sa.Index("uq_holds_subject", holds.c.subject, unique=True, sqlite_where=_standing, postgresql_where=_standing)

# What was taken down for good, the photo itself included: no plan reads it, no worker makes it again.
tombstones = sa.Table(
    "tombstones",
    metadata,
    sa.Column("sha256", sa.Text, primary_key=True),
    sa.Column("uri", sa.Text, primary_key=True),  # where it lay
    sa.Column("source", sa.Text, nullable=False),  # sha256 of the photo that was forgotten
    # photo, artifact, file (delivered), claim (a file that a worker may have been about to bring)
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("at", UtcTime, nullable=False),
    sa.Column("deleted", UtcTime),  # when its object was gone
    sa.Column("note", sa.Text),  # what people should know; without a time of deletion: why it is left
    sa.Index(None, "source"),
    sqlite_with_rowid=False,
)
