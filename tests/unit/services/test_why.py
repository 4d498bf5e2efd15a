"""Why a step was computed or was not, as `explain` tells it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from PIL import Image

from kontext_batch.errors import InfrastructureError, StepError
from kontext_batch.planning.states import StepState
from kontext_batch.ports import Act, EditJob, StepRow
from kontext_batch.services.takedown import go_on
from kontext_batch.services.why import Explainer
from tests.unit.services.conftest import RECIPE, Studio


def why(studio: Studio, node: str, item: str, scene: str | None = None, *, run: int = 1) -> Sequence[str]:
    return Explainer(studio.app.repository).why(row(studio, node, item, scene, run=run))


def row(studio: Studio, node: str, item: str, scene: str | None = None, *, run: int = 1) -> StepRow:
    wanted = {"item": item} | ({} if scene is None else {"scene": scene})
    rows = studio.app.repository.run_steps(run)
    return next(each for each in rows if each.node == node and dict(each.axes) == wanted)


def run(studio: Studio, recipe: str = RECIPE) -> int:
    studio.recipe.write_text(recipe)
    return studio.worker().run_until_done(studio.submit()).id


def test_a_first_run_has_never_run(studio: Studio) -> None:
    run(studio)
    assert why(studio, "clean", "mug") == ["never run before run 1 (shop.yaml:9)"]


def test_a_changed_prompt_is_told_with_its_line_and_its_readers_with_the_step(studio: Studio) -> None:
    run(studio)
    run(studio, RECIPE.replace("Change the", "Paint the"))
    assert why(studio, "staged", "mug", "snow", run=2) == ["since run 1: prompt changed (shop.yaml:18)"]
    replaced = row(studio, "staged", "mug", "snow", run=2).id
    assert why(studio, "finish", "mug", "snow", run=2) == [
        "since run 1: staged changed",
        f"step {replaced} staged item=mug scene=snow: prompt changed (shop.yaml:18)",
    ]
    assert why(studio, "staged", "mug", "snow") == [
        "never run before run 1 (shop.yaml:14)",
        f"replaced in run 2 by step {replaced}: prompt changed (shop.yaml:18)",
    ]


def test_where_a_change_began_is_told_however_far_above(studio: Studio) -> None:
    run(studio)
    Image.new("RGB", (64, 64), "green").save(studio.folder / "photos" / "mug.png")
    run(studio)
    clean = row(studio, "clean", "mug", run=2).id
    assert why(studio, "finish", "mug", "snow", run=2) == [
        "since run 1: staged changed",
        f"step {clean} clean item=mug: input bytes changed (mug.png)",
    ]


def test_a_line_is_that_of_the_recipe_as_it_was_then(studio: Studio) -> None:
    run(studio)
    run(studio, "# a word\n" + RECIPE.replace("Change the", "Paint the"))
    studio.recipe.write_text("gone")
    assert why(studio, "staged", "mug", "snow", run=2) == ["since run 1: prompt changed (shop.yaml:19)"]


def test_changed_bytes_of_a_photo(studio: Studio) -> None:
    run(studio)
    Image.new("RGB", (64, 64), "green").save(studio.folder / "photos" / "mug.png")
    run(studio)
    assert why(studio, "clean", "mug", run=2) == ["since run 1: input bytes changed (mug.png)"]


def test_what_was_found_says_which_run_it_was_made_for(studio: Studio) -> None:
    run(studio)
    run(studio, RECIPE.replace("Change the", "Paint the"))
    worker = studio.app.repository.attempts(row(studio, "clean", "mug").id)[0].worker_id
    told = why(studio, "clean", "mug", run=2)
    assert told[0] == "never run before run 1 (shop.yaml:9)"
    assert told[1].startswith(f"found, not computed, by run 2: made for run 1 by worker {worker}, 20")


def test_a_picture_that_somebody_did_not_like(studio: Studio) -> None:
    run(studio)
    instance = ("staged", (("item", "mug"), ("scene", "snow")), 1)
    ready = studio.prepare(takes={instance: 1})
    from kontext_batch.services.prepare import submit

    by = Act("ann", "cli", "runs retry --take")
    submit(studio.app.repository, studio.app.wake_ups, ready, trigger="cli", by=by)
    made = row(studio, "staged", "mug", "snow", run=2)
    assert why(studio, "staged", "mug", "snow", run=2)[:2] == [
        "since run 1: a new try (take 1)",
        "the picture of before was rejected: ann asked for another with `runs retry --take`",
    ]
    assert why(studio, "staged", "mug", "snow")[1:] == [
        f"replaced in run 2 by step {made.id}: a new try (take 1)",
        "it was rejected: ann asked for another with `runs retry --take`",
    ]


def test_a_lost_lease_and_a_quarantine(studio: Studio) -> None:
    studio.submit()
    repository = studio.app.repository
    names = []
    for _ in range(3):
        info = studio.worker().info
        repository.register_worker(info)
        repository.claim(info.id, limit=1, lease_seconds=60)
        repository.reconcile(gone_workers=[info.id])
        names.append(info.id)
    lost = next(each for each in repository.run_steps(1) if each.state is StepState.QUARANTINED)
    told = why(studio, "clean", dict(lost.axes)["item"])
    assert told[0].startswith("never run before run 1")
    for number, name in enumerate(names):
        assert told[number + 1].startswith(f"lease lost (worker {name}, attempt {number + 1}, 20")
        assert told[number + 1].endswith(": the worker is gone, or was silent for too long")
    assert told[4] == "quarantined: 3 workers were lost with it; `runs retry RUN --failed` tries it again"
    below = why(studio, "staged", dict(lost.axes)["item"], "snow")
    assert below[1].startswith(f"skipped because step {lost.id} clean item=")
    assert "quarantined" in below[1]


def test_a_step_below_one_that_failed(studio: Studio) -> None:
    def fault(job: EditJob) -> Exception | None:
        return StepError("too dark") if "Remove" in job.params["prompt"] else None

    studio.editor.fault = fault
    run(studio)
    failed = row(studio, "clean", "mug")
    assert why(studio, "finish", "mug", "snow")[1:] == [
        f"skipped because step {failed.id} clean item=mug failed: too dark"
    ]
    studio.editor.fault = lambda job: None
    studio.worker().run_until_done(studio.submit())
    assert why(studio, "clean", "mug")[1] == "asked for again: it had ended as error"


def test_what_was_put_back_or_given_back(studio: Studio) -> None:
    faults = [InfrastructureError("the device hiccuped")]
    studio.editor.fault = lambda job: faults.pop() if faults else None
    run(studio)
    told = [line for item in ("mug", "bag") for line in why(studio, "clean", item)]
    assert [line for line in told if line.startswith("put back (worker ") and line.endswith(": the device hiccuped")]


def test_what_waits_says_for_what(studio: Studio) -> None:
    studio.submit()
    clean = row(studio, "clean", "mug")
    assert why(studio, "clean", "mug")[1:] == ["it is ready and waits: no worker has claimed it yet"]
    assert why(studio, "staged", "mug", "snow")[1:] == [f"it waits for step {clean.id} clean item=mug (ready)"]
    studio.app.repository.pause_run(1)
    assert why(studio, "clean", "mug")[1:] == ["it is ready and waits: run 1 is paused"]
    studio.app.repository.cancel_run(1, reason="over its budget")
    assert why(studio, "clean", "mug")[1:] == ["cancelled: no open run wants it; run 1 is cancelled (over its budget)"]


def test_a_collected_picture_and_one_that_was_made_again(studio: Studio) -> None:
    run(studio)
    repository, made = studio.app.repository, row(studio, "clean", "mug")
    assert made.artifact is not None
    repository.lost_artifact(made.artifact.sha256, studio.app.store.delete)
    assert why(studio, "clean", "mug")[1].startswith("its picture was collected at 20")
    run(studio, RECIPE.replace("Change the", "Paint the"))
    assert why(studio, "clean", "mug")[1] == "asked for again: its picture was collected or lost"


def test_a_picture_that_was_taken_down_is_not_made_again(studio: Studio) -> None:
    run(studio)
    repository = studio.app.repository
    [photo] = repository.photos((studio.folder / "photos" / "mug.png").as_uri())
    by = Act("ann", "cli", "forget")
    repository.take_down(photo, "consent", uris=[], removes=lambda uri: False, despite_hold=False, by=by)
    go_on(repository, studio.app.store)
    said = why(studio, "clean", "mug")[1]
    assert said.startswith("its picture was taken down at 20")
    assert said.endswith(" by ann: consent; nothing makes it again")


def test_steps_that_a_takedown_cancelled_say_so(studio: Studio) -> None:
    studio.submit()
    repository, info = studio.app.repository, studio.worker().info
    repository.register_worker(info)
    steps = repository.claim(info.id, limit=8, lease_seconds=60)
    [photo] = repository.photos((studio.folder / "photos" / "mug.png").as_uri())
    by = Act("ann", "cli", "forget")
    repository.take_down(photo, "consent", uris=[], removes=lambda uri: False, despite_hold=False, by=by)
    assert steps
    late, cancelled = why(studio, "clean", "mug")[1:]
    assert late.startswith("a late result was dropped (worker ")
    assert late.endswith("): taken down: consent")
    assert cancelled == "cancelled: taken down: consent"
    assert why(studio, "staged", "mug", "snow")[1:] == ["cancelled: taken down: consent"]


@pytest.mark.parametrize("text", ["", "a: [", "x" * 300_000])
def test_a_recipe_that_cannot_be_read_leaves_the_line_of_the_step(studio: Studio, text: str) -> None:
    run(studio)
    run(studio, RECIPE.replace("Change the", "Paint the"))
    explainer = Explainer(studio.app.repository)
    studio.app.repository.recipe_text = lambda run_id: text  # type: ignore[method-assign]
    assert explainer.why(row(studio, "staged", "mug", "snow", run=2)) == ["since run 1: prompt changed (shop.yaml:14)"]
