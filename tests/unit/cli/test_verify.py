"""`db verify`: the database against its rules, the store against the database."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

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
