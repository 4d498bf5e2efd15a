"""What stops work from outside: a run that is cancelled or over its limits, a worker that is told to drain."""

from __future__ import annotations

import threading
import time

import pytest

from kontext_batch.errors import StepError
from kontext_batch.planning.states import RunState, StepState
from kontext_batch.ports import EditJob, Orders, Repository, RunFigures
from kontext_batch.services.leases import Heartbeat
from kontext_batch.services.limits import Limits, over
from kontext_batch.services.work import Worker
from kontext_batch.settings import Settings
from tests.unit.services.conftest import Studio, wait_for


def quick_worker(studio: Studio) -> Worker:
    worker = studio.worker(batch_rows=2)
    worker.orders_seconds = 0.01
    return worker


@pytest.mark.parametrize("drain", [False, True])
def test_a_batch_that_nobody_wants_stops_at_the_next_denoise_step(studio: Studio, drain: bool) -> None:
    worker, run_id = quick_worker(studio), studio.submit()

    told = threading.Event()

    def cancel(done: int, total: int) -> None:
        if not told.is_set():
            told.set()
            studio.app.repository.cancel_run(run_id, drain=drain)
            if drain:
                time.sleep(0.1)
            else:
                wait_for(lambda: worker.orders.unwanted)

    summary = worker.run_until_done(run_id, on_step=cancel)
    assert summary.state is RunState.CANCELLED
    finished = 2 if drain else 0
    expected = {StepState.DONE: finished, StepState.CANCELLED: 10 - finished}
    assert summary.steps == {state: count for state, count in expected.items() if count}
    assert len(studio.editor.jobs) <= 2
    assert studio.app.repository.verify() == []


def test_a_batch_that_is_wanted_in_part_goes_on(studio: Studio) -> None:
    worker, run_id = quick_worker(studio), studio.submit()

    def part(done: int, total: int) -> None:
        leased = studio.app.repository.run_steps(run_id, states=[StepState.LEASED])
        worker.orders = Orders(unwanted=frozenset((row.id, 1) for row in leased[:1]))

    assert worker.run_until_done(run_id, on_step=part).state is RunState.DONE


def test_a_worker_that_is_told_to_drain_finishes_what_it_samples_and_ends(studio: Studio) -> None:
    worker, run_id = quick_worker(studio), studio.submit()

    def drain(done: int, total: int) -> None:
        studio.app.repository.drain_workers(worker.info.id)
        wait_for(lambda: worker.orders.drain)

    summary = worker.run_until_done(run_id, on_step=drain)
    assert summary.finished is None
    assert summary.steps[StepState.DONE] in (1, 2), "the second of the first two may have been fetched too late"
    assert not worker.work_once()
    assert worker.run_until_done(run_id).state is RunState.DONE, "it was told once, not for ever"


def test_a_serving_worker_ends_when_it_is_told_to_drain(studio: Studio) -> None:
    worker = quick_worker(studio)
    serving = threading.Thread(target=worker.serve)
    serving.start()
    wait_for(studio.app.repository.workers)
    studio.app.repository.drain_workers(None)
    serving.join(30)
    assert not serving.is_alive()
    assert worker.orders.drain
    assert studio.app.repository.workers() == []


def test_a_worker_pauses_a_run_in_which_too_much_fails(studio: Studio) -> None:
    worker, run_id = studio.worker(batch_rows=1), studio.submit()
    worker.limits = Limits(failures=0)

    def first_fails(job: EditJob) -> StepError | None:
        if len(studio.editor.jobs) == 1:
            return StepError("not finite")
        wait_for(lambda: studio.app.repository.run(run_id).state is RunState.PAUSED)
        return None

    studio.editor.fault = first_fails
    summary = worker.run_until_done(run_id)
    assert summary.state is RunState.PAUSED
    assert summary.reason is not None
    assert "1 steps of 10 have failed, the limit is 0" in summary.reason
    assert len(studio.editor.jobs) == 2, "what was in hand when it was paused"


def test_a_run_whose_pictures_are_not_brought_gets_no_more_until_they_are(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps of Pillow go on, and nothing of it is lost: it goes on when its outputs have been brought."""
    worker, run_id = studio.worker(batch_rows=1), studio.submit()
    worker.backlog_limit = 1
    repository = studio.app.repository
    monkeypatch.setattr(Worker, "deliver", lambda self, **options: 0)
    monkeypatch.setattr("kontext_batch.services.work.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("kontext_batch.services.sample.AHEAD_SECONDS", 0.0)
    monkeypatch.setattr(studio.editor, "stepping", lambda jobs: time.sleep(0.05))
    with worker.registered():
        while worker.turn():
            pass
        waiting = len(repository.pending_deliveries(run_id))
        edits = len(studio.editor.jobs)
        assert waiting in (2, 3), "above the limit, with what was in hand"
        assert repository.run(run_id).steps[StepState.READY] > 0
        assert not worker.turn()
        assert len(studio.editor.jobs) == edits
    monkeypatch.undo()
    summary = studio.worker(batch_rows=1).run_until_done(run_id)
    assert summary.state is RunState.DONE


def test_the_settings_reach_the_worker(studio: Studio) -> None:
    studio.app.settings = Settings(run_cap=3, owner_cap=5, failure_limit=7, failure_share=0.5, backlog_limit=9)
    worker = studio.app.worker()
    assert (worker.turns.run_cap, worker.turns.owner_cap) == (3, 5)
    assert worker.limits == Limits(failures=7, share=0.5)
    assert worker.backlog_limit == 9


def test_the_heartbeat_extends_leases_and_asks_for_orders(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    repository: Repository = studio.app.repository

    def orders(worker_id: str) -> Orders:
        calls.append("orders")
        return Orders(drain=True)

    monkeypatch.setattr(repository, "extend_leases", lambda *args: calls.append("extend"))
    monkeypatch.setattr(repository, "orders", orders)
    told: list[Orders] = []
    with Heartbeat(repository, "w", 0.6, told.append, held=tuple, orders_seconds=0.02):
        wait_for(lambda: calls.count("extend") >= 2)
    assert calls.count("orders") >= 2
    assert told[0].drain
    calls.clear()
    with Heartbeat(repository, "w", 0.06, held=tuple):
        wait_for(lambda: calls.count("extend") >= 2)
    assert "orders" not in calls


@pytest.mark.parametrize(
    ("figures", "limits", "words"),
    [
        ((100, 0, 59.9, 1.0), Limits(), None),
        ((100, 0, 60.0, 1.0), Limits(), "the budget of 1 GPU minutes is used up"),
        ((100, 0, 0.0, 0.0), Limits(), None),
        ((100, 100, 1e9, None), Limits(), None),
        ((100, 10, 0.0, None), Limits(failures=10), None),
        ((100, 11, 0.0, None), Limits(failures=10), "11 steps of 100 have failed, the limit is 10"),
        ((100, 11, 0.0, None), Limits(share=0.1), "the limit is 0.1 of them"),
        ((100, 10, 0.0, None), Limits(share=0.1), None),
        ((3, 1, 0.0, None), Limits(share=0.0), "1 steps of 3"),
    ],
)
def test_what_is_over_a_limit(figures: tuple[int, int, float, float | None], limits: Limits, words: str | None) -> None:
    size, failed, seconds, minutes = figures
    reason = over(RunFigures(1, RunState.RUNNING, size, failed, seconds, minutes), limits)
    if words is None:
        assert reason is None
    else:
        assert reason is not None
        assert words in reason
