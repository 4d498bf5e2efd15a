"""What a worker says of its work: log lines with ids, and numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from kontext_batch.errors import InfrastructureError, StepError
from kontext_batch.observability import set_up_logging
from kontext_batch.observability.metrics import Activity
from kontext_batch.ports import EditJob, WorkerInfo
from kontext_batch.services.leases import Heartbeat
from kontext_batch.services.maintain import reconcile
from tests.contract.plans import done
from tests.unit.services.conftest import Studio, wait_for


@pytest.fixture
def grown() -> Callable[..., float]:
    """How much a number has grown since the test began."""
    before = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
    }

    def growth(name: str, **labels: str) -> float:
        value = REGISTRY.get_sample_value(name, labels)
        return 0.0 if value is None else value - before.get((name, *sorted(labels.items())), 0.0)

    return growth


def lane_of(studio: Studio) -> str:
    return next(step.lane for step in studio.app.repository.run_steps(1) if step.node == "clean")


def test_a_run_is_counted(studio: Studio, grown: Callable[..., float]) -> None:
    studio.worker(batch_rows=4).run_until_done(studio.submit())
    lane = lane_of(studio)
    # 2 pictures are cleaned, then 4 staged in the same session, each in three denoise steps
    assert grown("kontext_batch_steps_total", lane=lane, outcome="done") == 6
    assert grown("kontext_batch_steps_total", lane="operations", outcome="done") == 4
    assert grown("kontext_batch_batch_steps_count", lane=lane) == 1
    assert grown("kontext_batch_batch_steps_sum", lane=lane) == 6
    assert grown("kontext_batch_batch_occupancy_ratio_sum", lane=lane) == 6 * 3 / 4
    taken = grown("kontext_batch_batch_occupancy_ratio_count", lane=lane)
    for phase, count in {"fetch": 10, "sample": 6, "put": 10, "operate": 4, "compute": taken}.items():
        assert grown("kontext_batch_phase_seconds_count", phase=phase) == count
    for phase in ("claim", "commit"):
        assert grown("kontext_batch_phase_seconds_count", phase=phase) >= 3
    assert grown("kontext_batch_deliveries_total", outcome="delivered") == 4
    assert 0 < grown("kontext_batch_computing_seconds_total") < grown("kontext_batch_alive_seconds_total")
    assert 0 < (REGISTRY.get_sample_value("kontext_batch_gpu_idle_ratio") or 0.0) < 1


def test_faults_are_counted_by_what_they_are(
    studio: Studio, grown: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kontext_batch.services.execute.FIRST_RETRY_SECONDS", 0.001)
    faults: list[Exception] = [InfrastructureError("no answer"), StepError("it is grey")]

    def fault(job: EditJob) -> Exception | None:
        return faults.pop(0) if faults else None

    studio.editor.fault = fault
    studio.worker().run_until_done(studio.submit())
    lane = lane_of(studio)
    assert grown("kontext_batch_step_faults_total", error_class="InfrastructureError", outcome="retried") == 1
    assert grown("kontext_batch_step_faults_total", error_class="StepError", outcome="failed") == 1
    assert grown("kontext_batch_steps_total", lane=lane, outcome="retried") == 1
    assert grown("kontext_batch_steps_total", lane=lane, outcome="failed") == 1


def test_what_is_lost_fenced_and_given_back_is_counted(studio: Studio, grown: Callable[..., float]) -> None:
    repository = studio.app.repository
    run_id = studio.submit()
    lost = WorkerInfo("lost", studio.worker().info.host, 2**22 - 1, 1.0, "cpu", {})
    repository.register_worker(lost)
    held = repository.claim(lost.id, limit=8, lease_seconds=60)
    assert len(held) == 2
    reconcile(repository)
    assert grown("kontext_batch_leases_lost_total") == 2
    assert grown("kontext_batch_steps_quarantined_total") == 0
    late = studio.worker()
    late.executor.repository.commit(None, [done(step) for step in held])  # fenced, by somebody who counts nothing
    repository.register_worker(late.info)
    [mine] = repository.claim(late.info.id, limit=1, lease_seconds=60)
    repository.release([(mine.id, mine.token)])
    repository.claim(late.info.id, limit=1, lease_seconds=60)
    assert late.executor.commit(None, mine.lane, [done(mine)]).fenced == (mine.id,)
    assert grown("kontext_batch_steps_total", lane=mine.lane, outcome="fenced") == 1
    repository.retire_worker(late.info.id)
    stopped = studio.worker()
    stopped.run_until_done(run_id, on_step=lambda done, total: stopped.stopping.set())
    assert grown("kontext_batch_steps_total", lane=mine.lane, outcome="released") >= 1


def test_a_heartbeat_that_fails_is_counted(grown: Callable[..., float]) -> None:
    class Away:
        def extend_leases(self, worker_id: str, lease_seconds: float, held: object) -> int:
            raise InfrastructureError("no answer")

    with capture_logs() as lines, Heartbeat(Away(), "w1", 0.03, held=tuple):  # type: ignore[arg-type]
        wait_for(lambda: grown("kontext_batch_heartbeats_failed_total") >= 1)
    assert grown("kontext_batch_heartbeats_failed_total") >= 1
    assert (lines[0]["event"], lines[0]["worker"]) == ("heartbeat failed", "w1")


def test_the_idle_share_includes_the_batch_in_flight() -> None:
    moment = [100.0]
    activity = Activity(clock=lambda: moment[0])
    assert activity.seconds() == (0.0, 0.0)
    activity.begin()
    moment[0] = 106.0
    with activity.computing():
        moment[0] = 108.0
        assert activity.seconds() == (2.0, 8.0)
    with activity.computing(), activity.computing():  # two workers in one process
        pass
    moment[0] = 110.0
    assert activity.seconds() == (2.0, 10.0)
    values = {sample.name: sample.value for metric in activity.collect() for sample in metric.samples}
    assert values["kontext_batch_gpu_idle_ratio"] == pytest.approx(0.8)


def test_lines_of_a_batch_name_worker_lane_steps_and_runs(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(json=True, level=logging.INFO)
    studio.editor.fault = lambda job: StepError("it is grey") if job.params["prompt"].startswith("Remove") else None
    worker = studio.worker()
    run_id = studio.submit()
    worker.run_until_done(run_id)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    failed = [line for line in lines if line["event"] == "step failed"]
    committed = [line for line in lines if line["event"] == "batch committed"]
    assert len(failed) == 2
    for line in (*failed, *committed):
        assert (line["worker"], line["lane"], line["runs"]) == (worker.info.id, lane_of(studio), [run_id])
    assert [line["steps"] for line in failed] == [[line["step"]] for line in failed]
    told = {step: line["batch"] for line in committed for step in line["steps"]}
    assert told == {line["step"]: studio.app.repository.attempts(line["step"])[0].batch_id for line in failed}
