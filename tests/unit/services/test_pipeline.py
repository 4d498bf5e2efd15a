"""The three stages of a worker, on a real database; store and editor are told what to do."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kontext_batch.bootstrap.adapters import NoWakeUps
from kontext_batch.errors import InfrastructureError, ObjectNotFound, OutOfMemory, StepError, StorageFull
from kontext_batch.lineage.migrate import upgrade
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.observability.health import Pulse
from kontext_batch.planning.states import StepState
from kontext_batch.ports import EditJob, InHand, LeasedStep, MadePicture, Orders, StepRow
from kontext_batch.services import sample
from kontext_batch.services.execute import PATIENCE_TRIES, Executor
from kontext_batch.services.work import Worker
from tests.contract.plans import LEASE, make_plan, submit, worker
from tests.stepping import CountingSession, SteppingEditor
from tests.unit.services.conftest import wait_for

ROWS = 4


@dataclass
class Store:
    """Pictures in memory; a source's bytes are its name."""

    objects: dict[str, bytes] = field(default_factory=dict)
    on_read: Callable[[str], None] = lambda uri: None
    on_put: Callable[[str], None] = lambda uri: None

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        self.on_read(uri)
        name = uri.rpartition("/")[2]
        return self.objects[uri] if uri in self.objects else name.removesuffix(".png").encode()

    def write_if_absent(self, uri: str, data: bytes, *, media_type: str) -> bool:
        self.on_put(uri)
        self.objects[uri] = data
        return True

    def delete(self, uri: str) -> None:
        raise ObjectNotFound(uri)


@dataclass
class Editor(SteppingEditor):
    """Remembers who was in at each denoise step."""

    max_rows: int = ROWS
    seen: list[frozenset[str]] = field(default_factory=list)
    on_prepare: Callable[[str], None] = lambda name: None
    on_session: Callable[[], None] = lambda: None
    on_admit: Callable[[str], None] = lambda name: None
    on_step: Callable[[frozenset[str]], None] = lambda names: None
    on_make: Callable[[str], None] = lambda name: None

    def prepare(self, job: EditJob) -> EditJob:
        self.on_prepare(job.params["name"])
        return job

    @contextmanager
    def session(self, params: Mapping[str, Any]) -> Iterator[CountingSession]:
        self.on_session()
        with super().session(params) as session:
            yield session

    def admitted(self, job: EditJob) -> int:
        self.on_admit(job.params["name"])
        return super().admitted(job)

    def stepping(self, jobs: Sequence[EditJob]) -> None:
        self.seen.append(frozenset(job.params["name"] for job in jobs))
        self.on_step(self.seen[-1])

    def make(self, job: EditJob) -> MadePicture:
        self.on_make(job.params["name"])
        return MadePicture(job.params["name"].encode() + b" edited", "image/png", 8, 8)


@dataclass
class Bench:
    """A worker of four slots, with what it works on."""

    repository: SqlRepository
    store: Store = field(default_factory=Store)
    editor: Editor = field(default_factory=Editor)

    def __post_init__(self) -> None:
        self.worker = self.another("w1")

    def another(self, name: str) -> Worker:
        info = worker(name)
        store, operations = cast(Any, self.store), cast(Any, None)
        executor = Executor(
            info.id,
            self.repository,
            store,
            self.editor,
            operations,
            lambda sha256, media_type: f"file:///objects/{sha256}",
            max_input_bytes=1000,
            pause=lambda seconds: None,
        )
        self.repository.register_worker(info)
        return Worker(info, self.repository, store, executor, LEASE, ROWS, NoWakeUps())

    def submit(
        self, graph: Mapping[str, Sequence[str]], steps: Mapping[str, int], lanes: Mapping[str, str] | None = None
    ) -> int:
        """`steps`: denoise steps by name; 3 of those that are not named."""
        plan = make_plan(graph, lanes=lanes)
        timed = (
            replace(step, params={**step.params, "steps": steps.get(step.params["name"], 3)}) for step in plan.steps
        )
        return submit(self.repository, replace(plan, steps=tuple(timed)))

    def work(self) -> None:
        """Until nothing is ready, now or after a pause."""
        while READY in self.states().values():
            if not self.worker.work_once():
                time.sleep(0.01)

    def rows(self, run_id: int = 1) -> dict[str, StepRow]:
        return {str(row.params["name"]): row for row in self.repository.run_steps(run_id)}

    def states(self) -> dict[str, StepState]:
        return {name: row.state for name, row in self.rows().items()}

    def outcomes(self, name: str) -> list[str | None]:
        return [each.outcome for each in self.repository.attempts(self.rows()[name].id)]

    def members(self, name: str) -> dict[int, tuple[int, int]]:
        """Step id -> (joined, left), of the batch in which the step was done."""
        batch_id = self.repository.attempts(self.rows()[name].id)[-1].batch_id
        assert batch_id is not None
        return {each.step_id: (each.joined, each.left) for each in self.repository.batch(batch_id).members}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    url = f"sqlite:///{tmp_path / 'kontext.db'}"
    upgrade(url)
    repository = SqlRepository(url)
    before = set(threading.enumerate())
    yield Bench(repository)
    assert set(threading.enumerate()) <= before, "a thread was left behind"
    assert repository.verify() == []
    repository.close()


def singles(count: int) -> dict[str, list[str]]:
    return {f"s{number}": [] for number in range(count)}


DONE, READY, FAILED = StepState.DONE, StepState.READY, StepState.FAILED


# ------------------------------------------------------------------------------------------------------------- rows


def test_a_slot_is_filled_again_before_the_next_denoise_step(bench: Bench) -> None:
    """Twenty chains of three edits of 20, 28 or 50 denoise steps. In groups they would fill two slots of three."""
    graph: dict[str, list[str]] = {}
    for level, parent in (("a", None), ("b", "a"), ("c", "b")):
        graph |= {f"{level}{number}": [] if parent is None else [f"{parent}{number}"] for number in range(20)}
    steps = {name: (20, 28, 50)[number % 3] for number, name in enumerate(graph)}
    steps |= dict.fromkeys(list(graph)[-ROWS:], 20)  # how it ends is no matter of grouping
    bench.submit(graph, steps)
    bench.editor.on_step = lambda names: time.sleep(0.012)
    assert bench.worker.work_once()

    assert set(bench.states().values()) == {DONE}
    seen = bench.editor.seen
    assert sum(map(len, seen)) == sum(steps.values())
    assert sum(map(len, seen)) / (ROWS * len(seen)) >= 0.95
    joined = [i for i in range(1, len(seen)) if seen[i] - seen[i - 1]]
    assert sum(bool(seen[i] & seen[i - 1]) for i in joined) > 30, "they join others that are half done"
    chained = [i for i in joined if any(name[0] != "a" for name in seen[i] - seen[i - 1]) and seen[i] & seen[i - 1]]
    assert len(chained) > 15, "so does a chain's next step"


def test_the_lineage_tells_who_was_in_which_denoise_step(bench: Bench) -> None:
    graph = {**singles(6), "next": ["s0"]}
    bench.submit(graph, {"s0": 2, "s1": 5, "s2": 3, "s3": 9, "s4": 4, "s5": 6, "next": 4})
    bench.editor.on_step = lambda names: time.sleep(0.02)
    assert bench.worker.work_once()
    ids = {row.id: name for name, row in bench.rows().items()}
    members = bench.members("s0")
    assert {ids[step_id] for step_id in members} == set(graph), "one batch"
    told = [
        {ids[step_id] for step_id, (joined, left) in members.items() if joined <= clock < left}
        for clock in range(len(bench.editor.seen))
    ]
    assert told == bench.editor.seen
    batch_id = bench.repository.attempts(bench.rows()["s0"].id)[-1].batch_id
    assert batch_id is not None
    in_order = sorted(bench.repository.batch(batch_id).members, key=lambda each: (each.joined, each.place))
    assert [each.place for each in in_order] == list(range(len(graph)))


@pytest.mark.parametrize(("invariant", "mode"), [(True, "exact+batch-invariant"), (False, "exact")])
def test_the_lineage_tells_in_which_mode(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, invariant: bool, mode: str
) -> None:
    about = {**bench.editor.describe(), "batch_invariant": invariant}
    monkeypatch.setattr(type(bench.editor), "describe", lambda editor: about)
    bench.submit(singles(1), {})
    bench.worker.work_once()
    (attempt,) = bench.repository.attempts(bench.rows()["s0"].id)
    assert attempt.batch_id is not None
    assert bench.repository.batch(attempt.batch_id).numeric_mode == mode


def test_each_row_is_charged_with_its_share_of_the_denoise_steps(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def denoise(names: frozenset[str]) -> None:
        now[0] += 0.5

    bench.submit(singles(2), {"s0": 2, "s1": 4})
    bench.editor.on_step = denoise
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    bench.worker.work_once()
    charged = {
        name: sum(attempt.timings["sample"] for attempt in bench.repository.attempts(bench.rows()[name].id))
        for name in ("s0", "s1")
    }
    assert len(bench.editor.seen) * 0.5 == now[0]
    assert charged["s0"] == pytest.approx(0.5 * sum(0.5 for names in bench.editor.seen if "s0" in names))
    assert sum(charged.values()) == pytest.approx(now[0]) == pytest.approx(bench.repository.run(1).gpu_seconds)


def test_a_step_that_comes_back_begins_another_batch(bench: Bench) -> None:
    run_id = bench.submit({"s0": [], "long": []}, {"long": 40})
    failing = [True]

    def make(name: str) -> None:
        if name == "s0" and failing:
            failing.clear()
            raise StepError("not finite")

    def again(names: frozenset[str]) -> None:
        time.sleep(0.005)
        if bench.states()["s0"] is FAILED:
            bench.repository.retry_run(run_id)

    bench.editor.on_make, bench.editor.on_step = make, again
    bench.worker.work_once()
    assert bench.states() == {"s0": DONE, "long": DONE}
    first, last = bench.repository.attempts(bench.rows()["s0"].id)
    assert first.batch_id != last.batch_id
    assert bench.members("long")[bench.rows()["s0"].id] == (0, 3)


# ------------------------------------------------------------------------------------------------------------ bounds


def test_no_more_is_fetched_than_there_are_slots(bench: Bench) -> None:
    fetched: Counter[str] = Counter()
    most, lock = [0], threading.Lock()

    def read(name: str) -> None:
        with lock:
            fetched["begun"] += 1
            most[0] = max(most[0], fetched["begun"] - fetched["admitted"])

    def admit(name: str) -> None:
        with lock:
            fetched["admitted"] += 1

    bench.editor.on_prepare, bench.editor.on_admit = read, admit
    bench.editor.on_step = lambda names: time.sleep(0.002)
    bench.submit(singles(30), {})
    bench.worker.work_once()
    assert set(bench.states().values()) == {DONE}
    assert 1 < most[0] <= ROWS


def test_nothing_is_claimed_long_before_a_slot_is_free(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kontext_batch.services.sample.AHEAD_SECONDS", 0.0)
    bench.submit(singles(30), {})
    held: list[int] = []

    def step(names: frozenset[str]) -> None:
        time.sleep(0.01)
        held.append(len(bench.worker.leases))

    bench.editor.on_step = step
    bench.worker.work_once()
    assert max(held) <= 2 * ROWS, "four that are sampled, four that are being kept"


def test_a_slow_store_bounds_what_is_in_hand(bench: Bench) -> None:
    bench.submit(singles(40), {})
    slow = threading.Event()
    bench.store.on_put = lambda uri: cast(None, slow.wait(20))
    working = threading.Thread(target=bench.worker.work_once)
    working.start()
    wait_for(lambda: len(bench.worker.leases) >= 3 * ROWS)
    time.sleep(0.3)
    assert len(bench.worker.leases) == 3 * ROWS
    assert Counter(bench.states().values())[StepState.LEASED] == 3 * ROWS
    slow.set()
    working.join(30)
    assert set(bench.states().values()) == {DONE}
    assert len(bench.worker.leases) == 0


# ------------------------------------------------------------------------------------------------------------ faults


def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kontext_batch.services.execute.FIRST_RETRY_SECONDS", 0.01)


def first_time(error: Exception, *names: str) -> Callable[[str], None]:
    """Raises the error once for each of these."""
    left = set(names)

    def maybe(name: str) -> None:
        if name in left:
            left.remove(name)
            raise error

    return maybe


@pytest.mark.parametrize("where", ["on_prepare", "on_admit", "on_make"])
def test_a_steps_own_fault_fails_it_alone(bench: Bench, where: str) -> None:
    setattr(bench.editor, where, first_time(StepError("no picture"), "s1"))
    bench.submit({**singles(5), "next": ["s1"]}, {})
    bench.worker.work_once()
    states = bench.states()
    assert (states.pop("s1"), states.pop("next")) == (FAILED, StepState.SKIPPED)
    assert set(states.values()) == {DONE}
    assert bench.rows()["s1"].error == "no picture"


def test_a_read_that_finds_no_answer_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_retries(monkeypatch)
    missing = first_time(InfrastructureError("503"), "file:///in/s1.png")
    bench.store.on_read = missing
    bench.submit(singles(3), {})
    bench.work()
    assert set(bench.states().values()) == {DONE}
    assert bench.outcomes("s1") == ["retry", "ok"]
    assert bench.outcomes("s0") == ["ok"]


def test_a_session_that_breaks_is_met_by_all_that_were_in(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_retries(monkeypatch)
    broken = [InfrastructureError("the device does not answer")]

    def step(names: frozenset[str]) -> None:
        if len(names) == 2 and broken:
            raise broken.pop()

    bench.editor.on_step = step
    bench.submit(singles(2), {})
    bench.work()
    assert [bench.outcomes(name) for name in ("s0", "s1")] == [["retry", "ok"]] * 2


@pytest.mark.parametrize(
    ("error", "outcomes"), [(StepError("bad weights"), ["error"]), (InfrastructureError("not here"), ["retry", "ok"])]
)
def test_a_lane_without_a_session_is_met_by_all_its_steps(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, outcomes: list[str]
) -> None:
    quick_retries(monkeypatch)
    bench.submit(singles(2), {})
    closed = [error]

    def session() -> None:
        if closed:
            time.sleep(0.2)  # both are fetched
            raise closed.pop()

    bench.editor.on_session = session
    bench.work()
    assert [bench.outcomes(name) for name in ("s0", "s1")] == [outcomes] * 2


def test_too_many_for_the_device_are_done_by_halves(bench: Bench) -> None:
    def step(names: frozenset[str]) -> None:
        time.sleep(0.002)
        if len(names) > 1 and any(name < "s4" for name in names):
            raise OutOfMemory("no room")

    bench.editor.on_step = step
    bench.submit(singles(8), {})
    bench.work()
    assert set(bench.states().values()) == {DONE}
    tries = [outcome for name in bench.rows() for outcome in bench.outcomes(name)]
    assert set(tries) == {"retry", "ok"}
    assert tries.count("ok") == 8


def test_a_suspect_is_sampled_with_nothing_else_in_hand(bench: Bench) -> None:
    bench.submit({**singles(12), "next": ["s5"]}, {})
    lost = bench.another("lost")
    held = lost.repository.claim("lost", limit=2, lease_seconds=LEASE)
    bench.repository.reconcile(gone_workers=["lost"])
    suspects = {str(step.params["name"]) for step in held}
    beside: list[int] = []

    def step(names: frozenset[str]) -> None:
        if names & suspects:
            beside.append(len(bench.worker.leases))

    bench.editor.on_step = step
    bench.work()
    assert set(bench.states().values()) == {DONE}
    assert set(beside) == {1}


@pytest.mark.parametrize("where", ["read", "put", "on_prepare", "on_session", "on_admit", "on_step", "on_make"])
def test_what_nobody_foresaw_is_raised_and_leaves_no_thread(bench: Bench, where: str) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("CUDA error")

    if where in ("read", "put"):
        setattr(bench.store, f"on_{where}", broken)
    else:
        setattr(bench.editor, where, broken)
    bench.submit(singles(12), {})
    with pytest.raises(RuntimeError, match="CUDA error"):
        bench.worker.work_once()
    assert len(bench.worker.leases) > 0, "they count as lost with the process"


@pytest.mark.parametrize("call", ["claim", "commit", "intend_uploads"])
def test_what_nobody_foresaw_of_the_database_is_raised_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real, calls = getattr(bench.repository, call), []

    def broken(*args: object, **options: object) -> object:
        calls.append(call)
        if call != "claim" or len(calls) > 1:
            raise RuntimeError("a bug")
        return real(*args, **options)

    bench.submit(singles(12), {})
    with monkeypatch.context() as patch:
        patch.setattr(bench.repository, call, broken)
        with pytest.raises(RuntimeError, match="a bug"):
            bench.worker.work_once()


@pytest.mark.parametrize("call", ["claim", "finish_runs"])
def test_an_outage_that_claims_or_looks_meet_spoils_nothing_in_hand(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real, calls = getattr(bench.repository, call), []

    def away(*args: object, **options: object) -> object:
        calls.append(call)
        if len(calls) > 1:
            raise InfrastructureError("the database does not answer")
        return real(*args, **options)

    monkeypatch.setattr("kontext_batch.services.work.LOOK_SECONDS", 0.01)
    bench.editor.on_step = lambda names: time.sleep(0.01)
    bench.submit(singles(200), {})
    with monkeypatch.context() as patch:
        patch.setattr(bench.repository, call, away)
        with pytest.raises(InfrastructureError, match="does not answer"):
            bench.worker.work_once()
    states = Counter(bench.states().values())
    assert set(states) == {DONE, READY}
    assert len(bench.worker.leases) == 0


@pytest.mark.parametrize("call", ["commit", "intend_uploads"])
def test_an_outage_that_outlasts_patience_loses_nothing_that_is_sampled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """What is done is offered until it is kept; what is in the session is sampled on, and only claims stop."""
    real, failures = getattr(bench.repository, call), [PATIENCE_TRIES + 2]

    def away(*args: object, **options: object) -> object:
        if failures[0]:
            failures[0] -= 1
            raise InfrastructureError("the database does not answer")
        return real(*args, **options)

    bench.editor.on_step = lambda names: time.sleep(0.01)
    bench.submit(singles(6), {"s5": 30})
    with monkeypatch.context() as patch:
        patch.setattr(bench.repository, call, away)
        with pytest.raises(InfrastructureError, match="does not answer"):
            bench.worker.work_once()
    assert failures == [0]
    assert len(bench.worker.leases) == 0
    tries = {name: bench.outcomes(name) for name, state in bench.states().items() if state is DONE}
    assert len(tries) >= 4
    assert set(map(tuple, tries.values())) == {("ok",)}
    bench.work()
    assert set(bench.states().values()) == {DONE}
    assert all(bench.outcomes(name) == ["ok"] for name in bench.rows())


def test_a_full_store_gives_back_all_that_is_in_hand(bench: Bench) -> None:
    def full(uri: str) -> None:
        raise StorageFull("no space left")

    bench.store.on_put = full
    bench.editor.on_step = lambda names: time.sleep(0.01)
    bench.submit(singles(20), {"s3": 50})
    with pytest.raises(StorageFull):
        bench.worker.work_once()
    assert set(bench.states().values()) == {READY}
    assert all(row.attempts == 0 for row in bench.rows().values())
    assert len(bench.worker.leases) == 0
    assert bench.repository.orders("w1") == Orders()


def test_a_fenced_result_is_dropped_and_the_others_are_committed(bench: Bench) -> None:
    bench.submit(singles(3), {})
    second = bench.another("w2")

    def steal(names: frozenset[str]) -> None:
        if "s1" in names and not stolen:
            row = bench.rows()["s1"]
            bench.repository.release([(row.id, 1)])
            stolen.extend(second.repository.claim("w2", limit=1, lease_seconds=LEASE))

    stolen: list[LeasedStep] = []
    bench.editor.on_step = steal
    bench.worker.work_once()
    assert bench.states() == {"s0": DONE, "s1": StepState.LEASED, "s2": DONE}
    assert bench.outcomes("s1")[0] == "fenced"
    assert len(bench.worker.leases) == 0


# -------------------------------------------------------------------------------------------------------------- ends


def test_a_stop_gives_back_what_is_sampled_or_waits_and_keeps_what_is_finished(bench: Bench) -> None:
    bench.submit(singles(12), {"s0": 1})

    def step(names: frozenset[str]) -> None:
        time.sleep(0.02)
        if "s0" not in names and len(bench.worker.leases) > ROWS:
            bench.worker.stopping.set()

    bench.editor.on_step = step
    assert not bench.worker.work_once()
    states = bench.states()
    assert states.pop("s0") is DONE
    assert set(states.values()) <= {READY, DONE}
    assert READY in states.values()
    assert all(row.attempts == 0 for row in bench.rows().values() if row.state is READY)
    assert len(bench.worker.leases) == 0


def test_a_stop_is_seen_while_nothing_is_sampled(bench: Bench) -> None:
    bench.submit(singles(2), {})
    reading = threading.Event()

    def read(uri: str) -> None:
        reading.set()
        wait_for(bench.worker.stopping.is_set)

    bench.store.on_read = read
    working = threading.Thread(target=bench.worker.work_once)
    working.start()
    assert reading.wait(10)
    bench.worker.stopping.set()
    working.join(10)
    assert not working.is_alive()
    assert set(bench.states().values()) == {READY}


def test_a_drain_finishes_what_is_sampled_and_begins_nothing_more(bench: Bench) -> None:
    bench.submit(singles(150), {})
    sampled: set[str] = set()

    def step(names: frozenset[str]) -> None:
        # How long a step takes is known, and no slot is free: as many more are fetched.
        if len(bench.editor.seen) > 1 and len(names) == ROWS and not bench.worker.ending:
            wait_for(lambda: len(bench.worker.leases) >= 2 * ROWS)
            bench.worker.draining.set()
            sampled.update(names)
        elif not bench.worker.ending:
            time.sleep(0.03)  # claims of a busy machine fill the slots meanwhile

    bench.editor.on_step = step
    assert bench.worker.work_once()
    assert {name for name, state in bench.states().items() if state is DONE} == sampled
    assert set(bench.states().values()) == {DONE, READY}
    assert sum(row.attempts for row in bench.rows().values()) == len(sampled)
    assert len(bench.worker.leases) == 0


def test_a_drain_before_anything_is_sampled_begins_nothing(bench: Bench) -> None:
    bench.submit(singles(3), {})
    bench.editor.on_prepare = lambda name: bench.worker.draining.set()
    assert bench.worker.work_once()
    assert bench.editor.seen == []
    assert {(row.state, row.attempts) for row in bench.rows().values()} == {(READY, 0)}


def test_a_turn_that_is_over_claims_nothing_more_and_loses_nothing(bench: Bench) -> None:
    bench.submit(singles(40), {})
    bench.editor.on_step = lambda names: time.sleep(0.01)
    assert bench.worker.turn(seconds=0.1)
    assert set(bench.states().values()) == {DONE, READY}
    assert bench.worker.turn()
    assert set(bench.states().values()) == {DONE}
    assert all(bench.outcomes(name) == ["ok"] for name in bench.rows())


def test_an_outage_while_something_is_given_back_spoils_nothing_that_is_sampled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.submit(singles(150), {})
    release, failures = bench.repository.release, [3]

    def away(pairs: Sequence[tuple[int, int]]) -> None:
        if failures[0]:
            failures[0] -= 1
            raise InfrastructureError("the database does not answer")
        release(pairs)

    def step(names: frozenset[str]) -> None:
        # Until it is known how long a step takes, and while a slot is free, less is fetched.
        if not bench.worker.orders.unwanted and (len(bench.editor.seen) == 1 or len(names) < ROWS):
            time.sleep(0.03)  # claims of a busy machine fill the slots meanwhile
            return
        # Every three seconds the worker hears anew what is unwanted: nothing.
        given_back = bool(bench.worker.orders.unwanted) or not failures[0]
        wait_for(lambda: given_back or len(bench.worker.leases) >= 2 * ROWS)
        waiting = [step for step in bench.worker.leases.held() if step.params["name"] not in names]
        bench.worker.orders = Orders(unwanted=frozenset((step.id, step.token) for step in waiting))

    bench.editor.on_step = step
    monkeypatch.setattr(bench.repository, "release", away)
    paused: list[float] = []
    bench.worker.executor = replace(bench.worker.executor, pause=paused.append)
    bench.worker.work_once()
    assert failures == [0]
    assert len(paused) == 3, "it is not asked without a pause"
    assert Counter(bench.states().values())[DONE] >= 4
    assert set(bench.states().values()) <= {DONE, READY}
    assert len(bench.worker.leases) == 0


def test_a_device_that_hangs_looks_stalled_while_others_results_are_delivered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.submit(singles(2), {})
    now, looks, stalled = [0.0], [0], []
    bench.worker.pulse = Pulse(60.0, clock=lambda: now[0])

    def deliver(*args: object, on_delivery: Callable[[], None], **options: object) -> int:
        looks[0] += 1
        on_delivery()
        return 0

    def hang(names: frozenset[str]) -> None:
        now[0] += 100
        seen = looks[0]
        wait_for(lambda: looks[0] > seen + 1)
        stalled.append(bench.worker.pulse.stalled())

    monkeypatch.setattr("kontext_batch.services.work.deliver_pending", deliver)
    monkeypatch.setattr("kontext_batch.services.work.LOOK_SECONDS", 0.01)
    bench.editor.on_step = hang
    with bench.worker.pulse.working():
        bench.worker.work_once()
    assert stalled == [100.0] * 3


def test_a_first_commit_that_is_not_acknowledged_is_the_same_batch(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.submit(singles(3), {"s1": 9, "s2": 20})
    commit, unheard = bench.repository.commit, [True]

    def broken(*args: Any) -> object:
        report = commit(*args)
        if unheard:
            unheard.clear()
            raise InfrastructureError("the connection broke")
        return report

    def step(names: frozenset[str]) -> None:
        if "s0" not in names:
            wait_for(lambda: bench.states()["s0"] is DONE)

    monkeypatch.setattr(bench.repository, "commit", broken)
    bench.editor.on_step = step
    bench.worker.work_once()
    batches = {bench.repository.attempts(row.id)[-1].batch_id for row in bench.rows().values()}
    assert len(batches) == 1
    assert len(bench.members("s2")) == 3


def test_what_nobody_wants_is_not_admitted(bench: Bench) -> None:
    bench.submit(singles(8), {})

    def step(names: frozenset[str]) -> None:
        time.sleep(0.02)
        waiting = [step for step in bench.worker.leases.held() if step.params["name"] not in names]
        bench.worker.orders = Orders(unwanted=frozenset((step.id, step.token) for step in waiting))

    bench.editor.on_step = step
    claimed = bench.repository.claim

    def once(*args: Any, in_hand: InHand | None = None, **options: Any) -> Sequence[LeasedStep]:
        if len(bench.editor.seen) >= 3:
            return []
        return claimed(*args, in_hand=in_hand, **options)

    bench.repository.claim = once  # type: ignore[method-assign]
    bench.worker.work_once()
    assert set(bench.states().values()) == {DONE, READY}
    assert all(bench.outcomes(name)[-1] in ("ok", "released") for name in bench.rows() if bench.outcomes(name))
    assert len(bench.worker.leases) == 0


def test_another_lanes_turn_ends_the_session_and_nothing_of_it_is_claimed_before(bench: Bench) -> None:
    lanes = {f"s{number}": "edit/other" for number in range(6, 12)}
    bench.submit(singles(12), {}, lanes)
    bench.worker.turns.patience = 0.05
    bench.editor.on_step = lambda names: time.sleep(0.02)
    while bench.worker.work_once():
        assert {step.lane for step in bench.worker.leases.held()} == set()
    assert set(bench.states().values()) == {DONE}
    assert all(names <= set(lanes) or not names & set(lanes) for names in bench.editor.seen)
