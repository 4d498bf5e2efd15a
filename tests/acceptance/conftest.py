"""Real processes of `kontext-batch` on a small random model: a studio's folder, a recipe of two photos, two scenes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.states import StepState

REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "case-1" / "model"
RECIPE = """\
version: 1
name: shop
owner: studio@acme.example
inputs:
  item: {glob: "photos/*", on_missing: skip}
matrix:
  scene: {beach: {place: a beach}, snow: {place: deep snow}}
defaults:
  edit: {model: small, steps: STEPS}
steps:
  clean:
    op: edit
    image: ${item.file}
    prompt: Remove the background.
  staged:
    op: edit
    image: ${clean}
    prompt: Change the background to ${scene.place}.
  finish:
    op: finish
    image: ${staged}
    size: 32x32
    format: png
outputs:
  - {from: "${finish}", to: "OUT/${item}_${scene}.${ext}", if_exists: replace}
"""
STEPS_IN_ALL = 10
"""2 clean, 4 staged, 4 finish."""
PATIENCE = 150.0
"""Seconds to wait for one thing to happen."""


@dataclass(frozen=True)
class Result:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass
class Studio:
    """A folder with photos and recipe, and the commands that run in it."""

    folder: Path
    environment: Mapping[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def write_recipe(self, *, steps: int = 2, out: str = "out", name: str = "shop.yaml") -> Path:
        file = self.folder / name
        file.write_text(RECIPE.replace("STEPS", str(steps)).replace("OUT", out))
        return file

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", "-m", "kontext_batch.cli.main", *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, **environment: str) -> Result:
        return self.end(self.start(*arguments, **environment))

    def end(self, process: subprocess.Popen[str]) -> Result:
        out, err = process.communicate(timeout=PATIENCE)
        return Result(process.returncode, out, err)

    def repository(self) -> SqlRepository:
        return SqlRepository(f"sqlite:///{self.folder / 'kontext-out' / 'kontext.db'}")

    def assert_each_step_once(self, run_id: int = 1) -> None:
        """Every step is done, and was committed exactly once."""
        repository = self.repository()
        try:
            rows = repository.run_steps(run_id)
            assert len(rows) == STEPS_IN_ALL
            for row in rows:
                outcomes = [attempt.outcome for attempt in repository.attempts(row.id)]
                assert row.state is StepState.DONE
                assert outcomes.count("ok") == 1, (row.node, outcomes)
        finally:
            repository.close()

    def outputs(self, folder: str = "out") -> list[str]:
        return sorted(file.name for file in (self.folder / folder).glob("*.png"))


def wait_for_sampling(process: subprocess.Popen[str]) -> None:
    """Until `run --json` tells of a denoise step."""
    assert process.stdout is not None
    deadline = time.monotonic() + PATIENCE
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and event["denoise_step"] > 0:
            return
        assert time.monotonic() < deadline, "no denoise step was told"
    raise AssertionError(f"it ended before sampling: {process.stderr.read() if process.stderr else ''}")


def base_environment(models_file: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("KONTEXT_BATCH_", "AWS_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "KONTEXT_BATCH_MODELS_FILE": str(models_file)}


def draw_photo(file: Path, colour: str) -> None:
    image = Image.new("RGB", (80, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 54), fill=colour)
    image.save(file)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random reference model, told that it was made for 64x64."""
    folder = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(REFERENCE, folder)
    config = folder / "vae" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "sample_size": 64}))
    return folder


@pytest.fixture(scope="session")
def models_file(small_model: Path) -> Path:
    """A registry that `models add` wrote: `small` is free, `strict` requires a content filter."""
    file = small_model.parent / "models.json"
    for name, *more in (("small",), ("strict", "--requires-filter")):
        subprocess.run(
            [sys.executable, "-m", "kontext_batch.cli.main", "models", "add", name, str(small_model), *more],
            env=base_environment(file),
            check=True,
            capture_output=True,
            timeout=PATIENCE,
        )
    return file


@pytest.fixture
def studio(tmp_path: Path, models_file: Path) -> Iterator[Studio]:
    folder = tmp_path / "studio"
    (folder / "photos").mkdir(parents=True)
    draw_photo(folder / "photos" / "mug.png", "red")
    draw_photo(folder / "photos" / "bag.png", "blue")
    registry = tmp_path / "models.json"
    shutil.copy(models_file, registry)
    made = Studio(folder, base_environment(registry))
    yield made
    for process in made.started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
