"""Celery workers on real servers: PostgreSQL, Redis or RabbitMQ, and S3."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from contextlib import suppress
from itertools import chain
from urllib.request import urlopen

import psutil
import pytest
from kombu import Connection

from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.messaging.app import WAKE
from kontext_batch.planning.states import StepState
from tests.acceptance.conftest import STEPS_IN_ALL
from tests.cluster.conftest import OUTPUTS
from tests.cluster.installation import Cluster
from tests.servers import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LONG = 60
"""Denoise steps of an edit that is to be interrupted."""
only_redis = pytest.mark.parametrize("broker_url", ["redis"], indirect=True)


def test_workers_of_models_and_of_operations_share_a_run(cluster: Cluster) -> None:
    edits = cluster.worker("--device", "cpu")
    operations = cluster.worker("--operations")
    run_id = cluster.submit()
    cluster.wait_until_done(run_id, edits, operations)

    assert cluster.outputs() == OUTPUTS
    assert cluster.outcomes(run_id) == [["ok"]] * STEPS_IN_ALL

    def who(repository: SqlRepository) -> dict[str, set[str]]:
        done: dict[str, set[str]] = {}
        for row in repository.run_steps(run_id):
            done.setdefault(row.operation, set()).update(each.worker_id for each in repository.attempts(row.id))
        return done

    workers = cluster.ask(who)
    assert len(workers["edit"]) == len(workers["finish"]) == 1
    assert workers["edit"] != workers["finish"]

    children = [child for process in (edits, operations) for child in psutil.Process(process.pid).children()]
    assert children
    assert [cluster.end(process) for process in (edits, operations)] == [0, 0], cluster.logs()
    assert cluster.workers() == []
    assert not still_there(children)


def still_there(processes: list[psutil.Process], seconds: float = 10.0) -> list[psutil.Process]:
    """Those that have not ended by then; one that nobody has reaped has ended."""
    deadline = time.monotonic() + seconds
    alive = processes
    while alive and time.monotonic() < deadline:
        alive = [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.1)
    return alive


def wait_until_sampled(cluster: Cluster, worker: subprocess.Popen[str]) -> None:
    """Both steps of the batch: what is fetched and not begun would be given back."""
    cluster.wait_for(lambda: cluster.logs().count("step joined") == 2, worker)


@only_redis
def test_a_worker_that_is_told_to_end_finishes_its_batch(cluster: Cluster) -> None:
    worker = cluster.worker(KONTEXT_BATCH_LOG_LEVEL="debug")
    run_id = cluster.submit(steps=LONG)
    wait_until_sampled(cluster, worker)
    assert cluster.end(worker) == 0, cluster.logs()

    assert cluster.states(run_id).get(StepState.DONE) == 2, "both of the batch"
    assert set(chain(*cluster.outcomes(run_id))) == {"ok"}
    assert not cluster.leased(run_id)


@only_redis
@pytest.mark.parametrize("grace", ["600", "0.1"], ids=["told twice", "grace period over"])
def test_a_worker_gives_its_batch_back_when_it_is_told_twice_or_its_time_is_over(cluster: Cluster, grace: str) -> None:
    worker = cluster.worker(KONTEXT_BATCH_GRACE_SECONDS=grace)
    run_id = cluster.submit(steps=1000)
    cluster.wait_for(lambda: cluster.leased(run_id), worker)
    worker.send_signal(signal.SIGTERM)
    if grace == "600":
        time.sleep(1)
        assert cluster.leased(run_id)
        worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=60) == 0, cluster.logs()

    assert StepState.DONE not in cluster.states(run_id)
    assert set(chain(*cluster.outcomes(run_id))) == {"released"}


@only_redis
def test_a_killed_workers_steps_are_taken_over_at_the_next_beat(cluster: Cluster) -> None:
    first = cluster.worker()
    run_id = cluster.submit(steps=LONG)
    cluster.wait_for(lambda: cluster.leased(run_id), first)
    children = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    assert not still_there(children)

    second = cluster.worker()  # nobody rings it for what the first had taken: the beat does
    beat = cluster.start("workers", "beat", "--every", "0.2")
    cluster.wait_until_done(run_id, second, beat)
    assert cluster.outputs() == OUTPUTS
    outcomes = cluster.outcomes(run_id)
    assert all(each.count("ok") == 1 for each in outcomes)
    assert "lost" in chain(*outcomes)


@only_redis
def test_a_worker_that_is_told_to_drain_finishes_its_batch_and_ends(cluster: Cluster) -> None:
    worker = cluster.worker("--metrics-port", "0", KONTEXT_BATCH_LOG_LEVEL="debug")
    run_id = cluster.submit(steps=6 * LONG)  # the command takes seconds to start
    wait_until_sampled(cluster, worker)
    [known] = cluster.workers()
    told = cluster.run("workers", "drain", known.id)
    assert told.code == 0, told.err
    assert worker.wait(timeout=120) == 0, cluster.logs()
    assert set(chain(*cluster.outcomes(run_id))) == {"ok"}
    assert cluster.states(run_id).get(StepState.DONE, 0) == 2
    assert cluster.workers() == []


def test_rings_that_are_lost_are_rung_again_by_the_beat(cluster: Cluster) -> None:
    run_id = cluster.submit()
    with Connection(cluster.environment["KONTEXT_BATCH_BROKER_URL"]) as connection:
        for name in ("edits", "operations"):
            queue = f"{cluster.environment['KONTEXT_BATCH_QUEUE_PREFIX']}.{name}"
            connection.default_channel.queue_purge(queue)  # type: ignore[attr-defined]
    worker = cluster.worker()
    beat = cluster.start("workers", "beat", "--every", "0.2")
    cluster.wait_until_done(run_id, worker, beat)
    assert cluster.outputs() == OUTPUTS


@only_redis
def test_flower_shows_the_workers(cluster: Cluster) -> None:
    worker = cluster.worker("--operations")
    [port] = free_ports(1)
    url = cluster.environment["KONTEXT_BATCH_BROKER_URL"]
    flower = cluster.start(
        *(f"--broker={url}", "flower", f"--port={port}", "--address=127.0.0.1"),
        module="celery",
        FLOWER_UNAUTHENTICATED_API="1",
    )

    def shown() -> bool:
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/api/workers?refresh=1", timeout=10) as answer:
            return f"operations-{worker.pid}@" in answer.read().decode()
        return False

    cluster.wait_for(shown, worker, flower)


@only_redis
def test_a_message_that_is_no_json_is_not_decoded(cluster: Cluster) -> None:
    """Whoever may write to the broker may not run code by it."""
    worker = cluster.worker()
    queue = f"{cluster.environment['KONTEXT_BATCH_QUEUE_PREFIX']}.edits"
    spoiled = b"cos\nsystem\n(S'touch spoiled'\ntR."
    with Connection(cluster.environment["KONTEXT_BATCH_BROKER_URL"]) as connection:
        connection.Producer().publish(
            spoiled,
            routing_key=queue,
            content_type="application/x-python-serialize",
            content_encoding="binary",
            headers={"lang": "py", "task": WAKE, "id": "1", "root_id": "1"},
        )
    run_id = cluster.submit()
    cluster.wait_until_done(run_id, worker)
    assert not (cluster.folder / "spoiled").exists()
    assert "Refusing to deserialize untrusted content of type pickle" in cluster.logs()


def test_doctor_finds_a_broker_that_does_not_answer_and_keeps_its_password_to_itself(cluster: Cluster) -> None:
    sound = cluster.run("doctor", "--json")
    assert {"name": "broker", "ok": True}.items() <= next(
        each for each in json.loads(sound.out) if each["name"] == "broker"
    ).items()
    wrong = cluster.run("doctor", KONTEXT_BATCH_BROKER_URL="amqp://guest:open-sesame@127.0.0.1:1//")
    assert wrong.code == 1
    assert "FAIL broker: the broker does not answer" in wrong.out
    assert "open-sesame" not in wrong.out + wrong.err
