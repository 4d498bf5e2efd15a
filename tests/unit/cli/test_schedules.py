"""`schedules` and `workers beat`, as one types them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from kontext_batch.cli import main
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.engine import close_database, open_database

BEAT = [sys.executable, "-m", "kontext_batch.cli.main", "workers", "beat", "--every", "0.2"]
SCHEDULE = 'schedule: {cron: "0 22 * * *", tz: Europe/Berlin, stop_at: "06:00", overlap: queue}\n'


def let_an_hour_pass(studio: Path) -> None:
    engine = open_database(f"sqlite:///{studio / 'kontext-out' / 'kontext.db'}")
    with engine.begin() as conn:
        conn.execute(sa.update(t.schedules).values(considered=datetime.now(UTC) - timedelta(hours=1)))
    close_database(engine)


def test_a_schedule_of_a_recipe_is_taken_over(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = studio / "sizes.yaml"
    recipe.write_text(recipe.read_text() + SCHEDULE)
    assert main.main(["schedules", "add", "sizes.yaml", "--stop-at", "05:30", "--only-changed"]) == 0
    assert "schedule sizes: first at" in capsys.readouterr().out
    assert main.main(["schedules", "list", "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert (told["cron"], told["tz"], told["stop_at"]) == ("0 22 * * *", "Europe/Berlin", "05:30")
    assert (told["overlap"], told["catch_up"], told["only_changed"]) == ("queue", "last", True)
    assert datetime.fromisoformat(told["next"]).minute == 0
    assert main.main(["schedules", "add", "sizes.yaml"]) == 2
    assert "'sizes' already" in capsys.readouterr().err
    assert main.main(["schedules", "preview", "sizes", "--count", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(" 22:00 CE" in line for line in lines)


def test_a_schedule_that_nobody_added_is_spoken_of(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = "note: it runs now, once; its schedule fires nothing until `kontext-batch schedules add sizes.yaml`\n"

    def told(command: str) -> str:
        assert main.main(command.split()) == 0
        captured = capsys.readouterr()
        assert "note" not in captured.out.replace('"notes"', "")
        return captured.err

    assert "note" not in told("submit sizes.yaml")
    recipe = studio / "sizes.yaml"
    recipe.write_text(recipe.read_text() + SCHEDULE)
    for command in ("submit sizes.yaml", "run sizes.yaml"):
        assert told(command).count(note) == 1
    assert "note" not in told("submit sizes.yaml --json")
    assert main.main(["schedules", "add", "sizes.yaml"]) == 0
    capsys.readouterr()
    for command in ("submit sizes.yaml", "run sizes.yaml", "schedules run-now sizes"):
        assert "note" not in told(command)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no `schedule`"),
        (["--cron", "0 22 * *"], "has 4 fields"),
        (["--cron", "@daily", "--tz", "UTC"], "five"),
        (["--cron", "0 22 * * *", "--tz", "Europe/Berln"], "did you mean 'Europe/Berlin'"),
        (["--cron", "0 22 * * *", "--stop-at", "25:00"], "stop_at"),
        (["--cron", "0 22 * * *", "--overlap", "both"], "overlap"),
    ],
)
def test_a_schedule_that_cannot_be_is_told(
    studio: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main.main(["schedules", "add", "sizes.yaml", *options]) == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (studio / "kontext-out").exists()


def test_a_schedule_is_paused_resumed_removed(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["schedules", "add", "sizes.yaml", "--name", "n", "--cron", "* * * * *"]) == 0
    assert main.main(["schedules", "remove", "n"]) == 2
    assert "say --yes" in " ".join(capsys.readouterr().err.split())
    for verb in ("pause", "pause", "list", "resume", "resume", "remove"):
        assert main.main(["schedules", verb, *([] if verb == "list" else ["n"]), *["--yes"][: verb == "remove"]]) == 0
    told = capsys.readouterr().out
    assert "schedule n is paused\nschedule n is paused already\n" in told
    assert "  paused  " in told
    assert told.endswith("schedule n fires again\nschedule n is not paused\nschedule n is removed\n")
    for verb in ("pause", "resume", "remove", "preview", "fires", "run-now"):
        assert main.main(["schedules", verb, "n"]) == 2
        assert "there is no schedule 'n'" in capsys.readouterr().err


def test_run_now_submits_beside_the_times(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["schedules", "add", "sizes.yaml", "--cron", "0 0 29 2 *", "--priority", "7"]) == 0
    assert main.main(["schedules", "run-now", "sizes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["event"] == "finished"
    assert main.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["priority"] == 7
    assert main.main(["schedules", "fires", "sizes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_two_beats_start_one_run_and_stop_when_they_are_told(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["schedules", "add", "sizes.yaml", "--cron", "0 * * * *"]) == 0
    let_an_hour_pass(studio)
    beats = [subprocess.Popen(BEAT, cwd=studio, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for each in beats:  # one that is told to stop before it listens would end by the signal
            assert each.stderr is not None
            assert each.stderr.readline().startswith("beating")
        for _ in range(600):
            capsys.readouterr()
            assert main.main(["schedules", "fires", "sizes", "--json"]) == 0
            fires = json.loads(capsys.readouterr().out)
            if fires and fires[0]["state"] == "run":
                break
            time.sleep(0.1)
    finally:
        for each in beats:
            each.send_signal(signal.SIGTERM)
        told = [each.communicate(timeout=60)[1] for each in beats]
    assert [each.returncode for each in beats] == [0, 0]
    assert [fire["state"] for fire in fires] == ["run"]
    assert "".join(told).count("run 1\n") == 1
    assert main.main(["runs", "list", "--json"]) == 0
    [run] = json.loads(capsys.readouterr().out)
    assert (run["trigger"], run["state"]) == ("schedule", "running")
