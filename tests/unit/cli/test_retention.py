"""`gc` by age, `holds` and `forget`, as one types them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kontext_batch.cli import main
from kontext_batch.errors import InfrastructureError
from kontext_batch.storage.local import LocalStore

TWO_STEPS = """\
version: 1
name: chain
owner: studio@acme.example
inputs:
  item: {glob: "photos/*"}
steps:
  middle: {op: finish, image: "${item.file}", size: 32x32, format: png}
  made: {op: finish, image: "${middle}", size: 16x16, format: png}
outputs:
  - {from: "${made}", to: "out/${item}.${ext}"}
"""


@pytest.fixture
def done(studio: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder after a run of two photos, each with an intermediate and an output."""
    (studio / "chain.yaml").write_text(TWO_STEPS)
    assert main.main(["run", "chain.yaml"]) == 0
    capsys.readouterr()
    return studio


def objects(studio: Path) -> list[str]:
    return sorted(each.name for each in (studio / "kontext-out" / "objects").rglob("*.*"))


def told(capsys: pytest.CaptureFixture[str], command: str, *more: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main.main([*command.split(), *more, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def sha_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_gc_takes_old_intermediates_and_says_by_which_rule(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    would = told(capsys, "gc --dry-run --days 0")
    assert (would["artifacts"], would["by_age"]["artifacts"], would["by_size"]["artifacts"]) == (2, 2, 0)
    assert len(objects(done)) == 4
    would = told(capsys, "gc --dry-run --days 0 --keep-bytes 0")
    assert (would["by_age"]["artifacts"], would["by_size"]["artifacts"]) == (2, 2)
    assert main.main(["gc", "--days", "1", "--yes"]) == 0
    assert len(objects(done)) == 4
    assert main.main(["gc", "--days", "0", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "intermediates not wanted for long: 2 artifacts of" in out
    outputs = sorted(sha_of(each) for each in (done / "out").glob("*.png"))
    assert [name.removesuffix(".png") for name in objects(done)] == outputs
    assert main.main(["run", "chain.yaml", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["state"] == "done"
    assert len(objects(done)) == 2, "nothing was computed again"


def test_the_setting_decides_where_nothing_is_said(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(capsys, "gc --dry-run")["artifacts"] == 0
    monkeypatch.setenv("KONTEXT_BATCH_KEEP_INTERMEDIATES_DAYS", "0")
    assert told(capsys, "gc --dry-run")["by_age"]["artifacts"] == 2


@pytest.mark.parametrize("subject", ["run:1", "step:4", "out/mug.png", "photos/mug.png", "sha256"])
def test_holds_keep(done: Path, capsys: pytest.CaptureFixture[str], subject: str) -> None:
    if subject == "sha256":
        subject = sha_of(done / "photos" / "mug.png")
    assert main.main(["holds", "add", subject, "--reason", "case 4711"]) == 0
    assert main.main(["holds", "add", subject, "--reason", "again"]) == 0
    kept = told(capsys, "gc --dry-run --keep-bytes 0")["artifacts"]
    assert kept == (0 if subject == "run:1" else 2)
    [hold] = told(capsys, "holds list")
    assert hold["reason"] == "case 4711"
    assert main.main(["holds", "release", subject]) == 0
    assert main.main(["holds", "release", subject]) == 2
    assert told(capsys, "holds list") == []
    assert len(told(capsys, "holds list --all")) == 1
    assert told(capsys, "gc --dry-run --keep-bytes 0")["artifacts"] == 4
    assert [each["action"] for each in told(capsys, "audit list")] == ["holds release", "holds add", "run"]


def test_a_hold_on_what_is_not_there_is_refused(done: Path) -> None:
    for subject in ("run:9", "step:99", "photos/none.png", "0" * 64, "nonsense"):
        assert main.main(["holds", "add", subject, "--reason", "why"]) == 2, subject
    assert main.main(["holds", "add", "run:1", "--reason", " "]) == 2


def test_a_photo_is_forgotten_with_all_that_came_from_it(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, copy = done / "photos" / "mug.png", done / "photos" / "copy.png"
    copy.write_bytes(photo.read_bytes())
    assert main.main(["run", "chain.yaml"]) == 0
    sidecar = done / "out" / "mug.png.lineage.json"
    assert sidecar.exists()
    capsys.readouterr()
    assert main.main(["forget", "photos/mug.png", "--reason", "consent withdrawn", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"photo {sha_of(photo)}" in said
    assert "made from it: 2 steps" in said
    assert "out/mug.png" in said
    assert "out/copy.png" in said
    assert len(objects(done)) == 4
    assert main.main(["forget", "photos/mug.png", "--reason", "consent withdrawn"]) == 2, "nobody was there to ask"
    assert main.main(["forget", "photos/mug.png", "--reason", "consent withdrawn", "--yes"]) == 0
    said = capsys.readouterr().out
    assert "4 objects are deleted, 2 are not" in said
    assert "the photo itself: not deleted" in said
    assert len(objects(done)) == 2
    assert sorted(each.name for each in (done / "out").iterdir()) == ["bag.png", "bag.png.lineage.json"]
    assert photo.exists()
    assert main.main(["run", "chain.yaml"]) == 2
    err = capsys.readouterr().err
    assert "chain.yaml:5:16 inputs.item.glob: row 'copy'" in err, err
    assert "was taken down on" in err
    assert "consent withdrawn" in err
    (done / "chain.yaml").write_text(TWO_STEPS.replace('"photos/*"', '"photos/*", on_missing: skip'))
    assert main.main(["run", "chain.yaml"]) == 0
    assert sorted(each.name for each in (done / "out").iterdir()) == ["bag.png", "bag.png.lineage.json"]
    assert main.main(["lineage", "out/mug.png"]) == 0, "what was made of what stays known"
    assert main.main(["db", "verify", "--objects"]) == 0


def test_the_same_command_goes_on_and_the_photo_goes_where_it_is_said(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forget = ["forget", "photos/mug.png", "--reason", "consent withdrawn", "--yes"]
    delete = LocalStore.delete

    def broken(self: LocalStore, uri: str) -> None:
        if "/out/" in uri:
            raise InfrastructureError("no network")
        delete(self, uri)

    monkeypatch.setattr(LocalStore, "delete", broken)
    assert main.main(forget) == 1
    said = capsys.readouterr()
    assert "still to be deleted" in said.out
    assert "goes on" in said.err
    assert (done / "out" / "mug.png").exists()
    monkeypatch.setattr(LocalStore, "delete", delete)
    would = told(capsys, "gc --dry-run")
    assert would["taken_down"] == 1
    assert main.main(["gc", "--yes"]) == 0
    assert not (done / "out" / "mug.png").exists()
    assert told(capsys, "gc --dry-run")["taken_down"] == 0
    assert (done / "photos" / "mug.png").exists()
    assert main.main([*forget, "--source-too"]) == 0
    assert not (done / "photos" / "mug.png").exists()
    found = told(capsys, f"forget {sha_of(done / 'photos' / 'bag.png')} --reason why --yes --source-too")
    assert {each["kind"]: each["deleted"] is not None for each in found["tombstones"]} == {
        "artifact": True,
        "file": True,
        "photo": True,
    }
    assert not (done / "photos" / "bag.png").exists()


def test_what_was_moved_or_changed_is_told_and_left(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (done / "out" / "mug.png").rename(done / "out" / "moved.png")
    (done / "out" / "bag.png").write_bytes(b"retouched")
    for name in ("mug", "bag"):
        assert main.main(["forget", f"photos/{name}.png", "--reason", "why", "--yes"]) == 0
    said = capsys.readouterr().out
    assert "out/mug.png: was not there any more" in said
    assert "out/bag.png: another picture lies there by now" in said
    assert (done / "out" / "bag.png").read_bytes() == b"retouched"
    assert (done / "out" / "moved.png").exists()


def test_a_hold_stands_against_forgetting(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["holds", "add", "out/mug.png", "--reason", "case 4711"]) == 0
    assert main.main(["forget", "photos/mug.png", "--reason", "why", "--yes"]) == 5
    assert "case 4711" in capsys.readouterr().err
    assert len(objects(done)) == 4
    assert main.main(["forget", "photos/mug.png", "--reason", "why", "--yes", "--despite-hold"]) == 0
    assert len(objects(done)) == 2


def test_what_is_unknown_is_not_forgotten(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for photo in ("photos/none.png", "0" * 64, "s3://bucket/x.png"):
        assert main.main(["forget", photo, "--reason", "why", "--yes"]) == 2, photo
    (done / "photos" / "mug.png").unlink()
    assert main.main(["forget", "photos/mug.png", "--reason", "why", "--yes"]) == 0, "the database knows what lay there"
    with closing(sqlite3.connect(done / "kontext-out" / "kontext.db")) as conn:
        assert conn.execute("SELECT count(*) FROM tombstones WHERE deleted IS NOT NULL").fetchone() == (3,)


def test_a_plan_that_is_older_than_the_takedown_is_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main.main(["plan", "chain.yaml", "--json"]) == 0
    (done / "plan.json").write_text(capsys.readouterr().out)
    assert main.main(["forget", "photos/mug.png", "--reason", "withdrawn", "--yes"]) == 0
    assert main.main(["run", "plan.json"]) == 5
    assert "chain.yaml:7: file://" in (err := capsys.readouterr().err), err
    assert "was taken down" in err
