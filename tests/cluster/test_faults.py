"""One fault at a time, with real servers and real worker processes; the toy engine stands in for the model.

`make chaos` lets them come together, over thousands of steps.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import chain
from pathlib import Path

import psutil
import pytest

from kontext_batch.lineage.migrate import upgrade
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.messaging.app import make_app
from kontext_batch.messaging.wake_ups import CeleryWakeUps
from kontext_batch.planning.plan import OPERATIONS_LANE
from kontext_batch.planning.states import RunState, StepState
from tests import servers
from tests.acceptance.conftest import STEPS_IN_ALL
from tests.cluster.conftest import OUTPUTS
from tests.cluster.installation import Cluster
from tests.proxy import Mood, Proxy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.parametrize("broker_url", ["redis"], indirect=True),
]


def child_of(cluster: Cluster) -> psutil.Process:
    """The process that computes, of the one worker."""
    [worker] = cluster.workers()
    return psutil.Process(worker.pid)


def met(proxy: Proxy, mood: Mood, enough: int) -> bool:
    return proxy.met[mood] >= enough


def sound(repository: SqlRepository) -> bool:
    assert repository.verify() == []
    return True


def assert_each_step_once(cluster: Cluster, run_id: int) -> None:
    assert cluster.ask(sound)
    outcomes = cluster.outcomes(run_id)
    assert len(outcomes) == STEPS_IN_ALL
    assert all(each.count("ok") == 1 and each[-1] == "ok" for each in outcomes), outcomes
    assert cluster.outputs() == OUTPUTS


def test_a_child_that_is_killed_in_mid_batch_is_replaced_and_its_steps_are_done_once(cluster: Cluster) -> None:
    worker = cluster.toy_worker(KONTEXT_TOY_ROW_SECONDS="3")
    beat = cluster.start("workers", "beat", "--every", "0.2")
    run_id = cluster.submit()
    cluster.wait_for(lambda: cluster.leased(run_id), worker)
    child = child_of(cluster)
    child.kill()
    cluster.wait_until_done(run_id, worker, beat)
    assert_each_step_once(cluster, run_id)
    assert "lost" in chain(*cluster.outcomes(run_id))


def test_a_worker_that_stood_still_past_its_lease_writes_nothing(cluster: Cluster) -> None:
    """The fenced writer: it was thought dead, another has done its work, and it wakes up in mid batch."""
    first = cluster.toy_worker(KONTEXT_TOY_ROW_SECONDS="3", KONTEXT_BATCH_LEASE_SECONDS="30")
    run_id = cluster.submit()
    cluster.wait_for(lambda: cluster.leased(run_id), first)
    frozen = child_of(cluster)
    frozen.suspend()
    second = cluster.toy_worker()
    beat = cluster.start("workers", "beat", "--every", "0.2")
    cluster.wait_until_done(run_id, second, beat)
    assert_each_step_once(cluster, run_id)
    frozen.resume()
    cluster.wait_for(lambda: "fenced" in chain(*cluster.outcomes(run_id)), first)

    assert cluster.ask(sound)
    assert cluster.outputs() == OUTPUTS
    assert all(each.count("ok") == 1 for each in cluster.outcomes(run_id))


@pytest.mark.parametrize("place", ["poison", "cursed"])
def test_a_picture_that_ends_its_process_is_quarantined_and_its_batch_mates_are_done(
    cluster: Cluster, place: str
) -> None:
    worker = cluster.toy_worker()
    beat = cluster.start("workers", "beat", "--every", "0.2")
    run_id = cluster.submit(place=place)
    cluster.wait_until_done(run_id, worker, beat)

    states = cluster.states(run_id)
    assert states[StepState.QUARANTINED] == 2, "both pictures of that place"
    assert states[StepState.SKIPPED] == 2
    assert states[StepState.DONE] == STEPS_IN_ALL - 4
    assert cluster.ask(lambda repository: repository.run(run_id)).state is RunState.PARTIAL
    assert cluster.outputs() == ["out/bag_beach.png", "out/mug_beach.png"]
    assert worker.poll() is None, "the worker outlives its children"


def test_a_batch_that_is_too_big_for_the_device_is_done_by_halves(cluster: Cluster) -> None:
    worker = cluster.toy_worker(KONTEXT_TOY_ROW_SECONDS="1")  # so that all are in before the first leaves
    run_id = cluster.submit(place="huge")
    cluster.wait_until_done(run_id, worker)
    assert cluster.ask(lambda repository: repository.run(run_id)).state is RunState.DONE
    assert cluster.outputs() == OUTPUTS
    outcomes = list(chain(*cluster.outcomes(run_id)))
    assert outcomes.count("retry") >= 3
    assert set(outcomes) == {"ok", "retry"}


def test_a_broker_that_is_killed_and_comes_back_empty_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    broker = servers.needed(lambda: servers.redis(tmp_path).start())
    cluster.environment = {**cluster.environment, "KONTEXT_BATCH_BROKER_URL": broker.url}
    worker = cluster.toy_worker(KONTEXT_TOY_ROW_SECONDS="0.5")
    run_id = cluster.submit()
    cluster.wait_for(lambda: cluster.leased(run_id), worker)
    broker.kill()
    time.sleep(2)
    broker.start()
    beat = cluster.start("workers", "beat", "--every", "0.2")
    cluster.wait_until_done(run_id, worker, beat)
    assert_each_step_once(cluster, run_id)
    another = cluster.submit(place="the moon")  # the worker hears again
    cluster.wait_until_done(another, worker, beat)
    broker.kill()


def test_a_beat_lives_through_a_broker_that_goes_away_between_two_rings(cluster: Cluster, tmp_path: Path) -> None:
    """Steps are ready and nobody takes them, so that it counts rings and rings again at each tick."""
    broker = servers.needed(lambda: servers.redis(tmp_path).start())
    cluster.environment = {**cluster.environment, "KONTEXT_BATCH_BROKER_URL": broker.url}
    run_id = cluster.submit()
    beat = cluster.start("workers", "beat", "--every", "0.2")
    time.sleep(5)
    broker.kill()
    cluster.wait_for(lambda: "workers could not be rung" in cluster.logs(), beat)
    broker.start()
    cluster.wait_until_done(run_id, cluster.toy_worker(), beat)
    broker.kill()


def test_a_database_that_is_restarted_in_mid_batch_gets_the_result_all_the_same(
    cluster: Cluster, tmp_path: Path
) -> None:
    database = servers.needed(lambda: servers.Postgres(tmp_path / "postgres").start())
    upgrade(database.url)
    cluster.environment = {**cluster.environment, "KONTEXT_BATCH_DATABASE_URL": database.url}
    worker = cluster.toy_worker(KONTEXT_TOY_ROW_SECONDS="1")
    beat = cluster.start("workers", "beat", "--every", "0.2")
    run_id = cluster.submit()
    cluster.wait_for(lambda: cluster.leased(run_id), worker)
    database.restart()
    cluster.wait_until_done(run_id, worker, beat)
    assert_each_step_once(cluster, run_id)
    assert set(chain(*cluster.outcomes(run_id))) == {"ok"}, "what was computed was kept until it could be committed"
    database.kill()


def test_a_store_that_is_busy_slow_or_cuts_uploads_costs_time_and_no_step(cluster: Cluster) -> None:
    port = int(cluster.environment["KONTEXT_BATCH_S3_ENDPOINT"].rpartition(":")[2])
    proxy = Proxy(port)
    worker = cluster.toy_worker(KONTEXT_BATCH_S3_ENDPOINT=f"http://127.0.0.1:{proxy.port}")
    for mood in (Mood.BUSY, Mood.CUT, Mood.SLOW):
        enough = proxy.met[mood] + 3
        proxy.mood = mood
        run_id = cluster.submit(place=mood.name.lower())
        cluster.wait_for(partial(met, proxy, mood, enough), worker)
        proxy.mood = Mood.FAITHFUL if mood is not Mood.SLOW else Mood.SLOW
        beat = cluster.start("workers", "beat", "--every", "0.2")
        cluster.wait_until_done(run_id, worker, beat)
        beat.kill()
        assert cluster.states(run_id) == {StepState.DONE: STEPS_IN_ALL}
        assert all(each.count("ok") == 1 for each in cluster.outcomes(run_id))
    proxy.close()
    assert cluster.ask(sound)


def test_a_store_that_is_full_fails_no_step_and_goes_on_when_there_is_room(cluster: Cluster) -> None:
    proxy = Proxy(int(cluster.environment["KONTEXT_BATCH_S3_ENDPOINT"].rpartition(":")[2]))
    worker = cluster.toy_worker(KONTEXT_BATCH_S3_ENDPOINT=f"http://127.0.0.1:{proxy.port}")
    proxy.mood = Mood.FULL
    run_id = cluster.submit()
    cluster.wait_for(lambda: "the store takes nothing" in cluster.logs(), worker)
    assert StepState.DONE not in cluster.states(run_id)
    assert StepState.FAILED not in cluster.states(run_id)
    proxy.mood = Mood.FAITHFUL
    beat = cluster.start("workers", "beat", "--every", "0.2")
    cluster.wait_until_done(run_id, worker, beat)
    assert_each_step_once(cluster, run_id)
    assert set(chain(*cluster.outcomes(run_id))) <= {"ok", "released"}
    proxy.close()


def test_clocks_an_hour_apart_and_two_beats_change_nothing(cluster: Cluster) -> None:
    early = cluster.toy_worker(KONTEXT_TOY_CLOCK_OFFSET="-3600", KONTEXT_TOY_ROW_SECONDS="0.3")
    late = cluster.toy_worker(KONTEXT_TOY_CLOCK_OFFSET="3600", KONTEXT_TOY_ROW_SECONDS="0.3")
    beats = [cluster.start("workers", "beat", "--every", "0.2") for _ in range(2)]
    run_id = cluster.submit()
    cluster.wait_until_done(run_id, early, late, *beats)
    assert_each_step_once(cluster, run_id)
    assert set(chain(*cluster.outcomes(run_id))) == {"ok"}


def test_ten_rings_for_one_batch_do_no_more_than_one(cluster: Cluster) -> None:
    workers = [cluster.toy_worker(KONTEXT_TOY_ROW_SECONDS="0.2") for _ in range(2)]
    run_id = cluster.submit()
    url, prefix = (cluster.environment[f"KONTEXT_BATCH_{name}"] for name in ("BROKER_URL", "QUEUE_PREFIX"))
    bell = CeleryWakeUps(make_app(url, queue_prefix=prefix), batch_rows=1)
    for _ in range(5):
        bell.wake({"edit": 2, OPERATIONS_LANE: 2})
    bell.close()
    cluster.wait_until_done(run_id, *workers)
    assert_each_step_once(cluster, run_id)
    assert set(chain(*cluster.outcomes(run_id))) == {"ok"}
