"""A folder that people drop recipes into: what comes of each, what is answered, whoever dies in between."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from PIL import Image

from kontext_batch.bootstrap import Application, inbox_places, open_application
from kontext_batch.errors import InfrastructureError, NotAllowed, SettingsError, StepError
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.engine import close_database, open_database
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.inbox import DropState, Place
from kontext_batch.planning.states import RunState
from kontext_batch.ports import Notice, ObjectInfo
from kontext_batch.registry import ModelEntry, Registry
from kontext_batch.report.aside import ReportsAside
from kontext_batch.services.inbox import MAX_TRIES
from kontext_batch.services.prepare import Planner
from kontext_batch.settings import Inbox, InboxBudget, Settings
from kontext_batch.storage.local import LocalStore
from kontext_batch.storage.uris import file_uri
from tests.unit.services.conftest import ToyEditor, wait_for

RECIPE = """\
version: 1
name: shop
owner: studio@acme.example
budget: {outputs: 4}
inputs:
  item: {glob: "photos/*"}
steps:
  clean: {op: edit, model: toy, image: "${item.file}", prompt: Remove the background.}
  finish: {op: finish, image: "${clean}", size: 32x32, format: png}
outputs:
  - {from: "${finish}", to: "DAM/${item}.${ext}"}
"""


@dataclass
class Desk:
    """An inbox with its application, as somebody sees it who knows only the folder."""

    folder: Path
    dam: Path
    app: Application
    editor: ToyEditor

    @property
    def repository(self) -> SqlRepository:
        return self.app.repository

    @property
    def recipe(self) -> str:
        return RECIPE.replace("DAM", str(self.dam))

    def drop(self, name: str, text: str | bytes) -> Path:
        file = self.folder / name
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    def plan_of(self, place: Place, more: Sequence[str]) -> Planner:
        return self.app.inbox_planner(place, more)

    def tick(self, **changes: Any) -> list[int]:
        return replace(self.app.watcher(), **changes).tick(self.plan_of)

    def settle(self) -> list[int]:
        """Until what is there is whole, and everybody may look again."""
        return [*self.tick(), *self.hurry().tick()]

    def hurry(self) -> Desk:
        """As if time had passed: nobody waits for anything."""
        engine = open_database(self.app.database_url)
        with engine.begin() as conn:
            conn.execute(sa.update(t.inbox).values(claimed_until=sa.literal_column("'2026-01-01 00:00:00.000'")))
        close_database(engine)
        return self

    def work(self, run_id: int) -> RunState:
        worker = self.app.worker()
        worker.executor = replace(worker.executor, editor=self.editor)
        return worker.run_until_done(run_id).state

    def status(self, stem: str = "x") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{stem}.status.json").read_text())
        return found

    def errors(self, stem: str = "x") -> str:
        return (self.folder / f"{stem}.errors.txt").read_text()

    def names(self) -> list[str]:
        return sorted(file.name for file in self.folder.iterdir())

    def acts(self) -> list[tuple[str, str, str, str, str]]:
        """Who did what to which run, and by which file, the oldest first."""
        return [
            (row.who, row.via, row.action, row.subject, str(row.details["file"]).rpartition("/")[2])
            for row in reversed(self.repository.audit())
        ]

    def states(self) -> list[DropState]:
        return [row.state for row in reversed(self.repository.drops())]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr("kontext_batch.editor.count_tokens", lambda model, prompt: 5)
    folder, dam, models_file = tmp_path / "inbox" / "acme", tmp_path / "dam", tmp_path / "models.json"
    (folder / "photos").mkdir(parents=True)
    dam.mkdir()
    for name, colour in (("mug", "red"), ("bag", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / "photos" / f"{name}.png")
    entry = ModelEntry(path=folder, sha256="a" * 64, signature="", layout="bfl", native_area=4096, text_length=64)
    Registry().with_model("toy", entry).write(models_file)
    inbox = Inbox(prefix=str(folder), owner="studio@acme.example", budget=InboxBudget(outputs=10), write=(str(dam),))
    settings = Settings(models_file=models_file, device="cpu", inboxes=(inbox,))
    app = open_application(settings, workspace=tmp_path / "ws")
    yield Desk(folder, dam, app, ToyEditor())
    app.close()


def test_a_dropped_recipe_runs_and_is_answered(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe)
    assert desk.tick() == []  # it may still be being written
    assert desk.names() == ["photos", "x.yaml"]
    [run_id] = desk.hurry().tick()
    assert desk.names() == ["photos", "x.plan.txt", "x.status.json", "x.yaml"]
    told = desk.status()
    assert (told["file"], told["state"], told["run"], told["outputs"], told["delivered"]) == (
        "x.yaml",
        "running",
        run_id,
        2,
        0,
    )
    plan = (desk.folder / "x.plan.txt").read_text().splitlines()
    assert plan[0].startswith("shop of studio@acme.example, revision ")
    assert plan[-1] == "2 outputs; budget: outputs 4"
    summary = desk.repository.run(run_id)
    assert (summary.trigger, summary.owner, summary.source) == (
        "inbox",
        "studio@acme.example",
        file_uri(desk.folder / "x.yaml"),
    )
    assert desk.acts() == [("studio@acme.example", "inbox", "submit", f"run:{run_id}", "x.yaml")]
    assert desk.work(run_id) is RunState.DONE
    assert desk.hurry().tick() == []
    assert desk.status()["state"] == "done"
    assert desk.status()["message"] == f"run {run_id} ended as done: 4 of 4 steps done, 2 of 2 outputs delivered"
    report = (desk.folder / "x.report.html").read_text()
    assert f'<a href="{file_uri(desk.dam / "mug.png")}">' in report
    assert desk.states() == [DropState.FINISHED]
    before = {file: file.stat().st_mtime_ns for file in desk.folder.iterdir()}
    assert desk.hurry().tick() == []
    assert before == {file: file.stat().st_mtime_ns for file in desk.folder.iterdir()}  # and there is peace


def test_what_failed_is_in_the_report_and_harmless_there(desk: Desk) -> None:
    desk.editor.fault = lambda job: StepError("<script>alert(1)</script>")
    desk.drop("x.yaml", desk.recipe)
    [run_id] = desk.settle()
    assert desk.work(run_id) is RunState.FAILED
    desk.hurry().tick()
    assert (desk.status()["state"], desk.status()["steps"]) == ("failed", {"failed": 2, "skipped": 2})
    report = (desk.folder / "x.report.html").read_text()
    assert "clean item=mug" in report
    assert "<script>" not in report
    assert "&lt;script&gt;alert(1)" in report


def test_a_wrong_recipe_is_refused_with_its_lines(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe.replace("${clean}", "${claen}"))
    assert desk.settle() == []
    assert desk.errors().startswith("x.yaml:9:31 steps.finish.image: ")
    assert "did you mean 'clean'" in desk.errors()
    assert desk.status()["state"] == "refused"
    assert desk.status()["errors"] == desk.errors().splitlines()
    assert desk.names() == ["photos", "x.errors.txt", "x.status.json", "x.yaml"]
    [row] = desk.repository.drops()
    assert (row.state, row.error) == (DropState.REFUSED, desk.errors().strip())
    # Put right, it runs, and the old errors are gone.
    desk.drop("x.yaml", desk.recipe)
    [run_id] = desk.settle()
    assert desk.names() == ["photos", "x.plan.txt", "x.status.json", "x.yaml"]
    assert desk.repository.runs()[0].id == run_id


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("owner: studio@acme.example\n", "", "x.yaml:1:1 owner: an owner is required here: write `owner: studio@acme"),
        ("studio@acme", "boss@acme", "x.yaml:3:8 owner: 'boss@acme.example' is not the owner of this inbox"),
        ("budget: {outputs: 4}\n", "", "budget: a budget is required here: write `budget: {outputs: N}`, N up to 10"),
        ("{outputs: 4}", "{gpu_minutes: 4}", "x.yaml:4:9 budget: a budget is required here"),
        ("{outputs: 4}", "{outputs: 11}", "x.yaml:4:19 budget.outputs: 11; recipes of this inbox have at most 10"),
        ("{outputs: 4}", "{outputs: 1}", "x.yaml: 2 outputs, the budget is 1"),
        ("DAM/", "ELSEWHERE/", "lies outside of what this recipe may write"),
        ('"DAM/', '"out/', "lies outside of what this recipe may write"),
        ("photos/*", "WS/*", "lies outside of what this recipe may read"),
    ],
)
def test_what_an_inbox_does_not_allow_is_refused(desk: Desk, tmp_path: Path, old: str, new: str, words: str) -> None:
    text = RECIPE.replace(old, new).replace("DAM", str(desk.dam)).replace("ELSEWHERE", str(tmp_path / "ws"))
    desk.drop("x.yaml", text.replace("WS", str(tmp_path / "ws")))
    assert desk.settle() == []
    assert words in desk.errors()
    assert desk.repository.runs() == []


def test_the_rest_of_the_world_is_out_of_reach(desk: Desk, tmp_path: Path) -> None:
    brand = tmp_path / "ws" / "brand.yaml"  # of the workspace, which the watcher itself may read
    brand.write_text("kind: brand\ncolors: {red: '#ff0000'}\n")
    desk.drop("x.yaml", desk.recipe + f"import: [{brand}]\n")
    os.symlink(brand, desk.folder / "link.yaml")
    os.symlink(desk.dam, desk.folder / "dam")  # where its recipes may write, and nobody drops any
    (desk.dam / "z.yaml").write_text(desk.recipe)
    assert desk.settle() == []
    assert "may not be read" in desk.errors()
    assert [row.uri.rpartition("/")[2] for row in desk.repository.drops()] == ["x.yaml"]
    assert [file.name for file in desk.dam.iterdir()] == ["z.yaml"]


def test_answers_and_what_is_no_recipe_are_left_alone(desk: Desk) -> None:
    for name in (".x.yaml", "x.yaml.part", "x.yaml.tmp", "x.txt", "y.status.json", "y.plan.txt", "y.errors.txt"):
        desk.drop(name, desk.recipe)
    desk.drop("brand.yaml", "kind: brand\n")
    (desk.folder / ".git").mkdir()
    desk.drop(".git/x.yaml", desk.recipe)
    assert desk.settle() == []
    assert desk.states() == [DropState.IGNORED]
    assert "brand.status.json" not in desk.names()


def test_the_same_bytes_do_nothing_and_changed_ones_run(desk: Desk) -> None:
    file = desk.drop("x.yaml", desk.recipe)
    [first] = desk.settle()
    os.utime(file, (1, 1))
    assert desk.settle() == []
    assert desk.states() == [DropState.ACCEPTED, DropState.REPEATED]
    desk.drop("x.yaml", desk.recipe.replace("32x32", "16x16"))
    [second] = desk.settle()
    assert desk.status()["run"] == second
    assert desk.work(first) is RunState.DONE  # goes on, and is spoken of no more
    desk.hurry().tick()
    assert desk.status()["run"] == second
    assert "x.report.html" not in desk.names()
    assert desk.states() == [DropState.FINISHED, DropState.REPEATED, DropState.ACCEPTED]


def test_a_half_written_file_is_not_read(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe[:100])
    assert desk.tick() == []
    desk.drop("x.yaml", desk.recipe)
    assert desk.hurry().tick() == []
    assert len(desk.hurry().tick()) == 1
    assert desk.states() == [DropState.ACCEPTED]
    assert not (desk.folder / "x.errors.txt").exists()


def test_a_cancel_file_cancels(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe)
    [run_id] = desk.settle()
    desk.drop("x.cancel", "")
    assert desk.tick() == []
    assert desk.repository.run(run_id).state is RunState.CANCELLED
    assert desk.status()["state"] == "cancelled"
    assert "x.report.html" in desk.names()
    assert desk.states() == [DropState.CANCELLED]
    acts = [
        ("studio@acme.example", "inbox", action, f"run:{run_id}", file)
        for action, file in (("submit", "x.yaml"), ("runs cancel", "x.cancel"))
    ]
    assert desk.acts() == acts
    # Tried again by the administrator, it is not cancelled by the file that still lies there.
    desk.repository.retry_run(run_id)
    desk.tick()
    assert desk.status()["state"] == "running"
    assert "x.report.html" not in desk.names()
    assert desk.acts() == acts
    # A new recipe is none of its business.
    os.utime(desk.folder / "x.cancel", (1, 1))
    desk.drop("x.yaml", desk.recipe.replace("32x32", "16x16"))
    [second] = desk.settle()
    assert desk.repository.run(second).state is RunState.RUNNING


def bundle(desk: Desk, **members: str | bytes) -> bytes:
    out = io.BytesIO()
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(picture, "PNG")
    table = "sku,name\nRX 100,Runner\n"
    recipe = desk.recipe.replace('glob: "photos/*"', 'table: items.csv, key: sku, files: {file: "p/${item.sku}.png"}')
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in {
            "s/spring.yaml": recipe,
            "s/items.csv": table,
            "s/p/RX 100.png": picture.getvalue(),
            **members,
        }.items():
            archive.writestr(name, data)
    return out.getvalue()


def test_a_bundle_runs(desk: Desk) -> None:
    desk.drop("x.zip", bundle(desk))
    [run_id] = desk.settle()
    assert desk.work(run_id) is RunState.DONE
    assert [file.name for file in desk.dam.glob("*.png")] == ["RX 100.png"]
    assert desk.repository.run(run_id).source.startswith(desk.app.artifact_keys.bundles)
    desk.hurry().tick()
    assert desk.status()["state"] == "done"


def test_a_bad_bundle_is_refused_and_nothing_of_it_is_written(desk: Desk, tmp_path: Path) -> None:
    desk.drop("x.zip", bundle(desk, **{"../../evil.txt": "gotcha"}))
    desk.drop("y.zip", bundle(desk, **{"s/spring.yaml": desk.recipe.replace("${clean}", "${claen}")}))
    assert desk.settle() == []
    assert desk.errors() == "x.zip/../../evil.txt: has '.', '..' or nothing between two '/' in its path\n"
    assert desk.errors("y").startswith("y.zip/s/spring.yaml:9:31 steps.finish.image: ")
    assert not list(tmp_path.rglob("evil*"))


def test_what_is_too_large_is_refused_unread(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe + "#" * 300_000)
    watcher = desk.app.watcher()
    desk.drop("y.zip", bundle(desk))
    small = replace(watcher.limits, max_bytes=100)
    assert desk.tick(limits=small) == []
    assert desk.hurry().tick(limits=small) == []
    assert desk.errors() == "x.yaml: a recipe has at most 262144 bytes\n"
    assert desk.errors("y") == "y.zip: a bundle has at most 100 bytes\n"


def test_two_watchers_at_once_start_one_run(desk: Desk) -> None:
    """The second looks while the first is in the middle of planning."""
    desk.drop("x.yaml", desk.recipe)
    desk.tick()
    desk.hurry()
    inner: list[list[int]] = []

    def planner(place: Place, more: Sequence[str]) -> Planner:
        inner.append(desk.tick())
        return desk.plan_of(place, more)

    assert len(desk.app.watcher().tick(planner)) == 1
    assert inner == [[]]
    assert len(desk.repository.runs()) == 1


class Killed(BaseException):
    """As a process that is gone: nothing is caught, nothing is tidied."""


@pytest.mark.parametrize("ending", [".status.json", ".plan.txt", ".report.html", ".errors.txt"])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_around_any_answer_leads_to_one_run_and_all_answers(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, ending: str, after: bool
) -> None:
    good, bad = desk.drop("x.yaml", desk.recipe), desk.drop("y.yaml", desk.recipe.replace("${clean}", "${claen}"))
    desk.tick()
    crashes = 0
    real_write = LocalStore.write

    def write(self: LocalStore, uri: str, data: bytes, *, media_type: str) -> Any:
        nonlocal crashes
        if uri.endswith(ending):
            crashes += 1
            if crashes in (1, 3):
                if after:
                    real_write(self, uri, data, media_type=media_type)
                raise Killed
        return real_write(self, uri, data, media_type=media_type)

    monkeypatch.setattr(LocalStore, "write", write)
    for _ in range(12):
        desk.hurry()
        try:
            desk.tick()
        except Killed:
            continue
        for run in desk.repository.runs():
            desk.work(run.id)
    assert crashes >= 2
    assert [run.state for run in desk.repository.runs()] == [RunState.DONE]
    assert desk.status()["state"] == "done"
    assert desk.status("y")["state"] == "refused"
    assert sorted(desk.names()) == sorted(
        ["photos", good.name, "x.plan.txt", "x.report.html", "x.status.json", bad.name, "y.errors.txt", "y.status.json"]
    )


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["claim_drop", "note_drop", "create_run", "settle_answer", "settle_drop"])
def test_a_crash_around_any_transaction_leads_to_one_run_and_all_answers(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    desk.drop("x.yaml", desk.recipe)
    desk.drop("y.yaml", desk.recipe.replace("${clean}", "${claen}"))
    desk.tick()
    desk.hurry()
    real = getattr(SqlRepository, method)

    def crash(*arguments: Any, **named: Any) -> Any:
        if after:
            real(*arguments, **named)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SqlRepository, method, crash)
        killed = False
        for _ in range(3):  # a settled answer comes a tick later than the run
            try:
                desk.tick()
            except Killed:
                killed = True
            desk.hurry()
        assert killed
    for _ in range(4):
        desk.hurry().tick()
    [run] = desk.repository.runs()
    assert (desk.status()["run"], desk.status()["state"]) == (run.id, "running")
    assert (desk.folder / "x.plan.txt").exists()
    assert desk.status("y")["state"] == "refused"
    assert desk.states() == [DropState.ACCEPTED, DropState.REFUSED]


def test_a_store_that_does_not_answer_is_asked_again_and_blames_nobody(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe)
    desk.tick()

    def silent(place: Place, more: Sequence[str]) -> Planner:
        raise InfrastructureError("no answer")

    for _ in range(MAX_TRIES + 2):
        desk.hurry()
        assert desk.app.watcher().tick(silent) == []
    assert desk.states() == [DropState.CLAIMED]
    assert len(desk.hurry().tick()) == 1


def test_a_recipe_that_takes_its_watchers_down_is_refused_in_the_end(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe)
    desk.drop("y.yaml", desk.recipe.replace("32x32", "16x16"))
    desk.tick()

    def broken(place: Place, more: Sequence[str]) -> Planner:
        raise RuntimeError("a bug")

    for _ in range(MAX_TRIES + 1):
        desk.hurry()
        assert desk.app.watcher().tick(broken) == []
    assert "tried 5 times without an end" in desk.errors()
    assert desk.states() == [DropState.REFUSED, DropState.REFUSED]


def test_a_watcher_that_was_thought_dead_starts_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.drop("x.yaml", desk.recipe)
    desk.tick()
    desk.hurry()

    def slow(place: Place, more: Sequence[str]) -> Planner:
        assert len(desk.hurry().tick()) == 1
        return desk.plan_of(place, more)

    assert desk.app.watcher().tick(slow) == []
    assert len(desk.repository.runs()) == 1
    assert desk.states() == [DropState.ACCEPTED]
    assert [action for _, _, action, _, _ in desk.acts()] == ["submit"]


def test_a_slow_refusal_does_not_lie_over_the_answers_of_a_newer_file(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe)
    desk.tick()
    desk.hurry()

    def slow(place: Place, more: Sequence[str]) -> Planner:
        desk.drop("x.yaml", desk.recipe.replace("32x32", "16x16"))
        assert desk.tick(settle_seconds=0.0) == [1]
        raise NotAllowed("what it reads is not allowed")

    assert desk.app.watcher().tick(slow) == []
    assert desk.states() == [DropState.REFUSED, DropState.ACCEPTED]
    assert (desk.status()["state"], desk.status()["run"]) == ("running", 1)
    assert "x.errors.txt" not in desk.names()


def test_a_file_that_goes_or_changes_before_it_is_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = desk.drop("x.yaml", desk.recipe), desk.drop("y.yaml", desk.recipe)
    desk.tick()
    desk.hurry()
    real_list = LocalStore.list

    def late(self: LocalStore, prefix: str) -> Iterator[ObjectInfo]:
        found = list(real_list(self, prefix))
        one.unlink()
        two.write_text(desk.recipe.replace("32x32", "16x16"))
        return iter(found)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "list", late)
        assert desk.tick() == []
    assert desk.states()[:2] == [DropState.GONE, DropState.GONE]
    assert desk.settle() != []  # the changed one


def test_an_inbox_that_is_no_more_settles_what_was_begun(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe)
    desk.tick()

    def silent(place: Place, more: Sequence[str]) -> Planner:
        raise InfrastructureError("no answer")

    desk.hurry()
    desk.app.watcher().tick(silent)
    desk.hurry()
    other = replace(desk.app.places[0], prefix=file_uri(desk.dam) + "/")
    assert desk.tick(places=(other,), stores={other.prefix: desk.app.store}) == []
    assert desk.states() == [DropState.REFUSED]


class Queue:
    """`ports.ObjectEvents` in memory."""

    def __init__(self, *uris: str) -> None:
        self.notices = [Notice(str(number), (uri,)) for number, uri in enumerate(uris)]
        self.away = False

    def receive(self) -> Sequence[Notice]:
        if self.away:
            raise InfrastructureError("no queue")
        return list(self.notices)

    def forget(self, notices: Sequence[Notice]) -> None:
        for each in notices:
            self.notices.remove(each)


def test_events_that_come_twice_late_or_of_other_things_are_harmless(desk: Desk, tmp_path: Path) -> None:
    uri = file_uri(desk.drop("x.yaml", desk.recipe))
    (tmp_path / "z.yaml").write_text(desk.recipe)
    others = [file_uri(desk.folder / "gone.yaml"), file_uri(tmp_path / "z.yaml"), "s3://nowhere/x.yaml", uri + ".part"]
    queue = Queue(uri, uri, *others)
    assert desk.tick(events=queue, settle_seconds=0.0) == [1]
    assert queue.notices == []
    queue = Queue(uri)
    assert desk.tick(events=queue) == []
    queue.away = True
    desk.drop("y.yaml", desk.recipe.replace("32x32", "16x16"))
    assert desk.tick(events=queue, settle_seconds=0.0) == [2]


def test_a_schedule_of_a_dropped_recipe_is_spoken_of(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe + 'schedule: {cron: "0 22 * * *"}\n')
    assert len(desk.settle()) == 1
    assert "note: it runs now, once; its schedule is followed when" in (desk.folder / "x.plan.txt").read_text()


def test_inboxes_take_turns_and_no_tick_takes_for_ever(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kontext_batch.services.inbox.MOST_STARTS", 3)
    other = desk.folder.with_name("globex")
    other.mkdir()
    for number in range(4):
        desk.drop(f"{number}.yaml", desk.recipe + f"# {number}\n")
    (other / "late.yaml").write_text(desk.recipe)
    places = (desk.app.places[0], replace(desk.app.places[0], prefix=file_uri(other) + "/"))
    stores = {place.prefix: desk.app.watcher().stores[places[0].prefix] for place in places}
    stores[places[1].prefix] = LocalStore([places[1].prefix], [places[1].prefix])
    desk.tick(places=places, stores=stores, settle_seconds=0.0)
    told = [row.uri.rpartition("/")[2] for row in reversed(desk.repository.drops())]
    assert told == ["0.yaml", "late.yaml", "1.yaml"]
    desk.tick(places=places, stores=stores, settle_seconds=0.0)
    assert len(desk.repository.drops()) == 5


def test_a_prefix_is_spelt_as_files_are_listed() -> None:
    budget = InboxBudget(outputs=1)
    inbox = Inbox(prefix="file:///srv/In box", owner="o", budget=budget, write=("s3://dam",))
    [place] = inbox_places(Settings(inboxes=(inbox,)))
    assert place.prefix == "file:///srv/In%20box/"
    assert place.holds("file:///srv/In%20box/deep/x.yaml")
    assert not place.holds("file:///srv/In%20box/.git/x.yaml")
    assert not place.holds("file:///srv/In%20box.yaml")


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (("s3://b/in", ["s3://b/out"]), ("s3://b/in/deep/", ["s3://b/out"]), "lie in one another"),
        (("s3://b/in", ["s3://b/out"]), ("s3://b/two", ["s3://b/in/acme"]), "where recipes are dropped"),
        (("s3://b/in", ["s3://b"]), ("s3://c/two", ["s3://b/out"]), "where recipes are dropped"),
    ],
)
def test_inboxes_that_could_feed_one_another_are_refused(
    first: tuple[str, list[str]], second: tuple[str, list[str]], words: str
) -> None:
    budget = InboxBudget(outputs=1)
    inboxes = tuple(
        Inbox(prefix=prefix, owner="o", budget=budget, write=tuple(write)) for prefix, write in (first, second)
    )
    with pytest.raises(SettingsError, match=words):
        inbox_places(Settings(inboxes=inboxes))


def test_the_pictures_of_a_run_are_put_beside_its_recipe_while_the_ticks_go_on(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe)
    [run_id] = desk.settle()
    desk.work(run_id)
    with ReportsAside(desk.app.report_writer()) as reports:

        def look() -> bool:
            desk.hurry().tick(reports=reports)
            return desk.states() == [DropState.FINISHED]

        assert not look(), "nothing waits for pictures"
        assert desk.status()["state"] == "done"
        assert "All pictures" not in (desk.folder / "x.report.html").read_text()
        wait_for(look)
    assert 'href="x.report/index.html"' in (desk.folder / "x.report.html").read_text()
    assert (desk.folder / "x.report" / "index.html").is_file()
    assert len(list((desk.folder / "x.report" / "pictures").iterdir())) == 2 * 6  # two photos, two steps of each
    assert desk.hurry().tick() == [], "nothing of a report is a drop"

    desk.drop("x.yaml", desk.recipe + "# again\n")
    desk.settle()
    desk.hurry().tick()
    assert not (desk.folder / "x.report.html").exists(), "nobody is led to the pictures of another run"


def test_a_report_that_cannot_be_written_keeps_no_drop_from_its_end(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe)
    (desk.folder / "x.report").mkdir()
    (desk.folder / "x.report" / "index.html").mkdir()
    [run_id] = desk.settle()
    desk.work(run_id)
    with ReportsAside(desk.app.report_writer()) as reports:
        wait_for(lambda: desk.hurry().tick(reports=reports) == [] and desk.states() == [DropState.FINISHED])
    assert "x.report/" not in (desk.folder / "x.report.html").read_text()


def test_a_report_that_was_stopped_is_gone_on_with(desk: Desk) -> None:
    desk.drop("x.yaml", desk.recipe)
    [run_id] = desk.settle()
    desk.work(run_id)
    with ReportsAside(desk.app.report_writer()) as reports:
        desk.hurry().tick(reports=reports)
    with ReportsAside(desk.app.report_writer()) as reports:
        wait_for(lambda: desk.hurry().tick(reports=reports) == [] and desk.states() == [DropState.FINISHED])
    assert (desk.folder / "x.report" / "index.html").is_file()
