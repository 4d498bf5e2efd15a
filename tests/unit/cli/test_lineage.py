"""`lineage` and the exports of lineage, as one types them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kontext_batch.cli import lineage, main
from tests.unit.cli.conftest import FINISH_ONLY
from tests.unit.provenance.schemas import check_event, check_prov

PICTURE = "out/mug_small.png"


@pytest.fixture
def done(studio: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The studio after one run."""
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    return studio


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard output of a command that succeeds."""
    assert main.main(list(arguments)) == 0, arguments
    return capsys.readouterr().out


def data(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(said(capsys, *arguments, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that is refused, on one line."""
    assert main.main(list(arguments)) == 2, arguments
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_file_says_where_it_comes_from(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "lineage", PICTURE)
    for each in ("sizes.yaml:9", "photos/mug.png sha256 ", "delivered by run 1", "attempt 1 ok", "16x16 image/png"):
        assert each in told, each
    shutil.copy(PICTURE, "renamed.png")
    assert said(capsys, "lineage", "renamed.png") == told, "a file is known by its bytes"
    found = data(capsys, "lineage", PICTURE)
    assert (found["asked"], found["direction"]) == (PICTURE, "up")
    [step] = found["steps"]
    assert step["origin"]["line"] == 9
    assert step["reads"][0]["uri"] == f"file://{done}/photos/mug.png"
    assert step["deliveries"][0]["delivered_path"] == f"file://{done}/{PICTURE}"
    assert [each["outcome"] for each in step["attempts"]] == ["ok"]


def test_a_name_that_is_no_text_is_a_name_like_others(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"mug\xff.png")
    shutil.copy(PICTURE, name)
    assert main.main(["lineage", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"] == name
    for command in ("lineage", "explain"):
        assert main.main([command, f"no{name}", "--json"]) == 2
        assert "known as" in json.loads(capsys.readouterr().out)["message"]


def test_a_prompt_commands_no_terminal_and_adds_no_line(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lineage, "_facts", lambda traced: ['prompt "ä \x1b[2J\nstep 1 done"'])
    told = said(capsys, "lineage", PICTURE)
    assert '  prompt "ä \\x1b[2J\\nstep 1 done"\n' in told


def test_a_photo_says_what_was_made_from_it(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "lineage", "photos/mug.png", "--down")
    assert f"file://{done}/out/mug_small.png" in told
    assert f"file://{done}/out/mug_large.png" in told
    assert "bag" not in told
    assert told.endswith(": 2 steps (2 directly), 2 files delivered\n")
    found = data(capsys, "lineage", f"file://{done}/photos/mug.png", "--down")
    assert (found["direct"], found["after"], len(found["steps"])) == (2, None, 2)
    recipe = data(capsys, "lineage", PICTURE)["steps"][0]["origin"]["recipe_sha256"]
    assert len(data(capsys, "lineage", f"recipe:{recipe[:10]}", "--down")["steps"]) == 4


def test_a_file_that_two_runs_delivered_counts_once(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    told = said(capsys, "lineage", "photos/mug.png", "--down")
    assert told.count("  delivered by run ") == 4
    assert told.endswith(": 2 steps (2 directly), 2 files delivered\n")
    assert said(capsys, "lineage", "1", "--down").endswith(": 1 step, 1 file delivered\n")


def test_a_long_answer_says_how_to_go_on(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["lineage", "photos/mug.png", "--down", "--limit", "1"]) == 0
    first = capsys.readouterr()
    hint = first.err.strip()
    after = hint.removeprefix("there is more: --after ").partition(",")[0]
    rest = said(capsys, "lineage", "photos/mug.png", "--down", "--after", after)
    assert ("mug_small" in first.out) != ("mug_small" in rest)
    assert data(capsys, "lineage", "photos/mug.png", "--down", "--limit", "1")["after"] == after
    assert data(capsys, "lineage", "photos/mug.png", "--down", "--limit", "0")["after"] is None
    assert "'x': 12:34 is expected" in refused(capsys, "lineage", PICTURE, "--down", "--after", "x")


def test_a_photo_that_was_replaced_is_known_by_its_place(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (done / "photos" / "mug.png").write_bytes(b"another")
    told = refused(capsys, "lineage", "photos/mug.png", "--down")
    uri = f"file://{done}/photos/mug.png"
    assert told == f"photos/mug.png: a photo was read from there, with other bytes; ask for it as {uri}"
    assert "2 files delivered" in said(capsys, "lineage", uri, "--down")
    (done / "photos" / "mug.png").unlink()
    assert "2 files delivered" in said(capsys, "lineage", "photos/mug.png", "--down")


def test_two_pictures_are_compared(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "lineage", PICTURE, "out/bag_small.png", "--diff").splitlines()
    assert told[0] == "first difference: source bytes (image)"
    assert "photos/mug.png" in told[1]
    assert "photos/bag.png" in told[2]
    told = said(capsys, "lineage", PICTURE, "out/mug_large.png", "--diff").splitlines()
    assert told[0].startswith("first difference: size (")
    assert "and so are the bytes" in said(capsys, "lineage", PICTURE, PICTURE, "--diff")
    assert refused(capsys, "lineage", "made", PICTURE, "--diff").startswith("made means 4 steps; name one by ")
    found = data(capsys, "lineage", PICTURE, "out/mug_large.png", "--diff")
    assert found["first"]["what"] == "size"
    assert found["first"] == found["differences"][0]
    other = FINISH_ONLY.replace("small: {px: 16x16}, large: {px: 32x32}", "large: {px: 48x48}")
    (done / "sizes.yaml").write_text(other)
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    told = said(capsys, "lineage", PICTURE, "out/mug_large.png", "--diff").splitlines()
    assert told[0].startswith("first difference: recipe revision (")
    assert told[0].endswith("), which changes no pixel by itself")


def test_every_form_is_written(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_prov(json.loads(said(capsys, "lineage", PICTURE, "--prov")))
    events = [json.loads(line) for line in said(capsys, "lineage", PICTURE, "--openlineage").splitlines()]
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"]
    for event in events:
        check_event(event)
    assert said(capsys, "lineage", PICTURE, "--dot").startswith("digraph lineage {")
    assert said(capsys, "lineage", "photos/mug.png", "--down", "--dot").startswith("digraph lineage {")
    for arguments in ([PICTURE], ["photos/mug.png", "--down"]):
        assert said(capsys, "lineage", *arguments, "--html", "page.html") == ""
        assert "mug_small.png" in (done / "page.html").read_text()
    assert "nowhere/page.html: No such file" in refused(capsys, "lineage", PICTURE, "--html", "nowhere/page.html")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--json --dot", "--json and --dot are two forms; choose one"),
        ("--html a.html --prov", "--html and --prov are two forms; choose one"),
        ("--diff", "name the other one too"),
        ("other.png", "a second picture is taken with --diff alone"),
        ("other.png --diff --down", "pictures are compared by what they come from"),
        ("other.png --diff --dot", "a comparison is told as text or with --json"),
        ("--after 1:2", "answers of --down alone are told in parts"),
        ("--down --prov", "this form tells where pictures come from alone"),
    ],
)
def test_what_does_not_go_together_is_refused(
    done: Path, capsys: pytest.CaptureFixture[str], arguments: str, told: str
) -> None:
    assert told in refused(capsys, "lineage", PICTURE, *arguments.split())


def test_a_whole_run_is_exported(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(said(capsys, "runs", "export", "1", "--format", "prov"))
    check_prov(document)
    assert len(document["activity"]) == 4
    events = [json.loads(line) for line in said(capsys, "runs", "export", "1", "--format", "openlineage").splitlines()]
    for event in events:
        check_event(event)
    kinds = [event["eventType"] for event in events]
    assert kinds == ["START", *["START", "COMPLETE"] * 4, "COMPLETE"]
    parents = {event["run"]["facets"]["parent"]["run"]["runId"] for event in events[1:-1]}
    assert parents == {events[0]["run"]["runId"]} == {events[-1]["run"]["runId"]}


def test_what_a_run_found_done_is_no_event_of_it(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (done / "sizes.yaml").write_text(FINISH_ONLY.replace("large: {px: 32x32}", "large: {px: 24x24}"))
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    lines = said(capsys, "runs", "export", "2", "--format", "openlineage").splitlines()
    assert len(lines) == 2 + 2 * 2
    assert len(json.loads(said(capsys, "runs", "export", "2", "--format", "prov"))["activity"]) == 4
