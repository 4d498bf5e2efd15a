"""Submit, claim, execute, commit, deliver, on a real database and a real folder."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from PIL import Image

from kontext_batch.editor import EngineEditor
from kontext_batch.errors import (
    InfrastructureError,
    NotAllowed,
    PlanRefused,
    StepError,
    StorageFull,
    StorageReadOnly,
)
from kontext_batch.hashing import sha256_hex
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.states import RunState, StepState
from kontext_batch.ports import Artifact, EditJob, PendingDelivery, Repository, SettledDelivery, WorkerInfo
from kontext_batch.registry import AdapterEntry, signature
from kontext_batch.services.deliver import deliver_pending
from kontext_batch.services.execute import MAX_RETRIES, retry_delay
from kontext_batch.services.maintain import gone_workers
from kontext_batch.services.prepare import Selection
from kontext_batch.services.retention import Policy, collect_garbage
from tests.unit.services.conftest import Studio, wait_for


def test_a_run_computes_every_step_once_and_delivers(studio: Studio) -> None:
    summary = studio.worker().run_until_done(studio.submit())
    assert summary.state is RunState.DONE
    assert summary.steps == {StepState.DONE: 2 + 4 + 4}
    assert studio.outputs() == ["bag_beach.png", "bag_snow.png", "mug_beach.png", "mug_snow.png"]
    assert len(studio.editor.jobs) == 2 + 4  # `clean` is shared by both scenes
    with Image.open(studio.folder / "out" / "mug_snow.png") as picture:
        assert picture.size == (32, 32)


def test_the_same_run_again_computes_nothing(studio: Studio) -> None:
    studio.worker().run_until_done(studio.submit())
    studio.editor.jobs.clear()
    prepared = studio.prepare()
    assert {each.status for each in prepared.explained} == {"cached"}
    summary = studio.worker().run_until_done(studio.submit())
    assert (summary.state, summary.cached, studio.editor.jobs) == (RunState.DONE, 10, [])
    assert len(studio.outputs()) == 4  # identical bytes make no new version


def test_a_changed_prompt_runs_only_what_depends_on_it(studio: Studio) -> None:
    studio.worker().run_until_done(studio.submit())
    studio.editor.jobs.clear()
    studio.recipe.write_text(studio.recipe.read_text().replace("deep snow", "fresh deep snow"))
    prepared = studio.prepare()
    reasons = {each.reasons for each in prepared.explained if each.instance.node == "staged" and each.status == "run"}
    assert reasons == {("prompt changed (shop.yaml:18)",)}
    studio.worker().run_until_done(studio.submit())
    assert len(studio.editor.jobs) == 2
    assert "mug_snow.v2.png" in studio.outputs()
    assert "mug_beach.v2.png" not in studio.outputs()


def test_each_step_reads_its_canvas_as_its_own_recipe_line_says(studio: Studio) -> None:
    """Two readers of one step, by latents and by pixels; the lineage tells which."""
    pixels = "  framed: {op: edit, model: toy, image: '${clean}', handoff: pixels, prompt: Frame it.}\n"
    body = studio.recipe.read_text().replace("  finish:\n", pixels + "  finish:\n")
    studio.recipe.write_text(body + '  - {from: "${framed}", to: "framed/${item}.${ext}"}\n')
    read: dict[str, set[str]] = {"latents": set(), "pixels": set()}

    def note(job: EditJob) -> None:
        (canvas,) = job.pictures
        read["pixels" if canvas.latents is None else "latents"].add(job.params["prompt"].split()[0])
        if canvas.latents is not None:
            with Image.open(io.BytesIO(canvas.data)) as picture:
                assert canvas.latents == picture.tobytes()  # of the very picture

    studio.editor.fault = note
    run_id = studio.submit()
    assert studio.worker().run_until_done(run_id).state is RunState.DONE
    assert read == {"latents": {"Change"}, "pixels": {"Remove", "Frame"}}
    rows = studio.app.repository.run_steps(run_id)
    told = {(row.node, row.params["handoff"]) for row in rows if row.operation == "edit"}
    assert told == {("clean", "pixels"), ("staged", "latents"), ("framed", "pixels")}


def test_changed_bytes_under_a_plan_fail_the_step_with_advice(studio: Studio) -> None:
    run_id = studio.submit()
    Image.new("RGB", (64, 64), "green").save(studio.folder / "photos" / "mug.png")
    summary = studio.worker().run_until_done(run_id)
    assert summary.state is RunState.PARTIAL
    assert summary.steps == {StepState.DONE: 5, StepState.FAILED: 1, StepState.SKIPPED: 4}
    (failed,) = studio.app.repository.run_steps(run_id, states=[StepState.FAILED])
    assert failed.error is not None
    assert "has changed since the plan was made" in failed.error
    assert studio.outputs() == ["bag_beach.png", "bag_snow.png"]


def test_one_bad_picture_of_a_batch_fails_alone(studio: Studio) -> None:
    def fault(job: EditJob) -> Exception | None:
        beach = "a beach" in job.params["prompt"]
        return StepError("not finite") if beach else None

    studio.editor.fault = fault
    summary = studio.worker().run_until_done(studio.submit())
    assert summary.state is RunState.PARTIAL
    assert summary.steps == {StepState.DONE: 2 + 2 + 2, StepState.FAILED: 2, StepState.SKIPPED: 2}
    assert studio.outputs() == ["bag_snow.png", "mug_snow.png"]


def test_an_infrastructure_fault_is_tried_again_and_blames_nobody(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kontext_batch.services.execute.FIRST_RETRY_SECONDS", 0.01)
    failures = iter([True, True])

    def fault(job: EditJob) -> Exception | None:
        return InfrastructureError("the store did not answer") if next(failures, False) else None

    studio.editor.fault = fault
    summary = studio.worker().run_until_done(studio.submit())
    assert summary.state is RunState.DONE
    assert len(studio.editor.jobs) == 6 + 2


@pytest.mark.parametrize(
    ("attempt", "expected"), [(1, 1.0), (2, 2.0), (5, 16.0), (MAX_RETRIES, 128.0), (MAX_RETRIES + 1, None)]
)
def test_retry_delay_doubles_and_ends(attempt: int, expected: float | None) -> None:
    assert retry_delay(attempt, spread=lambda: 0.5) == expected


def test_a_full_store_stops_the_worker_and_costs_the_steps_nothing(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = studio.worker()
    run_id = studio.submit()
    with monkeypatch.context() as patch:

        def full(*args: object, **kwargs: object) -> bool:
            raise StorageFull("no space left")

        patch.setattr(type(studio.app.store), "write_if_absent", full)
        with pytest.raises(StorageFull):
            worker.run_until_done(run_id)
    states = {row.state for row in studio.app.repository.run_steps(run_id)}
    assert states == {StepState.READY, StepState.BLOCKED}
    assert all(row.attempts == 0 for row in studio.app.repository.run_steps(run_id))
    assert studio.worker().run_until_done(run_id).state is RunState.DONE


@pytest.mark.parametrize("error", [NotAllowed("not there"), StorageReadOnly("closed")], ids=["not allowed", "closed"])
def test_a_store_that_refuses_each_put_stops_the_worker_at_once(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run_id = studio.submit()
    with monkeypatch.context() as patch:

        def refuse(*args: object, **kwargs: object) -> bool:
            raise error

        patch.setattr(type(studio.app.store), "write_if_absent", refuse)
        with pytest.raises(type(error), match=str(error)):
            studio.worker().run_until_done(run_id)
    assert len(studio.editor.jobs) == 2, "no more were sampled"
    assert studio.app.repository.run(run_id).finished is None
    assert studio.worker().run_until_done(run_id).state is RunState.DONE


def test_deliveries_wait_for_room_and_a_read_only_folder_is_told(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = studio.submit()
    write = type(studio.app.store).write_if_absent

    def refusing(error: Exception) -> object:
        def refuse(self: object, uri: str, *args: object, **kwargs: object) -> bool:
            if "/out/" in uri:
                raise error
            return write(self, uri, *args, **kwargs)  # type: ignore[arg-type]

        return refuse

    monkeypatch.setattr(type(studio.app.store), "write_if_absent", refusing(StorageFull("no space left")))
    with pytest.raises(StorageFull):
        studio.worker().run_until_done(run_id)
    monkeypatch.setattr(type(studio.app.store), "write_if_absent", refusing(StorageReadOnly("out is read-only")))
    summary = studio.worker().run_until_done(run_id)
    assert (summary.state, summary.delivered, summary.failed_deliveries) == (RunState.FAILED, 0, 4)


@pytest.mark.parametrize("stood_still", ["before it looked", "between look and write"])
def test_an_old_run_that_goes_on_leaves_what_a_newer_run_delivered(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, stood_still: str
) -> None:
    studio.recipe.write_text(studio.recipe.read_text().replace("if_exists: version", "if_exists: replace"))
    old = studio.submit()
    studio.recipe.write_text(studio.recipe.read_text().replace("Change the", "Please change the"))
    only = Selection(only={"item": ["mug"]})
    new = studio.worker().run_until_done(studio.submit(selection=only))
    assert new.skipped_deliveries == 0
    newer = {name: (studio.folder / "out" / name).read_bytes() for name in studio.outputs()}
    newer_delivery, looks = studio.app.repository.newer_delivery, set[str]()

    def late(run_id: int, path: str) -> PendingDelivery | None:
        first = path not in looks
        looks.add(path)
        return None if first and stood_still == "between look and write" else newer_delivery(run_id, path)

    monkeypatch.setattr(studio.app.repository, "newer_delivery", late)
    summary = studio.worker().run_until_done(old)
    assert (summary.state, summary.delivered, summary.skipped_deliveries) == (RunState.DONE, 4, 2)
    assert {name: (studio.folder / "out" / name).read_bytes() for name in newer} == newer
    assert len(studio.outputs()) == 4, "what the newer run did not make has come"
    reasons = {reason for _, reason in studio.app.repository.skipped_deliveries(old)}
    assert reasons == {f"run {new.id} is newer and has delivered there"}


def test_a_stop_gives_the_leases_back_at_the_next_denoise_step(studio: Studio) -> None:
    worker = studio.worker(batch_rows=2)
    run_id = studio.submit()
    summary = worker.run_until_done(run_id, on_step=lambda done, total: worker.stopping.set())
    assert summary.finished is None
    rows = studio.app.repository.run_steps(run_id)
    assert {row.state for row in rows} == {StepState.READY, StepState.BLOCKED}
    assert studio.worker().run_until_done(run_id).state is RunState.DONE


def test_the_heartbeat_extends_the_batch_in_flight_and_no_other(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository: Repository = studio.app.repository
    worker = studio.worker(batch_rows=2)
    worker.lease_seconds = 0.15  # a beat each 50 ms; SQLite may be slow, and nobody else is here to take the steps
    run_id = studio.submit()
    beats: list[tuple[str, set[int]]] = []
    seen: list[tuple[str, set[int]]] = []

    def extend(worker_id: str, seconds: float, held: Collection[tuple[int, int]]) -> int:
        beats.append((worker_id, {step_id for step_id, _ in held}))
        return len(held)

    def on_step(done: int, total: int) -> None:
        beats.clear()
        wait_for(lambda: len(beats) >= 2)
        leased = {row.id for row in repository.run_steps(run_id) if row.state is StepState.LEASED}
        seen.append((worker.info.id, leased))
        assert beats[1] == seen[-1]

    monkeypatch.setattr(repository, "extend_leases", extend)
    with worker.registered():
        assert worker.work_once(on_step=on_step)
        assert seen
        assert seen[0][1]
        beats.clear()
        wait_for(lambda: len(beats) >= 2)
        assert beats[1] == (worker.info.id, set()), "it is committed"


def test_leases_of_a_killed_process_are_taken_over_at_once(studio: Studio) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = psutil.Process(child.pid).create_time()
    dead = WorkerInfo("dead", os.uname().nodename, child.pid, started, "cpu", {})
    studio.app.repository.register_worker(dead)
    run_id = studio.submit()
    assert studio.app.repository.claim("dead", limit=2, lease_seconds=600)
    assert gone_workers(studio.app.repository.workers()) == []
    child.kill()
    child.wait()
    assert gone_workers(studio.app.repository.workers()) == ["dead"]
    summary = studio.worker().run_until_done(run_id)
    assert summary.state is RunState.DONE


def test_workers_of_other_hosts_are_left_to_their_leases() -> None:
    elsewhere = WorkerInfo("w", "another-host", 1, 0.0, "cpu", {})
    assert gone_workers([elsewhere]) == []
    assert gone_workers([replace(elsewhere, host="here", pid=2**22 + 7)], host="here") == ["w"]


def test_a_selection_previews_a_slice_whose_work_is_reused(studio: Studio) -> None:
    worker = studio.worker()
    worker.run_until_done(studio.submit(selection=Selection(only={"item": ["mug"]}, limit=1)))
    assert studio.outputs() == ["mug_beach.png"]
    studio.editor.jobs.clear()
    studio.worker().run_until_done(studio.submit())
    assert len(studio.editor.jobs) == 6 - 2
    assert len(studio.outputs()) == 4


def test_a_deliberate_new_try_makes_another_image_and_stands(studio: Studio) -> None:
    studio.worker().run_until_done(studio.submit())
    studio.editor.jobs.clear()
    instance = ("staged", (("item", "mug"), ("scene", "snow")), 1)
    chosen = next(each for each in studio.prepare().explained if each.instance.axes == instance[1])
    again = studio.prepare(takes={(chosen.instance.node, instance[1], chosen.instance.candidate): 1})
    assert next(each.reasons for each in again.explained if each.status == "run") == ("a new try (take 1)",)


def test_a_budget_refuses_before_anything_is_stored(studio: Studio) -> None:
    studio.recipe.write_text(studio.recipe.read_text() + "budget: {outputs: 3}\n")
    with pytest.raises(PlanRefused, match="4 outputs, the budget is 3"):
        studio.submit()
    assert studio.app.repository.runs() == []


def test_garbage_goes_oldest_first_and_comes_back_when_asked_for(studio: Studio) -> None:
    studio.worker().run_until_done(studio.submit())
    told = collect_garbage(studio.app.repository, studio.app.store, Policy(keep_bytes=0), dry_run=True)
    objects = list(Path(studio.app.workspace, "objects").rglob("*.*"))
    assert told.artifacts == len(objects) > 0
    assert told.bytes == sum(each.stat().st_size for each in objects)
    done = collect_garbage(studio.app.repository, studio.app.store, Policy(keep_bytes=0))
    assert done == told
    assert list(Path(studio.app.workspace, "objects").rglob("*.*")) == []
    studio.editor.jobs.clear()
    summary = studio.worker().run_until_done(studio.submit())
    assert summary.state is RunState.DONE
    assert len(studio.editor.jobs) == 6


def test_what_lies_where_nothing_may_be_deleted_stops_no_collection(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio.worker().run_until_done(studio.submit())
    stranger = f"{studio.app.artifact_keys.root}/ab/cd/not-ours.png"
    studio.app.store.write(stranger, b"somebody else's", media_type="image/png")
    monkeypatch.setattr(studio.app.repository, "orphaned_uploads", lambda: ["file:///elsewhere/objects/a.png"])
    delete = type(studio.app.store).delete
    finished = list(studio.app.repository.artifact_uris())

    def elsewhere(self: object, uri: str) -> None:
        if uri == finished[0]:
            raise NotAllowed(uri)
        delete(self, uri)  # type: ignore[arg-type]

    monkeypatch.setattr(type(studio.app.store), "delete", elsewhere)
    collected = collect_garbage(studio.app.repository, studio.app.store, Policy(keep_bytes=0))
    assert (collected.artifacts, collected.orphans) == (len(finished) - 1, 0)
    assert list(studio.app.repository.artifact_uris()) == finished[:1]
    assert studio.app.store.read(stranger) == b"somebody else's"


def test_a_finished_run_leaves_no_more_than_the_size_limit(studio: Studio) -> None:
    worker = studio.worker()
    worker.policy = Policy(keep_bytes=3000)
    assert worker.run_until_done(studio.submit()).state is RunState.DONE
    left = [each.stat().st_size for each in Path(studio.app.workspace, "objects").rglob("*.*")]
    assert 0 < sum(left) <= 3000
    assert len(studio.outputs()) == 4


def test_weights_that_changed_since_they_were_registered_are_refused(studio: Studio) -> None:
    """They would make other pictures under the keys of the registered ones."""
    file = studio.folder / "look.safetensors"
    file.write_bytes(b"one")
    body = studio.recipe.read_text().replace("model: toy", "model: toy\n    adapters: [{name: look}]", 1)
    studio.recipe.write_text(body)

    def register() -> None:
        entry = AdapterEntry(path=file, sha256=sha256_hex(file.read_bytes()), signature=signature(file))
        studio.app.registry = studio.app.registry.with_adapter("look", entry)

    register()
    assert studio.worker().run_until_done(studio.submit()).state is RunState.DONE
    file.write_bytes(b"another")
    assert studio.prepare().refusals == ()  # all is done: no weights are needed
    studio.recipe.write_text(body.replace("Remove the background", "Take the background away"))
    (reason,) = studio.prepare().refusals
    assert "adapter 'look' are not those that were registered" in reason
    assert f"adapters add look {file}" in reason
    with pytest.raises(PlanRefused):
        studio.submit()
    register()
    assert studio.prepare().refusals == ()


@pytest.mark.parametrize("times", [1, 2], ids=["grace period over", "told twice"])
def test_a_worker_ends_although_the_database_is_away(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    worker = studio.worker()
    asked = threading.Event()

    def away(*_: object, **__: object) -> None:
        asked.set()
        raise InfrastructureError("the database does not answer")

    studio.app.repository.register_worker(worker.info)
    monkeypatch.setattr(SqlRepository, "claim", away)
    monkeypatch.setattr(SqlRepository, "release_all", away)
    turning = threading.Thread(target=worker.turn_through_outages)
    turning.start()
    assert asked.wait(10)
    for _ in range(times):
        worker.end(0.1 if times == 1 else 600)
    turning.join(10)
    assert not turning.is_alive()


def test_a_model_that_this_worker_does_not_know_is_no_fault_of_the_step() -> None:
    editor = EngineEditor(models={}, adapters={})
    params = {"model": "newer", "numeric_mode": "float32", "adapters": []}
    with pytest.raises(InfrastructureError, match="'newer' is not registered on this worker"), editor.session(params):
        pass


@dataclass
class Claimed:
    """A repository that has these deliveries to give, and hears how they end."""

    pending: list[PendingDelivery]
    settled: list[SettledDelivery] = field(default_factory=list)
    back: list[int] = field(default_factory=list)
    later: list[int] = field(default_factory=list)

    def claim_deliveries(self, worker_id: str, **_: object) -> list[PendingDelivery]:
        return self.pending

    def settle_deliveries(
        self,
        worker_id: str,
        settled: list[SettledDelivery],
        *,
        back: Sequence[int] = (),
        later: Sequence[int] = (),
    ) -> None:
        self.settled += settled
        self.back += back
        self.later += later


class OneDeadBucket:
    """`s3://dead` does not answer."""

    asked = 0

    def read(self, uri: str) -> bytes:
        return b"picture"

    def write_if_absent(self, uri: str, data: bytes, *, media_type: str) -> bool:
        if uri.startswith("s3://dead/"):
            self.asked += 1
            raise InfrastructureError("503")
        return True


def test_a_bucket_that_does_not_answer_holds_up_nobody_elses_deliveries() -> None:
    artifact = Artifact(sha256_hex(b"picture"), "s3://store/a.png", "image/png", 7, 1, 1)
    paths = ["s3://dead/1.png", "s3://dead/2.png", "s3://well/3.png", "s3://dead/4.png"]
    pending = [PendingDelivery(n, 1, path, "version", artifact) for n, path in enumerate(paths, start=1)]
    repository, store = Claimed(pending), OneDeadBucket()
    assert deliver_pending(cast(Any, repository), cast(Any, store), worker_id="w", patient=True) == 1
    assert [(each.id, each.error) for each in repository.settled] == [(3, None)]
    assert (repository.later, repository.back, store.asked) == ([1, 2, 4], [], 1)

    impatient = Claimed(pending)
    with pytest.raises(InfrastructureError):
        deliver_pending(cast(Any, impatient), cast(Any, store), worker_id="w")
    assert (impatient.settled, impatient.back) == ([], [1, 2, 3, 4])
