"""What the command line says to wrong input and in odd surroundings."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from kontext_batch.cli import main

TOO_LARGE = "99999999999999999999"


@pytest.fixture
def done(studio: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The studio after one run."""
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    return studio


def test_what_is_no_number_of_a_run_is_told_in_one_line(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (TOO_LARGE, "9" * 5000, "x", "12a", "²"):
        for command in ("status", "runs show", "runs cancel", "runs retry --failed", "explain"):
            text = f"run:{given}" if command == "explain" else given
            assert main.main([*command.split(), text]) == 2, (command, given)
            told = capsys.readouterr().err
            assert told == (
                f"there is no run '{given[:80]}': the number of a run is expected, as `runs list` shows it\n"
            ), command
    assert main.main(["status", "x", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["message"].startswith("there is no run 'x': ")


def test_what_is_no_step_is_told_in_one_line(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (TOO_LARGE, "9" * 5000, "x" * 100_000, "x", "a\nb"):
        for command in ("steps show", "steps logs", "explain", "lineage"):
            assert main.main([*command.split(), given]) == 2, (command, given)
            told = capsys.readouterr().err
            assert told == f"no step is known as '{given[:80]}': give its number, key, name or the path of an output\n"


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-"])
def test_a_command_does_its_work_without_standard_streams(studio: Path, closed: str) -> None:
    command = f'exec "{sys.executable}" -m kontext_batch.cli.main run sizes.yaml {closed}'
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == 0
    assert len(list((studio / "out").iterdir())) == 4
    with contextlib.closing(sqlite3.connect(studio / "kontext-out" / "kontext.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
