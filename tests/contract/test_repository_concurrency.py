"""Several processes at one database: every step is committed exactly once, whatever else they do to it."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.states import RunState, StepState
from tests.contract.plans import LEASE, artifact_of, done, failed, held_by, make_plan, submit, worker

WIDTH, WORKERS, SUBMITS = 40, 3, 6


def graph(count: int) -> dict[str, list[str]]:
    made: dict[str, list[str]] = {"root": []}
    for index in range(count):
        made |= {f"a{index}": ["root"], f"b{index}": [f"a{index}", "root"], f"c{index}": [f"b{index}", f"a{index}"]}
    made["all"] = [f"c{index}" for index in range(count)]
    return made


def work(url: str, name: str, result: Path) -> None:
    """Claim and commit until no run is left; sometimes release, put back, commit twice or lose everything."""
    repository = SqlRepository(url)
    repository.register_worker(worker(name))
    chance = random.Random(name)
    committed: list[int] = []
    while True:
        steps = repository.claim(name, limit=4, lease_seconds=LEASE)
        if not steps:
            repository.finish_runs()
            if all(run.state is not RunState.RUNNING for run in repository.runs()):
                break
            time.sleep(0.01)
            continue
        repository.intend_uploads([(artifact_of(step).uri, step.id, step.token) for step in steps])
        fate = chance.random()
        if fate < 0.05:
            repository.release(held_by(steps))
        elif fate < 0.1:
            repository.commit(None, [failed(step, retry_in=0.0) for step in steps])
            continue
        elif fate < 0.13:
            repository.reconcile(gone_workers=[name], max_losses=1000)
            repository.register_worker(worker(name))
        report = repository.commit(None, [done(step) for step in steps])
        if fate < 0.13:
            assert report.committed == (), "another one may have them by now"
            continue
        committed += report.committed
        repository.extend_leases(name, LEASE, held_by(steps))
        if fate > 0.9:
            assert repository.commit(None, [done(step) for step in steps]).committed == report.committed
    repository.retire_worker(name)
    result.write_text(json.dumps(committed))
    repository.close()


def resubmit(url: str) -> None:
    """Runs that share the steps come and go meanwhile."""
    repository = SqlRepository(url)
    for index in range(SUBMITS):
        run_id = submit(repository, make_plan(graph(WIDTH - index), deliver=[]), priority=index % 3)
        repository.reconcile()
        if index % 2:
            repository.cancel_run(run_id)
    repository.close()


@pytest.mark.timeout(300)
def test_processes_commit_each_step_exactly_once(
    database_url: str, repository: SqlRepository, engine: sa.Engine, tmp_path: Path
) -> None:
    run_id = submit(repository, make_plan(graph(WIDTH)))
    spawn = multiprocessing.get_context("spawn")
    results = [tmp_path / f"{index}.json" for index in range(WORKERS)]
    processes = [
        spawn.Process(target=work, args=(database_url, f"w{index}", result)) for index, result in enumerate(results)
    ]
    processes.append(spawn.Process(target=resubmit, args=(database_url,)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * len(processes)

    summary = repository.run(run_id)
    assert summary.state is RunState.DONE
    count = len(graph(WIDTH))
    committed = [step_id for result in results for step_id in json.loads(result.read_text())]
    assert sorted(committed) == sorted(set(committed)), "a step was committed twice"
    with engine.begin() as conn:
        succeeded = conn.exec_driver_sql("SELECT step_id FROM attempts WHERE outcome = 'ok'").scalars().all()
    assert sorted(succeeded) == sorted(committed)
    # A later submission may have added `all` of a narrower graph; its steps are done as well, or cancelled.
    assert summary.steps == {StepState.DONE: count}
    assert len(set(committed)) >= count
    assert not repository.verify()
