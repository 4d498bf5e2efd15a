"""`inbox`, and `workers beat` over a folder, as one types them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kontext_batch.cli import acting, main
from kontext_batch.storage.uris import file_uri

COMMAND = [sys.executable, "-m", "kontext_batch.cli.main", "workers"]
PATIENCE = 150.0
"""Seconds, on a machine that has other things to do."""
BUDGET = "budget: {outputs: 10}\n"


@pytest.fixture
def inbox(studio: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An inbox beside a workspace that is there."""
    (studio / "kontext-out").mkdir()
    folder = studio / "inbox"
    folder.mkdir()
    (studio / "photos").rename(folder / "photos")
    place = {
        "prefix": str(folder),
        "owner": "studio@acme.example",
        "budget": {"outputs": 10},
        "write": [str(studio / "dam")],
    }
    monkeypatch.setenv("KONTEXT_BATCH_INBOXES", json.dumps([place]))
    monkeypatch.setenv("KONTEXT_BATCH_INBOX_SETTLE_SECONDS", "0.3")
    return folder


def drop(studio: Path, inbox: Path, name: str, *, change: tuple[str, str] = ("", "")) -> Path:
    text = (studio / "sizes.yaml").read_text().replace('"out/', f'"{studio}/dam/') + BUDGET
    file = inbox / name
    file.write_text(text.replace(*change) if change[0] else text)
    return file


def listed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main.main(["inbox", "list", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if until():
            return
        time.sleep(0.2)
    raise AssertionError("it did not come to pass")


def test_an_empty_inbox_is_listed(inbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys) == []
    assert main.main(["inbox", "retry", "7"]) == 2
    assert "there is no drop 7; `inbox list` shows them" in capsys.readouterr().err


@pytest.mark.timeout(400)
def test_a_beat_and_a_worker_answer_a_dropped_recipe(
    studio: Path, inbox: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drop(studio, inbox, "x.yaml")
    bad = drop(studio, inbox, "y.yaml", change=("${made}", "${mode}"))
    commands = [[*COMMAND, "beat", "--every", "0.2"], [*COMMAND, "start"]]
    processes = [subprocess.Popen(each, cwd=studio, stderr=subprocess.PIPE, text=True) for each in commands]
    try:
        wait((inbox / "x.report.html").exists)
        wait((inbox / "y.errors.txt").exists)
        wait(lambda: [each["state"] for each in listed(capsys)] in (["refused", "finished"], ["finished", "refused"]))
    finally:
        for each in processes:
            each.send_signal(signal.SIGTERM)
        told = [each.communicate(timeout=60)[1] for each in processes]
    assert [each.returncode for each in processes] == [0, 0]
    assert told[0].count("run 1\n") == 1
    assert len(list((studio / "dam").glob("*.png"))) == 4
    assert json.loads((inbox / "x.status.json").read_text())["state"] == "done"
    by_name = {each["uri"].rpartition("/")[2]: each for each in listed(capsys)}
    assert (by_name["x.yaml"]["run_id"], by_name["x.yaml"]["owner"]) == (1, "studio@acme.example")
    assert by_name["y.yaml"]["error"].startswith("y.yaml:")
    assert main.main(["inbox", "list"]) == 0
    assert "unknown" in capsys.readouterr().out
    for which in (str(by_name["y.yaml"]["id"]), str(bad), file_uri(bad)):
        code = main.main(["inbox", "retry", which])
        told_now = capsys.readouterr()
        if which.isdecimal():
            assert (code, told_now.out) == (0, f"drop {which} is looked at again: {file_uri(bad)}\n")
        else:  # nobody has looked at it since
            assert code == 2
            assert "is claimed: `workers beat` acts on it by itself" in told_now.err
    assert main.main(["inbox", "retry", str(inbox / "x.yaml")]) == 2
    assert "`runs retry 1`" in capsys.readouterr().err
    assert main.main(["audit", "list", "--json"]) == 0
    retried, started = json.loads(capsys.readouterr().out)
    assert (retried["who"], retried["via"], retried["action"]) == (acting.user(), "cli", "inbox retry")
    assert retried["subject"] == f"drop:{by_name['y.yaml']['id']}"
    assert (started["who"], started["via"]) == ("studio@acme.example", "inbox")
    assert (started["action"], started["subject"]) == ("submit", "run:1")


@pytest.mark.parametrize(
    ("inboxes", "words"),
    [
        ("[{}]", "inboxes.0.prefix"),
        ('[{"prefix": "a", "owner": "o", "write": ["b"], "budget": {}}]', "a limit is needed"),
        ('[{"prefix": "a", "owner": "o", "write": [], "budget": {"outputs": 1}}]', "inboxes.0.write"),
        ('[{"prefix": "a", "owner": "o", "write": ["a/b"], "budget": {"outputs": 1}}]', "where recipes are dropped"),
        ("s3://acme/inbox", "a JSON list is expected"),
    ],
)
def test_settings_that_make_no_inbox_are_told(
    inbox: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, inboxes: str, words: str
) -> None:
    monkeypatch.setenv("KONTEXT_BATCH_INBOXES", inboxes)
    assert main.main(["inbox", "list"]) == 2
    assert words in capsys.readouterr().err


def test_doctor_tries_whether_an_inbox_can_be_answered(inbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["doctor"])
    assert (
        f"ok   inbox of studio@acme.example: {file_uri(inbox)}/ can be read and written to" in capsys.readouterr().out
    )
    inbox.rename(inbox.with_name("elsewhere"))
    inbox.write_text("no folder")
    assert main.main(["doctor"]) == 1
    assert "FAIL inbox of studio@acme.example: " in capsys.readouterr().out
