"""Cheap enough: statements counted, plans of queries looked at, times bounded loosely (machines differ)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event

from kontext_batch.lineage import migrate
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.plan import Plan
from kontext_batch.ports import BatchMember, BatchRecord
from kontext_batch.services.turns import Turns
from tests.contract.plans import LANE, LEASE, artifact_of, done, held_by, make_plan, submit, worker

BUDGET = 2.5
"""Statements a step in batches of 8, claim and commit, BEGIN and COMMIT counted."""
TABLES = ("steps", "step_params", "step_sources", "step_outputs", "edges", "run_steps", "attempts", "uploads")


def wide_plan(steps: int) -> Plan:
    graph: dict[str, list[str]] = {}
    for index in range(steps // 5):
        a, b, c, d, e = (f"{letter}{index}" for letter in "abcde")
        graph |= {a: [], b: [a], c: [b, a], d: [c], e: [c]}
    params = {"prompt": "x" * 300, "canvas": {"width": 1024, "height": 1024}}
    return make_plan(graph, deliver=[f"e{index}" for index in range(steps // 5)], params=params)


def work_batch(repository: SqlRepository, *, run_id: int | None = None) -> int:
    steps = repository.claim("w1", limit=8, lease_seconds=LEASE, run_id=run_id, ranking=Turns())
    repository.commit(
        BatchRecord("w1", LANE, "cpu", None, "exact", {}, tuple(BatchMember(step.id, 0, 28) for step in steps)),
        [done(step) for step in steps],
    )
    return len(steps)


def large_beside_small(url: str, steps: int) -> tuple[SqlRepository, int]:
    """A large run of which a batch is done, and its id; beside it a small one whose end nobody has noticed yet."""
    repository = SqlRepository(url)
    repository.register_worker(worker())
    run_id = submit(repository, wide_plan(steps))
    small = submit(repository, make_plan({"only": []}))
    assert work_batch(repository, run_id=small) == 1
    work_batch(repository)
    return repository, run_id


@contextmanager
def listening(repository: SqlRepository) -> Iterator[list[tuple[str, Any]]]:
    """The statements that the repository sends, with their parameters; BEGIN and COMMIT too."""
    engine = repository._db._reading
    said: list[tuple[str, Any]] = []

    def statement(conn: Any, cursor: Any, text: str, parameters: Any, context: Any, many: bool) -> None:
        if not text.startswith("BEGIN"):
            said.append((text, None if many else parameters))

    def begin(conn: Any) -> None:
        said.append(("BEGIN", None))

    def commit(conn: Any) -> None:
        said.append(("COMMIT", None))

    heard: dict[str, Callable[..., Any]] = {"before_cursor_execute": statement, "begin": begin, "commit": commit}
    for name, listener in heard.items():
        event.listen(engine, name, listener)
    try:
        yield said
    finally:
        for name, listener in heard.items():
            event.remove(engine, name, listener)


def test_statements_stay_within_their_budget(repository: SqlRepository) -> None:
    repository.register_worker(worker())
    submit(repository, wide_plan(200))
    with listening(repository) as said:
        steps = sum(work_batch(repository) for _ in range(10))
    assert steps == 80
    assert len(said) / steps <= BUDGET


def test_no_hot_statement_reads_a_table_whole(sqlite_url: str) -> None:
    repository, run_id = large_beside_small(sqlite_url, 200)
    with listening(repository) as said:
        repository.backlogged_runs(3)
        steps = repository.claim("w1", limit=8, lease_seconds=LEASE, run_id=run_id)
        repository.intend_uploads([(artifact_of(step).uri, step.id, step.token) for step in steps])
        repository.extend_leases("w1", LEASE, held_by(steps))
        repository.orders("w1")
        repository.commit(None, [done(step) for step in steps])
        repository.pending_deliveries(run_id)
        repository.finish_runs()
        repository.reconcile()
        repository.run(run_id)
        repository.run_figures()
    engine = repository._db._reading
    with engine.begin() as conn:
        for text, parameters in said:
            if parameters is None or text.startswith(("INSERT", "PRAGMA")):
                continue
            for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", parameters):
                step = str(row[3])
                whole = step.startswith("SCAN") and step.split()[1] in TABLES and "INDEX" not in step
                assert not whole, (step, text)
                assert "run_steps USING PRIMARY KEY" not in step, (step, text)
    repository.close()


def test_postgresql_finds_work_and_ends_by_index_in_a_large_run(postgres_url: str) -> None:
    """Not by reading past what is not ready, nor past all that is live: the larger the run, the longer that takes."""
    repository, run_id = large_beside_small(postgres_url, 5000)
    with listening(repository) as said:
        repository.waiting_lanes()
        repository.backlogged_runs(3)
        repository.claim("w1", limit=8, lease_seconds=LEASE, ranking=Turns())
        repository.claim("w1", limit=8, lease_seconds=LEASE, run_id=run_id, ranking=Turns())
        assert repository.finish_runs()
    queries = [each for each in said if each[0].startswith(("SELECT", "WITH RECURSIVE")) and "steps" in each[0]]
    with repository._db._reading.begin() as conn:
        plans = [
            "\n".join(row[0] for row in conn.exec_driver_sql(f"EXPLAIN {text}", parameters))
            for text, parameters in queries
        ]
    repository.close()
    assert len([plan for plan in plans if "LockRows" in plan]) >= 3
    for plan in plans:
        assert "Seq Scan on steps" not in plan, plan
        if "LockRows" in plan:
            assert "Index Scan using ix_steps_ready on steps" in plan, plan


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_hundred_thousand_steps(database_url: str, repository: SqlRepository) -> None:
    """Measured on two cores: see the bounds; they allow for a machine that is busy with other things."""

    def seconds(work: Any) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    plan = wide_plan(100_000)
    repository.register_worker(worker())
    figures = {"submit": seconds(lambda: submit(repository, plan))}
    figures["status"] = min(seconds(lambda: repository.run(1)) for _ in range(5))
    figures["batch"] = min(seconds(lambda: work_batch(repository)) for _ in range(20))
    figures["limits"] = min(seconds(repository.run_figures) for _ in range(5))
    figures["orders"] = min(seconds(lambda: repository.orders("w1")) for _ in range(5))
    figures["finish_runs"] = min(seconds(repository.finish_runs) for _ in range(5))
    figures["submit again"] = seconds(lambda: submit(repository, plan))
    figures["upgrade at head"] = seconds(lambda: migrate.upgrade(database_url))
    print({name: round(value, 4) for name, value in figures.items()})  # noqa: T201
    bounds = {
        "submit": 30.0,
        "status": 0.25,
        "limits": 0.05,
        "orders": 0.05,
        "batch": 0.1,
        "finish_runs": 0.05,
        "submit again": 30.0,
        "upgrade at head": 0.5,
    }
    assert {name: value for name, value in figures.items() if value > bounds[name]} == {}
