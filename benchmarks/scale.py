"""What gives way first on the way to 1,000 GPUs and 10 million steps a day: a simulation from measured costs.

Costs come from `benchmarks.control_plane --json FILE` (`--costs FILE`) or from the table below. The simulation is
first held against measurements: told of the costs of two workers, it must foresee runs of two and four within 20 %.

    python -m benchmarks.scale [--quick] [--json FILE] [--costs FILE] [--measure]
"""

from __future__ import annotations

import heapq
import json
import math
import random
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

from benchmarks import command
from kontext_batch.messaging.wake_ups import MOST_RINGS
from kontext_batch.observability import set_up_logging

GOAL = 0.2
"""Most by which a prediction may differ from the measurement."""
DAY = 86_400
BATCH_ROWS = 8
PEAK = 3.0
"""Of the busiest hour to the mean: an assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What one step costs, as measured with a no-op engine."""

    worker_ms: float
    """CPU of the worker."""
    database_ms: float
    """CPU of PostgreSQL."""
    wait_ms: float
    """Neither computes: wall less CPU."""
    start_ms: float
    """From the ring of a run until it flows, and from its last step until that is seen; once a run."""
    submit_ms: float
    """To store the plan, during which nobody else commits."""
    database_bytes: float
    wal_bytes: float
    message_bytes: float
    ring_ms: float
    """From ring to claim."""


MEASURED = Costs(
    worker_ms=1.07,
    database_ms=0.92,
    wait_ms=0.0,
    start_ms=1.7,
    submit_ms=0.07,
    database_bytes=4256.0,
    wal_bytes=8896.0,
    message_bytes=1157.0,
    ring_ms=9.0,
)
"""`python -m benchmarks.scale --measure` and `python -m benchmarks.control_plane`, two cores for everything."""
CORES = 2
"""Of the machine that these were measured on, for workers and database together."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A run of so many steps by so many workers, and how long it took."""

    workers: int
    steps: int
    seconds: float
    cores: float
    """Of the machine's that other processes left to it."""


CHECKS = (
    Timed(workers=2, steps=3006, seconds=2.74, cores=1.95),
    Timed(workers=2, steps=12006, seconds=10.69, cores=1.94),
    Timed(workers=4, steps=3006, seconds=3.16, cores=1.95),
    Timed(workers=4, steps=12006, seconds=13.56, cores=1.87),
)
"""Measured with the same command."""


# --------------------------------------------------------------------------------------------------------- simulation


def run_seconds(costs: Costs, *, workers: int, steps: int, cores: float = CORES, rows: int = BATCH_ROWS) -> float:
    """How long a run takes with a no-op engine: workers that share `cores` with their database, batch after batch.

    A batch holds one core for its CPU, in the worker or in the database, and then waits without one. Where others
    leave a part of a core, all cores are slower.
    """
    whole = math.ceil(cores)
    busy, wait = rows * (costs.worker_ms + costs.database_ms) / 1000 * whole / cores, rows * costs.wait_ms / 1000
    free = [0.0] * whole
    ready = [0.0] * workers
    left, end = steps, 0.0
    while left > 0:
        begin = heapq.heappop(ready)
        done = max(begin, heapq.heappop(free)) + busy
        heapq.heappush(free, done)
        heapq.heappush(ready, done + wait)
        end = max(end, done + wait)
        left -= rows
    return end + costs.start_ms / 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """GPUs and what they are asked for. The times are assumptions, to be replaced by those of one's own model."""

    gpus: int = 1000
    steps_a_day: float = 10e6
    lanes: int = 10
    batch_seconds: float = 4.0
    """Of a batch whatever its rows."""
    row_seconds: float = 4.0
    """Of each row."""
    switch_seconds: float = 20.0
    """To load another lane's model or adapters."""


@dataclass(frozen=True, slots=True)
class Filled:
    """How the batches of a fleet turn out."""

    rows: float
    """Mean rows of a batch."""
    busy: float
    """Share of the GPUs' time that computes or loads."""
    switching: float
    """Share that loads."""
    late: int
    """Steps that wait at the end."""


def fill(fleet: Fleet, *, seconds: float, seed: int = 1, rows: int = BATCH_ROWS) -> Filled:
    """Steps arrive evenly, of lanes as popular as 1, 1/2, 1/3, ...; a GPU stays with its lane, else takes the longest.

    A GPU that is free takes what is there, be it one row.
    """
    rng = random.Random(seed)
    weights = list(accumulate(1 / (number + 1) for number in range(fleet.lanes)))
    waiting = [0] * fleet.lanes
    lane_of = rng.choices(range(fleet.lanes), cum_weights=weights, k=fleet.gpus)
    idle = [True] * fleet.gpus
    longest_idle = deque(range(fleet.gpus))
    by_lane: list[list[int]] = [[] for _ in range(fleet.lanes)]
    for gpu, lane in enumerate(lane_of):
        by_lane[lane].append(gpu)
    ends: list[tuple[float, int]] = []

    def free_gpu(lane: int) -> int | None:
        """One that serves the lane, else the one that has been idle longest. Both lists name busy ones too."""
        while by_lane[lane]:
            gpu = by_lane[lane].pop()
            if idle[gpu] and lane_of[gpu] == lane:
                return gpu
        while longest_idle:
            gpu = longest_idle.popleft()
            if idle[gpu]:
                return gpu
        return None

    batches = taken = 0
    busy = switching = owed = 0.0
    for now in range(int(seconds)):
        owed += fleet.steps_a_day / DAY
        for lane in rng.choices(range(fleet.lanes), cum_weights=weights, k=int(owed)):
            waiting[lane] += 1
        owed -= int(owed)
        while ends and ends[0][0] <= now:
            _, gpu = heapq.heappop(ends)
            idle[gpu] = True
            by_lane[lane_of[gpu]].append(gpu)
            longest_idle.append(gpu)
        for lane in sorted((lane for lane, count in enumerate(waiting) if count), key=lambda lane: -waiting[lane]):
            while waiting[lane] > 0 and (chosen := free_gpu(lane)) is not None:
                count = min(rows, waiting[lane])
                waiting[lane] -= count
                load = 0.0 if lane_of[chosen] == lane else fleet.switch_seconds
                idle[chosen], lane_of[chosen] = False, lane
                took = load + fleet.batch_seconds + fleet.row_seconds * count
                heapq.heappush(ends, (now + took, chosen))
                batches, taken, busy, switching = batches + 1, taken + count, busy + took, switching + load
    whole = fleet.gpus * seconds
    return Filled(taken / max(1, batches), min(1.0, busy / whole), switching / whole, sum(waiting))


def generations(workers: int, *, first: int = MOST_RINGS) -> int:
    """Rings one after another until all are awake, when each that is woken wakes one more."""
    return 1 + max(0, math.ceil(math.log2(workers / first)))


# ------------------------------------------------------------------------------------------------------------- limits


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that has an end: how much of it the busiest hour asks for, and how much there is."""

    name: str
    load: float
    most: float
    unit: str
    moved_by: str

    @property
    def room(self) -> float:
        """How many times the load fits in; below 1 it gives way."""
        return self.most / self.load


# Of the 9 steps of an item 5 are edits (image and latents kept), 4 are finished and delivered.
PUTS_A_STEP = (5 * 2 + 4 * 1 + 4 * 1) / 9
GETS_A_STEP = (5 * 2 + 4 * 1 + 4 * 1) / 9
TRANSACTIONS_A_BATCH = 3.6
"""Claim, intents, commit; a claim and a settlement of deliveries for every sixteen."""


def limits(costs: Costs, fleet: Fleet, *, peak: float = PEAK) -> list[Limit]:
    """What gives way first comes first. The ends are of unchanged settings on one database server of 16 cores."""
    rate = peak * fleet.steps_a_day / DAY
    batches = rate / BATCH_ROWS
    beats = fleet.gpus / 20
    found = [
        Limit(
            "connections to the database",
            2.0 * fleet.gpus,
            100.0,
            "number",
            "a pooler in transaction mode (locks and statements are a transaction's); max_connections",
        ),
        Limit(
            "a plan of 1,000,000 steps keeps commits waiting",
            costs.submit_ms * 1000,
            60.0,
            "seconds",
            "smaller runs (`--only`, one recipe for each range of products); a longer batch than this hides it",
        ),
        Limit(
            "the database grows in a year",
            costs.database_bytes * fleet.steps_a_day * 365 / 1e12,
            4.0,
            "TB",
            "one database for each studio or month; old runs exported and dropped",
        ),
        Limit(
            "keys of 30 days of runs of 1,000 steps in an inbox that is listed every 30 s",
            fleet.steps_a_day / 1000 * 30,
            30 / 0.1 * 1000,
            "number",
            "events (SQS) instead of listing; a prefix for each owner; a lifecycle rule that removes old answers",
        ),
        Limit(
            "PUT of one prefix",
            rate * PUTS_A_STEP,
            3500.0,
            "a second",
            "S3 splits objects/ab/cd by itself as load grows; else more prefixes (`objects`), one for each studio",
        ),
        Limit("GET of one prefix", rate * GETS_A_STEP, 5500.0, "a second", "likewise"),
        Limit(
            "database CPU",
            rate * costs.database_ms / 1000 + beats * 0.001,
            16.0,
            "cores",
            "larger batches (`batch_rows`); one database for each group of studios",
        ),
        Limit(
            "commits that reach the disk",
            batches * TRANSACTIONS_A_BATCH + beats,
            2000.0,
            "a second",
            "larger batches; a disk with a write cache that survives power cuts; group commit",
        ),
        Limit("write-ahead log", rate * costs.wal_bytes / 1e6, 200.0, "MB a second", "as database CPU"),
        Limit(
            "rings through the broker",
            batches,
            10_000.0,
            "a second",
            "nothing for long: a ring is at most one for each batch; then a broker for each pool (`queue_prefix`)",
        ),
    ]
    return sorted(found, key=lambda limit: limit.room)


# --------------------------------------------------------------------------------------------------------- measuring


def measure(quick: bool) -> tuple[Costs, tuple[Timed, ...]]:
    """Two workers and half of the longer run for the costs; two and four, and two sizes, to check them."""
    from benchmarks import control_plane, noop

    sizes = (3_000, 6_000) if quick else (3_000, 12_000)
    with tempfile.TemporaryDirectory(prefix="kontext-bench-") as folder, control_plane.servers_of(Path(folder)) as urls:
        bench = control_plane.Bench(Path(folder), *urls)

        def timed(workers: int, steps: int, name: str = "") -> Timed:
            plan = noop.make_plan(f"scale-{workers}-{steps}{name}", steps)
            run_id = noop.submit(bench.repository, plan)
            before = busy_cores(), control_plane.worker_cpu(bench) + control_plane.database_cpu(bench)
            seconds = control_plane.work_through(bench, run_id, len(plan.steps))
            ours = control_plane.worker_cpu(bench) + control_plane.database_cpu(bench) - before[1]
            others = max(0.0, (busy_cores() - before[0] - ours) / seconds)
            return Timed(workers, len(plan.steps), seconds, max(0.5, CORES - others))

        def paced(name: str) -> tuple[float, ...]:
            """CPU of worker and database, wait and log of a step, and the start of a run, with two workers.

            One alone lets the cores fall asleep between its statements and its database's, and costs more.
            """
            bench.start_workers(2)
            timed(2, 500, name)
            short = min(timed(2, 500, f"{name}-{number}").seconds for number in range(3))
            spent = control_plane.worker_cpu(bench), control_plane.database_cpu(bench)
            logged = bench.value("SELECT pg_current_wal_lsn()::text")
            long = timed(2, sizes[1] // 2, name)
            worker = (control_plane.worker_cpu(bench) - spent[0]) / long.steps
            database = (control_plane.database_cpu(bench) - spent[1]) / long.steps
            wal = float(bench.value("SELECT pg_current_wal_lsn() - CAST(:lsn AS pg_lsn)", lsn=logged)) / long.steps
            few = len(noop.make_plan("", 500).steps)
            slope = (long.seconds - short) / (long.steps - few)
            bench.stop_workers()
            wait, start = max(0.0, 2 * slope - worker - database), max(0.0, short - slope * few)
            return 1000 * worker, 1000 * database, 1000 * wait, 1000 * start, wal

        try:
            before = paced("before")
            checks: list[Timed] = []
            for workers in (2, 4):
                bench.start_workers(workers - len(bench.workers))
                bench.wait(lambda workers=workers: len(bench.repository.workers()) >= workers)  # type: ignore[misc]
                timed(workers, 500)
                few_steps = [timed(workers, sizes[0], f"-{number}") for number in range(3)]
                # A run of few seconds varies; the longer one has its median within it.
                checks += [sorted(few_steps, key=lambda each: each.seconds)[1], timed(workers, sizes[1])]
            bench.stop_workers()
            # Before and after: the machine may have become faster or slower meanwhile.
            worker, database, wait, start, wal = (
                statistics.mean(each) for each in zip(before, paced("after"), strict=True)
            )
            costs = replace(
                MEASURED, worker_ms=worker, database_ms=database, wait_ms=wait, start_ms=start, wal_bytes=wal
            )
        finally:
            bench.close()
    return costs, tuple(checks)


def busy_cores() -> float:
    """Seconds that the cores of this machine have worked so far."""
    import psutil

    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def costs_of(result: Mapping[str, float], known: Costs) -> Costs:
    """`known`, with what the JSON of `benchmarks.control_plane` says."""
    names = {
        "worker_ms": "worker_cpu_ms",
        "database_ms": "database_cpu_ms",
        "submit_ms": "submit_step_ms",
        "database_bytes": "database_bytes",
        "wal_bytes": "wal_bytes",
        "message_bytes": "message_bytes",
        "ring_ms": "ring_to_claim_ms",
    }
    return replace(known, **{ours: result[theirs] for ours, theirs in names.items() if theirs in result})


# ----------------------------------------------------------------------------------------------------------- printing


def print_checks(costs: Costs, checks: Sequence[Timed]) -> float:
    """Returns the largest difference."""
    print(
        f"{'workers':>8} {'cores':>6} {'steps':>8} {'measured s':>11} {'predicted s':>12} {'off by':>8}  <= {GOAL:.0%}"
    )
    worst = 0.0
    for each in checks:
        predicted = run_seconds(costs, workers=each.workers, steps=each.steps, cores=each.cores)
        off = predicted / each.seconds - 1
        worst = max(worst, abs(off))
        timed = f"{each.workers:8} {each.cores:6.1f} {each.steps:8,} {each.seconds:11.2f}"
        missed = "  MISSED" if abs(off) > GOAL else ""
        print(f"{timed} {predicted:12.2f} {off:8.0%}{missed}")
    return worst


def main() -> int:
    """Check, simulate, print; 1 when the simulation is further off than it may be."""
    set_up_logging()  # what is told of each batch costs as much as the batch
    parser = command.parser(__doc__, quick="an hour of the fleet instead of four; smaller runs where it measures")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="JSON of benchmarks.control_plane")
    parser.add_argument("--measure", action="store_true", help="measure two and four workers here and now")
    options = parser.parse_args()
    costs, checks = measure(options.quick) if options.measure else (MEASURED, CHECKS)
    if options.measure:
        print(f"{costs}\n{checks}\n")
    worst = print_checks(costs, checks)
    if options.costs is not None:
        costs = costs_of(json.loads(options.costs.read_text())["result"], costs)
    fleet = Fleet()
    rate = fleet.steps_a_day / DAY
    asked = f"{fleet.gpus:,} GPUs, {fleet.steps_a_day:,.0f} steps a day"
    print(f"\n{asked}: {rate:.0f} a second, {PEAK * rate:.0f} at the peak")
    found = limits(costs, fleet)
    print(f"\n{'load':>10} {'most':>10} {'room':>8}  what gives way first comes first")
    for each in found:
        print(f"{each.load:10,.4g} {each.most:10,.6g} {each.room:7.2f}x  {each.name} ({each.unit})")
        print(f"{'':31}  moved by {each.moved_by}")
    alone = 1000 / costs.database_ms * 16
    print(f"\none database of 16 cores: {alone:,.0f} steps a second by its CPU")
    wakes = generations(fleet.gpus)
    print(f"{fleet.gpus:,} sleeping workers are awake after {wakes} rings in a row, {wakes * costs.ring_ms:.0f} ms")
    print(f"\n{'lanes':>8} {'rows a batch':>13} {'GPU busy':>9} {'loading':>8} {'waiting':>9}  of {BATCH_ROWS} rows")
    filled = {}
    for lanes in (1, 10, 100, 1000):
        each_fill = fill(replace(fleet, lanes=lanes), seconds=3600.0 if options.quick else 4 * 3600.0)
        filled[lanes] = asdict(each_fill)
        print(f"{lanes:8,} {each_fill.rows:13.2f} {each_fill.busy:9.0%} {each_fill.switching:8.0%} {each_fill.late:9,}")
    if options.json is not None:
        data = {
            "costs": asdict(costs),
            "off_by": worst,
            "limits": [{**asdict(each), "room": each.room} for each in found],
            "lanes": filled,
        }
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    return 1 if worst > GOAL else 0


if __name__ == "__main__":
    sys.exit(main())
