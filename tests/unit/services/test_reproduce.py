"""Who joins when in a replay, what is told of the store and of the weights; on a real database, with a toy editor."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kontext_batch.errors import InfrastructureError, PlanRefused, StepError
from kontext_batch.ports import BatchMember, BatchRecord, EditJob, LeasedStep, MadePicture
from kontext_batch.services.execute import Executor, Finished, Loaded
from kontext_batch.services.recorded import Weights, differences
from kontext_batch.services.reproduce import Replay, Replayer, _as_then, finished_from, sample_together
from tests.stepping import SteppingEditor
from tests.unit.services.conftest import Studio, ToyEditor


@dataclass
class Watched(SteppingEditor):
    """Remembers who was in at each denoise step; jobs are names."""

    steps: dict[str, int] = field(default_factory=dict)
    seen: list[list[str]] = field(default_factory=list)
    wrong: str = ""

    def admitted(self, job: Any) -> int:
        if job == "refused":
            raise StepError("not this one")
        return self.steps.get(job, 3)

    def stepping(self, jobs: Sequence[Any]) -> None:
        self.seen.append(list(jobs))

    def make(self, job: Any) -> MadePicture:
        if job == self.wrong:
            raise StepError("not finite")
        return MadePicture(job.encode(), "image/png", 8, 8)


def together(editor: Watched, queue: Sequence[tuple[str, int]], wanted: str) -> MadePicture:
    tickets = {name: number for number, (name, _) in enumerate(queue)}
    with editor.session({}) as session:
        entries = [(tickets[name], joined, name) for name, joined in queue]
        return sample_together(session, entries, tickets[wanted]).encode()


def test_each_joins_at_its_denoise_step_in_its_order_until_the_one_wanted_has_left() -> None:
    editor = Watched(steps={"a": 5, "b": 2, "c": 4, "d": 9})
    made = together(editor, [("b", 10), ("a", 10), ("d", 12), ("c", 13)], "c")
    assert made.data == b"c"
    assert editor.seen == [
        ["b", "a"],
        ["b", "a"],
        ["a", "d"],
        ["a", "d", "c"],
        ["a", "d", "c"],
        ["d", "c"],
        ["d", "c"],
    ]


def test_a_pause_in_which_nobody_was_in_is_not_sampled() -> None:
    editor = Watched(steps={"a": 1})
    together(editor, [("a", 0), ("b", 50)], "b")
    assert editor.seen == [["a"], ["b"], ["b"], ["b"]]


def test_what_is_wrong_with_others_is_no_matter_but_with_the_one_wanted() -> None:
    editor = Watched(wrong="a")
    assert together(editor, [("refused", 0), ("a", 2), ("b", 2)], "b").data == b"b"
    with pytest.raises(StepError, match="not finite"):
        together(editor, [("a", 0), ("b", 0)], "a")


def test_a_device_without_room_for_the_batch_of_then_is_told() -> None:
    with pytest.raises(InfrastructureError, match="no room for the 3 pictures that were in at once; --alone"):
        together(Watched(max_rows=2), [("a", 0), ("b", 0), ("c", 0)], "a")


# ------------------------------------------------------------------------------------------------- a whole workspace


@dataclass
class Influenced(ToyEditor):
    """What is sampled depends on what is sampled beside it, as rounding does; not in batch-invariant mode."""

    invariant: bool = False
    beside: dict[int, list[str]] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=lambda: {"toy": "1"})
    rows: list[list[str]] = field(default_factory=list)

    def stepping(self, jobs: Sequence[EditJob]) -> None:
        names = [f"{len(each.params['prompt'])}" for each in jobs]
        self.rows.append(names)
        for each in jobs:
            self.beside.setdefault(id(each), []).append("" if self.invariant else "+".join(names))

    def make(self, job: EditJob) -> MadePicture:
        made = super().make(job)
        image = Image.open(io.BytesIO(made.data))
        x, y = 5, 7
        red, green, blue = image.getpixel((x, y))  # type: ignore[misc]
        image.putpixel((x, y), (red, (green + sum(map(len, self.beside.pop(id(job))))) % 256, blue))
        from tests.unit.services.conftest import toy_picture

        return toy_picture(image)

    def describe(self) -> dict[str, Any]:
        return {"device": "cpu", "libraries": self.libraries, "batch_invariant": self.invariant}


@dataclass
class Bytes:
    """`ports.Judge` of toy latents, which are bytes; pictures by the real one."""

    real: Any

    def pictures(self, first: bytes, second: bytes) -> Any:
        return self.real.pictures(first, second)

    def latents(self, first: bytes, second: bytes) -> float:
        return float(max(abs(a - b) for a, b in zip(first, second, strict=True)))


@dataclass
class Shop:
    """The studio after a run of which every edit was in a mixed batch."""

    studio: Studio
    editor: Influenced
    database: Path
    told: list[str] = field(default_factory=list)

    def replayer(self) -> Replayer:
        made = self.studio.app.replayer(self.told.append)
        made.judge = Bytes(made.judge)

        def editor_of(rows: int, invariant: bool) -> Influenced:
            self.editor.invariant, self.editor.max_rows = invariant, rows
            return self.editor

        made.editor = editor_of
        return made

    def replay(self, step_id: int, **options: Any) -> Replay:
        return self.replayer().replay(step_id, **options)

    def refusal(self, step_id: int) -> str:
        with pytest.raises(PlanRefused) as refused:
            self.replay(step_id)
        return str(refused.value)

    def step(self, node: str, item: str, scene: str | None = None) -> int:
        wanted = {"item": item} | ({} if scene is None else {"scene": scene})
        rows = self.studio.app.repository.run_steps(1)
        return next(each.id for each in rows if each.node == node and dict(each.axes) == wanted)

    def file(self, step_id: int, slot: str = "image") -> Path:
        output = self.studio.app.repository.stored_steps([step_id])[step_id].outputs[slot]
        return Path(output.artifact.uri.removeprefix("file://"))

    def execute(self, sql: str, *values: Any) -> None:
        with closing(sqlite3.connect(self.database)) as conn, conn:
            conn.execute(sql, values)


def sample(executor: Executor, steps: Sequence[LeasedStep], joins: Sequence[int]) -> None:
    """As a worker would whose steps happen to join at these denoise steps."""
    waiting = [(executor.load(step), joined) for step, joined in zip(steps, joins, strict=True)]
    joined_at = {step.id: (joined, place) for place, (step, joined) in enumerate(zip(steps, joins, strict=True))}
    by_id = {step.id: step for step in steps}
    finished: list[Finished] = []
    members: list[BatchMember] = []
    clock = 0
    with executor.editor.session(steps[0].params) as session:
        while len(finished) < len(steps):
            while waiting and waiting[0][1] <= clock:
                loaded, _ = waiting.pop(0)
                assert isinstance(loaded, Loaded)
                session.admit(loaded.step.id, loaded.prepared)
            session.step()
            clock += 1
            for step_id, made in session.retire():
                assert not isinstance(made, StepError)
                finished.append(executor.finished(by_id[step_id], made.encode()))
                members.append(BatchMember(step_id, joined_at[step_id][0], clock, joined_at[step_id][1]))
    executor.announce(finished)
    record = replace(executor.record(steps[0]), members=tuple(members))
    executor.commit(record, steps[0].lane, [executor.put(each) for each in finished])


@pytest.fixture
def shop(studio: Studio, tmp_path: Path) -> Shop:
    editor = Influenced()
    studio.editor = editor
    studio.submit()
    worker = studio.worker(batch_rows=8)
    studio.app.repository.register_worker(worker.info)
    for joins in ((0, 0), (0, 0, 1, 2), ()):
        steps = studio.app.repository.claim(worker.info.id, limit=8, lease_seconds=60)
        if joins:
            sample(worker.executor, steps, joins)
        else:
            worker.executor.operate(steps)
    return Shop(studio, editor, tmp_path / "ws" / "kontext.db")


def test_a_batch_is_sampled_again_as_it_was(shop: Shop) -> None:
    step = shop.step("staged", "mug", "snow")
    before = shop.editor.rows[3:]
    assert [len(each) for each in before] == [2, 3, 4, 2, 1]
    shop.editor.rows.clear()
    found = shop.replay(step)
    assert (found.equal, found.batch_invariant, found.latents, found.notes, found.changes) == (True, False, 0.0, (), ())
    assert len(found.beside) == 3
    assert shop.editor.rows == before, "in their order"
    shop.editor.rows.clear()
    assert shop.replay(shop.step("staged", "bag", "beach")).equal
    assert shop.editor.rows == before[:3], "no longer than it was in"


def test_alone_shows_what_batching_did_in_dB_and_where(shop: Shop) -> None:
    found = shop.replay(shop.step("staged", "mug", "snow"), alone=True)
    assert (found.equal, found.beside) == (False, ())
    assert found.picture is not None
    assert found.picture.box == (5, 7, 1, 1)
    assert found.picture.worst is not None
    assert found.picture.worst[:2] == (5, 7)
    assert found.latents == found.picture.worst[2] > 0
    assert found.picture.psnr is not None
    assert found.picture.psnr > 20


def test_results_of_the_batch_invariant_mode_are_made_alone(shop: Shop) -> None:
    shop.execute("UPDATE batches SET numeric_mode = numeric_mode || '+batch-invariant'")
    found = shop.replay(shop.step("staged", "mug", "snow"))
    assert (found.batch_invariant, found.beside, shop.editor.invariant) == (True, (), True)
    assert not found.equal, "the record lies here: it was sampled with others"


def test_old_batches_without_places_are_told(shop: Shop) -> None:
    shop.execute("UPDATE batch_members SET place = NULL")
    found = shop.replay(shop.step("clean", "mug"))
    assert "who came before whom at the same denoise step was not recorded" in found.notes[0]
    assert shop.told[0] == found.notes[0]


def test_others_that_left_no_record_are_told(shop: Shop) -> None:
    shop.execute("DELETE FROM batch_members WHERE step_id = ?", shop.step("staged", "bag", "beach"))
    found = shop.replay(shop.step("staged", "mug", "snow"))
    assert (found.equal, len(found.beside)) == (False, 2)
    assert found.notes[0].startswith("1 more joined the batch and left no result")


def test_what_is_not_as_it_was_is_told_before(shop: Shop) -> None:
    shop.editor.libraries = {"toy": "2", "more": "1"}
    at: list[int] = []
    shop.editor.rows.clear()
    made = shop.replayer()
    made.tell = lambda text: at.append(len(shop.editor.rows)) or shop.told.append(text)  # type: ignore[func-returns-value]
    found = made.replay(shop.step("clean", "mug"))
    assert (found.equal, found.changes) == (True, ("toy: 1 then, 2 now",))
    assert (at, shop.told) == ([0], ["toy: 1 then, 2 now"])


def test_a_changed_parameter_shows(shop: Shop) -> None:
    step = shop.step("clean", "mug")
    shop.execute("UPDATE step_params SET params = json_set(params, '$.prompt', 'Other.') WHERE step_id = ?", step)
    found = shop.replay(step)
    assert not found.equal
    assert found.notes == ("its parameters in the database are not those that its key was made of",)
    assert found.picture is not None
    assert found.picture.box is not None


def test_a_damaged_picture_is_told_with_how_far_it_is_off(shop: Shop) -> None:
    step = shop.step("clean", "mug")
    file = shop.file(step)
    image = Image.open(file)
    image.load()
    image.putpixel((3, 4), (9, 9, 9))
    image.save(file, "PNG")
    found = shop.replay(step)
    assert (found.equal, found.sha256) == (False, found.stored_sha256)
    assert found.picture is not None
    assert found.picture.box == (3, 4, 1, 1)
    assert "is damaged" in found.notes[0]
    assert found.notes[0].endswith("; the replay is what was committed")
    file.write_bytes(b"no picture")
    assert "does not decode" in shop.replay(step).notes[1]
    assert "stored file is damaged; `kontext-batch verify --repair`" in shop.refusal(shop.step("staged", "mug", "snow"))


def test_a_stored_file_that_cannot_be_read_is_told(shop: Shop) -> None:
    step = shop.step("clean", "mug")
    file = shop.file(step)
    file.unlink()
    file.symlink_to(Path(__file__).resolve())
    found = shop.replay(step)
    assert found.equal, "the replay is what was committed"
    assert "the stored file cannot be read" in found.notes[0]


def test_a_file_without_room_for_a_mark_is_made_as_then(shop: Shop) -> None:
    number = shop.step("finish", "mug", "snow")
    step = shop.studio.app.repository.stored_steps([number])[number]

    def make(xmp: bytes | None) -> MadePicture:
        if xmp is not None:
            raise StepError("max_bytes")
        return MadePicture(b"plain", "image/png", 8, 8)

    assert _as_then(step, make).data == b"plain"


def test_the_file_of_a_picture_operation_is_made_again(shop: Shop) -> None:
    step = shop.step("finish", "mug", "snow")
    assert shop.replay(step).equal
    assert finished_from(shop.studio.app.repository, step) == [step, shop.step("staged", "mug", "snow")]
    shop.execute("UPDATE step_params SET params = json_set(params, '$.format', 'webp') WHERE step_id = ?", step)
    assert not shop.replay(step).equal, "the bytes of the file count"


def test_photos_and_pictures_that_are_gone_are_told_together(shop: Shop) -> None:
    photo = shop.studio.folder / "photos" / "mug.png"
    Image.new("RGB", (64, 64), "green").save(photo)
    told = shop.refusal(shop.step("clean", "mug"))
    assert told.startswith(f"{photo.as_uri()}: the photo is another one than then (sha256 ")
    assert told.endswith("put the old file back, then reproduce again")
    photo.unlink()
    assert "the photo is gone; put the one with sha256 " in shop.refusal(shop.step("clean", "mug"))
    shop.file(shop.step("clean", "bag")).unlink()
    told = shop.refusal(shop.step("staged", "bag", "snow"))
    assert "the stored file is gone; `kontext-batch verify` says what else is" in told
    assert shop.studio.app.repository.collectable(keep_bytes=0), "nothing was forgotten for it"


def collect(shop: Shop, step_id: int) -> None:
    app = shop.studio.app
    for output in app.repository.stored_steps([step_id])[step_id].outputs.values():
        assert app.repository.forget_artifact(output.artifact.sha256, app.store.delete)


def test_a_parent_that_was_collected_is_made_again_first(shop: Shop) -> None:
    clean, staged = shop.step("clean", "mug"), shop.step("staged", "mug", "snow")
    collect(shop, clean)
    found = shop.replay(staged)
    assert found.equal
    assert [note for note in found.notes if note.endswith("and was made again, bit for bit")]
    assert [note for note in found.notes if "is given a grey picture" in note], "its sister, which was beside it"
    found = shop.replay(clean)
    assert found.equal
    assert "its sha256 alone is compared" in found.notes[0]
    (shop.studio.folder / "photos" / "mug.png").unlink()
    assert "was collected on" in shop.refusal(staged)
    assert "and cannot be made again: file://" in shop.refusal(staged)


def test_a_neighbour_that_cannot_be_had_is_stood_in_for(shop: Shop) -> None:
    (shop.studio.folder / "photos" / "bag.png").unlink()
    found = shop.replay(shop.step("clean", "mug"))
    assert (found.equal, len(found.beside)) == (True, 1)
    assert "which was beside it, is given a grey picture: " in found.notes[0]


def test_a_step_without_a_picture_cannot_be_compared(studio: Studio) -> None:
    studio.submit()
    [ready, *_] = studio.app.repository.run_steps(1)
    with pytest.raises(PlanRefused, match=f"step {ready.id} is ready: nothing is stored"):
        studio.app.replayer(print).replay(ready.id)


def other(weights: Weights) -> Weights:
    return replace(weights, sha256="b" * 64)


def changed(weights: Weights) -> Weights:
    return replace(weights, unchanged=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, r"model 'toy' \(sha256 aaaaaaaaaaaa\) is not registered here; `kontext-batch models add toy PATH`"),
        (other, r"with other weights \(sha256 bbbbbbbbbbbb, aaaaaaaaaaaa then\); `kontext-batch models add"),
        (changed, r"the files of model 'toy' in .* are not those that were registered; `kontext-batch models add"),
    ],
)
def test_weights_that_are_not_those_of_then_are_refused(
    shop: Shop, change: Callable[[Weights], Weights] | None, said: str
) -> None:
    made = shop.replayer()
    known = made.weights["model", "toy"]
    made.weights = {} if change is None else {("model", "toy"): change(known)}
    with pytest.raises(PlanRefused, match=said):
        made.replay(shop.step("clean", "mug"))


def test_differences_name_device_libraries_and_mode() -> None:
    record = BatchRecord("w", "edit/x", "cuda:0 H100", "a", "bfloat16", {"torch": "2.6"}, (BatchMember(1, 0, 2),))
    params = {"numeric_mode": "float32", "model_sha256": "a"}
    about = {"device": "cpu", "libraries": {"torch": "2.7", "more": "1"}}
    assert differences(record, params, about) == [
        "device: cuda:0 H100 then, cpu now",
        "torch: 2.6 then, 2.7 now",
        "numeric mode: bfloat16 then, float32 now",
    ]


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        ("cuda:0 H100", "cuda:1 H100", True),
        ("cuda:0 H100", "cuda:0 L4", False),
        ("cuda:0", "cuda:0 H100", True),
        ("cuda", "cpu", False),
        ("cpu", "cpu", True),
    ],
)
def test_a_device_is_the_same_by_its_name_wherever_it_sits(then: str, now: str, same: bool) -> None:
    record = BatchRecord("w", "edit/x", then, "a", "float32", {}, ())
    told = differences(record, {"numeric_mode": "float32", "model_sha256": "a"}, {"device": now, "libraries": {}})
    assert told == ([] if same else [f"device: {then} then, {now} now"])
