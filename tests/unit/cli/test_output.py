"""What commands write is text: prompts, names and errors of others command no terminal."""

from __future__ import annotations

import json

import pytest

from kontext_batch.cli import output

HOSTILE = "a\x1b[2J\x07\x9b31m\x7f\tb"
SHOWN = r"a\x1b[2J\x07\x9b31m\x7f" + "\tb"


def test_lines_show_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    output.say(f"{HOSTILE}\nä")
    output.tell(HOSTILE)
    told = capsys.readouterr()
    assert (told.out, told.err) == (f"{SHOWN}\nä\n", f"{SHOWN}\n")


def test_json_means_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    output.say_json({"prompt": HOSTILE})
    told = capsys.readouterr().out
    assert json.loads(told) == {"prompt": HOSTILE}
    output.event("step", prompt=HOSTILE)
    told += (line := capsys.readouterr().out)
    assert json.loads(line)["prompt"] == HOSTILE
    assert not output.COMMANDS & set(map(ord, told))


def test_cells_of_tables_too(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["prompt"], [["a\x1b[2J\x9b"]])
    assert r"a\x1b[2J\x9b" in (told := capsys.readouterr().out)
    assert not output.COMMANDS & set(map(ord, told))
