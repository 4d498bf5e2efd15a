"""What the services ask of the database."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from kontext_batch.planning.events import ClaimedSend, Webhook, WebhookRow
from kontext_batch.planning.inbox import AnsweredDrop, Cancel, ClaimedDrop, DropRow, DropState, NewDrop
from kontext_batch.planning.plan import InstanceId, Plan
from kontext_batch.planning.schedules import ClaimedFire, FireRow, Schedule, ScheduledRun, StoredSchedule
from kontext_batch.planning.states import RunState, StepState
from kontext_batch.ports.admin import (
    Act,
    AuditRow,
    BatchRow,
    DamagedArtifact,
    ExportedInstance,
    Orders,
    RunFigures,
    WorkerRow,
)
from kontext_batch.ports.archives import Archives
from kontext_batch.ports.provenance import DeliveredPicture
from kontext_batch.ports.records import (
    Artifact,
    AttemptRow,
    BatchRecord,
    CommitReport,
    InHand,
    InputRecord,
    LeasedStep,
    NewRun,
    PendingDelivery,
    Ranking,
    ReconcileReport,
    RunSummary,
    SettledDelivery,
    SourceInput,
    Standing,
    StepResult,
    StepRow,
    StepUse,
    StoredInstance,
    WorkerInfo,
)
from kontext_batch.ports.replaying import StoredStep
from kontext_batch.ports.retention import Retention
from kontext_batch.ports.tracing import Tracing


class Repository(Tracing, Retention, Archives, Protocol):
    """The database. Every method is one transaction; all times are the database's own.

    `by`: the person's act that a change is, written down in the same transaction when something changed; None for what
    the system does by itself.
    """

    # ---- planning

    def step_states(self, keys: Iterable[str]) -> Mapping[str, StepState]:
        """State of each known key (unknown keys are left out); a done step whose artifact was collected is left out."""
        ...

    def latest_instances(self, recipe: str) -> Mapping[InstanceId, StoredInstance]:
        """For each (node, axes, candidate) of the recipe of that name: how its most recent run had it."""
        ...

    def lane_seconds(self) -> Mapping[str, float]:
        """Mean seconds a step by lane, over recent successful attempts."""
        ...

    def inputs(self, uris: Iterable[str]) -> Mapping[str, InputRecord]:
        """What is known of these source pictures; the caller compares ETags."""
        ...

    def remember_inputs(self, records: Sequence[InputRecord]) -> None:
        """Insert or replace by URI."""
        ...

    # ---- runs

    def create_run(
        self,
        run: NewRun,
        plan: Plan,
        *,
        fire: tuple[int, int] | None = None,
        drop: tuple[int, int] | None = None,
        by: Act | None = None,
    ) -> int:
        """Store run, steps, edges, run_steps and deliveries in one transaction; returns the run's id.

        A key that is known and live or done makes no new row (this run may become its account); one that is failed,
        skipped, cancelled, quarantined, or done without its artifact goes back to blocked or ready, with attempts and
        losses at 0.

        `fire`: (id, token) of the time of a schedule that this run is of; noted in the same transaction, so that a time
        has one run; `drop`: likewise of a dropped recipe. Raises `LeaseLost` when its claim has moved on.
        """
        ...

    def retry_run(self, run_id: int, *, keys: Iterable[str] | None = None, by: Act | None = None) -> int:
        """Put unsuccessful steps of the run (all, or those keys and what reads them) back; returns how many."""
        ...

    def cancel_run(self, run_id: int, *, drain: bool = False, reason: str | None = None, by: Act | None = None) -> int:
        """Cancel the run; blocked and ready steps that no other live run wants are cancelled; returns how many.

        `drain`: what is leased is finished; else its workers are told (`orders`) that nobody wants it any more.
        """
        ...

    def pause_run(self, run_id: int, *, reason: str | None = None, by: Act | None = None) -> bool:
        """Let nothing more be claimed for a running run; says whether it was running."""
        ...

    def resume_run(self, run_id: int, *, gpu_minutes: float | None = None, by: Act | None = None) -> bool:
        """Let a paused run go on; says whether it was paused. `gpu_minutes`: its budget from now on.

        Steps that have failed so far count no longer against the limit of failures.
        """
        ...

    def prioritize_run(self, run_id: int, priority: int, *, by: Act | None = None) -> None:
        """Give the run another priority."""
        ...

    def run_figures(self, run_id: int | None = None) -> Sequence[RunFigures]:
        """Of every running run, else of that run whatever its state: what its limits are compared with."""
        ...

    def backlogged_runs(self, limit: int) -> Sequence[int]:
        """Running runs of which more than `limit` pictures wait for Pillow or to be delivered.

        But for those whose ready steps of models another running run wants as well.
        """
        ...

    def finish_runs(self) -> Sequence[tuple[int, RunState]]:
        """Give a final state to each open run with no live step and no pending delivery; returns those."""
        ...

    def run(self, run_id: int) -> RunSummary:
        """Raises `ObjectNotFound`."""
        ...

    def runs(self, *, limit: int = 50) -> Sequence[RunSummary]:
        """Newest first."""
        ...

    def recipe_text(self, run_id: int) -> str: ...

    def run_steps(self, run_id: int, *, states: Iterable[StepState] | None = None) -> Sequence[StepRow]:
        """Instances of the run, in plan order."""
        ...

    def export(self, run_id: int) -> Iterator[ExportedInstance]:
        """Instances of the run with all that is known of them, in plan order, read a thousand at a time.

        Each thousand is a transaction of its own: a run may have millions. Raises `ObjectNotFound`.
        """
        ...

    # ---- schedules

    def add_schedule(self, new: Schedule, *, by: Act | None = None) -> None:
        """Times count from now on. Raises `SettingsError` when there is one of that name."""
        ...

    def schedules(self) -> Sequence[StoredSchedule]:
        """By name."""
        ...

    def pause_schedule(self, name: str, *, paused: bool, by: Act | None = None) -> bool:
        """Says whether that changed anything; times that go by meanwhile are not made up for."""
        ...

    def remove_schedule(self, name: str, *, by: Act | None = None) -> None:
        """Raises `ObjectNotFound`."""
        ...

    def fires(self, name: str, *, limit: int = 20) -> Sequence[FireRow]:
        """What became of the schedule's times, newest first."""
        ...

    def claim_fires(self, *, seconds: float) -> Sequence[ClaimedFire]:
        """The times that have come, oldest first, and those that another process claimed and lost `seconds` ago."""
        ...

    def settle_fire(self, fire_id: int, token: int, state: str, reason: str) -> bool:
        """That a claimed time gets no run: `skipped` or `refused`, and why. False when the claim has moved on."""
        ...

    def scheduled_runs(self) -> Sequence[ScheduledRun]:
        """Open runs that schedules have started, oldest first."""
        ...

    # ---- inbox

    def claimable_drops(self, found: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
        """Those of the (URI, ETag) pairs that nobody has acted on, nor acts on now, in their order."""
        ...

    def claim_drop(self, new: NewDrop, *, seconds: float) -> ClaimedDrop | None:
        """Claim it for so long; None when another process has it, or it may still be being written."""
        ...

    def claim_lost_drop(self, *, seconds: float) -> ClaimedDrop | None:
        """The oldest drop whose process was lost over it, or put it off until now; None when there is none."""
        ...

    def note_drop(self, drop_id: int, sha256: str) -> int | None:
        """That its bytes were read; returns the newest run that the same bytes have under the same name."""
        ...

    def is_answered(self, drop_id: int) -> bool:
        """Whether the answers beside a drop are about it: no newer one has its stem."""
        ...

    def settle_drop(self, drop_id: int, token: int, state: DropState, error: str) -> bool:
        """That no run comes of a claimed drop, and why. False when the claim has moved on."""
        ...

    def postpone_drop(self, drop_id: int, token: int, *, seconds: float, blame: bool) -> bool:
        """Let a claimed drop be tried again in so long; `blame`: whether this try counts against it."""
        ...

    def claim_answers(self, *, limit: int, seconds: float) -> Sequence[AnsweredDrop]:
        """Accepted drops whose answers are due, at most `limit`; nobody else looks at them for so long."""
        ...

    def settle_answer(self, drop_id: int, token: int, state: DropState, answer: str | None, *, seconds: float) -> bool:
        """That the answers are written; while `state` is accepted, they are due again in `seconds`.

        False when another process has looked meanwhile: then all answers are due again.
        """
        ...

    def cancel_drops(self, cancels: Sequence[Cancel]) -> Sequence[int]:
        """Cancel the open runs of drops that are no newer than these files; each file does it once. Returns runs.

        Each is written down as done by the owner of the file's inbox.
        """
        ...

    def drops(self, *, limit: int = 50) -> Sequence[DropRow]:
        """Newest first."""
        ...

    def retry_drop(self, drop: int | str, *, by: Act | None = None) -> DropRow:
        """Let a drop without a run be acted on anew, by its number or the newest of a URI; returns it as it was.

        Raises `ObjectNotFound`, and `SettingsError` when there is nothing to be tried again.
        """
        ...

    # ---- events

    def address_events(self, webhooks: Sequence[Webhook]) -> int:
        """Make a send of each event that is new for each webhook that wants it; returns how many.

        Each final state that a run is given makes an event, in the same transaction. One that was made long ago
        (`planning.events.KEPT_FOR`) is for nobody any more.
        """
        ...

    def claim_sends(self, webhooks: Sequence[str], *, limit: int, seconds: float) -> Sequence[ClaimedSend]:
        """Sends to these webhooks whose time has come, and those that another process claimed and lost `seconds` ago.

        Each is a try more.
        """
        ...

    def settle_send(
        self,
        send_id: int,
        token: int,
        *,
        error: str | None = None,
        retry_in: float | None = None,
        untried: bool = False,
    ) -> bool:
        """Without an `error` it is delivered; with one, it is tried again in `retry_in` seconds, or given up.

        `untried`: nothing was sent, so that the try counts for nothing. False when the claim has moved on.
        """
        ...

    def webhook_rows(self) -> Sequence[WebhookRow]:
        """How the events of each webhook stand, by name."""
        ...

    def standing(self) -> Standing:
        """How everything stands: a few counts over what is live."""
        ...

    # ---- workers

    def register_worker(self, worker: WorkerInfo) -> None: ...

    def workers(self) -> Sequence[WorkerInfo]:
        """Those that have not said goodbye."""
        ...

    def retire_worker(self, worker_id: str) -> None:
        """Say goodbye: leases still held go back to ready at no cost."""
        ...

    def release_all(self, worker_id: str) -> None:
        """Leases and deliveries that this worker holds go back, as in `retire_worker`; it goes on."""
        ...

    def worker_rows(self, *, retired: bool = False) -> Sequence[WorkerRow]:
        """How workers stand, the oldest first; with `retired` also those that have said goodbye."""
        ...

    def drain_workers(self, worker_id: str | None, *, by: Act | None = None) -> Sequence[str]:
        """Tell that worker, else all, to take nothing more; returns the ids of those that were not told before.

        Raises `ObjectNotFound` when there is no such worker at work.
        """
        ...

    def orders(self, worker_id: str) -> Orders:
        """What the worker is told; asked every few seconds."""
        ...

    def claim(
        self,
        worker_id: str,
        *,
        limit: int,
        lease_seconds: float,
        ranking: Ranking | None = None,
        run_id: int | None = None,
        capped: bool = False,
        in_hand: InHand | None = None,
    ) -> Sequence[LeasedStep]:
        """Lease up to `limit` ready steps of one lane, and open an attempt for each.

        The batch is filled from the first share of `ranking` that has something, then from the later ones of its lane;
        without a ranking the highest priority, then the oldest run comes first.
        `run_id`: only steps that this run wants. `capped`: the ranking keeps to caps, so no two claims may rank at
        once. A step with `batch_limit = 1` is claimed alone. Returns nothing when nothing is ready.

        `in_hand`: nothing either, when another lane's turn has come or when a step's turn has come whose batch limit
        leaves no room beside what is in hand; it waits for that to leave.
        """
        ...

    def waiting_lanes(self) -> Mapping[str, int]:
        """Lanes for which a worker would find something now, with at least how many steps; deliveries count as
        operations."""
        ...

    def extend_leases(self, worker_id: str, lease_seconds: float, held: Collection[tuple[int, int]]) -> int:
        """The heartbeat: extend those (step id, token) leases that are still this worker's; returns how many.

        Not whatever stands under the worker's name: a database that was brought back without its last commits may say
        of a step that it is leased to a worker that has long done it.
        """
        ...

    def release(self, steps: Sequence[tuple[int, int]]) -> None:
        """Give (step id, token) leases back unused: `leased -> ready`, no attempt counted."""
        ...

    def intend_uploads(self, uploads: Sequence[tuple[str, int, int]]) -> None:
        """(URI, step id, token) of every object about to be put, committed before the PUT."""
        ...

    def commit(self, batch: BatchRecord | None, results: Sequence[StepResult]) -> CommitReport:
        """Write the results of a batch, fenced row by row; free, or skip, their children."""
        ...

    def reconcile(self, *, gone_workers: Iterable[str] = (), max_losses: int = 3) -> ReconcileReport:
        """Return leases that ran out or that `gone_workers` hold; quarantine steps that lost too many workers."""
        ...

    # ---- deliveries

    def pending_deliveries(self, run_id: int | None = None, *, limit: int = 100) -> Sequence[PendingDelivery]:
        """Deliveries whose step is done."""
        ...

    def claim_deliveries(
        self, worker_id: str, *, limit: int, seconds: float, run_id: int | None = None
    ) -> Sequence[PendingDelivery]:
        """Pending deliveries that no other worker is about to bring; this one's for so long."""
        ...

    def settle_deliveries(
        self,
        worker_id: str,
        settled: Sequence[SettledDelivery],
        *,
        back: Sequence[int] = (),
        later: Sequence[int] = (),
    ) -> None:
        """How deliveries ended; what somebody else has settled stays.

        `back`: claimed, and not brought after all; `later`: likewise, and nobody is to try it at once.
        """
        ...

    def delivered_pictures(self, delivery_ids: Sequence[int]) -> Mapping[int, DeliveredPicture]:
        """Id of each delivery -> everything that made its picture."""
        ...

    def newer_delivery(self, run_id: int, path: str) -> PendingDelivery | None:
        """What the newest run after `run_id` that has delivered to exactly `path` brought; None when none has."""
        ...

    def skipped_deliveries(self, run_id: int) -> Sequence[tuple[str, str]]:
        """(URI, reason) of what was left out on purpose, in plan order."""
        ...

    def made_files(self, run_id: int) -> Sequence[str]:
        """URIs of what the run delivered, without the pictures that were there before it, in plan order."""
        ...

    def failed_deliveries(self, run_id: int) -> Sequence[tuple[str, str]]:
        """(URI, error) of what could not be brought where the recipe wants it, in plan order."""
        ...

    # ---- questions

    def find_steps(self, text: str, *, run_id: int | None = None) -> Sequence[StepRow]:
        """Steps by key or its prefix, node name, delivered path or artifact sha256 prefix."""
        ...

    def attempts(self, step_id: int) -> Sequence[AttemptRow]: ...

    def ancestors(self, step_id: int) -> Sequence[tuple[int, int, str]]:
        """(child id, parent id, role) edges above the step, by recursive CTE."""
        ...

    def steps_by_id(self, ids: Iterable[int]) -> Sequence[StepRow]: ...

    def step_sources(self, step_id: int) -> Sequence[SourceInput]: ...

    def step_inputs(self, step_ids: Iterable[int]) -> Mapping[int, Sequence[tuple[str, int, str, str]]]:
        """What each step reads: (role, position, URI or '', sha256 of the source or key of the parent), in order."""
        ...

    def batch(self, batch_id: int) -> BatchRow:
        """Raises `ObjectNotFound`."""
        ...

    def step_uses(self, step_id: int) -> Sequence[StepUse]:
        """Runs that wanted the step, the oldest first; each once, with its first instance."""
        ...

    def nearest_instance(self, use: StepUse, *, later: bool) -> tuple[int, int, StoredInstance] | None:
        """The run nearest before, or after, that of `use` in which its recipe has that instance; the id of its step
        there, and how it had it."""
        ...

    def stored_steps(self, ids: Iterable[int]) -> Mapping[int, StoredStep]:
        """Those of these steps that there are, with all that they read and made."""
        ...

    # ---- acts of people

    def note(self, by: Act, *subjects: str) -> None:
        """Write an act down that no other method does: one that spans several, changes a file, or gives a link."""
        ...

    def audit(self, *, subject: str | None = None, limit: int = 50) -> Sequence[AuditRow]:
        """What people did, to that subject or at all, newest first."""
        ...

    # ---- verification

    def unread_artifacts(self, *, since: datetime, after: str, limit: int) -> Sequence[Artifact]:
        """Kept artifacts behind the sha256 `after` that were not read since then, in order of their sha256."""
        ...

    def unread_artifacts_size(self, *, since: datetime) -> tuple[int, int]:
        """How many of them there are, and their bytes."""
        ...

    def note_read_artifacts(self, found: Sequence[tuple[str, str | None]]) -> None:
        """(sha256, what is wrong with it or None) of what was read now; what was collected meanwhile is left out."""
        ...

    def damaged_artifacts(self) -> Sequence[DamagedArtifact]:
        """Kept artifacts that a reading found something wrong with, in order of their sha256."""
        ...

    def is_kept(self, sha256: str) -> bool:
        """Whether there is such an artifact, not collected."""
        ...

    # ---- garbage

    def artifact_uris(self) -> Iterator[str]: ...

    def collectable(self, *, keep_bytes: int, expired_days: float | None = None) -> Sequence[Artifact]:
        """Artifacts that can be recomputed, oldest use first, whose removal brings the total under `keep_bytes`.

        What recipes deliver comes after everything else. Never one that a hold keeps, a live step will still read or a
        pending delivery needs. `expired_days`: without those that `expired` removes, which count as gone.
        """
        ...

    def forget_artifact(
        self, sha256: str, delete: Callable[[str], None] | None = None, *, expired_days: float | None = None
    ) -> bool:
        """Mark it collected (the row stays for the lineage), unless something needs it by now:

        a live step, a pending delivery or a hold.

        `expired_days`: nor is it when it is not what `expired` says of it any more.

        `delete` is called with its URI under the lock that keeps others from naming the object meanwhile; a caller
        who deletes afterwards may delete what somebody has just put anew.
        """
        ...

    def lost_artifact(self, sha256: str, delete: Callable[[str], None] | None = None) -> None:
        """Its object is gone or damaged: mark it collected, so that whoever needs it next has it made again.

        `delete` as for `forget_artifact`: what is put anew is written only where nothing is.
        """
        ...

    def lost_artifacts(self, sha256s: Sequence[str], *, by: Act | None = None) -> bool:
        """As `lost_artifact`, for many whose objects are gone; says whether that changed anything."""
        ...

    def orphaned_uploads(self) -> Sequence[str]:
        """URIs of uploads that no live intent and no artifact names: safe to delete."""
        ...

    def forget_uploads(self, uris: Sequence[str], delete: Callable[[str], None] | None = None) -> None:
        """Mark them deleted, each unless somebody names its object by now; `delete` as for `forget_artifact`."""
        ...
