"""`db verify`: the database against its rules, the store against the database; `verify`: bytes against hashes."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kontext_batch.cli import main


@pytest.fixture
def done(studio: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The workspace after a run of four pictures."""
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    return studio / "kontext-out"


def test_a_sound_workspace_is_told_as_such(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["db", "verify", "--objects"]) == 0
    assert capsys.readouterr().out == "0 rows break a rule, 0 objects are missing, 0 are unknown\n"


def test_a_row_that_breaks_a_rule_is_named(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(done / "kontext.db")) as conn, conn:
        conn.execute("UPDATE steps SET state = 'ready', deps_left = 1 WHERE id = 1")
    assert main.main(["db", "verify"]) == 1
    assert "broken: steps 1: a ready step waits for nothing" in capsys.readouterr().out


def test_objects_are_compared_with_the_database_both_ways(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost, *_ = sorted((done / "objects").rglob("*.png"))
    stray = done / "objects" / "00" / "stray.png"
    stray.parent.mkdir(exist_ok=True)
    lost.rename(stray)
    assert main.main(["db", "verify"]) == 0
    capsys.readouterr()
    assert main.main(["db", "verify", "--objects", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["missing"], told["unknown"]) == ([lost.as_uri()], [stray.as_uri()])
    assert main.main(["db", "verify", "--forget"]) == 2
    assert main.main(["db", "verify", "--objects", "--forget", "--yes"]) == 1
    assert main.main(["run", "sizes.yaml"]) == 0  # is made again, and delivered at once
    capsys.readouterr()
    assert main.main(["db", "verify", "--objects"]) == 0
    assert capsys.readouterr().out == "0 rows break a rule, 0 objects are missing, 1 are unknown\n"


# ------------------------------------------------------------------------------------------------ `verify`, which reads


def test_stored_pictures_are_read_and_what_is_wrong_is_mended(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["verify"]) == 0
    said = capsys.readouterr()
    count, size = (int(word) for word in said.out.split() if word.isdigit() and word != "0")
    assert (count, size) == (4, sum(file.stat().st_size for file in (done / "objects").rglob("*.png")))
    gone, changed, *_ = sorted((done / "objects").rglob("*.png"))
    gone.unlink()
    changed.write_bytes(b"something else")
    assert main.main(["verify", "--json", "--rate", "1GB"]) == 1
    told = json.loads(capsys.readouterr().out)["damaged"]
    assert {each["artifact"]["uri"]: each["problem"].partition(":")[0] for each in told} == {
        gone.as_uri(): "missing",
        changed.as_uri(): "changed",
    }
    assert main.main(["verify", "--repair", "--yes"]) == 1
    said = capsys.readouterr()
    assert f"missing: nothing lies at its place: {gone.as_uri()} (of step " in said.out
    assert said.err == "2 forgotten\n"
    assert main.main(["run", "sizes.yaml"]) == 0
    assert main.main(["verify"]) == 0
    assert gone.is_file()
    acts = [each["details"] for each in audited(capsys) if each["subject"] == "verification"]
    assert acts[:2] == [{"finished": True, "problems": 0}, {"finished": False}]


def test_a_pass_that_was_stopped_says_that_it_goes_on(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kontext_batch.storage.router import StoreRouter

    def stop(self: StoreRouter, uri: str, **options: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreRouter, "read", stop)
        assert main.main(["verify"]) == 130
    capsys.readouterr()
    assert main.main(["verify"]) == 0
    assert "going on with the pass of 20" in capsys.readouterr().err
    assert main.main(["verify"]) == 0
    assert not capsys.readouterr().err


def test_a_rate_that_is_none_is_told(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rate in ("fast", "0MB", "-1MB", "50 parsecs"):
        assert main.main(["verify", "--rate", rate]) == 2
        assert "is no number of bytes; write 350KB, 2MB, ..." in " ".join(capsys.readouterr().err.split())


def audited(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What the audit says, the newest first."""
    capsys.readouterr()
    assert main.main(["audit", "list", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found
