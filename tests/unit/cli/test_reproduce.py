"""`reproduce` with a small real engine: pictures of mixed batches are made again, bit for bit."""

from __future__ import annotations

import json
import math
import re
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file

from kontext_batch.bootstrap import model_entry
from kontext_batch.cli import main
from kontext_batch.registry import Registry
from tests.acceptance.conftest import REFERENCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RECIPE = """\
version: 1
name: shop
owner: studio@acme.example
inputs:
  item: {glob: "photos/*"}
matrix:
  scene: {beach: {place: a beach at noon}, snow: {place: deep snow}}
defaults:
  edit: {model: small}
steps:
  clean: {op: edit, image: "${item.file}", prompt: Remove the background., steps: 2}
  bright: {op: edit, image: "${item.file}", prompt: Make it bright., steps: 12}
  staged: {op: edit, image: "${clean}", references: ["${bright}"], prompt: "On ${scene.place}.", steps: 3}
  finish: {op: finish, image: "${staged}", size: 32x32, format: png}
outputs:
  - {from: "${finish}", to: "out/${item}_${scene}.${ext}", if_exists: replace}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random reference model, told that it was made for 64x64."""
    folder = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(REFERENCE, folder)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 64}))
    return folder


@pytest.fixture
def shop(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: three photos of several shapes, so that rows of a batch differ in size."""
    (tmp_path / "photos").mkdir()
    for name, size in (("mug", (80, 64)), ("bag", (64, 96)), ("cap", (64, 64))):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).ellipse((10, 10, size[0] - 10, size[1] - 20), fill="red" if name == "mug" else "blue")
        image.save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "shop.yaml").write_text(RECIPE)
    Registry().with_model("small", model_entry(model)).write(tmp_path / "models.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KONTEXT_BATCH_MODELS_FILE", str(tmp_path / "models.json"))
    monkeypatch.setenv("KONTEXT_BATCH_BATCH_ROWS", "4")
    monkeypatch.setenv("KONTEXT_BATCH_DEVICE", "cpu")
    return tmp_path


def query(shop: Path, sql: str, *values: Any) -> list[Any]:
    with closing(sqlite3.connect(shop / "kontext-out" / "kontext.db")) as conn, conn:
        return conn.execute(sql, values).fetchall()


def run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "shop.yaml"]) == 0
    capsys.readouterr()


def reproduce(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, what it says as JSON, and what it tells before."""
    code = main.main(["reproduce", *map(str, arguments), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def staged_beside_others(shop: Path) -> int:
    """A step that joined while others were half done, as the database has it."""
    rows = query(
        shop,
        "SELECT m.step_id FROM batch_members m JOIN batch_members o ON o.batch_id = m.batch_id "
        "WHERE o.joined < m.joined AND m.joined < o.left",
    )
    assert rows, "no batch was mixed"
    return int(rows[0][0])


@pytest.mark.parametrize("invariant", [False, True])
def test_a_picture_of_a_mixed_batch_is_made_again(
    shop: Path, invariant: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KONTEXT_BATCH_BATCH_INVARIANT", str(invariant).lower())
    run(capsys)
    monkeypatch.delenv("KONTEXT_BATCH_BATCH_INVARIANT")  # the record decides, not the setting of now
    before = dump(shop)
    step = staged_beside_others(shop)
    code, [found], told = reproduce(capsys, step)
    assert (code, found["equal"], found["latents"], found["picture"]) == (0, True, 0.0, None)
    assert (found["batch_invariant"], bool(found["beside"])) == (invariant, not invariant)
    assert told == ""
    code, both, told = reproduce(capsys, "out/mug_snow.png")
    assert (code, [each["operation"] for each in both]) == (0, ["finish", "edit"])
    assert all(each["equal"] for each in both)
    assert dump(shop) == before, "it writes nothing but notes"
    assert query(shop, "SELECT subject FROM audit WHERE action = 'reproduce'")[0] == (f"step:{step}",)


def dump(shop: Path) -> Sequence[str]:
    with closing(sqlite3.connect(shop / "kontext-out" / "kontext.db")) as conn:
        return [line for line in conn.iterdump() if "audit" not in line]


def test_a_stored_picture_that_was_changed_is_told_with_how_far_and_where(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys)
    step = query(shop, "SELECT step_id FROM run_steps WHERE node = 'staged'")[0][0]
    sql = "SELECT slot, uri FROM artifacts a JOIN step_outputs o ON o.sha256 = a.sha256 WHERE o.step_id = ?"
    files = {slot: Path(uri.removeprefix("file://")) for slot, uri in query(shop, sql, step)}
    image = Image.open(files["image"])
    image.load()
    before = image.getpixel((30, 20))
    assert isinstance(before, tuple)
    image.putpixel((30, 20), (before[0] ^ 64, *before[1:]))
    image.save(files["image"], "PNG")
    latents = load_file(files["latents"])
    latents["latents"][0, 0] += 0.5
    save_file(latents, files["latents"], metadata={"size": "64x64"})
    code, [found], told = reproduce(capsys, step)
    assert (code, found["equal"]) == (1, False)
    assert (found["picture"]["box"], found["picture"]["worst"]) == ([30, 20, 1, 1], [30, 20, 64])
    pixels = 3 * found["picture"]["size"][0] * found["picture"]["size"][1]
    assert found["picture"]["psnr"] == pytest.approx(10 * math.log10(255**2 * pixels / 64**2))
    assert found["latents"] == pytest.approx(0.5)
    assert told.count("is damaged, its sha256 is not the one that was committed; the replay is what was committed") == 2

    query(shop, "UPDATE step_params SET params = json_set(params, '$.seed', 1) WHERE step_id = ?", step)
    assert main.main(["reproduce", str(step)]) == 1
    said = capsys.readouterr()
    assert re.search(r"  it differs\n  PSNR \d+\.\d dB; what differs lies in \d+x\d+ pixels from \d+,\d+; ", said.out)
    assert re.search(r"\n  latents differ by at most \d", said.out)
    assert "its parameters in the database are not those that its key was made of" in said.err

    (shop / "photos" / "mug.png").write_bytes((shop / "photos" / "bag.png").read_bytes())
    assert main.main(["reproduce", "clean"]) == 2
    assert "3 steps are meant; give the number of one: " in capsys.readouterr().err
    clean = query(shop, "SELECT step_id FROM run_steps WHERE node = 'clean' AND axes LIKE '%mug%'")[0][0]
    assert main.main(["reproduce", str(clean)]) == 5
    assert "mug.png: the photo is another one than then" in capsys.readouterr().err
