"""What the services need from the outside, as protocols; the adapters implement them, `bootstrap` chooses.

An adapter raises the errors of `kontext_batch.errors` and nothing of its library's; the foreign error stays as
`__cause__`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from kontext_batch.planning.plan import Axes, InstanceId, Plan
from kontext_batch.planning.schedules import ClaimedFire, FireRow, Schedule, ScheduledRun, StoredSchedule
from kontext_batch.planning.states import RunState, StepState

# --------------------------------------------------------------------------------------------------- objects


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What is known of an object without reading it."""

    uri: str
    etag: str
    """Changes whenever the bytes change. S3: the ETag; a folder: size, mtime_ns and inode."""
    bytes: int
    modified: datetime
    problem: str | None = None
    """Why it is listed and may not be read; then ETag and size mean nothing, and a URI that ends in `/` is a folder."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder as it really lies, for comparing places that differ as text and are one."""

    uri: str
    """No symbolic link is left in it; ends in `/`."""
    folders: frozenset[str] = frozenset()
    """Names in it, decoded, that are folders: no object can take them."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Name in it, as a URI has it, that is a symbolic link -> URI of what it leads to."""


class ObjectStore(Protocol):
    """Bytes at URIs. `s3://bucket/key` and `file:///absolute/path`; one test suite runs over every implementation.

    A store knows which prefixes it may read and which it may write: anything else is `NotAllowed`, checked before
    any I/O, on the normalised URI (no `..`, NUL or control characters, no symbolic link out of a folder).
    """

    def head(self, uri: str) -> ObjectInfo:
        """Raises `ObjectNotFound`, `NotAllowed`, `InfrastructureError`."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose URI starts with `prefix`, in code point order of the paths, lazily.

        A prefix that ends in `/` is a folder. Hidden and unfinished files are left out. What a symbolic link leads to
        that may not be read comes with its `problem`, a folder as one. Raises `NotAllowed` at once.
        """
        ...

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        """The object whole. Raises `ObjectChanged` when `etag` is given and differs, `StepError` past `max_bytes`."""
        ...

    def write(self, uri: str, data: bytes, *, media_type: str) -> ObjectInfo:
        """Put the object, atomically: a reader sees the old bytes, the new bytes or nothing, never a half.

        Raises `StorageFull`, `StorageReadOnly`, `InfrastructureError`.
        """
        ...

    def write_if_absent(self, uri: str, data: bytes, *, media_type: str) -> bool:
        """Put the object unless one is there; says whether it did. Of racing writers exactly one gets True."""
        ...

    def delete(self, uri: str) -> None:
        """Remove the object; that nothing is there is no error."""
        ...

    def folder(self, uri: str, *, write: bool = False) -> Folder:
        """The folder at `uri`, which ends in `/` and need not exist yet.

        `write`: whether something is to be put there. Raises `NotAllowed`, `StorageReadOnly` or `InfrastructureError`
        where it is plain by now that this cannot be; a store that has no folders finds nothing against it.
        """
        ...


# ------------------------------------------------------------------------------------------------- values of SQL


@dataclass(frozen=True, slots=True)
class Artifact:
    """An image in the store, named by the hash of its bytes."""

    sha256: str
    uri: str
    media_type: str
    bytes: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class InputRecord:
    """What one listing found out about a source picture; valid while its ETag stands."""

    uri: str
    etag: str
    sha256: str
    bytes: int
    width: int
    """Pixels, after EXIF orientation; 0 when the header could not be read."""
    height: int
    format: str
    problem: str | None = None
    """Why the file cannot be used ("0 bytes", "not an image", ...); None for a usable picture."""


@dataclass(frozen=True, slots=True)
class NewRun:
    """What is known of a run before its plan is stored."""

    recipe: str
    """Name of the recipe."""
    recipe_sha256: str
    recipe_text: str
    source: str
    """URI or path that the recipe came from."""
    owner: str
    trigger: str
    """`cli`, `inbox`, `schedule`."""
    priority: int = 0
    """Higher runs first."""
    selection: Mapping[str, Any] = field(default_factory=dict)
    """`--only` and `--limit`; empty for the whole recipe."""
    budget: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A process that claims steps."""

    id: str
    host: str
    pid: int
    process_started: float
    """Start time of the process, seconds since the epoch: a pid alone may have been given out again."""
    device: str
    engine: Mapping[str, Any]
    """Library versions and model hashes; goes into the lineage of each batch."""


@dataclass(frozen=True, slots=True)
class ParentOutput:
    """A picture that a leased step reads, made by an earlier step."""

    role: str
    position: int
    key: str
    artifact: Artifact
    latents: Artifact | None = None
    """The packed final latents of the parent, where a model sampled it."""


@dataclass(frozen=True, slots=True)
class SourceInput:
    """A picture that a leased step reads from where the author keeps it."""

    role: str
    position: int
    uri: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Ready:
    """That a running run has steps of a lane to be claimed, and how much of it and of its owner is leased by now."""

    run_id: int
    owner: str
    priority: int
    lane: str
    leased: int
    owner_leased: int


@dataclass(frozen=True, slots=True)
class Share:
    """What may be claimed: steps of this lane for this run."""

    run_id: int
    lane: str
    owner: str = ""
    limit: int | None = None
    """Most steps; None: as many as a batch holds."""
    owner_limit: int | None = None
    """Most steps of all shares of this owner together."""


Ranking = Callable[[Sequence[Ready]], Sequence[Share]]
"""Chooses among what is ready, best first; what it leaves out is not claimed."""


@dataclass(frozen=True, slots=True)
class LeasedStep:
    """A step that this worker holds; all it writes is fenced by `token`."""

    id: int
    run_id: int
    """The run on whose account it is computed; others may want it too."""
    key: str
    operation: str
    params: Mapping[str, Any]
    lane: str
    token: int
    attempt: int
    """1 for the first try."""
    losses: int
    parents: tuple[ParentOutput, ...]
    sources: tuple[SourceInput, ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One finished picture of a step, already put."""

    slot: str
    """`image`, or `latents` for what is kept for a hand-off."""
    artifact: Artifact


@dataclass(frozen=True, slots=True)
class StepDone:
    """The step succeeded."""

    step_id: int
    token: int
    outputs: tuple[StepOutput, ...]
    timings: Mapping[str, float]
    """Seconds by phase: `fetch`, `sample`, `decode`, `put`, ..."""


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The step did not succeed."""

    step_id: int
    token: int
    error: str
    """One sentence for a person."""
    error_class: str
    retry_in: float | None
    """Seconds until it may be claimed again (an infrastructure fault); None: it has failed for good (its own fault)."""
    timings: Mapping[str, float] = field(default_factory=dict)


StepResult = StepDone | StepFailed


@dataclass(frozen=True, slots=True)
class BatchMember:
    """Which denoise steps of a batch a step took part in."""

    step_id: int
    joined: int
    left: int


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch as it was computed, for the lineage."""

    worker_id: str
    lane: str
    device: str
    model_sha256: str | None
    numeric_mode: str
    libraries: Mapping[str, str]
    members: tuple[BatchMember, ...]


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What a commit did."""

    committed: tuple[int, ...]
    """Step ids whose result was written (done, failed or returned for a retry)."""
    fenced: tuple[int, ...]
    """Step ids whose lease had moved on; their results were dropped and their uploads are orphans."""
    woken: Mapping[str, int]
    """Lane -> number of steps that became ready."""


@dataclass(frozen=True, slots=True)
class ReconcileReport:
    """What a reconcile tick did."""

    returned: int
    """Leases that ran out or whose process is gone: `leased -> ready`."""
    quarantined: int


@dataclass(frozen=True, slots=True)
class PendingDelivery:
    """A finished image that is not yet where the recipe wants it."""

    id: int
    run_id: int
    path: str
    if_exists: str
    artifact: Artifact


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run as `status` shows it. `steps` counts the run's distinct steps by state."""

    id: int
    recipe: str
    recipe_sha256: str
    source: str
    owner: str
    trigger: str
    priority: int
    state: RunState
    created: datetime
    finished: datetime | None
    steps: Mapping[StepState, int]
    cached: int
    """Steps that were already done when the run was submitted."""
    deliveries: int
    delivered: int
    """Settled: delivered, or left out on purpose."""
    failed_deliveries: int
    skipped_deliveries: int = 0
    """Those of `delivered` that were left out: something was there, or a newer run had delivered."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step of a run as `steps show` and `runs show` print it."""

    id: int
    key: str
    node: str
    axes: Axes
    candidate: int
    operation: str
    lane: str
    state: StepState
    attempts: int
    losses: int
    error: str | None
    params: Mapping[str, Any]
    artifact: Artifact | None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One try of a step."""

    number: int
    worker_id: str
    batch_id: int | None
    started: datetime
    ended: datetime | None
    outcome: str | None
    """`ok`, `error`, `retry`, `released`, `lost`, `fenced`; None while it runs."""
    error: str | None
    timings: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """An instance of an earlier run of a recipe, to compare a new plan with."""

    node: str
    axes: Axes
    candidate: int
    take: int
    key: str
    operation: str
    params: Mapping[str, Any]
    inputs: tuple[tuple[str, int, str, str], ...]
    """(role, position, URI or '', sha256 of the source or key of the parent)."""
    state: StepState


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model as the database knows it."""

    name: str
    layout: str
    sha256: str
    licence: str


class Repository(Protocol):
    """The database. Every method is one transaction; all times are the database's own."""

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

    def create_run(self, run: NewRun, plan: Plan, *, fire: tuple[int, int] | None = None) -> int:
        """Store run, steps, edges, run_steps and deliveries in one transaction; returns the run's id.

        A key that is known and live or done makes no new row (this run may become its account); one that is failed,
        skipped, cancelled, quarantined, or done without its artifact goes back to blocked or ready, with attempts and
        losses at 0.

        `fire`: (id, token) of the time of a schedule that this run is of; noted in the same transaction, so that a time
        has one run. Raises `LeaseLost` when its claim has moved on.
        """
        ...

    def retry_run(self, run_id: int, *, keys: Iterable[str] | None = None) -> int:
        """Put unsuccessful steps of the run (all, or those keys and what reads them) back; returns how many."""
        ...

    def cancel_run(self, run_id: int) -> int:
        """Cancel the run; blocked and ready steps that no other live run wants are cancelled; returns how many."""
        ...

    def pause_run(self, run_id: int) -> bool:
        """Let nothing more be claimed for a running run; says whether it was running."""
        ...

    def resume_run(self, run_id: int) -> bool:
        """Let a paused run go on; says whether it was paused."""
        ...

    def prioritize_run(self, run_id: int, priority: int) -> None:
        """Give the run another priority."""
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

    # ---- schedules

    def add_schedule(self, new: Schedule) -> None:
        """Times count from now on. Raises `SettingsError` when there is one of that name."""
        ...

    def schedules(self) -> Sequence[StoredSchedule]:
        """By name."""
        ...

    def pause_schedule(self, name: str, *, paused: bool) -> bool:
        """Says whether that changed anything; times that go by meanwhile are not made up for."""
        ...

    def remove_schedule(self, name: str) -> None:
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

    # ---- workers

    def register_worker(self, worker: WorkerInfo) -> None: ...

    def workers(self) -> Sequence[WorkerInfo]:
        """Those that have not said goodbye."""
        ...

    def retire_worker(self, worker_id: str) -> None:
        """Say goodbye: leases still held go back to ready at no cost."""
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
    ) -> Sequence[LeasedStep]:
        """Lease up to `limit` ready steps of one lane, and open an attempt for each.

        The batch is filled from the first share of `ranking` that has something, then from the later ones of its lane;
        without a ranking the highest priority, then the oldest run comes first.
        `run_id`: only steps that this run wants. `capped`: the ranking keeps to caps, so no two claims may rank at
        once. A step with `batch_limit = 1` is claimed alone. Returns nothing when nothing is ready.
        """
        ...

    def extend_leases(self, worker_id: str, lease_seconds: float) -> int:
        """The heartbeat: extend every lease of this worker that has not been taken away; returns how many it holds."""
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

    def record_delivery(self, delivery_id: int, *, path: str, version: int, skipped: str | None = None) -> None:
        """The image lies at `path` now (with its version in the name), or was left out; `skipped` says why."""
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

    def fail_delivery(self, delivery_id: int, error: str) -> None: ...

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

    # ---- garbage

    def artifact_uris(self) -> Iterator[str]: ...

    def collectable(self, *, keep_bytes: int) -> Sequence[Artifact]:
        """Artifacts that can be recomputed, oldest use first, whose removal brings the total under `keep_bytes`.

        Never one that a live step will still read or a pending delivery needs.
        """
        ...

    def forget_artifact(self, sha256: str, delete: Callable[[str], None] | None = None) -> bool:
        """Mark it collected (the row stays for the lineage), unless a live step or pending delivery needs it by now.

        `delete` is called with its URI under the lock that keeps others from naming the object meanwhile; a caller
        who deletes afterwards may delete what somebody has just put anew.
        """
        ...

    def lost_artifact(self, sha256: str, delete: Callable[[str], None] | None = None) -> None:
        """Its object is gone or damaged: mark it collected, so that whoever needs it next has it made again.

        `delete` as for `forget_artifact`: what is put anew is written only where nothing is.
        """
        ...

    def orphaned_uploads(self) -> Sequence[str]:
        """URIs of uploads that no live intent and no artifact names: safe to delete."""
        ...

    def forget_uploads(self, uris: Sequence[str], delete: Callable[[str], None] | None = None) -> None:
        """Mark them deleted, each unless somebody names its object by now; `delete` as for `forget_artifact`."""
        ...


# --------------------------------------------------------------------------------------------------- computing


@dataclass(frozen=True, slots=True)
class LoadedPicture:
    """Bytes of a picture that a step reads, fetched and checked against its hash."""

    role: str
    position: int
    data: bytes
    latents: bytes | None = None
    """What to take instead of the picture, where latents are handed on."""


@dataclass(frozen=True, slots=True)
class EditJob:
    """One edit or generation, with its pictures in memory."""

    params: Mapping[str, Any]
    pictures: tuple[LoadedPicture, ...]


@dataclass(frozen=True, slots=True)
class MadePicture:
    """A finished picture in memory."""

    data: bytes
    """Encoded file."""
    media_type: str
    width: int
    height: int
    timings: Mapping[str, float] = field(default_factory=dict)
    latents: bytes | None = None
    """Packed final latents as safetensors, of what a model sampled."""


OnStep = Callable[[int, int], None]
"""Called after each denoise step with the steps done and the steps of the batch, over all its images."""


class Editor(Protocol):
    """The engine as the services see it. One call is one batch of one lane."""

    def edit(self, jobs: Sequence[EditJob], *, on_step: OnStep | None = None) -> Sequence[MadePicture | Exception]:
        """One result for each job, in order: the picture, or the error that this job met.

        A `StepError` is the job's own fault. What stops the whole batch is raised. `on_step(done, total)` is called
        after each denoise step.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """Device, library versions; goes into the lineage."""
        ...


class Operations(Protocol):
    """The Pillow operations as the services see them."""

    def run(self, operation: str, params: Mapping[str, Any], pictures: Sequence[LoadedPicture]) -> MadePicture:
        """Raises `StepError` when a picture does not decode or the result cannot meet its limits."""
        ...


Probe = Callable[[bytes], tuple[str, int, int]]
"""Format (Pillow's name), width and height after EXIF orientation of a picture file, from its header alone.

Raises `StepError` whose message can stand as `InputRecord.problem`.
"""


class ContentFilter(Protocol):
    """Says whether an image may be delivered; needed by models whose licence asks for it."""

    def allows(self, data: bytes) -> bool: ...


class WakeUps(Protocol):
    """Rings the workers. A lost, doubled or late ring is harmless: nothing ready, nothing done."""

    def wake(self, lanes: Mapping[str, int]) -> None:
        """`lanes`: lane -> number of steps that became ready."""
        ...
