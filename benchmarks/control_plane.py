"""What a step costs beside its pixels: claim, intents, commit, children, deliveries and rings, with no engine at all.

PostgreSQL and Redis are real and started here (or named by KONTEXT_TEST_POSTGRES_URL and KONTEXT_TEST_REDIS_URL), and
so are four Celery workers of eight rows. The same DAG as a chain and chord of Celery is timed beside it.

    python -m benchmarks.control_plane [--quick] [--json FILE]
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis
import sqlalchemy as sa

from benchmarks import celery_peer, command, noop
from kontext_batch.bootstrap.adapters import NoWakeUps
from kontext_batch.lineage.engine import close_database, open_database
from kontext_batch.lineage.migrate import upgrade
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.messaging.app import edits_queue, make_app
from kontext_batch.messaging.wake_ups import CeleryWakeUps
from kontext_batch.observability import set_up_logging
from kontext_batch.planning.plan import OPERATIONS_LANE
from tests import servers
from tests.contract.test_repository_speed import listening

WORKERS = 4
SMALL, QUICK, LARGE = 1_000, 10_000, 100_000
"""Steps of the runs that are compared."""
RINGS = 15
"""Of which the median latency is taken."""
GOALS = {
    "step_ms": 1.5,
    "large_to_small": 1.15,
    "statements_a_step": 2.5,
    "message_bytes": 2000.0,
    "status_ms": 50.0,
    "ring_to_claim_ms": 20.0,
    "resume_seconds": 5.0,
}
"""Most of each."""
MEANING = {
    "step_ms": "ms a step end to end, {small:,} steps, 4 workers",
    "large_step_ms": "ms a step end to end, {large:,} steps, 4 workers",
    "large_to_small": "cost a step, {large:,} steps to {small:,}",
    "celery_step_ms": "ms a step of a Celery chain and chord of the same DAG, 4 processes",
    "to_celery": "cost a step, ours to Celery's",
    "statements_a_step": "SQL statements a step, BEGIN and COMMIT counted",
    "message_bytes": "bytes of a message in Redis",
    "status_ms": "ms of `status`, {large:,} steps",
    "busy_status_ms": "ms of `status` while the workers leave no core free",
    "ring_to_claim_ms": "ms from ring to claim, median",
    "resume_seconds": "s from starting a worker again to its first claim in a run of {large:,} that is 99 % done",
    "resumed_seconds": "s from starting a worker again to the end of that run",
    "submit_step_ms": "ms a step to store the plan, {large:,} steps",
    "database_cpu_ms": "ms of CPU a step in PostgreSQL, {large:,} steps",
    "database_bytes": "bytes a step in the database, plan included",
    "wal_bytes": "bytes a step in the write-ahead log, plan excluded",
    "worker_cpu_ms": "ms of CPU a step in the workers, {large:,} steps",
}
ROOT = Path(__file__).parents[1]
PREFIX = f"kontext-bench-{os.getpid()}"
START_SECONDS = 120.0


@dataclass
class Bench:
    """The servers, and the workers that were started on them."""

    folder: Path
    database_url: str
    redis_url: str
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.repository = SqlRepository(self.database_url)
        self.engine = open_database(self.database_url)
        self.app = make_app(self.redis_url, queue_prefix=PREFIX)
        self.wake_ups = CeleryWakeUps(self.app, batch_rows=noop.BATCH_ROWS)

    def start(self, module: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.folder / "workers.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=self.folder,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "KONTEXT_BATCH_DATABASE_URL": self.database_url,
                    "KONTEXT_BATCH_BROKER_URL": self.redis_url,
                    "KONTEXT_BATCH_QUEUE_PREFIX": PREFIX,
                    "KONTEXT_BATCH_MODELS_FILE": str(self.folder / "models.json"),
                    "KONTEXT_BATCH_BATCH_ROWS": str(noop.BATCH_ROWS),
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.workers.append(process)
        return process

    def start_workers(self, count: int) -> None:
        """Returns when they have said hello."""
        for _ in range(count):
            self.start("benchmarks.noop_worker")
        self.wait(lambda: len(self.repository.workers()) >= count)

    def stop_workers(self) -> None:
        """Cleanly: what they compute is finished, what they hold is given back."""
        for process in self.workers:
            process.send_signal(signal.SIGTERM)
        for process in self.workers:
            process.wait(timeout=60)
        self.workers.clear()

    def wait(self, condition: Callable[[], bool], *, seconds: float = START_SECONDS, every: float = 0.02) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or any(each.poll() is not None for each in self.workers):
                raise RuntimeError(f"the workers do not get on:\n{(self.folder / 'workers.log').read_text()[-4000:]}")
            time.sleep(every)

    def value(self, query: str, **parameters: Any) -> Any:
        with self.engine.connect() as conn:
            return conn.execute(sa.text(query), parameters).scalar_one()

    def values(self, query: str) -> list[Any]:
        with self.engine.connect() as conn:
            return list(conn.execute(sa.text(query)).scalars())

    def left(self, run_id: int) -> int:
        """Live steps and deliveries that have not arrived: a look that costs the more, the more are left."""
        return int(
            self.value(
                "SELECT (SELECT count(*) FROM steps WHERE run_id = :run AND state IN ('blocked', 'ready', 'leased'))"
                " + (SELECT count(*) FROM deliveries WHERE run_id = :run AND state IN ('waiting', 'pending'))",
                run=run_id,
            )
        )

    def ring(self, steps: int) -> None:
        self.wake_ups.wake({noop.LANE: steps, OPERATIONS_LANE: steps})

    def close(self) -> None:
        for process in self.workers:
            process.kill()
            process.wait()
        with redis.Redis.from_url(self.redis_url) as client:
            for queue in client.scan_iter(f"*{PREFIX}*"):
                client.delete(queue)
        self.wake_ups.close()
        self.repository.close()
        close_database(self.engine)


@contextlib.contextmanager
def servers_of(folder: Path) -> Iterator[tuple[str, str]]:
    """URL of an empty database at the newest revision, and of a Redis."""
    with contextlib.ExitStack() as opened:
        redis_url = os.environ.get("KONTEXT_TEST_REDIS_URL")
        if not redis_url:
            broker = servers.redis(folder).start()
            opened.callback(broker.kill)
            redis_url = broker.url
        given = os.environ.get("KONTEXT_TEST_POSTGRES_URL")
        if given:
            url = sa.make_url(given).set(drivername="postgresql+psycopg")
        else:
            postgres = servers.Postgres(folder / "postgres").start()
            opened.callback(postgres.kill)
            url = sa.make_url(postgres.url)
        name = f"kontext_bench_{os.getpid()}"
        admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        opened.callback(admin.dispose)
        with admin.connect() as conn:
            conn.exec_driver_sql(f"CREATE DATABASE {name}")
        opened.callback(lambda: _drop(admin, name))
        database_url = url.set(database=name).render_as_string(hide_password=False)
        upgrade(database_url)
        yield database_url, redis_url


def _drop(admin: sa.Engine, name: str) -> None:
    with admin.connect() as conn:
        conn.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


# ----------------------------------------------------------------------------------------------------------- measures


def work_through(bench: Bench, run_id: int, steps: int) -> float:
    """Seconds from the first ring until every step is done and every image delivered."""
    started = time.perf_counter()
    bench.ring(steps)
    rung = time.monotonic()

    def over() -> bool:
        nonlocal rung
        if time.monotonic() > rung + 1:  # as the beat does
            bench.wake_ups.wake(bench.repository.waiting_lanes())
            rung = time.monotonic()
        return bench.left(run_id) == 0

    bench.wait(over, seconds=1200, every=0.02 if steps <= SMALL * 2 else 0.1)
    return time.perf_counter() - started


def step_ms(bench: Bench, name: str, steps: int) -> float:
    plan = noop.make_plan(name, steps)
    run_id = noop.submit(bench.repository, plan)
    return 1000 * work_through(bench, run_id, len(plan.steps)) / len(plan.steps)


def worker_cpu(bench: Bench) -> float:
    """Seconds of the workers and their children so far."""
    total = 0.0
    for each in bench.workers:
        with contextlib.suppress(psutil.Error):
            for process in [psutil.Process(each.pid), *psutil.Process(each.pid).children(recursive=True)]:
                total += _spent(process)
    return total


def database_cpu(bench: Bench) -> float:
    """Seconds of the processes of PostgreSQL that serve this database, of the connections that are open."""
    pids = bench.values("SELECT pid FROM pg_stat_activity WHERE datname = current_database()")
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += _spent(psutil.Process(pid))
    return total


def _spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def statements_a_step(database_url: str) -> float:
    """Of one worker that takes turns, over 360 steps: as it does in a Celery worker's child."""
    repository = SqlRepository(database_url)
    worker = noop.make_worker(repository, NoWakeUps())
    repository.register_worker(worker.info)
    plan = noop.make_plan("statements", 360)
    noop.submit(repository, plan)
    with listening(repository) as said:
        while worker.turn():
            pass
    repository.retire_worker(worker.info.id)
    repository.close()
    return len(said) / len(plan.steps)


def message_bytes(bench: Bench) -> float:
    """The longest message as it lies in Redis; nobody takes it from this queue."""
    prefix = f"{PREFIX}-unread"
    CeleryWakeUps(make_app(bench.redis_url, queue_prefix=prefix), batch_rows=noop.BATCH_ROWS).wake({noop.LANE: 1})
    with redis.Redis.from_url(bench.redis_url) as client:
        [message] = client.lrange(edits_queue(prefix), 0, -1)
    return float(len(message))


def ring_to_claim_ms(bench: Bench) -> float:
    """By the database's clock, of workers that sleep until they are rung."""
    found = []
    for number in range(RINGS):
        plan = noop.make_plan(f"ring-{number}", 1)
        run_id = noop.submit(bench.repository, plan)
        time.sleep(0.05)
        before = bench.value("SELECT clock_timestamp()")
        bench.wake_ups.wake({noop.LANE: 1})
        bench.wait(lambda run_id=run_id: bench.left(run_id) == 0)  # type: ignore[misc]
        claimed = bench.value(
            "SELECT min(started) FROM attempts JOIN run_steps USING (step_id) WHERE run_id = :run", run=run_id
        )
        found.append((claimed - before).total_seconds() * 1000)
    return float(statistics.median(found))


def status_ms(bench: Bench, run_id: int) -> float:
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        bench.repository.run(run_id)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def large_run(bench: Bench, steps: int) -> dict[str, float]:
    """One run of so many steps, worked through to 99 %, stopped cleanly and gone on with."""
    plan = noop.make_plan("large", steps)
    count = len(plan.steps)
    size = bench.value("SELECT pg_database_size(current_database())")
    started = time.perf_counter()
    run_id = noop.submit(bench.repository, plan)
    stored = time.perf_counter() - started
    result = {"submit_step_ms": 1000 * stored / count}
    logged = bench.value("SELECT pg_current_wal_lsn()::text")
    spent, spent_there, started = worker_cpu(bench), database_cpu(bench), time.perf_counter()
    bench.ring(count)
    bench.wait(lambda: bench.left(run_id) <= 0.55 * count, seconds=1200, every=1)
    result["busy_status_ms"] = status_ms(bench, run_id)
    # Of 13 steps and deliveries of an item, as many are left as of 1 % of the items, and what is done until they stop.
    bench.wait(lambda: bench.left(run_id) <= 0.0145 * count + 400, seconds=1200, every=0.2)
    done = 1 - bench.left(run_id) / (count * 13 / 9)
    result["large_step_ms"] = 1000 * (time.perf_counter() - started) / (count * done)
    result["worker_cpu_ms"] = 1000 * (worker_cpu(bench) - spent) / (count * done)
    result["database_cpu_ms"] = 1000 * (database_cpu(bench) - spent_there) / (count * done)
    result["wal_bytes"] = float(bench.value("SELECT pg_current_wal_lsn() - CAST(:lsn AS pg_lsn)", lsn=logged)) / count
    result["database_bytes"] = (bench.value("SELECT pg_database_size(current_database())") - size) / count
    bench.stop_workers()
    left = bench.value("SELECT count(*) FROM steps WHERE state = 'ready'")
    assert left, "the run was over before it could be stopped"
    result["status_ms"] = status_ms(bench, run_id)
    stopped = bench.value("SELECT clock_timestamp()")
    started = time.perf_counter()
    bench.start("benchmarks.noop_worker")  # one: in earnest each has a machine, or a share of one, of its own
    work_through(bench, run_id, left)
    result["resumed_seconds"] = time.perf_counter() - started
    claimed = bench.value("SELECT min(started) FROM attempts WHERE started > :stopped", stopped=stopped)
    result["resume_seconds"] = (claimed - stopped).total_seconds()
    bench.stop_workers()
    return result


def celery_step_ms(bench: Bench, steps: int) -> float:
    worker = bench.start("benchmarks.celery_peer", **{celery_peer.BROKER_VARIABLE: bench.redis_url})
    celery_peer.measure(bench.redis_url, 9)  # until they are there
    found = celery_peer.measure(bench.redis_url, steps)
    worker.terminate()
    worker.wait(timeout=60)
    bench.workers.remove(worker)
    return found


def measure(bench: Bench, large: int) -> dict[str, float]:
    """All figures, by their names in `MEANING`."""
    result: dict[str, float] = {}
    result["statements_a_step"] = statements_a_step(bench.database_url)
    result["message_bytes"] = message_bytes(bench)
    bench.start_workers(WORKERS)
    step_ms(bench, "warm", SMALL // 2)
    result["ring_to_claim_ms"] = ring_to_claim_ms(bench)
    small = [step_ms(bench, f"before-{number}", SMALL) for number in range(3)]
    result |= large_run(bench, large)
    if large > QUICK:  # the machine may have become faster or slower meanwhile
        bench.start_workers(WORKERS)
        step_ms(bench, "warm-again", SMALL // 2)
        small += [step_ms(bench, f"after-{number}", SMALL) for number in range(3)]
        bench.stop_workers()
    result["step_ms"] = statistics.median(small)
    result["large_to_small"] = result["large_step_ms"] / result["step_ms"]
    result["celery_step_ms"] = celery_step_ms(bench, SMALL)
    result["to_celery"] = result["step_ms"] / result["celery_step_ms"]
    return {name: result[name] for name in MEANING if name in result}


def missed(result: Mapping[str, float]) -> list[str]:
    """Names of the goals that were not met."""
    return [name for name, goal in GOALS.items() if result[name] > goal]


def main() -> int:
    """Measure, print, compare with the goals; 1 when one is missed."""
    set_up_logging()  # what is told of each batch costs as much as the batch
    parser = command.parser(__doc__, quick=f"{QUICK:,} steps instead of {LARGE:,}")
    options = parser.parse_args()
    large = QUICK if options.quick else LARGE
    with tempfile.TemporaryDirectory(prefix="kontext-bench-") as folder, servers_of(Path(folder)) as urls:
        bench = Bench(Path(folder), *urls)
        try:
            fsync = bench.value("SHOW fsync"), bench.value("SHOW synchronous_commit")
            result = measure(bench, large)
        finally:
            bench.close()
    unmet = missed(result)
    print(f"PostgreSQL with fsync {fsync[0]}, synchronous_commit {fsync[1]}; {os.cpu_count()} cores for everything\n")
    print(f"{'measured':>10} {'goal':>10}")
    for name, value in result.items():
        goal = f"<= {GOALS[name]:g}" if name in GOALS else ""
        meaning = MEANING[name].format(small=SMALL, large=large)
        print(f"{value:10,.2f} {goal:>10}  {meaning}{'  MISSED' if name in unmet else ''}")
    if options.json is not None:
        data = {"steps": large, "workers": WORKERS, "result": result, "goals": GOALS, "missed": unmet}
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    return 1 if unmet else 0


if __name__ == "__main__":
    sys.exit(main())
