"""`reproduce` of picture operations, which need no model: what it says and how it ends."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from kontext_batch.cli import main


@pytest.fixture
def done(studio: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    return studio


def test_a_finished_file_is_made_again_and_may_be_kept(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["reproduce", "out/mug_small.png", "--save", "again.png"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1] == "  equal bit for bit"
    assert not said.err
    assert (done / "again.png").read_bytes() == (done / "out" / "mug_small.png").read_bytes()
    assert main.main(["audit", "list", "--json"]) == 0
    [act, *_] = json.loads(capsys.readouterr().out)
    assert (act["action"], act["details"]) == ("reproduce", {"equal": True, "alone": False, "psnr": None})


def test_a_file_from_before_marks_is_made_again(
    studio: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KONTEXT_BATCH_MARK", "false")
    assert main.main(["run", "sizes.yaml"]) == 0
    monkeypatch.delenv("KONTEXT_BATCH_MARK")
    assert b"kontext-batch:b2:" not in (studio / "out" / "mug_small.png").read_bytes()
    capsys.readouterr()
    assert main.main(["reproduce", "out/mug_small.png"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  equal bit for bit"


def test_nothing_is_made_again_from_a_photo_that_was_taken_down(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["forget", "photos/mug.png", "--reason", "consent withdrawn", "--yes"]) == 0
    capsys.readouterr()
    assert main.main(["reproduce", "out/mug_small.png"]) == 5
    assert "consent withdrawn" in capsys.readouterr().err


def test_a_file_that_differs_says_how(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(done / "kontext-out" / "kontext.db")) as conn, conn:
        conn.execute("UPDATE step_params SET params = json_set(params, '$.format', 'webp', '$.quality', 100)")
        conn.execute(
            "UPDATE step_params SET params = json_set(params, '$.size', json('{\"width\": 8, \"height\": 8}')) "
            "WHERE step_id = 1"
        )
    assert main.main(["reproduce", "1"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == ["  it differs as a file", "  its size was 16x16 and is 8x8"]
    assert main.main(["reproduce", "2"]) == 1
    assert capsys.readouterr().out.splitlines()[1] == "  it differs as a file"


def test_what_cannot_be_done_is_refused_with_all_reasons(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["reproduce", "nothing-like-it"]) == 2
    assert "no step is known as" in capsys.readouterr().err
    assert main.main(["reproduce", "made"]) == 2
    assert "4 steps are meant; give the number of one: 1, 2, 3, 4" in capsys.readouterr().err
    assert main.main(["reproduce", "1", "--save", "no/such/place.png"]) == 2
    assert "the picture cannot be kept there (No such file or directory)" in capsys.readouterr().err
    for name in ("mug", "bag"):
        Image.new("RGB", (40, 40), "green").save(done / "photos" / f"{name}.png")
    assert main.main(["reproduce", "1", "--json"]) == 5
    told = json.loads(capsys.readouterr().out)
    assert told["exit"] == 5
    assert "the photo is another one than then" in told["problems"][0]
