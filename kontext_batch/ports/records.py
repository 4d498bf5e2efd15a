"""Values that go into the database and come out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kontext_batch.planning.marking import Ancestry
from kontext_batch.planning.plan import Axes
from kontext_batch.planning.states import RunState, StepState


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
    source: str = ""
    """URI of the run's recipe."""


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
class InHand:
    """What a worker is computing, which the steps that it claims are to join."""

    lane: str
    steps: int
    """Leases that it holds, from the claim to the commit."""


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
    batch_limit: int | None = None
    """Most steps that its worker may have in hand as long as this is one of them; None: any number."""
    ancestry: Ancestry = field(default_factory=Ancestry)
    """Of the picture that it makes."""


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
    """Seconds by phase: `fetch`, `sample`, `decode`, `put`, ...

    `sample` is what the device sampled for this step: of each denoise step an equal part for each row that was in.
    """


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
    batch_limit: int | None = None
    """Most steps of a batch that it may be part of from now on; None: as before."""


StepResult = StepDone | StepFailed


@dataclass(frozen=True, slots=True)
class BatchMember:
    """Which denoise steps of a batch a step took part in: those numbered `joined + 1` to `left`, of all its rows."""

    step_id: int
    joined: int
    left: int
    place: int = 0
    """How many had joined the batch before it: with `joined` the order of its rows."""


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch as it was computed, for the lineage: steps of one lane that joined and left between denoise steps."""

    worker_id: str
    lane: str
    device: str
    model_sha256: str | None
    numeric_mode: str
    libraries: Mapping[str, str]
    members: tuple[BatchMember, ...]
    """Those that this commit adds."""
    id: int | None = None
    """Of the row that they are added to, as the commit of the first of them has told it; None: a new one."""


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What a commit did."""

    committed: tuple[int, ...]
    """Step ids whose result was written (done, failed or returned for a retry)."""
    fenced: tuple[int, ...]
    """Step ids whose lease had moved on; their results were dropped and their uploads are orphans."""
    woken: Mapping[str, int]
    """Lane -> number of steps that became ready."""
    deliverable: int = 0
    """Deliveries that may be brought now."""
    batch_id: int | None = None
    """Of the batch's row; None when it has none."""


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
    source: str = ""
    """URI of the recipe: what lies around it may be read and delivered to."""


@dataclass(frozen=True, slots=True)
class SettledDelivery:
    """How a delivery ended. With an error it has failed."""

    id: int
    path: str = ""
    """Where the image lies, or would."""
    version: int = 1
    """1 for the path that the recipe wants, n for `name.vN.ext`."""
    skipped: str | None = None
    """Why it was left out; None when it was not."""
    error: str | None = None
    file_sha256: str | None = None
    """Of what lies there, where that is not the artifact as it is: signed."""


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
    reason: str | None = None
    """Why the system paused or cancelled it; None when a person did, or nobody."""
    gpu_seconds: float = 0.0
    """Of sampling, as measured, of the steps that were computed on its account."""
    budget: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Standing:
    """How everything stands at one moment, for the metrics."""

    steps: Mapping[tuple[str, StepState], int]
    """(lane, live state) -> steps."""
    queue_age: Mapping[str, float]
    """Lane with ready steps -> seconds since the oldest might have been claimed; paused runs and later retries count
    nothing."""
    runs: Mapping[RunState, int]
    """Open runs by state."""
    pending_deliveries: int
    workers: int
    """Those that have not said goodbye."""
    longest_silence: float
    """Seconds since the heartbeat of the most silent one of them."""
    sends: Mapping[tuple[str, str], int]
    """(webhook, `waiting` or `given_up`) -> events."""


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
    asked: int = 1
    """Which time it was that somebody had asked for the step."""


@dataclass(frozen=True, slots=True)
class StepUse:
    """That a run wanted a step."""

    run_id: int
    recipe: str
    """Name of the run's recipe."""
    created: datetime
    node: str
    axes: Axes
    candidate: int
    cached: bool
    """The step was done already."""
    file: str
    """Where the recipe has the step."""
    line: int


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
