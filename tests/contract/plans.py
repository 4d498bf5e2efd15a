"""Plans written by hand, for tests of the repository."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kontext_batch.hashing import content_hash, sha256_hex
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.plan import (
    ImageInfo,
    Instance,
    Origin,
    Plan,
    PlannedDelivery,
    PlannedStep,
    StepInput,
)
from kontext_batch.ports import (
    Artifact,
    LeasedStep,
    NewRun,
    PendingDelivery,
    SettledDelivery,
    StepDone,
    StepFailed,
    StepOutput,
    WorkerInfo,
)

ORIGIN = Origin("r.yaml", 3, 5)
LANE = "edit/tiny"
LEASE = 60.0


def key(name: str) -> str:
    """The key of the step that tests call `name`."""
    return content_hash(name)


def source(name: str) -> ImageInfo:
    digest = sha256_hex(name.encode())
    return ImageInfo(f"file:///in/{name}.png", "1", digest, 10, 8, 8, "PNG")


def make_plan(
    graph: Mapping[str, Sequence[str]],
    *,
    recipe: str = "r",
    lanes: Mapping[str, str] | None = None,
    deliver: Sequence[str] = (),
    folder: str = "out",
    params: Mapping[str, Any] | None = None,
) -> Plan:
    """`graph`: step -> its parents, parents first; a step without parents reads a source picture.

    The first parent is the canvas, others are references; naming one parent twice makes two edges.
    """
    steps, instances = [], {}
    for name, parents in graph.items():
        inputs = [StepInput("image", 0, source(name), None)] if not parents else []
        for position, parent in enumerate(parents):
            role = "reference" if position else "image"
            inputs.append(StepInput(role, max(0, position - 1), None, key(parent)))
        lane = (lanes or {}).get(name, LANE)
        made = {"name": name, **(params or {})}
        steps.append(PlannedStep(key(name), "edit", made, tuple(inputs), lane, ORIGIN, 1.0))
        instances[name] = Instance(name, (("item", name),), 1, key(name))
    deliveries = tuple(
        PlannedDelivery(f"file:///{folder}/{name}.png", key(name), "version", instances[name], ORIGIN)
        for name in deliver
    )
    return Plan(recipe, sha256_hex(recipe.encode()), "studio", tuple(steps), tuple(instances.values()), deliveries)


def new_run(plan: Plan, *, priority: int = 0) -> NewRun:
    return NewRun(plan.recipe, plan.recipe_sha256, "text", "r.yaml", plan.owner, "cli", priority)


def submit(repository: SqlRepository, plan: Plan, *, priority: int = 0) -> int:
    return repository.create_run(new_run(plan, priority=priority), plan)


def worker(name: str = "w1", *, pid: int = 1, host: str = "here") -> WorkerInfo:
    return WorkerInfo(name, host, pid, 1000.5, "cpu", {"torch": "2"})


def claim(repository: SqlRepository, worker_id: str = "w1", *, limit: int = 8, **options: object) -> list[LeasedStep]:
    return list(repository.claim(worker_id, limit=limit, lease_seconds=LEASE, **options))  # type: ignore[arg-type]


def held_by(steps: Iterable[LeasedStep]) -> list[tuple[int, int]]:
    return [(step.id, step.token) for step in steps]


def artifact_of(step: LeasedStep, *, slot: str = "image", size: int = 100) -> Artifact:
    digest = sha256_hex(f"{step.key}/{slot}".encode())
    return Artifact(digest, f"file:///objects/{digest}", "image/png", size, 8, 8)


def done(step: LeasedStep, *, latents: bool = False, size: int = 100) -> StepDone:
    slots = ("image", "latents") if latents else ("image",)
    outputs = tuple(StepOutput(slot, artifact_of(step, slot=slot, size=size)) for slot in slots)
    return StepDone(step.id, step.token, outputs, {"sample": 0.5})


def failed(step: LeasedStep, *, retry_in: float | None = None) -> StepFailed:
    return StepFailed(step.id, step.token, "it went wrong", "StepError", retry_in)


def finish(repository: SqlRepository, worker_id: str = "w1", *, run_id: int | None = None) -> int:
    """Compute everything that is ready, and what becomes ready by it; returns the number of steps."""
    count = 0
    while leased := repository.claim(worker_id, limit=8, lease_seconds=LEASE, run_id=run_id):
        repository.intend_uploads([(artifact_of(step).uri, step.id, step.token) for step in leased])
        repository.commit(None, [done(step) for step in leased])
        count += len(leased)
    return count


def settle(
    repository: SqlRepository,
    delivery: PendingDelivery,
    *,
    path: str = "",
    version: int = 1,
    skipped: str | None = None,
    error: str | None = None,
    file_sha256: str | None = None,
) -> None:
    """As a worker says how a delivery ended."""
    settled = SettledDelivery(delivery.id, path or delivery.path, version, skipped, error, file_sha256)
    repository.settle_deliveries("w1", [settled])
