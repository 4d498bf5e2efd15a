"""Runs for reports to tell of: a chain of three steps over products, scenes and channels, made without any model."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

from PIL import Image, ImageDraw

from kontext_batch.hashing import content_hash, sha256_hex
from kontext_batch.lineage.migrate import upgrade
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.operations.previews import previews
from kontext_batch.planning.plan import ImageInfo, Instance, Origin, Plan, PlannedDelivery, PlannedStep, StepInput
from kontext_batch.ports import (
    Artifact,
    LeasedStep,
    NewRun,
    SettledDelivery,
    StepDone,
    StepFailed,
    StepOutput,
    WorkerInfo,
)
from kontext_batch.report.write import Draw, ReportWriter, Written
from kontext_batch.storage.keys import ObjectKeys
from kontext_batch.storage.local import LocalStore
from kontext_batch.storage.uris import file_uri

ORIGIN = Origin("spring.yaml", 3, 5)
LANE = "edit/toy"
DRAW: Draw = lambda data: previews(data, max_pixels=10**8)  # noqa: E731
Picture = Callable[[str], bytes]
Fault = Callable[[str, Mapping[str, str]], str | None]
"""(node, axes) -> why that step fails."""


def drawn(name: str) -> bytes:
    """A picture that differs by its name."""
    number = int(sha256_hex(name.encode())[:8], 16)
    image = Image.new("RGB", (96, 64), (number % 200, number // 200 % 200, 90))
    ImageDraw.Draw(image).text((4, 4), name[:16], fill="white")
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()


@dataclass
class Shop:
    """A folder with photos, a database, a store and the run that is told of."""

    folder: Path
    items: list[str]
    scenes: Mapping[str, str]
    """Name -> the prompt's place."""
    channels: list[str]
    owner: str = "studio@acme.example"
    recipe: str = "spring"
    picture: Picture = drawn
    fault: Fault = lambda node, axes: None
    staged: bool = True
    """Whether there is a step for each scene between the cut out product and the file."""
    undelivered: str | None = None
    """Path that ends so is not delivered."""
    written: Written = field(init=False)
    """Its report, where one was written."""

    def __post_init__(self) -> None:
        url = f"sqlite:///{self.folder / 'kontext.db'}"
        self.folder.mkdir(parents=True, exist_ok=True)
        upgrade(url)
        self.repository = SqlRepository(url)
        self.root = file_uri(self.folder)
        self.store = LocalStore((), [self.root])
        self.keys = ObjectKeys(self.root)
        self.run_id = 0

    def writer(self, draw: Draw = DRAW, *, threads: int = 2) -> ReportWriter:
        return ReportWriter(self.repository, self.store, draw, 10**9, threads)

    @property
    def report(self) -> str:
        """URI of the report's folder."""
        return f"{self.root}/report/"

    def submit(self) -> Shop:
        plan = self._plan()
        new = NewRun(
            plan.recipe, plan.recipe_sha256, "text", f"{self.root}/spring.yaml", plan.owner, "cli", budget=plan.budget
        )
        self.run_id = self.repository.create_run(new, plan)
        self.repository.register_worker(WorkerInfo("w1", "here", 1, 1000.5, "cpu", {"torch": "2"}))
        return self

    def work(self, *, most: int | None = None) -> Shop:
        """Compute everything that is ready, and what becomes ready by it, or `most` claims of it; deliver it."""
        names = {row.id: (row.node, dict(row.axes)) for row in self.repository.run_steps(self.run_id)}
        claims = 0
        while most is None or claims < most:
            leased = self.repository.claim("w1", limit=500, lease_seconds=600.0)
            if not leased:
                break
            claims += 1
            self.repository.commit(None, [self._result(step, *names[step.id]) for step in leased])
        while pending := self.repository.claim_deliveries("w1", limit=500, seconds=600.0):
            settled = []
            for each in pending:
                lost = self.undelivered is not None and each.path.endswith(self.undelivered)
                if not lost:
                    self.store.write(each.path, self.store.read(each.artifact.uri), media_type="image/png")
                settled.append(SettledDelivery(each.id, each.path, error="no space left" if lost else None))
            self.repository.settle_deliveries("w1", settled)
        self.repository.finish_runs()
        return self

    def _result(self, step: LeasedStep, node: str, axes: Mapping[str, str]) -> StepDone | StepFailed:
        error = self.fault(node, axes)
        if error is not None:
            return StepFailed(step.id, step.token, error, "StepError", None)
        data = self.picture(f"{node} {' '.join(axes.values())}")
        uri = self.keys(sha256_hex(data), "image/png")
        self.store.write_if_absent(uri, data, media_type="image/png")
        made = Artifact(sha256_hex(data), uri, "image/png", len(data), 96, 64)
        timings = {"sample": 0.5, "put": 0.01} if step.lane == LANE else {"operate": 0.02}
        return StepDone(step.id, step.token, (StepOutput("image", made),), timings)

    def _photo(self, item: str) -> ImageInfo:
        data = self.picture(f"photo {item}")
        uri = file_uri(self.folder / "photos" / f"{quote(item, safe='')}.png")
        self.store.write_if_absent(uri, data, media_type="image/png")
        return ImageInfo(uri, "1", sha256_hex(data), len(data), 96, 64, "PNG")

    def _plan(self) -> Plan:
        steps: list[PlannedStep] = []
        instances: list[Instance] = []
        deliveries: list[PlannedDelivery] = []

        def add(node: str, axes: dict[str, str], operation: str, params: dict[str, Any], read: StepInput) -> str:
            key = content_hash([self.recipe, node, axes])
            lane = LANE if operation == "edit" else "operations"
            steps.append(PlannedStep(key, operation, params, (read,), lane, ORIGIN, 1.0))
            instances.append(Instance(node, tuple(axes.items()), 1, key))
            return key

        for item in self.items:
            photo = StepInput("image", 0, self._photo(item), None)
            clean = add("clean", {"item": item}, "edit", _edit("Remove the background."), photo)
            for scene, place in self.scenes.items():
                read = StepInput("image", 0, None, clean)
                axes = {"item": item, "scene": scene}
                if self.staged:
                    prompt = f"Change the background to {place}."
                    read = StepInput("image", 0, None, add("staged", axes, "edit", _edit(prompt), read))
                for channel in self.channels:
                    axes = {"item": item, "scene": scene, "channel": channel}
                    size = {"width": 96, "height": 64}
                    params = {"size": size, "fit": "pad", "format": "jpeg", "quality": 90}
                    key = add("finish", axes, "finish", params, read)
                    path = file_uri(self.folder / "out" / f"{quote(item, safe='')}_{scene}_{channel}.jpg")
                    deliveries.append(PlannedDelivery(path, key, "replace", instances[-1], ORIGIN))
        return Plan(
            self.recipe,
            sha256_hex(self.recipe.encode()),
            self.owner,
            tuple(steps),
            tuple(instances),
            tuple(deliveries),
            budget={"gpu_minutes": 30},
        )


def many(folder: Path, *, products: int, scenes: int) -> Shop:
    """A report of products x scenes pictures, whose small copies are all one; nothing of it outlives a power cut."""
    shop = Shop(
        folder,
        [f"item-{number:03}" for number in range(products)],
        {f"scene-{number:02}": f"place {number}" for number in range(scenes)},
        ["shop"],
        picture=str.encode,
        staged=False,
    )
    small = DRAW(drawn("any"))[0]
    with mock.patch("os.fsync"):
        shop.submit().work()
        shop.written = shop.writer(lambda data: (small, small)).write(shop.run_id, shop.report, shop.store)
    return shop


def _edit(prompt: str) -> dict[str, Any]:
    return {
        "model": "toy",
        "model_sha256": "a" * 64,
        "adapters": [{"name": "brand-look", "scale": 0.8, "sha256": "b" * 64}],
        "prompt": prompt,
        "negative_prompt": None,
        "true_cfg_scale": 1.0,
        "steps": 28,
        "guidance": 2.5,
        "seed": 1234,
        "target": {"width": 96, "height": 64},
        "handoff": "pixels",
    }
