"""What stands in for model, pictures and store where the control plane alone is measured: nothing is computed or put.

The bytes of a picture are a hash, and its URI carries them, so that any process can read what another has made
without a store between them. URIs, params and numbers of outputs are as large as those of real edits.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psutil

from kontext_batch.errors import ObjectNotFound
from kontext_batch.hashing import canonical_json, content_hash, sha256_hex
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.plan import (
    OPERATIONS_LANE,
    ImageInfo,
    Instance,
    Origin,
    Plan,
    PlannedDelivery,
    PlannedStep,
    StepInput,
)
from kontext_batch.ports import (
    EditJob,
    Folder,
    LoadedPicture,
    MadePicture,
    NewRun,
    ObjectInfo,
    WakeUps,
    WorkerInfo,
)
from kontext_batch.services.execute import Executor
from kontext_batch.services.work import Worker
from tests.stepping import StandIn

ROOT = "s3://studio-assets/kontext/objects"
LANE = "edit/" + "a" * 64 + "/bfloat16-cuda"
"""As long as a lane's name is."""
SCENES = 4
STEPS_OF_AN_ITEM = 1 + 2 * SCENES
ORIGIN = Origin("recipe.yaml", 12, 5)
LEASE_SECONDS = 60.0
BATCH_ROWS = 8


# ------------------------------------------------------------------------------------------------------------ the run


def make_plan(name: str, steps: int) -> Plan:
    """At least `steps` steps: photos are cut out, placed in four scenes each, and these finished and delivered."""
    planned: list[PlannedStep] = []
    instances: list[Instance] = []
    deliveries: list[PlannedDelivery] = []

    def add(node: str, axes: tuple[tuple[str, str], ...], step_input: StepInput) -> str:
        said = "/".join([name, node, *(key for _, key in axes)])
        finish = node == "finish"
        params = {
            "prompt": f"{said}: change the background. Keep the shape, the label and the colours as they are. " * 3,
            "canvas": {"width": 1024, "height": 1024},
            "target": {"width": 1024, "height": 1024},
            "seed": 1234567,
            "steps": 28,
            "guidance": 2.5,
            "model_sha256": "a" * 64,
            "numeric_mode": "bfloat16-cuda",
        }
        lane = OPERATIONS_LANE if finish else LANE
        key = content_hash(said)
        operation = "finish" if finish else "edit"
        planned.append(PlannedStep(key, operation, params, (step_input,), lane, ORIGIN, 0.0 if finish else 5.0))
        instances.append(Instance(node, axes, 1, key))
        return key

    for number in range(-(-steps // STEPS_OF_AN_ITEM)):
        item = ("item", f"p{number:05}")
        data = f"{name}/{number}".encode()
        photo = ImageInfo(uri_of(data, "jpg"), "1", sha256_hex(data), len(data), 3000, 2000, "JPEG")
        clean = add("clean", (item,), StepInput("image", 0, photo, None))
        for scene in range(SCENES):
            axes = (item, ("scene", f"s{scene}"))
            staged = add("staged", axes, StepInput("image", 0, None, clean))
            finish = add("finish", axes, StepInput("image", 0, None, staged))
            path = f"s3://studio-out/{name}/{item[1]}_{axes[1][1]}.jpg"
            deliveries.append(PlannedDelivery(path, finish, "version", instances[-1], ORIGIN))
    return Plan(name, sha256_hex(name.encode()), "studio", tuple(planned), tuple(instances), tuple(deliveries))


def submit(repository: SqlRepository, plan: Plan) -> int:
    """Returns the run's number; nobody is rung."""
    new = NewRun(plan.recipe, plan.recipe_sha256, "text", "s3://studio-assets/r.yaml", plan.owner, "cli", 0)
    return repository.create_run(new, plan)


# ---------------------------------------------------------------------------------------------------------- stand-ins


def uri_of(data: bytes, extension: str) -> str:
    return f"{ROOT}/{data.hex()}.{extension}"


@dataclass(slots=True)
class CarryingStore:
    """`ports.ObjectStore` in which everything is there that could have been put, and nothing is ever written."""

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        return bytes.fromhex(uri.rpartition("/")[2].partition(".")[0])

    def head(self, uri: str) -> ObjectInfo:
        raise ObjectNotFound(uri)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())

    def write(self, uri: str, data: bytes, *, media_type: str) -> ObjectInfo:
        return ObjectInfo(uri, "1", len(data), datetime.now(UTC))

    def write_if_absent(self, uri: str, data: bytes, *, media_type: str) -> bool:
        return True

    def link(self, uri: str, *, seconds: int) -> str:
        return uri

    def delete(self, uri: str) -> None: ...

    def folder(self, uri: str, *, write: bool = False) -> Folder:
        return Folder(uri)

    def allow_folders(self, uris: Iterable[str]) -> None: ...


@dataclass(slots=True)
class CarryingUris:
    """`ArtifactUri` for it: told of the bytes before it is asked where they go."""

    made: dict[str, bytes] = field(default_factory=dict)
    prefix: str = f"{ROOT}/"

    def told(self, data: bytes) -> bytes:
        self.made[sha256_hex(data)] = data
        return data

    def __call__(self, sha256: str, media_type: str) -> str:
        return uri_of(self.made.pop(sha256), "png" if media_type == "image/png" else "bin")


URIS = CarryingUris()
"""Of this process."""


def _made(params: Mapping[str, Any], slot: str) -> bytes:
    return URIS.told(bytes.fromhex(sha256_hex(canonical_json([params["prompt"], slot]).encode())))


@dataclass
class NoEngine(StandIn):
    """`editor.EngineEditor` that samples nothing. As of a model, latents are kept beside each picture."""

    def admitted(self, job: EditJob) -> int:
        return 1

    def make(self, job: EditJob) -> MadePicture:
        image, latents = _made(job.params, "image"), _made(job.params, "latents")
        return MadePicture(image, "image/png", 1024, 1024, {"decode": 0.0}, latents=latents)

    def describe(self) -> Mapping[str, Any]:
        return {"device": self.device, "libraries": {"torch": "2.9.0", "transformers": "5.0.0", "pillow": "13.0.0"}}


@dataclass(slots=True)
class NoOperations:
    """`PillowOperations` that paints nothing."""

    max_pixels: int = 0

    def run(
        self,
        operation: str,
        params: Mapping[str, Any],
        pictures: Sequence[LoadedPicture],
        *,
        xmp: bytes | None = None,
    ) -> MadePicture:
        return MadePicture(_made(params, "image"), "image/png", 1024, 1024)

    def describe(self) -> Mapping[str, Any]:
        return {"device": "cpu", "libraries": {"pillow": "13.0.0"}}


def make_worker(repository: SqlRepository, wake_ups: WakeUps) -> Worker:
    """A worker in this process, as `bootstrap` makes it."""
    process = psutil.Process()
    info = WorkerInfo(
        f"bench-{os.getpid()}", socket.gethostname(), process.pid, process.create_time(), "cpu", NoEngine().describe()
    )
    store = CarryingStore()
    executor = Executor(info.id, repository, store, NoEngine(), NoOperations(), URIS, max_input_bytes=10**6)
    return Worker(info, repository, store, executor, LEASE_SECONDS, BATCH_ROWS, wake_ups)
