"""What is done with one step or with several: fetch what it reads, operate, put what it made, commit.

Every fault finds its home here (DESIGN.md 6): a picture that does not decode fails its step; a store that does not
answer puts the step back for later; the others go on. Steps that a model samples go through `services.pipeline`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from kontext_batch.errors import (
    InfrastructureError,
    NotAllowed,
    ObjectChanged,
    ObjectNotFound,
    OutOfMemory,
    StepError,
    StorageFull,
    StorageReadOnly,
)
from kontext_batch.hashing import sha256_hex
from kontext_batch.observability import metrics
from kontext_batch.observability.logs import about_batch
from kontext_batch.planning.backoff import doubling_delay
from kontext_batch.planning.marking import xmp_packet
from kontext_batch.planning.plan import OPERATIONS_LANE
from kontext_batch.ports import (
    Artifact,
    BatchMember,
    BatchRecord,
    CommitReport,
    EditJob,
    Editor,
    LeasedStep,
    LoadedPicture,
    MadePicture,
    ObjectStore,
    Operations,
    ParentOutput,
    Prepared,
    Repository,
    SourceInput,
    StepDone,
    StepFailed,
    StepOutput,
    StepResult,
)
from kontext_batch.services.artifacts import read_artifact

log = structlog.get_logger(__name__)

T = TypeVar("T")
ArtifactUri = Callable[[str, str], str]
"""(sha256, media type) -> where the artifact goes."""

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 1.0, 300.0
MAX_RETRIES = 8
"""Infrastructure faults of one step before it fails: by then about ten minutes have passed."""
PATIENCE_TRIES = 6
"""How often a result that is paid for is offered to a store or database that does not answer: half a minute long."""


def retry_delay(attempt: int, *, spread: Callable[[], float] = random.random) -> float | None:
    """Seconds to wait after infrastructure fault number `attempt` (1-based), doubling, with jitter; None: give up."""
    if attempt > MAX_RETRIES:
        return None
    return doubling_delay(attempt, first=FIRST_RETRY_SECONDS, longest=LONGEST_RETRY_SECONDS, spread=spread())


@dataclass(frozen=True, slots=True)
class Loaded:
    """A step whose pictures are in memory."""

    step: LeasedStep
    job: EditJob
    prepared: Prepared
    """What the editor samples; None of a picture operation."""
    seconds: float
    """That fetching and preparing took."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A step whose picture is made and is not yet in the store."""

    step: LeasedStep
    picture: MadePicture
    files: Mapping[str, tuple[Artifact, bytes]]
    """By slot."""


@dataclass(frozen=True, slots=True)
class Executor:
    """It holds no state: threads may share one."""

    worker_id: str
    repository: Repository
    store: ObjectStore
    editor: Editor
    operations: Operations
    artifact_uri: ArtifactUri
    max_input_bytes: int
    mark: bool = True
    """Whether files say how they were made (`planning.marking`)."""
    pause: Callable[[float], None] = time.sleep

    def operate(self, steps: Sequence[LeasedStep]) -> CommitReport:
        """Compute and commit picture operations."""
        results: list[StepResult] = []
        finished: list[Finished] = []
        for step in steps:
            loaded = self.load(step)
            made = loaded if isinstance(loaded, StepFailed) else self._operated(loaded)
            if isinstance(made, StepFailed):
                results.append(made)
            else:
                finished.append(made)
        self.announce(finished)
        results.extend(self.put(each) for each in finished)
        members = tuple(BatchMember(step.id, 0, 1, place) for place, step in enumerate(steps))
        return self.commit(replace(self.record(steps[0]), members=members), steps[0].lane, results)

    def load(self, step: LeasedStep) -> Loaded | StepFailed:
        """Fetch what the step reads and, where a model samples it, decode and fit it."""
        started = time.perf_counter()
        try:
            job = EditJob(params=step.params, pictures=tuple(self._fetch(step)))
            prepared = None if step.lane == OPERATIONS_LANE else self.editor.prepare(job)
        except (StepError, InfrastructureError, ObjectNotFound, ObjectChanged, NotAllowed) as error:
            return failure(step, error)
        return Loaded(step, job, prepared, time.perf_counter() - started)

    def _operated(self, loaded: Loaded) -> Finished | StepFailed:
        step, started = loaded.step, time.perf_counter()
        try:
            made = self.operations.run(step.operation, step.params, loaded.job.pictures, xmp=self.xmp_of(step))
        except (StepError, InfrastructureError) as error:
            return failure(step, error)
        timings = {**made.timings, "operate": time.perf_counter() - started, "fetch": loaded.seconds}
        return self.finished(step, replace(made, timings=timings))

    def xmp_of(self, step: LeasedStep) -> bytes | None:
        """What the file that this step makes says of itself."""
        return xmp_packet(step.key, step.ancestry) if self.mark else None

    def finished(self, step: LeasedStep, picture: MadePicture) -> Finished:
        """What is to be put of a picture, under which names."""
        files = {"image": self._as_artifact(picture.data, picture.media_type, picture)}
        if picture.latents is not None:
            files["latents"] = self._as_artifact(picture.latents, "application/octet-stream", picture)
        return Finished(step, picture, files)

    def announce(self, finished: Sequence[Finished]) -> None:
        """Before the puts: no object may exist that the database does not know."""
        uploads = [
            (artifact.uri, each.step.id, each.step.token) for each in finished for artifact, _ in each.files.values()
        ]
        if uploads:
            self._patiently(lambda: self.repository.intend_uploads(uploads))

    def put(self, finished: Finished) -> StepResult:
        """Put what was announced. Raises what the next step would meet too, however often it were computed."""
        step, started = finished.step, time.perf_counter()
        try:
            for artifact, data in finished.files.values():
                self._put(artifact, data)
        except (StorageFull, StorageReadOnly, NotAllowed):
            raise
        except InfrastructureError as error:
            return replace(failure(step, error), timings=finished.picture.timings)  # it was sampled, and is charged
        timings = {**finished.picture.timings, "put": time.perf_counter() - started}
        outputs = tuple(StepOutput(slot, artifact) for slot, (artifact, _) in finished.files.items())
        return StepDone(step.id, step.token, outputs, timings)

    def _put(self, artifact: Artifact, data: bytes) -> None:
        self._patiently(lambda: self.store.write_if_absent(artifact.uri, data, media_type=artifact.media_type))

    def commit(self, record: BatchRecord | None, lane: str, results: Sequence[StepResult]) -> CommitReport:
        """Write down results of a lane, and count them."""
        with metrics.timed("commit"):
            report = self._patiently(lambda: self.repository.commit(record, results))
        measure(lane, results, report)
        return report

    def record(self, step: LeasedStep) -> BatchRecord:
        """The batch that this step is, or begins, as yet without members."""
        about = self.operations.describe() if step.lane == OPERATIONS_LANE else self.editor.describe()
        mode = str(step.params.get("numeric_mode", "exact"))
        return BatchRecord(
            worker_id=self.worker_id,
            lane=step.lane,
            device=str(about.get("device", "cpu")),
            model_sha256=step.params.get("model_sha256"),
            numeric_mode=f"{mode}+batch-invariant" if about.get("batch_invariant") else mode,
            libraries={name: str(version) for name, version in about.get("libraries", {}).items()},
            members=(),
        )

    def give_back(self, steps: Sequence[LeasedStep]) -> None:
        """Unused, and no attempt counted."""
        self._patiently(lambda: self.repository.release(sorted((step.id, step.token) for step in steps)))
        metrics.STEPS.labels(steps[0].lane, "released").inc(len(steps))
        with self.about(steps):
            log.info("steps given back")

    def about(self, steps: Sequence[LeasedStep]) -> AbstractContextManager[None]:
        """Within, log lines are about these steps of a lane."""
        return about_batch(
            worker=self.worker_id,
            lane=steps[0].lane,
            steps=[step.id for step in steps],
            runs=[step.run_id for step in steps],
        )

    def _patiently(self, work: Callable[[], T]) -> T:
        """What is computed is not computed again for want of a short outage's patience; a commit may be repeated."""
        for attempt in range(1, PATIENCE_TRIES):
            try:
                return work()
            except (StorageFull, StorageReadOnly):
                raise  # this does not pass by itself
            except InfrastructureError as error:
                delay = retry_delay(attempt) or 0.0
                log.warning(
                    "held back until the database or the store answers", retry_in=round(delay, 1), error=str(error)
                )
                self.pause(delay)
        return work()

    def _fetch(self, step: LeasedStep) -> list[LoadedPicture]:
        by_latents = step.params.get("handoff") == "latents"
        return [self._source(source) for source in step.sources] + [
            self._parent(parent, by_latents=by_latents and parent.role == "image") for parent in step.parents
        ]

    def _source(self, source: SourceInput) -> LoadedPicture:
        data = self.store.read(source.uri, max_bytes=self.max_input_bytes)
        if sha256_hex(data) != source.sha256:
            raise StepError(f"{source.uri} has changed since the plan was made; run the recipe again")
        return LoadedPicture(role=source.role, position=source.position, data=data)

    def _parent(self, parent: ParentOutput, *, by_latents: bool) -> LoadedPicture:
        data = self._artifact(parent.artifact)
        latents = None
        if by_latents:
            assert parent.latents is not None, "what a model sampled is committed with its latents"
            latents = self._artifact(parent.latents)
        return LoadedPicture(role=parent.role, position=parent.position, data=data, latents=latents)

    def _artifact(self, artifact: Artifact) -> bytes:
        return read_artifact(self.repository, self.store, artifact)

    def _as_artifact(self, data: bytes, media_type: str, picture: MadePicture) -> tuple[Artifact, bytes]:
        sha256 = sha256_hex(data)
        uri = self.artifact_uri(sha256, media_type)
        return Artifact(sha256, uri, media_type, len(data), picture.width, picture.height), data


def halved(step: LeasedStep, error: OutOfMemory, rows: int) -> StepFailed:
    """Back at once, for a batch of half the size: down to one alone, whose own fault it then is to be too big."""
    log.warning("batch too big for the device", step=step.key, rows=rows, error=str(error))
    limit = rows // 2
    return StepFailed(step.id, step.token, str(error), type(error).__name__, retry_in=0.0, batch_limit=limit)


def measure(lane: str, results: Sequence[StepResult], report: CommitReport) -> None:
    """Count what became of a batch."""
    fenced = set(report.fenced)
    for result in results:
        if result.step_id in fenced:
            outcome = "fenced"
        elif isinstance(result, StepDone):
            outcome = "done"
        else:
            outcome = "failed" if result.retry_in is None else "retried"
            metrics.FAULTS.labels(result.error_class, outcome).inc()
        metrics.STEPS.labels(lane, outcome).inc()
        for phase, seconds in result.timings.items():
            metrics.PHASE_SECONDS.labels(phase).observe(seconds)


def failure(step: LeasedStep, error: Exception) -> StepFailed:
    """Whose fault it is decides what becomes of the step."""
    retry_in = retry_delay(step.attempt) if isinstance(error, InfrastructureError) else None
    about = {"step": step.id, "run": step.run_id, "key": step.key, "attempt": step.attempt, "error": str(error)}
    if retry_in is not None:
        log.warning("step put back", **about, retry_in=round(retry_in, 1))
    else:
        log.warning("step failed", **about)
    return StepFailed(step.id, step.token, error=str(error), error_class=type(error).__name__, retry_in=retry_in)
