"""The grammar, exit codes and machine output of the command line, on a workspace without a model to load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer

from kontext_batch.cli import checks, common, main, output
from kontext_batch.cli.main import app, exit_code
from kontext_batch.cli.progress import LineProgress, Pace, duration
from kontext_batch.cli.run import output_folders
from kontext_batch.errors import (
    InfrastructureError,
    KontextBatchError,
    NotAllowed,
    ObjectChanged,
    ObjectNotFound,
    PlanRefused,
    Problem,
    RecipeError,
    SettingsError,
    StorageFull,
)
from kontext_batch.planning.states import RunState, StepState
from kontext_batch.ports import RunSummary
from tests.unit.cli.conftest import FINISH_ONLY


def commands() -> Iterator[tuple[str, ...]]:
    """Every command, as one types it."""

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield path
            return
        for name, each in inner.items():
            yield from walk(each, (*path, name))

    return walk(typer.main.get_command(app), ())


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_grammar_is_for_good() -> None:
    told = {" ".join(path) for path in commands()}
    assert told >= {"run", "plan", "submit", "status", "explain", "lineage", "doctor", "gc"}
    assert told >= {f"runs {verb}" for verb in ("list", "show", "retry", "cancel", "pause", "resume", "prioritize")}
    assert told >= {"steps show", "steps logs", "recipes validate", "recipes schema", "recipes init"}
    assert told >= {"runs export", "batches show", "workers list", "workers drain", "audit list"}
    assert told >= {"models list", "models add", "models verify", "models convert", "workers start", "db upgrade"}


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_each_command_has_help_with_an_example(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*path, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"Example: kontext-batch {' '.join(path)}" in re.sub(r"\s+", " ", told)


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_each_command_is_in_the_docs_as_its_help_has_it(path: tuple[str, ...]) -> None:
    docs = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
    section = docs.partition(f"## `kontext-batch {' '.join(path)}")[2].partition("\n## ")[0]
    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    for paragraph in command.callback.__doc__.split("\n\n"):
        assert " ".join(paragraph.split()).removeprefix("Example: ") in section
    for option in command.params:
        if option.param_type_name == "option" and option.name not in ("workspace", "as_json"):
            assert f"{option.opts[0]}`: {option.help}" in section


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kontext_batch.cli.main import main; main(['--help']);"
        "print([name for name in ('torch', 'sqlalchemy', 'pydantic', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("x"), 2),
        (NotAllowed("x"), 2),
        (RecipeError([Problem("a.yaml", 1, 1, "", "x")]), 2),
        (ObjectNotFound("x"), 2),
        (PlanRefused(["x"]), 5),
        (ObjectChanged("x"), 5),
        (StorageFull("x"), 3),
        (InfrastructureError("x"), 1),
        (KontextBatchError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_a_run_ends_with_one_terminal_event(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "sizes.yaml", "--json"]) == 0
    told = events(capsys)
    assert [each["event"] in output.TERMINAL_EVENTS for each in told] == [False] * (len(told) - 1) + [True]
    assert told[-1]["state"] == "done"
    assert told[-1]["outputs"] == [f"{studio}/out/"]
    assert sorted(file.name for file in (studio / "out").glob("*.png")) == [
        "bag_large.png",
        "bag_small.png",
        "mug_large.png",
        "mug_small.png",
    ]


def test_an_error_is_the_terminal_event(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (studio / "sizes.yaml").write_text(FINISH_ONLY.replace("owner:", "ovner:"))
    assert main.main(["run", "sizes.yaml", "--json"]) == 2
    (told,) = events(capsys)
    assert told["event"] == "error"
    assert any("sizes.yaml:3:1 ovner: unknown key" in each for each in told["problems"])


def test_usage_is_told_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "x.yaml", "--nonsense", "--json"]) == 2
    assert events(capsys)[-1]["exit"] == 2


def test_an_internal_error_says_where_its_traceback_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(file: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(common, "target", broken)
    assert main.main(["run", "x.yaml"]) == 1
    told = capsys.readouterr().err
    assert "internal error: RuntimeError: a bug" in told
    found = re.search(r"the traceback is in (\S+);", told)
    assert found is not None
    log = Path(found[1])
    assert "in broken" in log.read_text()
    log.unlink()


def test_a_plan_can_be_stored_and_run(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "sizes.yaml", "--json"]) == 0
    (studio / "plan.json").write_text(capsys.readouterr().out)
    assert main.main(["run", "plan.json"]) == 0
    assert len(list((studio / "out").glob("*.png"))) == 4
    assert main.main(["run", "plan.json", "--limit", "1"]) == 2
    (studio / "plan.json").write_text("{}")
    assert main.main(["run", "plan.json"]) == 2


def test_a_plan_beyond_the_budget_is_refused(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (studio / "sizes.yaml").write_text(FINISH_ONLY + "budget: {outputs: 3}\n")
    assert main.main(["plan", "sizes.yaml"]) == 5
    assert "refused: 4 outputs, the budget is 3" in capsys.readouterr().err
    assert main.main(["run", "sizes.yaml"]) == 5
    assert main.main(["run", "sizes.yaml", "--limit", "2"]) == 0


def test_questions_about_a_run(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    for command in (
        ["status"],
        ["runs", "list"],
        ["runs", "show", "1"],
        ["steps", "show", "out/mug_small.png"],
        ["steps", "logs", "made"],
        ["explain", "out/mug_small.png"],
        ["lineage", "out/mug_small.png"],
    ):
        assert main.main(command) == 0, command
        assert capsys.readouterr().out.strip(), command
        assert main.main([*command, "--json"]) == 0, command
        json.loads(capsys.readouterr().out)
    assert main.main(["lineage", "out/mug_small.png"]) == 0
    assert "photos/mug.png" in capsys.readouterr().out
    assert main.main(["explain", "run:1"]) == 0
    assert main.main(["runs", "show", "7"]) == 2
    assert main.main(["steps", "show", "nothing-of-the-kind"]) == 2
    assert main.main(["runs", "cancel", "1"]) == 2
    assert main.main(["gc", "--dry-run", "--keep-bytes", "0"]) == 0
    assert main.main(["doctor"]) == 0
    assert main.main(["db", "check"]) == 0


def test_a_submitted_run_can_be_cancelled(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["submit", "sizes.yaml"]) == 0
    assert main.main(["runs", "cancel", "1"]) == 0
    assert "4 steps will not be computed" in capsys.readouterr().out
    assert main.main(["runs", "retry", "1", "--failed"]) == 0
    assert len(list((studio / "out").glob("*.png"))) == 4


def test_a_paused_run_waits_until_it_is_resumed(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["submit", "sizes.yaml"]) == 0
    assert main.main(["runs", "pause", "1"]) == 0
    assert main.main(["runs", "pause", "1"]) == 0
    assert main.main(["runs", "prioritize", "1", "-5"]) == 0
    assert main.main(["runs", "retry", "1", "--failed", "--json"]) == 130
    told = capsys.readouterr().out
    assert "run 1 is paused\nrun 1 is paused already\nrun 1 has priority -5\n" in told
    last = json.loads(told.splitlines()[-1])
    assert (last["event"], last["exit"]) == ("paused", 130)
    assert "runs resume 1" in last["message"]
    assert main.main(["runs", "resume", "1"]) == 0
    assert main.main(["runs", "resume", "1"]) == 0
    assert capsys.readouterr().out == "run 1 goes on\nrun 1 is not paused\n"
    assert main.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["priority"] == -5
    assert main.main(["runs", "retry", "1", "--failed"]) == 0
    assert len(list((studio / "out").glob("*.png"))) == 4
    for verb in ("pause", "resume", "cancel"):
        assert main.main(["runs", verb, "1"]) == 2
        assert "run 1 has ended already: done\n" in capsys.readouterr().err


def test_the_same_command_lets_a_paused_run_go_on(studio: Path) -> None:
    assert main.main(["submit", "sizes.yaml"]) == 0
    assert main.main(["runs", "pause", "1"]) == 0
    assert main.main(["run", "sizes.yaml"]) == 0
    assert main.main(["status", "2"]) == 2  # it was the same run


def test_a_command_without_a_workspace_makes_none(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["status"]) == 2
    assert "there is no workspace here" in capsys.readouterr().err
    assert not (studio / "kontext-out").exists()


def test_doctor_finds_nothing_wrong_before_the_first_run(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor"]) == 0
    assert "ok   workspace: not made yet; `run FILE` makes it" in capsys.readouterr().out.splitlines()
    assert not (studio / "kontext-out").exists()
    assert main.main(["doctor", "--workspace", "kontext-out"]) == 1
    assert "FAIL workspace: " in capsys.readouterr().out
    (studio / "kontext-out").write_text("a file")
    assert main.main(["doctor"]) == 1


def test_doctor_says_that_a_database_of_ones_own_needs_a_store_that_all_see(
    studio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "shared store" not in (main.main(["doctor"]), capsys.readouterr().out)[1]
    monkeypatch.setenv("KONTEXT_BATCH_DATABASE_URL", f"sqlite:///{studio}/shared.db")
    assert main.main(["db", "upgrade"]) == 0
    assert main.main(["doctor"]) == 1
    assert "FAIL shared store: database_url is set and objects is not" in capsys.readouterr().out
    monkeypatch.setenv("KONTEXT_BATCH_OBJECTS", str(studio))
    assert main.main(["doctor"]) == 0


def test_doctor_tells_of_model_files_that_changed(studio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kontext_batch.registry import AdapterEntry, Registry, signature

    file = studio / "look.safetensors"
    file.write_bytes(b"x")
    entry = AdapterEntry(path=file, sha256="0" * 64, signature=signature(file))
    Registry().with_adapter("look", entry).write(studio / "models.json")
    file.write_bytes(b"longer")
    told = {check.name: check.ok for check in checks.all_checks(studio)}
    assert told["adapter look"] is False


def test_a_starter_recipe_is_sound_and_stays(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipes", "init", "first.yaml"]) == 0
    assert main.main(["recipes", "validate", "first.yaml"]) == 0
    assert main.main(["recipes", "init", "first.yaml"]) == 2
    capsys.readouterr()
    assert main.main(["recipes", "schema"]) == 0
    assert "draft-07" in json.loads(capsys.readouterr().out)["$schema"]


def test_only_takes_several_values_of_several_axes() -> None:
    assert common.selection(["item=a,b,locale=de", "scene=x"], 4).only == {
        "item": ["a", "b"],
        "locale": ["de"],
        "scene": ["x"],
    }
    for wrong in ("item", "item=", "=a"):
        with pytest.raises(typer.BadParameter):
            common.selection([wrong], None)


def test_pace_counts_what_was_done_since_the_start() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.read(10, 20) == (None, None)
    now[0] = 5.0
    assert pace.read(15, 20) == (1.0, 5.0)


def test_plain_progress_writes_at_most_a_line_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = LineProgress(json=False, every=5.0, clock=lambda: now[0])
    for step in range(20):
        now[0] = float(step)
        progress.on_step(step + 1, 20)
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_plain_progress_ends_with_the_last_count(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = LineProgress(json=False, every=5.0, clock=lambda: now[0])
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    summary = RunSummary(
        1, "r", "", "file:///r.yaml", "o", "cli", 0, RunState.RUNNING, begun, None, {}, 0, deliveries=7, delivered=0,
        failed_deliveries=0,
    )  # fmt: skip
    for done in range(1, 8):
        now[0] = float(done)
        steps = {StepState.DONE: done} | ({StepState.READY: 7 - done} if done < 7 else {})
        progress.on_progress(replace(summary, steps=steps, finished=begun if done == 7 else None))
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in told] == ["1/7 steps", "6/7 steps", "7/7 steps"]
    assert "left" not in told[-1]
    progress.on_progress(replace(summary, steps=steps, finished=begun))
    assert capsys.readouterr().err == ""


def test_durations_and_folders_read_well() -> None:
    assert [duration(each) for each in (12.2, 200, 3900)] == ["12 s", "3 min 20 s", "1 h 5 min"]
    paths = ["file:///a/b%20c/x/1.png", "file:///a/b%20c/y/2.png", "s3://dam/spring/1.png"]
    assert output_folders(paths) == ["/a/b c/", "s3://dam/spring/"]


@pytest.mark.parametrize("line", ["kontext-batch retry ", "kontext-batch nonsense ", "kontext-batch runs retry --ta"])
def test_completion_of_a_half_written_line_tells_no_error(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_KONTEXT_BATCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - (not line.endswith(" "))))
    assert main.main([]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert ("--take" in said.out) == line.endswith("--ta")
