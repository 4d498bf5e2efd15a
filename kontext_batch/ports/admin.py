"""Values for those who look after runs and workers: acts of people, what a run has used, how workers stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kontext_batch.planning.plan import Axes
from kontext_batch.planning.states import RunState, StepState
from kontext_batch.ports.records import Artifact, AttemptRow


@dataclass(frozen=True, slots=True)
class Act:
    """What a person does, to be written down in the transaction that changes something."""

    who: str
    """The user of the system, the name of a token, or the owner of the inbox that a file was dropped into."""
    via: str
    """`cli`, `cli+token` or `inbox`."""
    action: str
    """As the command is called: `runs cancel`."""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditRow:
    """An act that was written down."""

    id: int
    at: datetime
    who: str
    via: str
    action: str
    subject: str
    """`run:12`, `schedule:nightly`, `worker:gpu1-71-9a0b3c4d`, `drop:3`, `step:17`, `artifacts`, ..."""
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What the limits of a run are compared with."""

    id: int
    state: RunState
    size: int
    """Distinct steps."""
    failed: int
    """Its failed and quarantined steps, without those that were there when somebody last let it go on."""
    gpu_seconds: float
    """Of sampling, as measured."""
    gpu_minutes: float | None
    """Its budget; None: none."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What a worker is told from outside."""

    drain: bool = False
    """Take nothing more; finish what is held."""
    unwanted: frozenset[tuple[int, int]] = frozenset()
    """(step id, token) of what it holds and no run wants any more."""


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker as `workers list` shows it."""

    id: str
    host: str
    pid: int
    device: str
    registered: datetime
    heartbeat_age: float
    """Seconds, by the database's clock."""
    held: int
    """Steps that it has leased."""
    draining: bool
    retired: datetime | None


@dataclass(frozen=True, slots=True)
class BatchMemberRow:
    """A step in a batch as it was computed."""

    step_id: int
    key: str
    joined: int
    """Denoise step of the batch."""
    left: int
    place: int | None
    """How many had joined before it; None where that was not recorded."""
    outcome: str | None
    timings: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A batch as `batches show` shows it."""

    id: int
    worker_id: str
    lane: str
    device: str
    model_sha256: str | None
    numeric_mode: str
    libraries: Mapping[str, str]
    committed: datetime
    members: tuple[BatchMemberRow, ...]


@dataclass(frozen=True, slots=True)
class DamagedArtifact:
    """An artifact whose bytes are not those of its hash, or cannot be read."""

    artifact: Artifact
    problem: str
    """Begins with `missing`, `changed` or `unreadable`."""
    found: datetime
    steps: tuple[int, ...]
    """Ids of those that it is an output of, or some of them."""


@dataclass(frozen=True, slots=True)
class ExportedDelivery:
    """Where a picture was wanted, and what became of that."""

    path: str
    state: str
    delivered_path: str | None
    delivered: datetime | None
    withdrawn: datetime | None
    """When its file was deleted, as taken down."""
    error: str | None


@dataclass(frozen=True, slots=True)
class ExportedInstance:
    """An instance of a run with everything that is known of it."""

    ordinal: int
    """Its place in the plan."""
    node: str
    axes: Axes
    candidate: int
    take: int
    step_id: int
    key: str
    operation: str
    lane: str
    state: StepState
    cached: bool
    error: str | None
    artifact: Artifact | None
    deliveries: tuple[ExportedDelivery, ...]
    attempts: tuple[AttemptRow, ...]
