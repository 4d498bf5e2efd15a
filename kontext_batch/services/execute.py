"""One batch: fetch what the steps read, compute, put, commit.

Every fault finds its home here (DESIGN.md 6): a picture that does not decode fails its step; a store that does not
answer puts the step back for later; the rest of the batch goes on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

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
from kontext_batch.planning.backoff import doubling_delay
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
    OnStep,
    Operations,
    ParentOutput,
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
class Executor:
    """Runs leased steps. It holds no state: two threads may share one."""

    worker_id: str
    repository: Repository
    store: ObjectStore
    editor: Editor
    operations: Operations
    artifact_uri: ArtifactUri
    max_input_bytes: int
    pause: Callable[[float], None] = time.sleep

    def run(self, steps: Sequence[LeasedStep], *, on_step: OnStep | None = None) -> CommitReport:
        """Compute and commit a batch of one lane."""
        assert len({step.lane for step in steps}) == 1, "a batch is of one lane"
        results: list[StepResult] = []
        loaded: list[tuple[LeasedStep, EditJob, float]] = []
        for step in steps:
            started = time.perf_counter()
            try:
                pictures = tuple(self._fetch(step))
            except (StepError, InfrastructureError, ObjectNotFound, ObjectChanged, NotAllowed) as error:
                results.append(failure(step, error))
            else:
                seconds = time.perf_counter() - started
                loaded.append((step, EditJob(params=step.params, pictures=pictures), seconds))

        made = self._compute(steps[0].lane, loaded, on_step)
        done: list[tuple[LeasedStep, MadePicture, float]] = []
        for (step, _, fetched), picture in zip(loaded, made, strict=True):
            if isinstance(picture, OutOfMemory) and len(loaded) > 1:
                results.append(halved(step, picture, len(loaded)))
            elif isinstance(picture, Exception):
                results.append(failure(step, picture))
            else:
                done.append((step, picture, fetched))
        results.extend(self._put(done))
        record = self._record(steps)
        with metrics.timed("commit"):
            report = self._patiently(lambda: self.repository.commit(record, results))
        measure(steps[0].lane, results, report)
        return report

    def _patiently(self, work: Callable[[], T]) -> T:
        """What is computed is not computed again for want of a short outage's patience; a commit may be repeated."""
        for attempt in range(1, PATIENCE_TRIES):
            try:
                return work()
            except (StorageFull, StorageReadOnly):
                raise  # this does not pass by itself
            except InfrastructureError as error:
                delay = retry_delay(attempt) or 0.0
                log.warning("result held back until it can be kept", retry_in=round(delay, 1), error=str(error))
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

    def _compute(
        self, lane: str, loaded: Sequence[tuple[LeasedStep, EditJob, float]], on_step: OnStep | None
    ) -> Sequence[MadePicture | Exception]:
        """A result or an error for each step; what stops the whole batch stands for each of them."""
        if not loaded:
            return []
        if lane == OPERATIONS_LANE:
            return [self._operate(step, job) for step, job, _ in loaded]
        try:
            with metrics.ACTIVITY.computing(), metrics.timed("compute"):
                return self.editor.edit([job for _, job, _ in loaded], on_step=on_step)
        except (StepError, InfrastructureError) as error:
            return [error] * len(loaded)

    def _operate(self, step: LeasedStep, job: EditJob) -> MadePicture | Exception:
        started = time.perf_counter()
        try:
            made = self.operations.run(step.operation, job.params, job.pictures)
        except (StepError, InfrastructureError) as error:
            return error
        timings = {**made.timings, "operate": time.perf_counter() - started}
        return MadePicture(made.data, made.media_type, made.width, made.height, timings, made.latents)

    def _put(self, done: Sequence[tuple[LeasedStep, MadePicture, float]]) -> list[StepResult]:
        """Announce the uploads, then put them: no object may exist that the database does not know."""
        planned: list[tuple[LeasedStep, MadePicture, float, dict[str, tuple[Artifact, bytes]]]] = []
        for step, picture, fetched in done:
            files = {"image": self._as_artifact(picture.data, picture.media_type, picture)}
            if picture.latents is not None:
                files["latents"] = self._as_artifact(picture.latents, "application/octet-stream", picture)
            planned.append((step, picture, fetched, files))
        if planned:
            announced = [
                (artifact.uri, step.id, step.token) for step, _, _, files in planned for artifact, _ in files.values()
            ]
            self._patiently(lambda: self.repository.intend_uploads(announced))
        results: list[StepResult] = []
        for step, picture, fetched, files in planned:
            started = time.perf_counter()
            try:
                for artifact, data in files.values():
                    put = partial(self.store.write_if_absent, artifact.uri, data, media_type=artifact.media_type)
                    self._patiently(put)
            except (StorageFull, StorageReadOnly, NotAllowed):
                raise  # the next one would meet the same, however often it were computed: the worker stops
            except InfrastructureError as error:
                results.append(failure(step, error))
                continue
            timings = {**picture.timings, "fetch": fetched, "put": time.perf_counter() - started}
            outputs = tuple(StepOutput(slot, artifact) for slot, (artifact, _) in files.items())
            results.append(StepDone(step.id, step.token, outputs, timings))
        return results

    def _as_artifact(self, data: bytes, media_type: str, picture: MadePicture) -> tuple[Artifact, bytes]:
        sha256 = sha256_hex(data)
        uri = self.artifact_uri(sha256, media_type)
        return Artifact(sha256, uri, media_type, len(data), picture.width, picture.height), data

    def _record(self, steps: Sequence[LeasedStep]) -> BatchRecord:
        params, lane = steps[0].params, steps[0].lane
        about: Mapping[str, Any] = {} if lane == OPERATIONS_LANE else self.editor.describe()
        return BatchRecord(
            worker_id=self.worker_id,
            lane=lane,
            device=str(about.get("device", "cpu")),
            model_sha256=params.get("model_sha256"),
            numeric_mode=str(params.get("numeric_mode", "exact")),
            libraries={name: str(version) for name, version in about.get("libraries", {}).items()},
            members=tuple(BatchMember(step.id, 0, int(step.params.get("steps", 1))) for step in steps),
        )


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
