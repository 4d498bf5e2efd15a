"""What is listed for a plan, and what becomes of a finished image under each policy."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from kontext_batch.bootstrap import open_application
from kontext_batch.errors import KontextBatchError, NotAllowed, PlanRefused, RecipeError
from kontext_batch.hashing import sha256_hex
from kontext_batch.planning.states import RunState
from kontext_batch.ports import Artifact, PendingDelivery
from kontext_batch.services.deliver import place, versioned
from kontext_batch.services.prepare import Selection
from kontext_batch.storage.uris import file_uri
from tests.unit.services.conftest import Studio


@pytest.mark.parametrize(
    ("path", "version", "expected"),
    [
        ("s3://a/b/c.jpg", 1, "s3://a/b/c.jpg"),
        ("s3://a/b/c.jpg", 2, "s3://a/b/c.v2.jpg"),
        ("file:///x.y/c", 3, "file:///x.y/c.v3"),
    ],
)
def test_versioned_names(path: str, version: int, expected: str) -> None:
    assert versioned(path, version) == expected


def deliver(studio: Studio, data: bytes, policy: str) -> tuple[str, int, bool]:
    sha256 = sha256_hex(data)
    uri = studio.app.artifact_keys(sha256, "image/png")
    studio.app.store.write_if_absent(uri, data, media_type="image/png")
    artifact = Artifact(sha256, uri, "image/png", len(data), 1, 1)
    pending = PendingDelivery(1, 1, file_uri(studio.folder / "out" / "a.png"), policy, artifact)
    placed = place(studio.app.store, pending, data)
    return placed.path.rpartition("/")[2], placed.version, placed.skipped is not None


def test_version_keeps_what_is_there_and_knows_its_own_bytes(studio: Studio) -> None:
    assert deliver(studio, b"one", "version") == ("a.png", 1, False)
    assert deliver(studio, b"two", "version") == ("a.v2.png", 2, False)
    assert deliver(studio, b"one", "version") == ("a.png", 1, False)
    assert deliver(studio, b"two", "version") == ("a.v2.png", 2, False)
    assert studio.outputs() == ["a.png", "a.v2.png"]


def test_skip_replace_and_fail(studio: Studio) -> None:
    there = studio.folder / "out" / "a.png"
    assert deliver(studio, b"one", "fail") == ("a.png", 1, False)
    assert deliver(studio, b"two", "skip") == ("a.png", 1, True)
    with pytest.raises(KontextBatchError, match="if_exists: fail"):
        deliver(studio, b"two", "fail")
    assert there.read_bytes() == b"one"
    assert deliver(studio, b"two", "replace") == ("a.png", 1, False)
    assert there.read_bytes() == b"two"


@pytest.mark.parametrize("policy", ["replace", "version", "skip", "fail"])
def test_a_link_that_leads_outside_is_something_that_is_there(studio: Studio, tmp_path: Path, policy: str) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"precious")
    out = studio.folder / "out"
    out.mkdir()
    (out / "a.png").symlink_to(outside)
    if policy == "fail":
        with pytest.raises(KontextBatchError, match="another image is there already"):
            deliver(studio, b"new", policy)
    else:
        name = "a.v2.png" if policy == "version" else "a.png"
        assert deliver(studio, b"new", policy) == (name, 2 if policy == "version" else 1, policy == "skip")
        assert ((out / name).read_bytes() == b"new") is (policy != "skip")
    assert outside.read_bytes() == b"precious"
    assert (out / "a.png").is_symlink() is (policy != "replace")


@pytest.mark.parametrize("fault", ["gone", "damaged"])
def test_a_lost_object_is_told_and_made_again_by_the_same_command(studio: Studio, fault: str) -> None:
    studio.worker().run_until_done(studio.submit())
    objects = list(Path(studio.app.workspace, "objects").rglob("*.png"))
    for each in objects:
        if fault == "gone":
            each.unlink()
        else:
            each.write_bytes(b"damaged")
    for each in (studio.folder / "out").iterdir():
        each.unlink()
    broken = studio.worker().run_until_done(studio.submit())
    assert (broken.state, broken.failed_deliveries) == (RunState.FAILED, 4)
    for _ in range(3):  # each time the next level up is found to be gone
        mended = studio.worker().run_until_done(studio.submit())
    assert (mended.state, mended.delivered) == (RunState.DONE, 4)
    assert len(studio.outputs()) == 4


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("shop.yaml", "made from"),
        ("photos/bag.png", "made from"),
        ("Photos/BAG.png", "made from"),
        ("out/" + "n" * 300 + "${item}_${scene}.png", "at most 255 bytes"),
    ],
)
def test_an_output_that_would_destroy_something_is_refused(studio: Studio, to: str, told: str) -> None:
    text = studio.recipe.read_text().replace("out/${item}_${scene}.${ext}", to).replace("version}", "replace}")
    studio.recipe.write_text(text)
    with pytest.raises(PlanRefused, match=told):
        studio.submit(selection=Selection(only={"item": ["mug"], "scene": ["snow"]}))


def test_the_workspace_itself_is_out_of_reach(studio: Studio) -> None:
    inside = file_uri(studio.app.workspace)
    for name in ("kontext.db", "kontext.db-wal", "objects/a.png"):
        text = studio.recipe.read_text()
        studio.recipe.write_text(text.replace("out/${item}_${scene}.${ext}", f"{inside}/{name}"))
        with pytest.raises(PlanRefused, match="belongs to the workspace"):
            studio.submit(selection=Selection(only={"item": ["mug"], "scene": ["snow"]}))
        studio.recipe.write_text(text)


def refused(studio: Studio, to: str) -> str:
    text = studio.recipe.read_text()
    studio.recipe.write_text(text.replace("out/${item}_${scene}.${ext}", to).replace("version}", "replace}"))
    try:
        with pytest.raises(PlanRefused) as caught:
            studio.submit(selection=Selection(only={"item": ["mug"], "scene": ["snow"]}))
    finally:
        studio.recipe.write_text(text)
    return str(caught.value)


def test_sources_and_workspace_are_out_of_reach_through_a_symbolic_link(studio: Studio) -> None:
    (studio.folder / "alias").symlink_to("photos")
    (studio.folder / "ws").symlink_to(studio.app.workspace)
    (studio.folder / "photos" / "cup.png").symlink_to("../shelf/real.png")
    (studio.folder / "shelf").mkdir()
    Image.new("RGB", (8, 8)).save(studio.folder / "shelf" / "real.png")
    assert "made from" in refused(studio, "alias/mug.png")
    assert "made from" in refused(studio, "alias/bag.png"), "the selection leaves it out, and it is a source"
    assert "made from" in refused(studio, "shelf/real.png"), "a source is a link to it"
    assert "belongs to the workspace" in refused(studio, "ws/kontext.db")
    assert "belongs to the workspace" in refused(studio, "ws/objects/a.png")


def test_the_workspace_is_out_of_reach_in_other_case(studio: Studio) -> None:
    planner, prepared = studio.app.planner(), studio.prepare()
    first, *rest = prepared.plan.deliveries
    place = file_uri(studio.app.workspace).replace("/ws", "/WS") + "/Kontext.DB"
    planner = replace(planner, writable=(*planner.writable, file_uri(studio.folder.parent)))
    plan = replace(prepared.plan, deliveries=(replace(first, path=place), *rest))
    assert "belongs to the workspace" in planner.from_plan(plan, prepared.source).refusals[0]


def test_two_outputs_that_a_link_makes_one_file_are_refused(studio: Studio) -> None:
    (studio.folder / "out").mkdir()
    (studio.folder / "alias").symlink_to("out")
    outputs = '  - {from: "${finish}", to: "alias/${item}_${scene}.${ext}", if_exists: replace}\n'
    studio.recipe.write_text(studio.recipe.read_text() + outputs)
    with pytest.raises(PlanRefused, match="are one file"):
        studio.submit()


def test_places_that_cannot_work_are_refused_before_anything_is_computed(studio: Studio, tmp_path: Path) -> None:
    (studio.folder / "full" / "a.png").mkdir(parents=True)
    (studio.folder / "file").write_text("x")
    (studio.folder / "away").symlink_to(tmp_path)
    assert "a folder is there already" in refused(studio, "full/a.png")
    assert "a file stands where a folder is needed" in refused(studio, "file/below/a.png")
    assert "leads by a symbolic link out" in refused(studio, "away/a.png")


def test_a_closed_folder_is_told_once_and_each_folder_is_looked_at_once(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    (studio.folder / "out").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("/out"))
    looked: list[str] = []
    folder = type(studio.app.store).folder

    def looking(self: object, uri: str, *, write: bool = False) -> object:
        looked.append(uri if write else "")
        return folder(self, uri, write=write)  # type: ignore[arg-type]

    monkeypatch.setattr(type(studio.app.store), "folder", looking)
    with pytest.raises(PlanRefused, match="closed to this user") as caught:
        studio.submit()
    assert len(caught.value.reasons) == 1
    assert looked.count(file_uri(studio.folder / "out") + "/") == 1


def test_a_plan_whose_paths_were_changed_by_hand_is_refused(studio: Studio) -> None:
    prepared = studio.prepare()
    first, *rest = prepared.plan.deliveries
    planner = studio.app.planner()
    for path, told in (
        (file_uri(studio.folder / "photos" / "mug.png"), "made from"),
        (file_uri(studio.folder) + "/../x.png", "may not stand"),
        ("file:///etc/x.png", "outside"),
    ):
        plan = replace(prepared.plan, deliveries=(replace(first, path=path), *rest))
        (refusal,) = planner.from_plan(plan, prepared.source).refusals
        assert told in refusal


def test_a_plan_kept_elsewhere_says_what_it_needs(studio: Studio, tmp_path: Path) -> None:
    prepared = studio.prepare()
    elsewhere = tmp_path / "plans"
    elsewhere.mkdir()
    uri, folder = file_uri(elsewhere / "plan.json"), str(studio.folder)
    settings = studio.app.settings
    with (
        closing(open_application(settings, workspace=tmp_path / "ws", recipe_folder=elsewhere)) as app,
        pytest.raises(NotAllowed, match=r"g\.png may not be read .*beside its recipe, or .* in read_prefixes"),
    ):
        app.planner().from_plan(prepared.plan, uri)
    settings = settings.model_copy(update={"read_prefixes": (folder,), "write_prefixes": (folder,)})
    with closing(open_application(settings, workspace=tmp_path / "ws", recipe_folder=elsewhere)) as app:
        assert app.planner().from_plan(prepared.plan, uri).refusals == ()


def test_unusable_photos_are_skipped_and_listed(studio: Studio) -> None:
    photos = studio.folder / "photos"
    (photos / "empty.png").touch()
    (photos / "text.png").write_text("not a picture")
    plan = studio.prepare().plan
    assert {row.row for row in plan.skipped} == {"empty", "text"}
    assert all(row.reason for row in plan.skipped)
    assert len(plan.deliveries) == 4


def test_photos_behind_a_link_that_leads_out_are_skipped_and_listed(studio: Studio, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    Image.new("RGB", (8, 8)).save(away / "cup.png")
    (studio.folder / "photos" / "cup.png").symlink_to(away / "cup.png")
    (studio.folder / "photos" / "more").symlink_to(away)

    def skipped(pattern: str) -> dict[str, str]:
        text = studio.recipe.read_text()
        studio.recipe.write_text(text.replace("photos/*", pattern))
        try:
            plan = studio.prepare().plan
        finally:
            studio.recipe.write_text(text)
        return {row.row: row.reason for row in plan.skipped}

    assert "out of the folders that may be read" in skipped("photos/*")["cup"]
    assert skipped("photos/*").keys() == {"cup"}, "a folder was not asked for"
    assert skipped("photos/**/*.png").keys() == {"cup", "more"}
    studio.recipe.write_text(studio.recipe.read_text().replace("on_missing: skip", "on_missing: fail"))
    for pattern in ("photos/cup.png", "photos/more/cup.png"):
        with pytest.raises(RecipeError, match="out of the folders that may be read"):
            skipped(pattern)


def test_unusable_photos_fail_the_plan_where_the_recipe_says_so(studio: Studio) -> None:
    studio.recipe.write_text(studio.recipe.read_text().replace("on_missing: skip", "on_missing: fail"))
    (studio.folder / "photos" / "empty.png").touch()
    with pytest.raises(RecipeError, match=r"shop\.yaml:5:.*0 bytes"):
        studio.prepare()


def test_a_photo_is_read_once_for_each_etag(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    studio.prepare()
    reads: list[str] = []
    read = type(studio.app.store).read

    def counted(self: object, uri: str, **options: object) -> bytes:
        reads.append(uri)
        return read(self, uri, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(studio.app.store), "read", counted)
    studio.prepare()
    assert [uri for uri in reads if uri.endswith(".png")] == []
    Image.new("RGB", (64, 64), "lime").save(studio.folder / "photos" / "mug.png")
    studio.prepare()
    assert [Path(uri).name for uri in reads if uri.endswith(".png")] == ["mug.png"]


def test_places_outside_the_prefixes_are_told_with_their_line(studio: Studio) -> None:
    studio.recipe.write_text(studio.recipe.read_text().replace('"out/${item}', '"file:///etc/out/${item}'))
    with pytest.raises(RecipeError, match=r"shop\.yaml:25:.*outputs"):
        studio.prepare()


def test_a_missing_recipe_is_told(studio: Studio) -> None:
    studio.recipe.unlink()
    with pytest.raises(RecipeError, match=r"shop\.yaml: there is no such file"):
        studio.prepare()
