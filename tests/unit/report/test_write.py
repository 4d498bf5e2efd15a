"""What a report holds, and what becomes of a folder that it is written into."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kontext_batch.errors import InfrastructureError, ObjectNotFound, PlanRefused, SettingsError
from kontext_batch.hashing import sha256_hex
from kontext_batch.ports import Act
from kontext_batch.report import pages, write
from kontext_batch.report.data import Telling, facts
from kontext_batch.report.write import Stopped
from kontext_batch.services.takedown import go_on
from kontext_batch.storage.uris import file_path
from tests.unit.report.made import DRAW, Shop, drawn


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """Two products in one scene: two photos, six steps, two files."""
    made = Shop(tmp_path / "shop", ["mug", "bag"], {"snow": "deep snow"}, ["shop"])
    return made.submit().work()


def data(shop: Shop, kind: str, number: int = 0) -> Any:
    """What a data file hands to the page."""
    [file] = (shop.folder / "report" / "data").glob(f"{kind}-{number}-*.js")
    text = file.read_text(encoding="ascii")
    head = f'kontext.take("{kind}",{number},'
    assert text.startswith(head)
    return json.loads(json.loads(text.removeprefix(head).removesuffix(");\n")))


def names(shop: Shop, folder: str = "") -> set[str]:
    root = shop.folder / "report" / folder
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}


def counted(draw: Callable[[bytes], tuple[bytes, bytes]]) -> tuple[list[str], Callable[[bytes], tuple[bytes, bytes]]]:
    """`draw`, and the hashes of what was drawn."""
    seen: list[str] = []

    def drawing(picture: bytes) -> tuple[bytes, bytes]:
        seen.append(sha256_hex(picture))
        return draw(picture)

    return seen, drawing


def test_the_head_and_the_rows_tell_the_run(shop: Shop) -> None:
    written = shop.writer().write(shop.run_id, shop.report, shop.store)
    assert (written.instances, written.made, written.kept, written.missing) == (6, 8, 0, {})
    run = data(shop, "run")
    assert (run["recipe"], run["owner"], run["state"], run["steps"]) == ("spring", shop.owner, "done", {"done": 6})
    assert (run["outputs"], run["delivered"], run["budget"]) == (2, 2, {"gpu_minutes": 30})
    assert [axis["name"] for axis in run["axes"]] == ["item", "scene", "channel"]
    assert [axis["values"] for axis in run["axes"]] == [["mug", "bag"], ["snow"], ["shop"]]
    assert [(node["name"], node["axes"]) for node in run["nodes"]] == [
        ("clean", [0]),
        ("staged", [0, 1]),
        ("finish", [0, 1, 2]),
    ]
    assert run["first"] == 2, "what is delivered is shown first"
    rows = data(shop, "rows")
    staged = next(row for row in rows["rows"] if row[1] == 1)
    place, _, state, candidate, cached, sha256, prompts, error, *values = staged
    assert (place, run["states"][state], candidate, cached, error, values) == (1, "done", 1, 0, -1, [0, 0])
    told = ["Change the background to deep snow.", "Remove the background."]
    assert [rows["texts"][prompt] for prompt in prompts] == told, "its own, and those of the steps above"
    finish = next(row for row in rows["rows"] if row[1] == 2)
    assert [rows["texts"][prompt] for prompt in finish[6]] == told, "what is delivered is found by them"
    assert {pages.thumbnail_name(sha256), pages.preview_name(sha256)} <= names(shop)


def test_the_details_tell_each_step_with_what_it_reads(shop: Shop) -> None:
    shop.writer().write(shop.run_id, shop.report, shop.store)
    clean, staged, finish, *_ = data(shop, "details")
    [photo] = clean["reads"]
    assert (photo["sha256"], photo["href"]) == (sha256_hex(drawn("photo mug")), "../photos/mug.png")
    assert [each["parent"] for each in (*staged["reads"], *finish["reads"])] == [0, 1]
    assert staged["prompt"] == "Change the background to deep snow."
    assert ["Seed", "1234"] in staged["facts"]
    assert ["Adapters", "brand-look × 0.8"] in staged["facts"]
    [attempt] = staged["attempts"]
    assert (attempt["outcome"], attempt["timings"]) == ("ok", [["put", 0.01], ["sample", 0.5]])
    [output] = finish["outputs"]
    assert (output["state"], output["href"]) == ("delivered", "../out/mug_snow_shop.jpg")
    assert (shop.folder / "report" / finish["picture"]["href"]).is_file()


def test_what_is_there_is_not_made_again(shop: Shop) -> None:
    first, draw = counted(DRAW)
    shop.writer(draw).write(shop.run_id, shop.report, shop.store)
    assert len(first) == len(set(first)) == 8
    before = names(shop)
    again, draw = counted(DRAW)
    written = shop.writer(draw).write(shop.run_id, shop.report, shop.store)
    assert (again, written.made, written.kept) == ([], 0, 8)
    changed = before ^ names(shop)
    assert {name.partition("-")[0] for name in changed} == {"data/run"}, "nothing of the report before is left"
    picture = shop.folder / "report" / pages.thumbnail_name(first[0])
    picture.unlink()
    shop.writer(draw).write(shop.run_id, shop.report, shop.store)
    assert again == [first[0]]


def test_one_that_was_interrupted_is_gone_on_with(shop: Shop) -> None:
    ends = threading.Event()

    def draw(picture: bytes) -> tuple[bytes, bytes]:
        ends.set()
        return DRAW(picture)

    with pytest.raises(Stopped):
        shop.writer(draw, threads=1).write(shop.run_id, shop.report, shop.store, stopped=ends.is_set)
    assert pages.INDEX not in names(shop), "no half report can be opened"
    rest, drawing = counted(DRAW)
    written = shop.writer(drawing).write(shop.run_id, shop.report, shop.store)
    assert (len(rest), written.kept) == (7, 1)


def test_an_outage_ends_it_and_a_bad_picture_does_not(shop: Shop) -> None:
    (shop.folder / "photos" / "mug.png").write_bytes(b"another")
    (shop.folder / "photos" / "bag.png").unlink()
    damaged = sha256_hex(drawn("clean mug"))

    def draw(picture: bytes) -> tuple[bytes, bytes]:
        return DRAW(b"\x89PNG damaged" if sha256_hex(picture) == damaged else picture)

    written = shop.writer(draw).write(shop.run_id, shop.report, shop.store)
    assert dict(written.missing) == {
        sha256_hex(drawn("photo mug")): "the file has changed since",
        sha256_hex(drawn("photo bag")): "the file is gone",
        damaged: "not an image (JPEG, PNG, WebP, AVIF or TIFF is wanted)",
    }
    clean = data(shop, "details")[0]
    assert (clean["reads"][0]["missing"], clean["picture"]["missing"]) == (
        "the file has changed since",
        "not an image (JPEG, PNG, WebP, AVIF or TIFF is wanted)",
    )
    assert data(shop, "rows")["rows"][0][5] == ""

    def silent(picture: bytes) -> tuple[bytes, bytes]:
        raise InfrastructureError("the store does not answer")

    with pytest.raises(InfrastructureError):
        shop.writer(silent).write(shop.run_id, shop.report, shop.store)


def test_pictures_that_it_shows_no_more_are_taken_away(shop: Shop) -> None:
    shop.writer().write(shop.run_id, shop.report, shop.store)
    gone = sha256_hex(drawn("photo mug"))
    assert pages.preview_name(gone) in names(shop)
    (shop.folder / "report" / "notes.txt").write_text("mine")
    (shop.folder / "photos" / "mug.png").unlink()
    for name in (pages.preview_name(gone), pages.thumbnail_name(gone)):
        (shop.folder / "report" / name).unlink()
    left = shop.folder / "report" / pages.preview_name("f" * 64)
    left.write_bytes(b"of a run before")
    shop.writer().write(shop.run_id, shop.report, shop.store)
    assert not left.exists()
    assert (shop.folder / "report" / "notes.txt").exists()


def test_nothing_else_in_its_folder_is_taken_away(shop: Shop) -> None:
    folder = Path(file_path(shop.report))
    others = [folder / name for name in ("pictures/hero.webp", "assets/app.js", "data/items-1.js", "shared.html")]
    for each in others:
        each.parent.mkdir(parents=True, exist_ok=True)
        each.write_text("mine")
    shop.writer().write(shop.run_id, shop.report, shop.store)
    assert [each.read_text() for each in others] == ["mine"] * 4
    own = names(shop) - {"pictures/hero.webp", "assets/app.js", "data/items-1.js", "shared.html", "index.html"}
    assert [name for name in own if not write.OWN.fullmatch(name)] == [], "all that is left of a report is known"


def test_of_a_photo_that_was_taken_down_no_small_picture_stays(shop: Shop) -> None:
    shop.writer().write(shop.run_id, shop.report, shop.store)
    photo = sha256_hex(drawn("photo mug"))
    told = shop.repository.take_down(
        photo,
        "consent withdrawn",
        uris=[],
        removes=lambda uri: False,
        despite_hold=False,
        by=Act("ann", "cli", "forget"),
    )
    assert go_on(shop.repository, shop.store).done
    gone = {photo, *(each.sha256 for each in told.artifacts)}
    assert len(gone) == 4
    previews = {pages.preview_name(sha256) for sha256 in gone} | {pages.thumbnail_name(sha256) for sha256 in gone}
    assert previews <= names(shop)
    written = shop.writer().write(shop.run_id, shop.report, shop.store)
    assert written.missing == dict.fromkeys(gone, "taken down: consent withdrawn")
    assert not previews & names(shop)
    outputs = [each for detail in data(shop, "details") for each in detail["outputs"]]
    assert sorted(each["state"] for each in outputs) == ["delivered", "withdrawn"]
    assert all((each["href"] is None) == (each["state"] == "withdrawn") for each in outputs)


def test_another_page_is_not_overwritten(shop: Shop) -> None:
    (shop.folder / "report").mkdir()
    (shop.folder / "report" / "index.html").write_text("<title>Our shop</title>")
    with pytest.raises(SettingsError, match=r"is no report of kontext-batch; choose another folder with --to"):
        shop.writer().write(shop.run_id, shop.report, shop.store)
    assert names(shop) == {"index.html"}


def test_what_no_page_could_hold_is_refused(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ObjectNotFound):
        shop.writer().write(99, shop.report, shop.store)
    monkeypatch.setattr(write, "MOST", 5)
    with pytest.raises(PlanRefused, match="more than 5 pictures"):
        shop.writer().write(shop.run_id, shop.report, shop.store)


def test_a_run_that_is_not_done_tells_what_waits(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop", ["mug"], {"snow": "deep snow"}, ["shop"]).submit().work(most=1)
    shop.writer().write(shop.run_id, shop.report, shop.store)
    run, rows = data(shop, "run"), data(shop, "rows")["rows"]
    assert [run["states"][row[2]] for row in rows] == ["done", "ready", "blocked"]
    assert run["finished"] is None
    assert run["state"] == "running"


def test_details_and_rows_come_in_parts(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "DETAILS", 2)
    monkeypatch.setattr(write, "ROWS", 4)
    shop.writer().write(shop.run_id, shop.report, shop.store)
    run = data(shop, "run")
    assert (len(run["files"]["details"]), run["details_each"], len(run["files"]["rows"])) == (3, 2, 2)
    assert [each["place"] for number in range(3) for each in data(shop, "details", number)] == list(range(6))
    assert [row[0] for number in range(2) for row in data(shop, "rows", number)["rows"]] == list(range(6))


def test_data_hold_no_markup_and_no_code(shop: Shop) -> None:
    nasty = "</script><!-- \u2028 \ud800 `${x}` ');alert(1)//"
    file = pages.data_file("rows", 0, {"__proto__": nasty})
    assert b"<" not in file.data
    text = file.data.decode("ascii").removeprefix('kontext.take("rows",0,').removesuffix(");\n")
    assert json.loads(json.loads(text)) == {"__proto__": nasty}
    page = pages.page('<b>&"', ["data/a.js"]).data.decode()
    assert "<title>&lt;b&gt;&amp;&quot;</title>" in page
    assert "default-src 'none'" in page
    assert "unsafe" not in page
    assert pages.is_report(page.encode())


@pytest.mark.parametrize(
    ("folder", "uri", "href"),
    [
        ("file:///a/report/", "file:///a/out/x.png", "../out/x.png"),
        ("file:///a/report/", "file:///a/report/javascript:alert(1)", "./javascript%3Aalert%281%29"),
        ("file:///a/R%C3%A9/", "file:///a/Ré/x y#1.png", "./x%20y%231.png"),
        ("file:///a/", "s3://dam/x.png", None),
        ("s3://dam/r/", "s3://dam/x?.png", "../x%3F.png"),
        ("s3://dam/r/", "s3://other/x.png", None),
        ("s3://dam/r/", "javascript:alert(1)", None),
    ],
)
def test_links_lead_along_one_disk_or_bucket_alone(folder: str, uri: str, href: str | None) -> None:
    assert Telling(folder).href(uri) == href


def test_facts_are_what_was_said() -> None:
    assert facts("contact_sheet", {"columns": 4, "format": "jpeg", "quality": None}, take=0) == [
        ["Format", "jpeg"],
        ["Columns", "4"],
    ]
    assert ["Take", "2"] in facts("generate", {"model": "dev", "true_cfg_scale": 1.0}, take=2)


def test_small_pictures_are_small_and_say_nothing_of_their_source() -> None:
    import io

    from PIL import Image

    picture = Image.effect_noise((1600, 800), 40).convert("RGB")
    written = io.BytesIO()
    picture.save(written, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", comment=b"secret")
    thumbnail, preview = (Image.open(io.BytesIO(each)) for each in DRAW(written.getvalue()))
    assert (thumbnail.size, preview.size) == ((320, 160), (1024, 512))
    assert (thumbnail.format, "exif" in preview.info) == ("WEBP", False)
    tiny = DRAW(drawn("x"))
    assert Image.open(io.BytesIO(tiny[1])).size == (96, 64)


def test_the_package_holds_every_asset() -> None:
    folder = Path(pages.__file__).parent / "assets"
    assert {file.name for file in folder.iterdir()} == {"index.html", pages.ICON, pages.STYLES, *pages.SCRIPTS}
    assert len(pages.assets()) == 2 + len(pages.SCRIPTS)
    assert replace(pages.assets()[0], name="a/x.css").media_type.startswith("text/css")
