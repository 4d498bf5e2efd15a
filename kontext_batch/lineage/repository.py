"""`ports.Repository` over a database: each method is one transaction of the function that bears its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from kontext_batch.lineage import (
    audit,
    claim,
    commit,
    deliveries,
    events,
    export,
    garbage,
    impact,
    inbox,
    limits,
    moving,
    naming,
    provenance,
    queries,
    rehash,
    replay,
    runs,
    schedules,
    standing,
    submit,
    tracing,
    workers,
)
from kontext_batch.lineage.engine import Transactions, open_database
from kontext_batch.lineage.keeping import SqlArchives, SqlRetention
from kontext_batch.lineage.verify import Violation, verify
from kontext_batch.planning.events import ClaimedSend, Webhook, WebhookRow
from kontext_batch.planning.inbox import AnsweredDrop, Cancel, ClaimedDrop, DropRow, DropState, NewDrop
from kontext_batch.planning.plan import InstanceId, Plan
from kontext_batch.planning.schedules import ClaimedFire, FireRow, Schedule, ScheduledRun, StoredSchedule
from kontext_batch.planning.states import RunState, StepState
from kontext_batch.ports import (
    Act,
    Artifact,
    AttemptRow,
    AuditRow,
    BatchRecord,
    BatchRow,
    CommitReport,
    DamagedArtifact,
    DeliveredPicture,
    ExportedInstance,
    InHand,
    InputRecord,
    LeasedStep,
    ModelRow,
    NewRun,
    Orders,
    PendingDelivery,
    Ranking,
    ReconcileReport,
    RunFigures,
    RunSummary,
    SettledDelivery,
    SourceInput,
    Standing,
    StepResult,
    StepRow,
    StepUse,
    StoredInstance,
    StoredStep,
    WorkerInfo,
    WorkerRow,
)
from kontext_batch.ports.tracing import MadePage, Place, Subject, TracedStep, Weights


class SqlRepository(SqlRetention, SqlArchives):
    """Implements `ports.Repository`. Threads may share it; a forked process makes its own. Close it at the end."""

    def __init__(self, url: str) -> None:
        self._db = Transactions(open_database(url))

    def close(self) -> None:
        self._db.dispose()

    def verify(self, *, overdue_seconds: float | None = None) -> Sequence[Violation]:
        """What breaks the rules of `lineage.verify`; nothing in a sound database."""
        return self._db.read(verify, overdue_seconds=overdue_seconds)

    # ---- planning

    def step_states(self, keys: Iterable[str]) -> Mapping[str, StepState]:
        return self._db.read(queries.step_states, list(keys))

    def latest_instances(self, recipe: str) -> Mapping[InstanceId, StoredInstance]:
        return self._db.read(queries.latest_instances, recipe)

    def lane_seconds(self) -> Mapping[str, float]:
        return self._db.read(queries.lane_seconds)

    def inputs(self, uris: Iterable[str]) -> Mapping[str, InputRecord]:
        return self._db.read(queries.inputs, list(uris))

    def remember_inputs(self, records: Sequence[InputRecord]) -> None:
        self._db.write(queries.remember_inputs, records)

    def models(self) -> Sequence[ModelRow]:
        return self._db.read(queries.models)

    def remember_models(self, rows: Sequence[ModelRow]) -> None:
        self._db.write(queries.remember_models, rows)

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
        return self._db.write(audit.acted, by, "run:{}".format, submit.create_run, run, plan, fire, drop)

    def retry_run(self, run_id: int, *, keys: Iterable[str] | None = None, by: Act | None = None) -> int:
        chosen = None if keys is None else list(keys)
        return self._db.write(audit.acted, by, f"run:{run_id}", runs.retry_run, run_id, keys=chosen)

    def cancel_run(self, run_id: int, *, drain: bool = False, reason: str | None = None, by: Act | None = None) -> int:
        return self._db.write(audit.acted, by, f"run:{run_id}", runs.cancel_run, run_id, drain=drain, reason=reason)

    def pause_run(self, run_id: int, *, reason: str | None = None, by: Act | None = None) -> bool:
        return self._db.write(audit.acted, by, f"run:{run_id}", runs.pause_run, run_id, reason=reason)

    def resume_run(self, run_id: int, *, gpu_minutes: float | None = None, by: Act | None = None) -> bool:
        return self._db.write(audit.acted, by, f"run:{run_id}", runs.resume_run, run_id, gpu_minutes=gpu_minutes)

    def prioritize_run(self, run_id: int, priority: int, *, by: Act | None = None) -> None:
        self._db.write(audit.acted, by, f"run:{run_id}", runs.prioritize_run, run_id, priority)

    def run_figures(self, run_id: int | None = None) -> Sequence[RunFigures]:
        return self._db.read(limits.run_figures, run_id)

    def backlogged_runs(self, limit: int) -> Sequence[int]:
        return self._db.read(limits.backlogged_runs, limit)

    def finish_runs(self) -> Sequence[tuple[int, RunState]]:
        return self._db.write(runs.finish_runs) if self._db.read(runs.finishable) else []

    def run(self, run_id: int) -> RunSummary:
        return self._db.read(runs.run, run_id)

    def runs(self, *, limit: int = 50) -> Sequence[RunSummary]:
        return self._db.read(runs.newest_runs, limit=limit)

    def recipe_text(self, run_id: int) -> str:
        return self._db.read(runs.recipe_text, run_id)

    def run_steps(self, run_id: int, *, states: Iterable[StepState] | None = None) -> Sequence[StepRow]:
        return self._db.read(queries.run_steps, run_id, states=states)

    def export(self, run_id: int) -> Iterator[ExportedInstance]:
        found = self._db.read(export.page, run_id, -1)
        while found:
            yield from found
            found = self._db.read(export.page, run_id, found[-1].ordinal)

    # ---- schedules

    def add_schedule(self, new: Schedule, *, by: Act | None = None) -> None:
        self._db.write(audit.acted, by, f"schedule:{new.name}", schedules.add_schedule, new)

    def schedules(self) -> Sequence[StoredSchedule]:
        return self._db.read(schedules.schedules)

    def pause_schedule(self, name: str, *, paused: bool, by: Act | None = None) -> bool:
        return self._db.write(audit.acted, by, f"schedule:{name}", schedules.pause_schedule, name, paused=paused)

    def remove_schedule(self, name: str, *, by: Act | None = None) -> None:
        self._db.write(audit.acted, by, f"schedule:{name}", schedules.remove_schedule, name)

    def fires(self, name: str, *, limit: int = 20) -> Sequence[FireRow]:
        return self._db.read(schedules.fires, name, limit=limit)

    def claim_fires(self, *, seconds: float) -> Sequence[ClaimedFire]:
        return self._db.write(schedules.claim_fires, seconds=seconds)

    def settle_fire(self, fire_id: int, token: int, state: str, reason: str) -> bool:
        return self._db.write(schedules.settle_fire, fire_id, token, state, reason)

    def scheduled_runs(self) -> Sequence[ScheduledRun]:
        return self._db.read(schedules.scheduled_runs)

    # ---- inbox

    def claimable_drops(self, found: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
        return self._db.read(inbox.claimable_drops, found) if found else []

    def claim_drop(self, new: NewDrop, *, seconds: float) -> ClaimedDrop | None:
        return self._db.write(inbox.claim_drop, new, seconds=seconds)

    def claim_lost_drop(self, *, seconds: float) -> ClaimedDrop | None:
        return self._db.write(inbox.claim_lost_drop, seconds=seconds) if self._db.read(inbox.any_lost_drop) else None

    def note_drop(self, drop_id: int, sha256: str) -> int | None:
        return self._db.write(inbox.note_drop, drop_id, sha256)

    def is_answered(self, drop_id: int) -> bool:
        return self._db.read(inbox.is_answered, drop_id)

    def settle_drop(self, drop_id: int, token: int, state: DropState, error: str) -> bool:
        return self._db.write(inbox.settle_drop, drop_id, token, state, error)

    def postpone_drop(self, drop_id: int, token: int, *, seconds: float, blame: bool) -> bool:
        return self._db.write(inbox.postpone_drop, drop_id, token, seconds=seconds, blame=blame)

    def claim_answers(self, *, limit: int, seconds: float) -> Sequence[AnsweredDrop]:
        if not self._db.read(inbox.any_answer_due):
            return []
        return self._db.write(inbox.claim_answers, limit=limit, seconds=seconds)

    def settle_answer(self, drop_id: int, token: int, state: DropState, answer: str | None, *, seconds: float) -> bool:
        return self._db.write(inbox.settle_answer, drop_id, token, state, answer, seconds=seconds)

    def cancel_drops(self, cancels: Sequence[Cancel]) -> Sequence[int]:
        if not cancels or not self._db.read(inbox.cancellable, sorted({each.stem for each in cancels})):
            return []
        return self._db.write(inbox.cancel_drops, cancels)

    def drops(self, *, limit: int = 50) -> Sequence[DropRow]:
        return self._db.read(inbox.drops, limit=limit)

    def retry_drop(self, drop: int | str, *, by: Act | None = None) -> DropRow:
        return self._db.write(audit.acted, by, inbox.subject, inbox.retry_drop, drop)

    # ---- events

    def address_events(self, webhooks: Sequence[Webhook]) -> int:
        return self._db.write(events.address_events, webhooks) if self._db.read(events.unaddressed) else 0

    def claim_sends(self, webhooks: Sequence[str], *, limit: int, seconds: float) -> Sequence[ClaimedSend]:
        if not self._db.read(events.anything_due, webhooks):
            return []
        return self._db.write(events.claim_sends, webhooks, limit=limit, seconds=seconds)

    def settle_send(
        self,
        send_id: int,
        token: int,
        *,
        error: str | None = None,
        retry_in: float | None = None,
        untried: bool = False,
    ) -> bool:
        return self._db.write(events.settle_send, send_id, token, error=error, retry_in=retry_in, untried=untried)

    def webhook_rows(self) -> Sequence[WebhookRow]:
        return self._db.read(events.webhook_rows)

    def standing(self) -> Standing:
        return self._db.read(standing.standing)

    # ---- workers

    def register_worker(self, worker: WorkerInfo) -> None:
        self._db.write(workers.register_worker, worker)

    def workers(self) -> Sequence[WorkerInfo]:
        return self._db.read(workers.workers)

    def retire_worker(self, worker_id: str) -> None:
        self._db.write(workers.retire_worker, worker_id)

    def worker_rows(self, *, retired: bool = False) -> Sequence[WorkerRow]:
        return self._db.read(workers.worker_rows, retired=retired)

    def drain_workers(self, worker_id: str | None, *, by: Act | None = None) -> Sequence[str]:
        subject = "workers" if worker_id is None else f"worker:{worker_id}"
        return self._db.write(audit.acted, by, subject, workers.drain_workers, worker_id)

    def orders(self, worker_id: str) -> Orders:
        return self._db.read(workers.orders, worker_id)

    def release_all(self, worker_id: str) -> None:
        self._db.write(workers.release_all, worker_id)

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
        return self._db.write(
            claim.claim,
            worker_id,
            limit=limit,
            lease_seconds=lease_seconds,
            ranking=ranking,
            run_id=run_id,
            capped=capped,
            in_hand=in_hand,
        )

    def waiting_lanes(self) -> Mapping[str, int]:
        return self._db.read(claim.waiting_lanes)

    def extend_leases(self, worker_id: str, lease_seconds: float, held: Collection[tuple[int, int]]) -> int:
        return self._db.write(claim.extend_leases, worker_id, lease_seconds, held)

    def release(self, steps: Sequence[tuple[int, int]]) -> None:
        self._db.write(claim.release, steps)

    def intend_uploads(self, uploads: Sequence[tuple[str, int, int]]) -> None:
        self._db.write(commit.intend_uploads, uploads)

    def commit(self, batch: BatchRecord | None, results: Sequence[StepResult]) -> CommitReport:
        return self._db.write(commit.commit, batch, results)

    def reconcile(self, *, gone_workers: Iterable[str] = (), max_losses: int = 3) -> ReconcileReport:
        gone = list(gone_workers)
        if not self._db.read(claim.anything_overdue, gone_workers=gone):
            return ReconcileReport(returned=0, quarantined=0)
        return self._db.write(claim.reconcile, gone_workers=gone, max_losses=max_losses)

    # ---- deliveries

    def pending_deliveries(self, run_id: int | None = None, *, limit: int = 100) -> Sequence[PendingDelivery]:
        return self._db.read(deliveries.pending_deliveries, run_id, limit=limit)

    def claim_deliveries(
        self, worker_id: str, *, limit: int, seconds: float, run_id: int | None = None
    ) -> Sequence[PendingDelivery]:
        return self._db.write(deliveries.claim_deliveries, worker_id, limit=limit, seconds=seconds, run_id=run_id)

    def settle_deliveries(
        self,
        worker_id: str,
        settled: Sequence[SettledDelivery],
        *,
        back: Sequence[int] = (),
        later: Sequence[int] = (),
    ) -> None:
        self._db.write(deliveries.settle_deliveries, worker_id, settled, back, later)

    def delivered_pictures(self, delivery_ids: Sequence[int]) -> Mapping[int, DeliveredPicture]:
        return self._db.read(provenance.delivered_pictures, delivery_ids)

    def newer_delivery(self, run_id: int, path: str) -> PendingDelivery | None:
        return self._db.read(deliveries.newer_delivery, run_id, path)

    def skipped_deliveries(self, run_id: int) -> Sequence[tuple[str, str]]:
        return self._db.read(deliveries.not_arrived, run_id, "skipped")

    def made_files(self, run_id: int) -> Sequence[str]:
        return self._db.read(deliveries.made_files, run_id)

    def failed_deliveries(self, run_id: int) -> Sequence[tuple[str, str]]:
        return self._db.read(deliveries.not_arrived, run_id, "failed")

    # ---- questions

    def find_steps(self, text: str, *, run_id: int | None = None) -> Sequence[StepRow]:
        return self._db.read(queries.find_steps, text, run_id=run_id)

    def attempts(self, step_id: int) -> Sequence[AttemptRow]:
        return self._db.read(queries.attempts, step_id)

    def ancestors(self, step_id: int) -> Sequence[tuple[int, int, str]]:
        return self._db.read(queries.ancestors, step_id)

    def steps_by_id(self, ids: Iterable[int]) -> Sequence[StepRow]:
        return self._db.read(queries.steps_by_id, list(ids))

    def step_sources(self, step_id: int) -> Sequence[SourceInput]:
        return self._db.read(queries.step_sources, step_id)

    def step_inputs(self, step_ids: Iterable[int]) -> Mapping[int, Sequence[tuple[str, int, str, str]]]:
        return self._db.read(queries.step_inputs, list(step_ids))

    def batch(self, batch_id: int) -> BatchRow:
        return self._db.read(export.batch, batch_id)

    def step_uses(self, step_id: int) -> Sequence[StepUse]:
        return self._db.read(queries.step_uses, step_id)

    def nearest_instance(self, use: StepUse, *, later: bool) -> tuple[int, int, StoredInstance] | None:
        return self._db.read(queries.nearest_instance, use, later=later)

    def stored_steps(self, ids: Iterable[int]) -> Mapping[int, StoredStep]:
        return self._db.read(replay.stored_steps, list(ids))

    # ---- lineage

    def known_by_hash(self, prefix: str) -> Sequence[Subject]:
        return self._db.read(naming.known_by_hash, prefix)

    def known_by_place(self, uri: str) -> Sequence[Subject]:
        return self._db.read(naming.known_by_place, uri)

    def weights(self) -> Sequence[Weights]:
        return self._db.read(naming.weights)

    def above(self, step_ids: Iterable[int]) -> Sequence[tuple[int, int]]:
        return self._db.read(tracing.above, list(step_ids))

    def traced(self, step_ids: Iterable[int]) -> Sequence[TracedStep]:
        return self._db.read(tracing.traced, list(step_ids))

    def made_from(self, subject: Subject, *, after: Place | None = None, limit: int = 200) -> MadePage:
        return self._db.read(impact.made_from, subject, after=after, limit=limit)

    def made_directly(self, subject: Subject) -> int:
        return self._db.read(impact.made_directly, subject)

    # ---- acts of people

    def note(self, by: Act, *subjects: str) -> None:
        self._db.write(audit.note, by, *subjects)

    def audit(self, *, subject: str | None = None, limit: int = 50) -> Sequence[AuditRow]:
        return self._db.read(audit.audit, subject=subject, limit=limit)

    # ---- verification

    def unread_artifacts(self, *, since: datetime, after: str, limit: int) -> Sequence[Artifact]:
        return self._db.read(rehash.unread, since=since, after=after, limit=limit)

    def unread_artifacts_size(self, *, since: datetime) -> tuple[int, int]:
        return self._db.read(rehash.unread_size, since=since)

    def note_read_artifacts(self, found: Sequence[tuple[str, str | None]]) -> None:
        self._db.write(rehash.note_read, found)

    def damaged_artifacts(self) -> Sequence[DamagedArtifact]:
        return self._db.read(rehash.damaged)

    def is_kept(self, sha256: str) -> bool:
        return self._db.read(rehash.is_kept, sha256)

    # ---- garbage

    def artifact_uris(self) -> Iterator[str]:
        return iter(self._db.read(garbage.artifact_uris))

    def collectable(self, *, keep_bytes: int, expired_days: float | None = None) -> Sequence[Artifact]:
        return self._db.read(garbage.collectable, keep_bytes=keep_bytes, expired_days=expired_days)

    def forget_artifact(
        self, sha256: str, delete: Callable[[str], None] | None = None, *, expired_days: float | None = None
    ) -> bool:
        return self._db.write(garbage.forget_artifact, sha256, delete, expired_days=expired_days)

    def lost_artifact(self, sha256: str, delete: Callable[[str], None] | None = None) -> None:
        self._db.write(garbage.lost_artifact, sha256, delete)

    def lost_artifacts(self, sha256s: Sequence[str], *, by: Act | None = None) -> bool:
        return self._db.write(audit.acted, by, "artifacts", garbage.lost_artifacts, sha256s)

    def artifact_elsewhere(self, prefix: str) -> str | None:
        """URI of some kept artifact that does not lie under `prefix`; none while a worker is at work."""
        return self._db.read(moving.artifact_elsewhere, prefix)

    def follow_artifacts(self, old: str, new: str) -> None:
        """What was kept under the prefix `old` lies under `new`; unfinished runs end as cancelled."""
        self._db.write(moving.follow_artifacts, old, new)

    def orphaned_uploads(self) -> Sequence[str]:
        return self._db.read(garbage.orphaned_uploads)

    def forget_uploads(self, uris: Sequence[str], delete: Callable[[str], None] | None = None) -> None:
        for uri in uris:
            self._db.write(garbage.forget_upload, uri, delete)
