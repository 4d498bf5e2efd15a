"""Whether a tenant with 10 steps waits behind one with 100,000. Goals: no step of the small one waits for more than two
batches of each worker, and the large one is never left out for longer than that.

Workers claim and commit as they do in earnest; instead of sampling they sleep. The large tenant is submitted first.
While its steps are worked off, a small run after the other is submitted: five photos, two edits each. A wait lasts from
the moment at which a step may be claimed to that at which it is. It is counted in batches, too, those that were claimed
meanwhile: that does not depend on the machine. "first come, first served" is how long the small tenant would have
waited for the large one to be done, at the pace that was measured.

    python -m benchmarks.fairness [--quick] [--json FILE] [--postgres URL]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from benchmarks import command
from kontext_batch.hashing import content_hash, sha256_hex
from kontext_batch.lineage.migrate import upgrade
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.observability import set_up_logging
from kontext_batch.planning.plan import ImageInfo, Instance, Origin, Plan, PlannedStep, StepInput
from kontext_batch.ports import (
    Artifact,
    BatchMember,
    BatchRecord,
    LeasedStep,
    NewRun,
    StepDone,
    StepOutput,
    WorkerInfo,
)
from kontext_batch.services.turns import Turns

STEPS, SMALL_STEPS, SMALL_RUNS = 100_000, 10, 20
WORKERS, ROWS, BATCH_SECONDS, LEASE_SECONDS = 4, 8, 0.1, 600.0
LANE = "edit/bench"
GOALS = {"small_batches_worst": 2.0 * WORKERS, "large_batches_worst": 2.0 * WORKERS}


def plan(owner: str, steps: int) -> Plan:
    """Chains of two edits, each of a photo of its own."""
    origin = Origin("bench.yaml", 1, 1)
    planned, instances = [], []
    for number in range(steps // 2):
        name = f"{owner}/{number}"
        digest = sha256_hex(name.encode())
        photo = ImageInfo(f"s3://raw/{name}.png", "1", digest, 10, 8, 8, "PNG")
        first, second = content_hash([name, 1]), content_hash([name, 2])
        for key, node, source, parent in ((first, "clean", photo, None), (second, "staged", None, first)):
            inputs = (StepInput("image", 0, source, parent),)
            planned.append(PlannedStep(key, "edit", {"prompt": node}, inputs, LANE, origin, 1.0))
            instances.append(Instance(node, (("item", name),), 1, key))
    return Plan("bench", sha256_hex(owner.encode()), owner, tuple(planned), tuple(instances), ())


def submit(repository: SqlRepository, owner: str, steps: int) -> int:
    """Store a run of that owner; returns its id."""
    made = plan(owner, steps)
    return repository.create_run(NewRun("bench", made.recipe_sha256, "", "bench.yaml", owner, "cli"), made)


@dataclass
class Book:
    """Who got which batch, and how long steps of the small tenant could have been claimed before they were.

    Threads hold `changed` while they use it.
    """

    large: int
    """The run of the large tenant."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    batches: int = 0
    """Claimed so far."""
    large_steps: int = 0
    large_last: int = 0
    """Number of the last batch in which the large tenant had steps."""
    large_gaps: list[int] = field(default_factory=list)
    large_waits: list[float] = field(default_factory=list)
    """Seconds between two batches in which it had some."""
    large_since: float = field(default_factory=time.perf_counter)
    ready: dict[int, int] = field(default_factory=dict)
    """Run of the small tenant -> steps that may be claimed."""
    since: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Run -> when the first of those became ready, and how many batches had been claimed by then."""
    left: dict[int, int] = field(default_factory=dict)
    """Run -> steps that are not done."""
    waits: list[tuple[float, int]] = field(default_factory=list)
    """Of batches with steps of the small tenant: seconds, batches."""

    def became_ready(self, run_id: int, count: int) -> None:
        """Steps of a small run may be claimed from now on."""
        self.ready[run_id] = self.ready.get(run_id, 0) + count
        self.since.setdefault(run_id, (time.perf_counter(), self.batches))

    def claimed(self, steps: Sequence[LeasedStep]) -> None:
        """A worker has leased a batch."""
        self.batches += 1
        by_run = Counter(step.run_id for step in steps)
        self.large_steps += by_run[self.large]
        if by_run.pop(self.large, 0):
            self.large_gaps.append(self.batches - self.large_last - 1)
            self.large_last = self.batches
            self.large_waits.append(time.perf_counter() - self.large_since)
            self.large_since = time.perf_counter()
        for run_id, count in by_run.items():
            moment, batches = self.since[run_id]
            self.waits.append((time.perf_counter() - moment, self.batches - batches - 1))
            self.ready[run_id] -= count
            if not self.ready[run_id]:
                del self.since[run_id]

    def committed(self, steps: Sequence[LeasedStep]) -> None:
        """A worker has committed a batch: what reads its steps may be claimed."""
        for step in steps:
            if step.run_id in self.left:
                self.left[step.run_id] -= 1
                if not step.parents:
                    self.became_ready(step.run_id, 1)
        self.changed.notify_all()


def work(repository: SqlRepository, name: str, book: Book, stopping: threading.Event) -> None:
    """A worker that sleeps instead of sampling."""
    turns = Turns()
    while not stopping.is_set():
        steps = repository.claim(name, limit=ROWS, lease_seconds=LEASE_SECONDS, ranking=turns)
        if not steps:
            time.sleep(0.01)
            continue
        turns.took(steps)
        with book.changed:
            book.claimed(steps)
        time.sleep(BATCH_SECONDS)
        members = tuple(BatchMember(step.id, 0, 28) for step in steps)
        record = BatchRecord(name, LANE, "cpu", None, "exact", {}, members)
        repository.commit(record, [done(step) for step in steps])
        with book.changed:
            book.committed(steps)


def done(step: LeasedStep) -> StepDone:
    """As if it had been sampled."""
    digest = sha256_hex(step.key.encode())
    picture = Artifact(digest, f"s3://objects/{digest}", "image/png", 100, 8, 8)
    return StepDone(step.id, step.token, (StepOutput("image", picture),), {"sample": BATCH_SECONDS})


def measure(url: str, steps: int) -> dict[str, float]:
    """Let both tenants be served; figures of the small one's waits and of the large one's."""
    upgrade(url)
    repository = SqlRepository(url)
    names = [f"w{number}" for number in range(WORKERS)]
    for name in names:
        repository.register_worker(WorkerInfo(name, "bench", 1, 0.0, "cpu", {}))
    book, stopping = Book(submit(repository, "large", steps)), threading.Event()
    threads = [threading.Thread(target=work, args=(repository, name, book, stopping)) for name in names]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    runs = []
    try:
        for number in range(SMALL_RUNS):
            time.sleep(2 * BATCH_SECONDS)
            begun = time.perf_counter()
            with book.changed:  # no worker may take of it before the book knows of it
                run_id = submit(repository, f"small-{number}", SMALL_STEPS)
                book.left[run_id] = SMALL_STEPS
                book.became_ready(run_id, SMALL_STEPS // 2)
                while book.left[run_id] > 0:
                    if not book.changed.wait(timeout=60):
                        raise TimeoutError(f"small run {number} is starved: {book.left[run_id]} steps are left")
            runs.append(time.perf_counter() - begun)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    seconds = time.perf_counter() - started
    pace = book.large_steps / seconds
    repository.close()
    return {
        "large_steps": float(steps),
        "large_steps_a_second": pace,
        "large_wait_seconds_mean": statistics.mean(book.large_waits),
        "large_wait_seconds_worst": max(book.large_waits),
        "large_batches_worst": float(max(book.large_gaps)),
        "small_wait_seconds_mean": statistics.mean(seconds for seconds, _ in book.waits),
        "small_wait_seconds_worst": max(seconds for seconds, _ in book.waits),
        "small_batches_mean": statistics.mean(batches for _, batches in book.waits),
        "small_batches_worst": float(max(batches for _, batches in book.waits)),
        "small_run_seconds_mean": statistics.mean(runs),
        "small_run_seconds_worst": max(runs),
        "first_come_first_served_seconds": (steps - book.large_steps) / pace,
    }


@contextmanager
def database(server: str | None) -> Iterator[str]:
    """URL of an empty database: a file, or one of that server's, which is dropped again."""
    if server is None:
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{Path(folder) / 'fairness.db'}"
        return
    at = sa.make_url(server).set(drivername="postgresql+psycopg")
    name = f"kontext_fairness_{uuid.uuid4().hex[:8]}"
    engine = sa.create_engine(at, isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        conn.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield at.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as conn:
            conn.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        engine.dispose()


def main() -> int:
    """Measure, print, compare with the goals; 1 when one is missed."""
    set_up_logging()  # what is told of each batch costs as much as the batch
    parser = command.parser(__doc__, quick="20,000 steps instead of 100,000")
    parser.add_argument("--postgres", metavar="URL", help="a server to make a database on; left out, SQLite")
    options = parser.parse_args()
    with database(options.postgres) as url:
        result = measure(url, STEPS // 5 if options.quick else STEPS)
    missed = [name for name, goal in GOALS.items() if result[name] > goal]
    print(f"{'':32} {'measured':>12} {'goal':>8}")
    for name, value in result.items():
        goal = f"<= {GOALS[name]:g}" if name in GOALS else ""
        print(f"{name:32} {value:12,.2f} {goal:>8} {'MISSED' if name in missed else ''}".rstrip())
    if options.json is not None:
        options.json.write_text(json.dumps({"result": result, "goals": GOALS, "missed": missed}, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
