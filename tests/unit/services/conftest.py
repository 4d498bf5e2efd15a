"""A workspace on SQLite and a folder, a recipe with two photos, and an editor that needs no model."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from kontext_batch.bootstrap import Application, open_application
from kontext_batch.errors import StepError
from kontext_batch.operations.pictures import encode_png
from kontext_batch.planning.sidecars import is_sidecar
from kontext_batch.ports import EditJob, MadePicture
from kontext_batch.registry import ModelEntry, Registry
from kontext_batch.services.prepare import Prepared, submit
from kontext_batch.services.work import Worker
from kontext_batch.settings import Settings
from kontext_batch.storage.uris import file_uri
from tests.stepping import SteppingEditor

RECIPE = """\
version: 1
name: shop
owner: studio@acme.example
inputs:
  item: {glob: "photos/*", on_missing: skip}
matrix:
  scene: {beach: {place: a beach}, snow: {place: deep snow}}
steps:
  clean:
    op: edit
    model: toy
    image: ${item.file}
    prompt: Remove the background.
  staged:
    op: edit
    model: toy
    image: ${clean}
    prompt: Change the background to ${scene.place}.
  finish:
    op: finish
    image: ${staged}
    size: 32x32
    format: png
outputs:
  - {from: "${finish}", to: "out/${item}_${scene}.${ext}", if_exists: version}
"""


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def toy_picture(image: Image.Image) -> MadePicture:
    """As an editor returns it; its latents can be told from those of another picture."""
    return MadePicture(encode_png(image), "image/png", *image.size, latents=image.tobytes())


@dataclass
class ToyEditor(SteppingEditor):
    """Inverts the canvas in three denoise steps; remembers what it is asked for and fails as told."""

    jobs: list[Mapping[str, Any]] = field(default_factory=list)
    """Params of all that were admitted."""
    fault: Callable[[EditJob], Exception | None] = lambda job: None
    """A `StepError` is what comes of the job, anything else ends the session."""
    faults: dict[int, StepError] = field(default_factory=dict)

    def admitted(self, job: EditJob) -> int:
        self.jobs.append(job.params)
        fault = self.fault(job)
        if isinstance(fault, StepError):
            self.faults[id(job)] = fault
        elif fault is not None:
            raise fault
        return 3

    def make(self, job: EditJob) -> MadePicture:
        if id(job) in self.faults:
            raise self.faults.pop(id(job))
        return self._make(job)

    def _make(self, job: EditJob) -> MadePicture:
        size = (job.params["target"]["width"], job.params["target"]["height"])
        canvas = next(picture for picture in job.pictures if picture.role == "image")
        image = ImageOps.invert(Image.open(io.BytesIO(canvas.data)).convert("RGB")).resize(size)
        image.putpixel((0, 0), (len(job.params["prompt"]) % 256, 0, 0))
        return toy_picture(image)


@dataclass
class Studio:
    """A recipe folder with its application."""

    folder: Path
    app: Application
    editor: ToyEditor

    @property
    def recipe(self) -> Path:
        return self.folder / "shop.yaml"

    def prepare(self, **options: Any) -> Prepared:
        return self.app.planner().from_recipe(file_uri(self.recipe), shown="shop.yaml", **options)

    def submit(self, **options: Any) -> int:
        return submit(self.app.repository, self.app.wake_ups, self.prepare(**options), trigger="cli")

    def worker(self, *, batch_rows: int = 4) -> Worker:
        worker = self.app.worker()
        worker.executor = replace(worker.executor, editor=self.editor)
        worker.batch_rows = self.editor.max_rows = batch_rows
        return worker

    def outputs(self) -> list[str]:
        """Names of the pictures; their sidecars lie beside them."""
        return sorted(file.name for file in (self.folder / "out").glob("*") if not is_sidecar(file.name))


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    monkeypatch.setattr("kontext_batch.editor.count_tokens", lambda model, prompt: len(prompt.split()) + 1)
    folder = tmp_path / "studio"
    (folder / "photos").mkdir(parents=True)
    for name, colour in (("mug", "red"), ("bag", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / "photos" / f"{name}.png")
    (folder / "shop.yaml").write_text(RECIPE)
    models_file = tmp_path / "models.json"
    entry = ModelEntry(
        path=folder, sha256="a" * 64, signature="", layout="diffusers", native_area=64 * 64, text_length=64
    )
    Registry().with_model("toy", entry).write(models_file)
    app = open_application(
        Settings(models_file=models_file, device="cpu"), workspace=tmp_path / "ws", recipe_folder=folder
    )
    yield Studio(folder, app, ToyEditor())
    app.close()
