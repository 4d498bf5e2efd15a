"""What went into a picture, asked for a batch at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import sqlalchemy as sa

from kontext_batch.hashing import sha256_hex
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.marking import Ancestry
from kontext_batch.planning.plan import Plan
from kontext_batch.ports import BatchMember, BatchRecord, ModelRow
from tests.contract import plans

WEIGHTS = "c" * 64


def operated(plan: Plan, **operations: str) -> Plan:
    """The plan with these steps' operations."""
    named = {plans.key(name): operation for name, operation in operations.items()}
    steps = [replace(step, operation=named.get(step.key, step.operation)) for step in plan.steps]
    return replace(plan, steps=tuple(steps))


def ancestry_of(repository: SqlRepository) -> dict[str, Ancestry]:
    """Of every step, as its worker is told when it claims it."""
    found: dict[str, Ancestry] = {}
    while leased := plans.claim(repository):
        found |= {step.key: step.ancestry for step in leased}
        repository.commit(None, [plans.done(step) for step in leased])
    return found


def test_a_claim_tells_what_goes_into_each_picture(repository: SqlRepository) -> None:
    graph = {
        "edit": [],
        "finish": ["edit"],
        "again": ["finish"],
        "convert": [],
        "converted": ["convert"],
        "sheet": ["converted", "again"],
    }
    plan = plans.make_plan(graph)
    plan = operated(plan, finish="finish", again="finish", convert="finish", converted="finish", sheet="contact_sheet")
    words = replace(plan.steps[0], key=plans.key("words"), operation="generate", inputs=())
    redone = replace(plan.steps[1], key=plans.key("redone"), operation="edit")
    read = replace(redone.inputs[0], parent=words.key)
    redone = replace(redone, inputs=(read,))
    logo = replace(plan.steps[3].inputs[0], role="logo")
    branded = replace(plan.steps[1], key=plans.key("branded"), inputs=(replace(read, parent=redone.key), logo))
    steps = (*plan.steps, words, redone, branded)
    added = [replace(plan.instances[0], node=step.operation, key=step.key) for step in (words, redone, branded)]
    instances = [*plan.instances, *(replace(each, candidate=n) for n, each in enumerate(added, start=2))]
    plans.submit(repository, replace(plan, steps=steps, instances=tuple(instances)))

    repository.register_worker(plans.worker())
    photo, model, both = Ancestry(photo=True), Ancestry(model=True), Ancestry(model=True, photo=True)
    expected = {
        "edit": both,
        "finish": both,
        "again": both,
        "convert": photo,
        "converted": photo,
        "sheet": both,
        "words": model,
        "redone": model,
        "branded": both,
    }
    assert ancestry_of(repository) == {plans.key(name): each for name, each in expected.items()}


def test_delivered_pictures_are_told_with_their_whole_chain(repository: SqlRepository) -> None:
    plan = plans.make_plan(
        {"base": [], "edit": ["base"], "other": []}, deliver=["edit", "other"], params={"model_sha256": WEIGHTS}
    )
    run_id = plans.submit(repository, plan)
    repository.remember_models([ModelRow("tiny", "diffusers", WEIGHTS, "Apache-2.0")])
    repository.register_worker(plans.worker())
    while leased := plans.claim(repository):
        members = tuple(BatchMember(step.id, 0, 1, place) for place, step in enumerate(leased))
        record = BatchRecord("w1", leased[0].lane, "cuda:0", WEIGHTS, "bfloat16", {"torch": "2"}, members)
        repository.commit(record, [plans.done(step) for step in leased])
    pending = {each.path.rpartition("/")[2]: each.id for each in repository.pending_deliveries(run_id)}

    found = repository.delivered_pictures(list(pending.values()))

    assert set(found) == set(pending.values())
    edit = found[pending["edit.png"]]
    assert (edit.run_id, edit.recipe, edit.recipe_sha256) == (run_id, "r", plan.recipe_sha256)
    assert (edit.file, edit.line, edit.node, edit.axes, edit.candidate, edit.take) == (
        "r.yaml",
        3,
        "edit",
        (("item", "edit"),),
        1,
        0,
    )
    assert edit.ancestry == Ancestry(model=True, photo=True)
    assert edit.licences == {WEIGHTS: "Apache-2.0"}
    made, base = edit.steps
    assert (made.key, base.key) == (plans.key("edit"), plans.key("base"))
    assert [(each.role, each.key) for each in made.parents] == [("image", plans.key("base"))]
    assert base.sha256 is not None
    assert made.parents[0].sha256 == base.sha256
    assert (base.parents, made.sources) == ((), ())
    assert [each.sha256 for each in base.sources] == [plans.source("base").sha256]
    assert (made.device, made.numeric_mode, made.libraries) == ("cuda:0", "bfloat16", {"torch": "2"})
    assert made.started is not None
    assert made.ended is not None
    assert made.started <= made.ended
    assert [each.key for each in found[pending["other.png"]].steps] == [plans.key("other")]
    assert repository.delivered_pictures([]) == {}


def test_above_a_sheet_only_its_cells_are_named(repository: SqlRepository) -> None:
    plan = operated(
        plans.make_plan({"a": [], "b": ["a"], "sheet": ["b"], "final": ["sheet"]}, deliver=["final"]),
        sheet="contact_sheet",
        final="finish",
    )
    run_id = plans.submit(repository, plan)
    repository.register_worker(plans.worker())
    plans.finish(repository)
    (pending,) = repository.pending_deliveries(run_id)

    picture = repository.delivered_pictures([pending.id])[pending.id]

    assert [each.key for each in picture.steps] == [plans.key("final"), plans.key("sheet")]
    assert [each.key for each in picture.steps[1].parents] == [plans.key("b")]
    assert picture.ancestry == Ancestry(model=True, photo=True)


def test_what_was_signed_is_recorded_beside_the_artifact(repository: SqlRepository) -> None:
    run_id = plans.submit(repository, plans.make_plan({"a": []}, deliver=["a"]))
    repository.register_worker(plans.worker())
    plans.finish(repository)
    (pending,) = repository.claim_deliveries("w1", limit=8, seconds=60, run_id=run_id)
    plans.settle(repository, pending, file_sha256="f" * 64)
    with repository._db._reading.begin() as conn:
        recorded = conn.execute(sa.select(t.deliveries.c.sha256, t.deliveries.c.file_sha256)).one()
    assert tuple(recorded) == (pending.artifact.sha256, "f" * 64)


def test_a_picture_that_is_read_as_a_photo_brings_along_what_it_came_from(repository: SqlRepository) -> None:
    """A model's picture stays one when a later run crops it, once or twice, signed or not."""
    repository.register_worker(plans.worker())
    first = plans.make_plan({"edit": [], "words": []}, deliver=["edit"])
    words = replace(first.steps[1], operation="generate", inputs=())
    run_id = plans.submit(repository, replace(first, steps=(first.steps[0], words)))
    plans.finish(repository)
    (pending,) = repository.pending_deliveries(run_id)
    plans.settle(repository, pending, file_sha256="5" * 64)
    made = {name: sha256_hex(f"{plans.key(name)}/image".encode()) for name in ("edit", "words", "crop")}
    read = {"crop": made["edit"], "signed": "5" * 64, "drawn": made["words"], "own": "6" * 64}
    plan = plans.make_plan({name: [] for name in read}, recipe="second")
    plans.submit(repository, reading(operated(plan, **dict.fromkeys(read, "finish")), read))
    photo, model, both = Ancestry(photo=True), Ancestry(model=True), Ancestry(model=True, photo=True)

    expected = {"crop": both, "signed": both, "drawn": model, "own": photo}
    assert ancestry_of(repository) == {plans.key(name): each for name, each in expected.items()}

    plan = operated(plans.make_plan({"again": []}, recipe="third", deliver=["again"]), again="finish")
    run_id = plans.submit(repository, reading(plan, {"again": made["crop"]}))
    assert ancestry_of(repository) == {plans.key("again"): both}
    (pending,) = repository.pending_deliveries(run_id)
    assert repository.delivered_pictures([pending.id])[pending.id].ancestry == both


def reading(plan: Plan, sha256s: Mapping[str, str]) -> Plan:
    """The plan whose steps read photos of these contents, by name."""
    sources = {plans.key(name): replace(plans.source(name), sha256=sha256) for name, sha256 in sha256s.items()}
    steps = [replace(step, inputs=(replace(step.inputs[0], source=sources[step.key]),)) for step in plan.steps]
    return replace(plan, steps=tuple(steps))
