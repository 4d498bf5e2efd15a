"""What the command line says to wrong input and in odd surroundings."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kontext_batch.bootstrap import open_application
from kontext_batch.cli import main, models
from kontext_batch.cli.progress import BarProgress, LineProgress
from kontext_batch.errors import InfrastructureError
from kontext_batch.ports import EditJob, MadePicture, RunSummary
from kontext_batch.registry import ModelEntry, Registry
from kontext_batch.settings import load_settings
from tests.unit.cli.conftest import FINISH_ONLY
from tests.unit.services.conftest import RECIPE, ToyEditor, toy_picture

TOO_LARGE = "99999999999999999999"


@pytest.fixture
def done(studio: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The studio after one run."""
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    return studio


def test_what_is_no_number_of_a_run_is_told_in_one_line(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (TOO_LARGE, "9" * 5000, "x", "12a", "²"):
        for command in (
            "status",
            "runs show",
            "runs cancel",
            "runs pause",
            "runs resume",
            "runs retry --failed",
            "explain",
        ):
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
        assert main.main(["lineage", given]) == 2, given
        assert capsys.readouterr().err.startswith(f"nothing is known as '{given[:80]}': looked for ")
        for command in ("steps show", "steps logs", "explain"):
            assert main.main([*command.split(), given]) == 2, (command, given)
            told = capsys.readouterr().err
            assert told == f"no step is known as '{given[:80]}': give its number, key, name or the path of an output\n"


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-"])
def test_a_command_does_its_work_without_standard_streams(studio: Path, closed: str) -> None:
    command = f'exec "{sys.executable}" -m kontext_batch.cli.main run sizes.yaml {closed}'
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == 0
    assert len(list((studio / "out").glob("*.png"))) == 4
    with contextlib.closing(sqlite3.connect(studio / "kontext-out" / "kontext.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_plan_or_a_refused_recipe_leaves_nothing_behind(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = sorted(studio.rglob("*"))
    for text, codes in (
        (FINISH_ONLY, {"plan": 0}),
        (FINISH_ONLY.replace("owner:", "ovner:"), {"plan": 2, "run": 2, "submit": 2}),
        (FINISH_ONLY + "budget: {outputs: 3}\n", {"plan": 5, "run": 5, "submit": 5}),
    ):
        (studio / "sizes.yaml").write_text(text)
        for command, code in codes.items():
            assert main.main([command, "sizes.yaml"]) == code
            assert sorted(studio.rglob("*")) == there, command
    (studio / "kontext-out").mkdir()  # as outputs that are delivered there make it
    (studio / "sizes.yaml").write_text(FINISH_ONLY)
    assert main.main(["plan", "sizes.yaml"]) == 0
    assert not any((studio / "kontext-out").iterdir())


def test_a_plan_reads_a_workspace_that_is_there(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "sizes.yaml"]) == 0
    assert re.search(r"made +finish +0 +4 ", capsys.readouterr().out)


def test_what_was_read_for_the_plan_of_a_first_run_is_not_read_again(done: Path) -> None:
    with contextlib.closing(sqlite3.connect(done / "kontext-out" / "kontext.db")) as database:
        assert database.execute("SELECT count(*) FROM inputs").fetchone() == (2,)


def test_a_file_is_no_workspace(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (studio / "kontext-out").write_text("")
    assert main.main(["plan", "sizes.yaml"]) == 2
    assert capsys.readouterr().err == f"{studio / 'kontext-out'}: a workspace is a folder\n"


def test_a_retry_of_a_clean_run_says_that_nothing_failed(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["runs", "retry", "1", "--failed"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "nothing of run 1 failed, nothing is made again; for other pictures: --only or --step, with --take",
        "run 1 done: 4 done (0 were cached); 4 of 4 outputs delivered",
    ]
    assert main.main(["runs", "retry", "1", "--step", "made", "--json"]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["event"] for line in said.out.splitlines()] == ["finished"]
    assert said.err.startswith("nothing that is meant of run 1 failed")


def test_a_retry_delivers_what_could_not_be_delivered(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (studio / "sizes.yaml").write_text(FINISH_ONLY.replace("if_exists: replace", "if_exists: fail"))
    (studio / "out").mkdir()
    (studio / "out" / "mug_small.png").write_bytes(b"another")
    assert main.main(["run", "sizes.yaml"]) == 3
    (studio / "out" / "mug_small.png").unlink()
    capsys.readouterr()
    assert main.main(["runs", "retry", "1", "--failed"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "no step of run 1 failed; 1 output will be delivered again"
    assert told[-1].endswith("4 of 4 outputs delivered")


def write_shop(studio: Path, monkeypatch: pytest.MonkeyPatch, make_editor: Callable[[], ToyEditor]) -> None:
    """A recipe with edits, and editors that need no model."""

    def made(**options: Any) -> ToyEditor:
        editor = make_editor()
        editor.max_rows = options["max_rows"]
        return editor

    monkeypatch.setattr("kontext_batch.editor.EngineEditor", made)
    monkeypatch.setattr("kontext_batch.editor.count_tokens", lambda model, prompt: 8)
    entry = ModelEntry(
        path=studio, sha256="a" * 64, signature="", layout="diffusers", native_area=64 * 64, text_length=64
    )
    Registry().with_model("toy", entry).write(studio / "models.json")
    (studio / "shop.yaml").write_text(RECIPE)


class SeededEditor(ToyEditor):
    """Another seed, another picture."""

    def _make(self, job: EditJob) -> MadePicture:
        size = (job.params["target"]["width"], job.params["target"]["height"])
        return toy_picture(Image.new("RGB", size, job.params["seed"] % 2**24))


def test_a_new_take_names_the_new_files(
    studio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shop(studio, monkeypatch, SeededEditor)
    assert main.main(["run", "shop.yaml"]) == 0
    capsys.readouterr()
    assert main.main(["runs", "retry", "1", "--only", "item=mug", "--step", "staged", "--take"]) == 0
    new = [str(studio / "out" / name) for name in ("mug_beach.v2.png", "mug_snow.v2.png")]
    assert capsys.readouterr().out.splitlines() == new
    assert all(Path(name).is_file() for name in new)


def test_a_starter_recipe_is_told_as_data(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipes", "init", "first.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"event": "finished", "file": "first.yaml", "exit": 0}


@pytest.mark.parametrize("setting", ["auto", "cpu"])
def test_doctor_says_which_device_computes(
    done: Path, setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KONTEXT_BATCH_DEVICE", setting)
    main.main(["doctor"])
    assert re.search(rf"^ok   device: (cuda|mps|cpu) \(the setting is {setting}\)", capsys.readouterr().out, re.M)


def test_doctor_says_what_is_approximate(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"DEVICE": "cpu", "STEP_TOLERANCE": "0.05", "CONTEXT_EVERY": "4"}.items():
        monkeypatch.setenv(f"KONTEXT_BATCH_{name}", value)
    main.main(["doctor"])
    assert "computing in float32+steps=0.05+context=4\n" in capsys.readouterr().out


def test_doctor_finds_a_device_that_is_not_there(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KONTEXT_BATCH_DEVICE", "nonsense")
    assert main.main(["doctor"]) == 1


def test_models_are_listed_with_the_size_that_they_are_made_for(
    studio: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = ModelEntry(
        path=studio, sha256="a" * 64, signature="", layout="diffusers", native_area=16384, text_length=64
    )
    Registry().with_model("toy", entry).write(studio / "models.json")
    assert main.main(["models", "list"]) == 0
    assert "128x128" in capsys.readouterr().out
    assert models.native_size(1024 * 768) == "786432 pixels"


@pytest.mark.parametrize(
    ("verb", "meant"),
    [
        ("retry", "'runs retry' or 'inbox retry'"),
        ("validate", "'recipes validate'"),
        ("show", "'runs show' or 'steps show' or 'batches show'"),
    ],
)
def test_a_verb_without_its_noun_is_told_its_noun(verb: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([verb, "1"]) == 2
    assert f"No such command '{verb}'. Did you mean {meant}?" in capsys.readouterr().err
    assert main.main(["nonsense"]) == 2
    assert "No such command 'nonsense'." in capsys.readouterr().err


class SlowEditor(ToyEditor):
    """Before its first denoise step another worker has done everything else that is ready."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self._meanwhile = meanwhile

    def stepping(self, jobs: Sequence[EditJob]) -> None:
        meanwhile, self._meanwhile = self._meanwhile, lambda: None
        meanwhile()


def test_progress_counts_what_another_process_did_of_the_run(
    studio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def meanwhile() -> None:
        editors.append(ToyEditor())
        app = open_application(load_settings(), workspace=studio / "kontext-out", recipe_folder=studio)
        worker = app.worker()
        app.repository.register_worker(worker.info)
        while worker.work_once():
            pass
        app.repository.retire_worker(worker.info.id)
        app.close()

    editors: list[ToyEditor] = [SlowEditor(meanwhile)]
    write_shop(studio, monkeypatch, lambda: editors[-1])
    monkeypatch.setenv("KONTEXT_BATCH_BATCH_ROWS", "1")
    assert main.main(["run", "shop.yaml", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first = next(each for each in told if each["event"] == "progress")
    assert (first["steps_done"], first["steps"], first["denoise_step"]) == (5, 10, 1)


def test_a_look_that_fails_stops_no_batch(capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> RunSummary:
        raise InfrastructureError("locked")

    LineProgress(json=False, look=look).on_step(1, 8)
    assert capsys.readouterr().err == "working, denoise step 1/8 of the batch\n"
    bar = BarProgress(look)
    bar._looked -= 60
    with bar:
        bar.on_step(1, 8)


def test_a_locked_database_says_who_holds_it_and_that_nothing_is_lost(
    studio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["submit", "sizes.yaml"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("kontext_batch.lineage.engine.BUSY_SECONDS", 0.05)
    with contextlib.closing(sqlite3.connect(studio / "kontext-out" / "kontext.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert main.main(["run", "sizes.yaml"]) == 1
    told = capsys.readouterr().err
    assert "another process has been writing in the same workspace for more than 0.05 s" in told
    assert "nothing is lost: when it is done or stopped, the same command goes on" in told
    assert main.main(["run", "sizes.yaml"]) == 0


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_workspace_that_was_moved_or_copied_has_its_work_still(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    """Nothing is computed again, and a picture to deliver comes from the objects as they lie now."""
    assert main.main(["submit", "sizes.yaml"]) == 0  # and never worked on
    new = done.parent / f"{done.name} {how}"
    if how == "moved":
        done.rename(new)
    else:
        shutil.copytree(done, new)
    monkeypatch.chdir(new)
    (new / "out" / "mug_small.png").unlink()
    assert main.main(["run", "sizes.yaml"]) == 0
    assert "0 steps to run, 4 cached" in capsys.readouterr().err
    assert (new / "out" / "mug_small.png").is_file()
    application = open_application(load_settings(), workspace=new / "kontext-out")
    kept = list(application.repository.artifact_uris())
    assert len(kept) == 4
    assert all(uri.startswith(application.artifact_keys.prefix) and application.store.read(uri) for uri in kept)
    assert [run.state for run in application.repository.runs()] == ["done", "cancelled", "done"]
    assert not application.repository.verify()
    application.close()


def test_objects_that_lie_elsewhere_on_purpose_stay_as_they_are_named(
    studio: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`objects` set for the run and forgotten afterwards is no move."""
    elsewhere = tmp_path_factory.mktemp("objects")
    monkeypatch.setenv("KONTEXT_BATCH_OBJECTS", str(elsewhere))
    assert main.main(["run", "sizes.yaml"]) == 0
    monkeypatch.delenv("KONTEXT_BATCH_OBJECTS")
    assert main.main(["status"]) == 0
    monkeypatch.setenv("KONTEXT_BATCH_OBJECTS", str(elsewhere))
    application = open_application(load_settings(), workspace=studio / "kontext-out")
    kept = list(application.repository.artifact_uris())
    assert len(kept) == 4
    assert all(uri.startswith(application.artifact_keys.prefix) for uri in kept)
    application.close()


def test_what_could_not_be_delivered_is_named_with_its_reason(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (studio / "sizes.yaml").write_text(FINISH_ONLY.replace("if_exists: replace", "if_exists: fail"))
    (studio / "out").mkdir()
    for item, size in itertools.product(("bag", "mug"), ("small", "large")):
        (studio / "out" / f"{item}_{size}.png").write_bytes(b"another")
    assert main.main(["run", "sizes.yaml"]) == 3
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not delivered: ")]
    assert len(told) == 4
    assert str(studio / "out" / "bag_small.png") in told[0]
    assert main.main(["runs", "show", "1"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("not delivered: ")] == told
    shutil.rmtree(studio / "out")
    assert main.main(["run", "sizes.yaml", "--json"]) == 0
    *_, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (last["delivered"], last["undelivered"]) == (4, [])


@pytest.mark.parametrize("part", [["--limit", "1"], ["--only", "item=bag,scene=beach"]])
def test_a_new_take_stays_within_what_the_run_had(
    studio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: list[str]
) -> None:
    write_shop(studio, monkeypatch, SeededEditor)
    assert main.main(["run", "shop.yaml", *part]) == 0
    capsys.readouterr()
    for run, version in (("1", "v2"), ("2", "v3")):  # a take of a take, too
        assert main.main(["runs", "retry", run, "--step", "staged", "--take"]) == 0
        assert capsys.readouterr().out.splitlines() == [str(studio / "out" / f"bag_beach.{version}.png")]
    assert main.main(["runs", "retry", "1", "--only", "item=mug", "--take"]) == 2
    assert capsys.readouterr().err == "nothing that a model makes is meant by --only and --step\n"
    assert sorted(file.name for file in (studio / "out").glob("*.png")) == [
        "bag_beach.png",
        "bag_beach.v2.png",
        "bag_beach.v3.png",
    ]


@pytest.mark.parametrize("what", [["--failed"], ["--step", "made"], ["--step", "made", "--take"]])
def test_a_retry_in_a_moved_project_leaves_the_old_folder_alone(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: list[str]
) -> None:
    new = done.parent / f"{done.name} moved"
    done.rename(new)
    monkeypatch.chdir(new)
    assert main.main(["runs", "retry", "1", *what]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"run 1 was made from {done / 'sizes.yaml'}; run the recipe from where it lies now")
    assert not done.exists()


def test_a_budget_holds_where_nothing_was_timed_yet(
    studio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shop(studio, monkeypatch, ToyEditor)
    for minutes, code in ((0, 5), (1, 0)):
        (studio / "shop.yaml").write_text(f"{RECIPE}budget: {{gpu_minutes: {minutes}}}\n")
        assert main.main(["run", "shop.yaml"]) == code
        told = capsys.readouterr().err.splitlines()
        assert told[1] == "6 images are not in the estimate: nothing was timed with their model yet"
        assert ("refused: 6 images to sample, of which nothing was timed yet" in told[2]) == (code == 5)
    (studio / "shop.yaml").write_text(RECIPE)
    assert main.main(["run", "shop.yaml"]) == 0
    assert "not in the estimate" not in capsys.readouterr().err


def test_a_skipped_file_of_a_glob_has_no_line(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (studio / "sizes.yaml").write_text(FINISH_ONLY.replace('"photos/*"', '"photos/*", on_missing: skip'))
    (studio / "photos" / "empty.png").touch()
    uri = (studio / "photos" / "empty.png").as_uri()
    assert main.main(["plan", "sizes.yaml"]) == 0
    assert f"skipped item=empty: empty (0 bytes) ({uri})\n" in capsys.readouterr().out
    assert main.main(["run", "sizes.yaml"]) == 0
    assert f"skipped item=empty: empty (0 bytes) ({uri})\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("run sizes.yaml >/dev/full", 3, "standard output cannot be written to: No space left on device\n"),
        ("run sizes.yaml --json >/dev/full", 3, "standard output cannot be written to: No space left on device\n"),
        ("run none.yaml --json >/dev/full", 3, "standard output cannot be written to: No space left on device\n"),
        ("--help >/dev/full", 3, "no space is left to write to ([Errno 28] No space left on device)\n"),
        ("run sizes.yaml --json 2>&1 | true", 1, ""),
    ],
)
def test_output_that_cannot_be_written_is_told_in_one_line(done: Path, command: str, code: int, told: str) -> None:
    logs = done / "logs"
    logs.mkdir()
    line = f'set -o pipefail; "{sys.executable}" -m kontext_batch.cli.main {command}'
    ended = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=110, env={**os.environ, "TMPDIR": str(logs)}
    )
    assert (ended.returncode, ended.stderr[-len(told) :]) == (code, told)
    assert "internal error" not in ended.stderr
    assert not list(logs.glob("kontext-batch*"))
    with contextlib.closing(sqlite3.connect(done / "kontext-out" / "kontext.db")) as database:
        assert database.execute("SELECT count(*) FROM workers WHERE retired IS NULL").fetchone() == (0,)


def test_a_file_of_somebody_else_is_not_called_ours(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = done / "out" / "mug_small.png"
    theirs.write_bytes(b"theirs")
    assert main.main(["lineage", "photos/mug.png"]) == 2, "of a photo --down has an answer"
    assert "told by --down" in capsys.readouterr().err
    assert main.main(["lineage", "out/mug_small.png"]) == 2
    assert "; run 1 delivered there, or wanted to\n" in capsys.readouterr().err
    for command in ("explain", "steps show", "steps logs"):
        for name, run in (("out/mug_small.png", "; run 1 delivered there, or wanted to"), ("photos/mug.png", "")):
            assert main.main([*command.split(), name]) == 2
            said = capsys.readouterr()
            assert said.err == f"{name}: this picture was not made in this workspace, or was changed since{run}\n"
            assert not said.out
    theirs.unlink()
    assert main.main(["explain", "out/mug_small.png"]) == 0  # where it should lie


def test_a_retry_of_what_is_undelivered_says_nothing_of_other_steps(
    studio: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (studio / "sizes.yaml").write_text(FINISH_ONLY.replace("if_exists: replace", "if_exists: fail"))
    (studio / "out").mkdir()
    (studio / "out" / "mug_small.png").write_bytes(b"another")
    photo = studio / "photos" / "bag.png"
    photo.write_bytes(photo.read_bytes()[:60])  # its header is sound
    assert main.main(["run", "sizes.yaml"]) == 3
    (studio / "out" / "mug_small.png").unlink()
    capsys.readouterr()
    assert main.main(["runs", "retry", "1", "--only", "item=mug"]) == 3
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "no step that is meant of run 1 failed; 1 output will be delivered again"
    assert (studio / "out" / "mug_small.png").is_file()


def test_what_was_skipped_is_counted_and_named(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (studio / "sizes.yaml").write_text(FINISH_ONLY.replace("if_exists: replace", "if_exists: skip"))
    (studio / "out").mkdir()
    (studio / "out" / "mug_small.png").write_text("mine")
    assert main.main(["run", "sizes.yaml"]) == 0
    assert "4 of 4 outputs delivered, 1 of them skipped" in capsys.readouterr().err
    assert (studio / "out" / "mug_small.png").read_text() == "mine"
    assert main.main(["runs", "show", "1"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")]
    assert len(told) == 1
    assert "mug_small.png: " in told[0]
    assert main.main(["status"]) == 0
    assert "1 of them skipped" in capsys.readouterr().out


def test_what_was_just_collected_is_no_orphan_of_the_next_collection(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["gc", "--keep-bytes", "0", "--yes"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"above the size limit: 4 artifacts of \d+ bytes", told[0])
    assert re.fullmatch(r"4 artifacts of \d+ bytes and 0 orphaned uploads removed", told[1])
    assert len(told) == 2
    assert main.main(["gc", "--keep-bytes", "0"]) == 0
    assert capsys.readouterr().out == "0 artifacts of 0 bytes and 0 orphaned uploads removed\n"


@pytest.mark.parametrize("more", [["--only", "item=mug"], ["--step", "made"]])
def test_a_retry_of_what_failed_takes_no_choice(
    done: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert main.main(["runs", "retry", "1", "--failed", *more]) == 2
    assert "--failed stands alone" in " ".join(capsys.readouterr().err.split())
    assert main.main(["runs", "retry", "1"]) == 2
    assert "say what is made again: --failed, or" in " ".join(capsys.readouterr().err.split())


def test_who_means_a_run_is_told_how_to_name_it(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("run2", "run-2", "run 2"):
        assert main.main(["explain", given]) == 2
        assert capsys.readouterr().err.endswith("; for a run write `run:2`\n")
    for command in ("lineage", "steps show", "steps logs"):
        assert main.main([*command.split(), "run:2"]) == 2
        told = capsys.readouterr().err
        assert told.endswith("; a step or a path is taken here, no run (`runs show 2` lists the steps of one)\n")


def test_no_step_in_a_state_is_told_in_words(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["runs", "show", "1", "--state", "failed"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["no step of run 1 is failed"]
    assert main.main(["runs", "show", "1", "--state", "done"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 5


def test_a_new_take_of_a_step_without_a_model_says_what_a_take_is(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["runs", "retry", "1", "--step", "made", "--take"]) == 2
    told = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert "--take changes the seed of model steps; 'made' uses no model" in told
    assert main.main(["runs", "retry", "1", "--step", "unknown", "--take"]) == 2
    assert capsys.readouterr().err == "nothing that a model makes is meant by --only and --step\n"


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_a_worker_without_its_device_does_not_start(
    device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would fail everybody's steps."""
    monkeypatch.setenv("KONTEXT_BATCH_BROKER_URL", "memory://")
    (tmp_path / "kontext-out").mkdir()
    assert main.main(["workers", "start", "--device", device, "--workspace", str(tmp_path / "kontext-out")]) == 2
    assert device in capsys.readouterr().err
