"""The main job as a user runs it: whole runs, and what comes between."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.acceptance.conftest import PATIENCE, STEPS_IN_ALL, Studio, draw_photo, wait_for_sampling

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OUTPUTS = ["bag_beach.png", "bag_snow.png", "mug_beach.png", "mug_snow.png"]
LONG = 40
"""Denoise steps of an edit that is to be interrupted."""


def test_a_run_delivers_every_variant_and_a_second_one_finds_nothing_to_do(studio: Studio) -> None:
    studio.write_recipe()
    first = studio.run("run", "shop.yaml")
    assert first.code == 0, first.err
    assert studio.outputs() == OUTPUTS
    assert first.out.strip() == f"{studio.folder / 'out'}/"
    studio.assert_each_step_once()

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    second = studio.run("run", "shop.yaml", "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert second.code == 0, second.err
    assert second.events[0]["instances"] == {"run": 0, "cached": STEPS_IN_ALL, "shared": 0}
    assert second.events[-1]["event"] == "finished"
    # Of the processor, not of the clock: other work on this machine is no fault of ours.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_a_killed_run_goes_on_at_once_and_commits_every_step_once(studio: Studio) -> None:
    studio.write_recipe(steps=LONG)
    process = studio.start("run", "shop.yaml", "--json")
    wait_for_sampling(process)
    process.kill()
    process.wait()

    again = studio.run("run", "shop.yaml", "--json")
    assert again.code == 0, again.err
    assert again.events[1] == {"event": "submitted", "run": 1, "continued": True}
    assert studio.outputs() == OUTPUTS
    studio.assert_each_step_once()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_gives_its_leases_back_and_goes_on(studio: Studio, number: signal.Signals) -> None:
    studio.write_recipe(steps=LONG)
    process = studio.start("run", "shop.yaml", "--json")
    wait_for_sampling(process)
    process.send_signal(number)
    stopped = studio.end(process)
    assert stopped.code == 130, stopped.err
    assert stopped.events[-1]["event"] == "interrupted"
    repository = studio.repository()
    assert all(row.state in ("ready", "blocked") for row in repository.run_steps(1))
    repository.close()

    again = studio.run("run", "shop.yaml")
    assert again.code == 0, again.err
    studio.assert_each_step_once()


def test_a_picture_that_does_not_decode_fails_its_step_and_the_rest_goes_on(studio: Studio) -> None:
    studio.write_recipe()
    Image.effect_noise((80, 64), 90).save(studio.folder / "photos" / "cup.jpg")
    whole = (studio.folder / "photos" / "cup.jpg").read_bytes()
    (studio.folder / "photos" / "cup.jpg").write_bytes(whole[: len(whole) * 2 // 3])

    result = studio.run("run", "shop.yaml", "--json")
    assert result.code == 3, result.err
    end = result.events[-1]
    assert (end["event"], end["state"], end["exit"]) == ("finished", "partial", 3)
    assert end["steps"] == {"done": STEPS_IN_ALL, "failed": 1, "skipped": 4}
    assert [each["axes"] for each in end["failures"]] == [[["item", "cup"]]]
    assert studio.outputs() == OUTPUTS


def test_two_runs_at_once_share_one_workspace(studio: Studio) -> None:
    studio.write_recipe(steps=30)
    results = [studio.end(process) for process in [studio.start("run", "shop.yaml") for _ in range(2)]]
    assert [result.code for result in results] == [0, 0], [result.err for result in results]
    assert studio.outputs() == OUTPUTS
    studio.assert_each_step_once()


def test_a_stored_plan_runs_and_is_refused_once_an_input_changed(studio: Studio) -> None:
    studio.write_recipe()
    plan = studio.run("plan", "shop.yaml", "--json")
    assert plan.code == 0, plan.err
    (studio.folder / "plan.json").write_text(plan.out)
    draw_photo(studio.folder / "photos" / "mug.png", "green")
    refused = studio.run("run", "plan.json", "--json")
    assert refused.code == 5
    assert "mug.png changed since the plan was made" in refused.events[-1]["problems"][0]
    draw_photo(studio.folder / "photos" / "mug.png", "red")
    assert studio.run("run", "plan.json").code == 0
    assert studio.outputs() == OUTPUTS


def test_a_slice_is_previewed_and_its_work_is_reused(studio: Studio) -> None:
    studio.write_recipe()
    assert studio.run("run", "shop.yaml", "--only", "item=mug,scene=snow").code == 0
    assert studio.outputs() == ["mug_snow.png"]
    whole = studio.run("run", "shop.yaml", "--json")
    assert whole.events[0]["instances"]["cached"] == 3
    assert studio.outputs() == OUTPUTS


def test_a_new_take_makes_another_picture(studio: Studio) -> None:
    studio.write_recipe()
    assert studio.run("run", "shop.yaml", "--only", "item=mug").code == 0
    before = {name: (studio.folder / "out" / name).read_bytes() for name in studio.outputs()}
    again = studio.run("runs", "retry", "1", "--only", "item=mug,scene=snow", "--take")
    assert again.code == 0, again.err
    after = {name: (studio.folder / "out" / name).read_bytes() for name in studio.outputs()}
    assert after["mug_beach.png"] == before["mug_beach.png"]
    assert after["mug_snow.png"] != before["mug_snow.png"]


def test_a_worker_computes_what_was_submitted(studio: Studio) -> None:
    studio.write_recipe()
    assert studio.run("submit", "shop.yaml").code == 0
    worker = studio.start("workers", "start")
    deadline = time.monotonic() + PATIENCE
    while studio.outputs() != OUTPUTS and time.monotonic() < deadline:
        time.sleep(0.2)
    worker.send_signal(signal.SIGTERM)
    stopped = studio.end(worker)
    assert stopped.code == 0, stopped.err
    studio.assert_each_step_once()


def test_a_model_that_requires_a_filter_delivers_nothing_without_one(studio: Studio) -> None:
    file = studio.write_recipe()
    file.write_text(file.read_text().replace("model: small", "model: strict"))
    refused = studio.run("run", "shop.yaml", "--json")
    assert refused.code == 5
    assert "content filter" in refused.events[-1]["problems"][0]
    allowed = studio.run("run", "shop.yaml", "--only", "item=mug", KONTEXT_BATCH_CONTENT_FILTER="cat > /dev/null")
    assert allowed.code == 0, allowed.err
    denied = studio.run("run", "shop.yaml", "--only", "item=bag", KONTEXT_BATCH_CONTENT_FILTER="cat > /dev/null; false")
    assert denied.code == 3
    assert studio.outputs() == ["mug_beach.png", "mug_snow.png"]


def test_an_output_folder_that_cannot_be_written_to_is_refused_before_anything_runs(studio: Studio) -> None:
    studio.write_recipe()
    (studio.folder / "out").write_text("a file where the folder should be")
    result = studio.run("run", "shop.yaml", "--json")
    assert result.code == 5, result.err
    assert str(studio.folder / "out") in result.events[-1]["message"]
    assert not (studio.folder / "kontext-out").exists()
    (studio.folder / "out").unlink()
    again = studio.run("run", "shop.yaml", "--json")
    assert again.code == 0, again.err


def test_a_place_outside_the_allowed_prefixes_is_refused_before_anything_runs(studio: Studio) -> None:
    studio.write_recipe(out="/elsewhere/out")
    result = studio.run("run", "shop.yaml")
    assert result.code == 2, result.err
    assert "/elsewhere" in result.err
    assert "Traceback" not in result.err


def test_a_model_folder_with_a_missing_tensor_is_told(studio: Studio, small_model: Path) -> None:
    broken = studio.folder / "broken"
    shutil.copytree(small_model, broken)
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    missing = sorted(tensors)[0]
    del tensors[missing]
    save_file(tensors, weights)
    result = studio.run("models", "add", "broken", str(broken))
    assert result.code == 2, result.err
    assert missing in result.err
    assert "broken" not in json.loads(studio.run("models", "list", "--json").out)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(studio: Studio, tiny_disk: Path) -> None:
    studio.write_recipe()
    command = ("run", "shop.yaml", "--json", "--workspace", str(tiny_disk))
    assert studio.run("plan", "shop.yaml", "--workspace", str(tiny_disk)).code == 0  # makes the database
    ballast = tiny_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            pass
    full = studio.run(*command)
    assert full.code == 3, full.err
    assert "Traceback" not in full.err
    assert "space" in full.events[-1]["message"]
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=50m", str(tiny_disk)], check=True)
    again = studio.run(*command)
    assert again.code == 0, again.err
    assert studio.outputs() == OUTPUTS
