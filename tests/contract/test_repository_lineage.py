"""Where pictures come from and what was made from what, as the database tells it."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import sqlalchemy as sa

from kontext_batch.hashing import sha256_hex
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.plan import Plan, StepInput
from kontext_batch.ports import BatchMember, BatchRecord, InputRecord, ModelRow
from kontext_batch.ports.tracing import Place, Subject, SubjectKind
from tests.contract.plans import LANE, claim, done, failed, finish, key, make_plan, settle, source, submit, worker

MODEL, ADAPTER = sha256_hex(b"model"), sha256_hex(b"adapter")
WEIGHTS = {
    "model": "dev",
    "model_sha256": MODEL,
    "adapters": [{"name": "brand", "scale": 0.8, "sha256": ADAPTER}],
}


@pytest.fixture(autouse=True)
def _workers(repository: SqlRepository) -> None:
    repository.register_worker(worker("w1"))


def step_id(repository: SqlRepository, name: str) -> int:
    [row] = repository.find_steps(key(name))
    return row.id


def picture(name: str) -> str:
    """sha256 of what the tests' workers make of the step."""
    return sha256_hex(f"{key(name)}/image".encode())


def photo(name: str) -> Subject:
    return Subject(SubjectKind.PHOTO, name, (source(name).sha256,))


def told(repository: SqlRepository, subject: Subject, *, limit: int = 200) -> list[list[str]]:
    """Names of the steps, page by page."""
    pages: list[list[str]] = []
    after: Place | None = None
    while True:
        page = repository.made_from(subject, after=after, limit=limit)
        pages.append([step.node for step in page.steps])
        if page.after is None:
            return pages
        after = page.after


def reading(plan: Plan, name: str, sha256: str) -> Plan:
    """The plan with other content of the photo that its step `name` reads."""

    def changed(each: StepInput) -> StepInput:
        return each if each.source is None else replace(each, source=replace(each.source, sha256=sha256))

    steps = [
        replace(step, inputs=tuple(map(changed, step.inputs))) if step.key == key(name) else step for step in plan.steps
    ]
    return replace(plan, steps=tuple(steps))


# ------------------------------------------------------------------------------------------------------------- up


def test_a_step_is_told_with_all_that_made_it(repository: SqlRepository) -> None:
    run_id = submit(
        repository, make_plan({"a": [], "c": [], "old": [], "b": ["a", "old"]}, deliver=["b"], params=WEIGHTS)
    )
    a, c = claim(repository, limit=2)
    libraries = {"torch": "2.9"}
    members = (BatchMember(a.id, 0, 4, 0), BatchMember(c.id, 2, 6, 1))
    batch = BatchRecord("w1", LANE, "cuda:0", MODEL, "bfloat16", libraries, members)
    repository.commit(batch, [done(a), failed(c, retry_in=0.0)])
    finish(repository)
    [pending] = repository.pending_deliveries()
    settle(repository, pending)

    ids = [step_id(repository, name) for name in ("b", "a", "old")]
    assert set(repository.above([ids[0]])) == {(ids[0], ids[1]), (ids[0], ids[2])}
    by_node = {each.step.node: each for each in repository.traced(ids)}
    first = by_node["a"]
    assert (first.origin.run_id, first.origin.recipe, first.origin.file, first.origin.line) == (
        run_id,
        "r",
        "r.yaml",
        3,
    )
    assert first.step.params["model_sha256"] == MODEL
    assert [(read.role, read.step_id, read.uri) for read in first.reads] == [("image", None, source("a").uri)]
    [made] = first.batches
    assert (made.device, made.numeric_mode, made.libraries, made.joined, made.left) == (
        "cuda:0", "bfloat16", libraries, 0, 4,
    )  # fmt: skip
    assert [(mate.step_id, mate.joined, mate.left, mate.place) for mate in made.mates] == [(c.id, 2, 6, 1)]
    assert [each.outcome for each in first.attempts] == ["ok"]
    second = by_node["b"]
    assert [(read.role, read.position, read.step_id, read.sha256) for read in second.reads] == [
        ("image", 0, ids[1], picture("a")),
        ("reference", 0, ids[2], picture("old")),
    ]
    [delivery] = second.deliveries
    assert (delivery.run_id, delivery.delivered_path, delivery.sha256) == (run_id, pending.path, picture("b"))
    assert repository.traced([]) == []


def test_who_was_in_the_batch_at_another_time_is_no_mate(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": []}))
    a, b = claim(repository)
    members = (BatchMember(a.id, 0, 4, 0), BatchMember(b.id, 4, 8, 1))
    repository.commit(BatchRecord("w1", LANE, "cpu", None, "exact", {}, members), [done(a), done(b)])
    assert [each.batches[0].mates for each in repository.traced([a.id, b.id])] == [(), ()]


def test_the_newest_run_says_where_a_step_stands(repository: SqlRepository) -> None:
    plan = make_plan({"a": []})
    submit(repository, plan)
    finish(repository)
    moved = replace(plan.steps[0], origin=replace(plan.steps[0].origin, line=99))
    newest = submit(repository, replace(plan, steps=(moved,)))
    [a] = repository.traced([step_id(repository, "a")])
    assert (a.origin.run_id, a.origin.line) == (newest, 99)


def test_a_photo_that_was_made_here_leads_on(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"]}))
    finish(repository)
    submit(repository, reading(make_plan({"again": []}, recipe="second"), "again", picture("b")))
    finish(repository)
    ids = {name: step_id(repository, name) for name in ("a", "b", "again")}
    assert set(repository.above([ids["again"]])) == {(ids["again"], ids["b"]), (ids["b"], ids["a"])}
    [again] = repository.traced([ids["again"]])
    assert again.reads[0].step_id == ids["b"]
    assert told(repository, photo("a")) == [["a", "b", "again"]]


def test_a_step_that_changes_no_byte_of_a_photo_is_not_where_it_comes_from(
    repository: SqlRepository, engine: sa.Engine
) -> None:
    """Without marks a conversion may give the bytes that it read, or those of a step before it."""
    submit(repository, make_plan({"a": [], "b": ["a"]}))
    submit(repository, reading(make_plan({"c": []}, recipe="second"), "c", picture("a")))
    finish(repository)
    a, b, c = (step_id(repository, name) for name in "abc")
    with engine.begin() as conn:
        for each in (b, c):
            conn.execute(t.step_outputs.update().where(t.step_outputs.c.step_id == each).values(sha256=picture("a")))
    [read] = repository.traced([c])[0].reads
    assert read.step_id == a
    with engine.begin() as conn:
        conn.execute(t.step_sources.update().where(t.step_sources.c.step_id == c).values(sha256=picture("c")))
        conn.execute(t.step_outputs.update().where(t.step_outputs.c.step_id == c).values(sha256=picture("c")))
    [read] = repository.traced([c])[0].reads
    assert (read.step_id, read.sha256) == (None, picture("c"))


def test_a_signed_file_that_is_read_again_leads_on(repository: SqlRepository, engine: sa.Engine) -> None:
    submit(repository, make_plan({"a": []}, deliver=["a"]))
    finish(repository)
    settle(repository, repository.pending_deliveries()[0])
    signed = sha256_hex(b"signed")
    with engine.begin() as conn:
        conn.execute(sa.update(t.deliveries).values(file_sha256=signed))
    submit(repository, reading(make_plan({"again": []}, recipe="second"), "again", signed))
    finish(repository)
    a, again = step_id(repository, "a"), step_id(repository, "again")
    assert repository.above([again]) == [(again, a)]
    assert told(repository, photo("a")) == [["a", "again"]]
    [found] = repository.known_by_hash(signed[:9])
    assert (found.kind, found.step_ids) == (SubjectKind.STEP, (a,))


# ----------------------------------------------------------------------------------------------------------- down


@pytest.mark.parametrize("limit", [1, 2, 3, 200])
def test_what_was_made_is_told_once_however_it_is_paged(repository: SqlRepository, limit: int) -> None:
    graph: dict[str, list[str]] = {
        "a": [],
        "b": ["a"],
        "c": ["b"],
        "d": ["a", "b", "a"],
        "z": [],
        "sheet": ["c", "d", "z"],
    }
    submit(repository, make_plan(graph, deliver=["c", "sheet"]))
    finish(repository)
    for pending in repository.pending_deliveries():
        settle(repository, pending)
    pages = told(repository, photo("a"), limit=limit)
    assert all(len(page) == limit for page in pages[:-1])
    assert list(chain.from_iterable(pages)) == ["a", "b", "c", "d", "sheet"]
    assert list(chain.from_iterable(told(repository, photo("z"), limit=limit))) == ["z", "sheet"]
    page = repository.made_from(photo("a"), limit=200)
    assert [each.path for step in page.steps for each in step.deliveries] == [
        "file:///out/c.png",
        "file:///out/sheet.png",
    ]
    assert page.steps[3].parents == (page.steps[0].id, page.steps[1].id)
    assert repository.made_directly(photo("a")) == 1
    assert told(repository, photo("unknown")) == [[]]


@pytest.mark.parametrize("limit", [1, 2, 200])
def test_what_lies_below_several_steps_of_a_model_is_told_once(
    repository: SqlRepository, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("kontext_batch.lineage.impact.ROOTS_AT_ONCE", 2)
    graph: dict[str, list[str]] = {"a": [], "b": ["a"], "c": [], "d": ["c"], "sheet": ["b", "d"]}
    submit(repository, make_plan(graph, params=WEIGHTS))
    submit(repository, make_plan({"a": [], "plain": ["a"]}))
    other = make_plan({"a": [], "other": ["a"], "far": []}, params={"model_sha256": sha256_hex(b"another")})
    submit(repository, other)
    finish(repository)
    for sha256 in (MODEL, ADAPTER):
        subject = Subject(SubjectKind.WEIGHTS, "", (sha256,))
        names = list(chain.from_iterable(told(repository, subject, limit=limit)))
        assert sorted(names) == ["a", "b", "c", "d", "other", "plain", "sheet"]
        assert names[0] == "a"
        assert repository.made_directly(subject) == 5


def test_below_a_step_it_is_told_itself(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"], "c": ["b"]}, deliver=["b"]))
    subject = Subject(SubjectKind.STEP, "", step_ids=(step_id(repository, "b"),))
    assert told(repository, subject) == [["b", "c"]]
    page = repository.made_from(subject, limit=1)
    assert [each.state for each in page.steps[0].deliveries] == ["waiting"]


@pytest.mark.parametrize("limit", [1, 2, 200])
def test_a_recipe_is_told_run_by_run(repository: SqlRepository, limit: int) -> None:
    plan = make_plan({"a": [], "b": ["a"]}, deliver=["b"])
    first = submit(repository, plan)
    submit(repository, make_plan({"a": [], "b": ["a"]}, recipe="other", deliver=["b"], folder="o"))
    second = submit(repository, plan)
    subject = Subject(SubjectKind.RECIPE, "", (plan.recipe_sha256,))
    assert list(chain.from_iterable(told(repository, subject, limit=limit))) == ["a", "b", "a", "b"]
    page = repository.made_from(subject, limit=200)
    assert [(step.run_id, [each.run_id for each in step.deliveries]) for step in page.steps] == [
        (first, []), (first, [first]), (second, []), (second, [second]),
    ]  # fmt: skip
    assert repository.made_directly(subject) == 4


# ---------------------------------------------------------------------------------------------------------- names


def test_hashes_are_known_by_their_beginning(repository: SqlRepository) -> None:
    plan = make_plan({"a": [], "b": ["a"]}, params=WEIGHTS)
    submit(repository, plan)
    finish(repository)
    repository.remember_inputs([InputRecord("file:///unused.png", "1", "ab" * 32, 10, 4, 5, "PNG")])
    for digits in (8, 64):
        kinds = {
            sha256: [(each.kind, each.step_ids) for each in repository.known_by_hash(sha256[:digits])]
            for sha256 in (picture("b"), source("a").sha256, MODEL, ADAPTER, plan.recipe_sha256, "ab" * 32)
        }
        assert kinds == {
            picture("b"): [(SubjectKind.STEP, (step_id(repository, "b"),))],
            source("a").sha256: [(SubjectKind.PHOTO, ())],
            MODEL: [(SubjectKind.WEIGHTS, ())],
            ADAPTER: [(SubjectKind.WEIGHTS, ())],
            plan.recipe_sha256: [(SubjectKind.RECIPE, ())],
            "ab" * 32: [(SubjectKind.PHOTO, ())],
        }
    assert repository.known_by_hash("0" * 64) == []
    assert len(repository.known_by_hash("")) > 3


def test_weights_are_known_by_the_names_they_had(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}, params=WEIGHTS))
    repository.remember_models([ModelRow("dev-2024", "diffusers", MODEL, "x"), ModelRow("unused", "d", "cc", "x")])
    assert {(each.sha256, each.kind, each.names) for each in repository.weights()} == {
        (MODEL, "model", ("dev", "dev-2024")),
        (ADAPTER, "adapter", ("brand",)),
    }


def test_places_are_known(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"]}, deliver=["b"]))
    finish(repository)
    [pending] = repository.pending_deliveries()
    settle(repository, pending, path="file:///out/b.v12.png", version=12)
    repository.remember_inputs([InputRecord(source("a").uri, "2", "ab" * 32, 10, 4, 5, "PNG")])
    b = (step_id(repository, "b"),)
    artifact = repository.steps_by_id(b)[0].artifact
    assert artifact is not None
    for place in ("file:///out/b.v12.png", "file:///out/b.png", artifact.uri):
        [found] = repository.known_by_place(place)
        assert (found.kind, found.step_ids) == (SubjectKind.STEP, b), place
    [found] = repository.known_by_place(source("a").uri)
    assert found.kind is SubjectKind.PHOTO
    assert set(found.sha256s) == {"ab" * 32, source("a").sha256}, "what lay there before counts too"
    for place in ("file:///out/b.v2.png", "file:///out", "file:///out/b", "%", ""):
        assert repository.known_by_place(place) == [], place


def test_of_one_place_the_newest_file_is_meant(repository: SqlRepository) -> None:
    for name in ("a", "b"):
        plan = make_plan({name: []}, deliver=[name])
        [delivery] = plan.deliveries
        submit(repository, replace(plan, deliveries=(replace(delivery, path="file:///out/x.png"),)))
        finish(repository)
        settle(repository, repository.pending_deliveries()[0])
        [found] = repository.known_by_place("file:///out/x.png")
        assert found.step_ids == (step_id(repository, name),)


def test_a_picture_that_was_made_anew_is_known_by_its_first_bytes(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    finish(repository)
    first = picture("a")
    repository.lost_artifact(first)
    submit(repository, make_plan({"a": []}, deliver=["a"]))
    [step] = claim(repository)
    again = done(step)
    [output] = again.outputs
    other = replace(output.artifact, sha256="cd" * 32, uri="file:///objects/other")
    repository.intend_uploads([(other.uri, step.id, step.token)])
    repository.commit(None, [replace(again, outputs=(replace(output, artifact=other),))])
    for sha256 in (first, "cd" * 32):
        [found] = repository.known_by_hash(sha256)
        assert found.step_ids == (step.id,)
