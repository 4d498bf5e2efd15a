"""Whether the device waits: its busy share while a store takes 80 ms for each read and each write.

Chains of three edits, of different numbers of denoise steps, on eight slots, with a real database (SQLite) and real
PNGs. Two devices: a simulated one, whose denoise step takes a set time however many rows are in, and the shipped model
on this machine's processor. Two arms: the worker's pipeline, and one thread that claims a batch, fetches, samples it to
its end, puts and commits, and only then claims again. Busy is the time in the engine (of the simulated device: that its
denoise steps take by definition) over the time from the first denoise step to the last. Goal: 99 % with the pipeline.

    python -m benchmarks.pipeline_busy [--quick] [--json FILE]
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from PIL import Image

from benchmarks import command
from kontext_batch.bootstrap.adapters import NoWakeUps
from kontext_batch.editor import EngineEditor
from kontext_batch.hashing import sha256_hex
from kontext_batch.lineage.migrate import upgrade
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.observability import set_up_logging
from kontext_batch.planning.plan import ImageInfo, Plan
from kontext_batch.planning.states import StepState
from kontext_batch.ports import (
    BatchMember,
    EditJob,
    Editor,
    EditSession,
    MadePicture,
    Prepared,
    StepFailed,
    WorkerInfo,
)
from kontext_batch.registry import shipped_folder
from kontext_batch.services.execute import Executor
from kontext_batch.services.work import Worker
from tests.contract.plans import make_plan, submit
from tests.stepping import SteppingEditor

ROWS = 8
STORE_SECONDS = 0.08
STEP_SECONDS = 0.1
"""Of the simulated device; a denoise step of Kontext takes longer."""
CHAIN = 3
GOAL = 0.99
LEASE_SECONDS = 60.0


@dataclass(frozen=True)
class Device:
    """What samples."""

    side: int
    """Pixels of a picture's side."""
    steps: tuple[int, ...]
    """Denoise steps of its edits, in turn."""


DEVICES = {"simulated": Device(512, (8, 12, 16)), "shipped": Device(128, (3, 4, 5))}


# ------------------------------------------------------------------------------------------------------------ the job


def photo(side: int) -> bytes:
    out = io.BytesIO()
    Image.radial_gradient("L").resize((side, side)).convert("RGB").save(out, "PNG")
    return out.getvalue()


def plan_of(chains: int, device: Device) -> tuple[Plan, dict[str, bytes]]:
    """The job, and the photos that it reads: each has a byte of its own, so that no two pictures are the same."""
    graph: dict[str, list[str]] = {}
    for turn in range(CHAIN):
        graph |= {f"{turn}-{chain}": [f"{turn - 1}-{chain}"] if turn else [] for chain in range(chains)}
    photos: dict[str, bytes] = {}
    steps, side = [], device.side
    for number, step in enumerate(make_plan(graph).steps):
        source = step.inputs[0].source
        if source is not None:
            data = photos[source.uri] = photo(side) + bytes(str(number), "ascii")
            info = ImageInfo(source.uri, "1", sha256_hex(data), len(data), side, side, "PNG")
            step = replace(step, inputs=(replace(step.inputs[0], source=info),))
        steps.append(replace(step, params={**step.params, **params_of(number, device)}))
    return replace(make_plan(graph), steps=tuple(steps)), photos


def params_of(number: int, device: Device) -> dict[str, Any]:
    size = {"width": device.side, "height": device.side}
    box = {"x": 0, "y": 0, **size}
    return {
        "model": "shipped",
        "numeric_mode": "float32",
        "adapters": [],
        "prompt": "make it red",
        "negative_prompt": None,
        "true_cfg_scale": 1.0,
        "steps": device.steps[number % len(device.steps)],
        "guidance": 2.5,
        "seed": number,
        "target": size,
        "canvas": {**size, "fit": "pad", "background": "#FFFFFF", "box": box},
        "references": [],
    }


@dataclass
class SlowStore:
    """`ports.ObjectStore` as far as it is needed, in memory and slow."""

    objects: dict[str, bytes]

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        time.sleep(STORE_SECONDS)
        return self.objects[uri]

    def write_if_absent(self, uri: str, data: bytes, *, media_type: str) -> bool:
        time.sleep(STORE_SECONDS)
        self.objects[uri] = data
        return True


# -------------------------------------------------------------------------------------------------------- the devices


@dataclass
class SimulatedDevice(SteppingEditor):
    """Sleeps for a denoise step; its pictures are as large as a photo to encode."""

    max_rows: int = ROWS

    def stepping(self, jobs: Sequence[EditJob]) -> None:
        time.sleep(STEP_SECONDS)

    def make(self, job: EditJob) -> MadePicture:
        size = job.params["target"]
        return MadePicture(bytes(str(job.params["seed"]), "ascii"), "image/png", size["width"], size["height"])

    def encode(self, picture: MadePicture) -> MadePicture:
        return replace(picture, data=photo(picture.width) + picture.data, latents=picture.data * 64)


@dataclass
class Clock:
    """What a device was seen to do."""

    engine_seconds: float = 0.0
    busy_seconds: float = 0.0
    """Of those, the ones before `last`."""
    denoise_steps: int = 0
    row_steps: int = 0
    first: float = 0.0
    last: float = 0.0

    @property
    def wall(self) -> float:
        return self.last - self.first


@dataclass
class TimedEditor:
    """`ports.Editor` with a clock beside it."""

    editor: Editor
    clock: Clock = field(default_factory=Clock)

    def prepare(self, job: EditJob) -> Prepared:
        return self.editor.prepare(job)

    @contextmanager
    def session(self, params: Mapping[str, Any]) -> Iterator[EditSession]:
        with self.editor.session(params) as session:
            yield TimedSession(session, self.clock)

    def describe(self) -> Mapping[str, Any]:
        return self.editor.describe()


@dataclass
class TimedSession:
    """`ports.EditSession` with a clock beside it."""

    session: EditSession
    clock: Clock

    @property
    def free(self) -> int:
        return self.session.free

    def admit(self, ticket: int, prepared: Prepared) -> None:
        with self._timed():
            self.session.admit(ticket, prepared)

    def step(self) -> None:
        self.clock.first = self.clock.first or time.perf_counter()
        with self._timed():
            self.session.step()
        self.clock.last, self.clock.busy_seconds = time.perf_counter(), self.clock.engine_seconds
        self.clock.denoise_steps += 1
        self.clock.row_steps += ROWS - self.free

    def retire(self) -> Sequence[tuple[int, Any]]:
        with self._timed():
            return self.session.retire()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.clock.first:
            self.clock.engine_seconds += time.perf_counter() - started


# ----------------------------------------------------------------------------------------------------------- the arms


def with_pipeline(worker: Worker) -> None:
    """As it is."""
    while worker.work_once():
        pass


def one_after_another(worker: Worker) -> None:
    """A batch is claimed, fetched, sampled to its end, put and committed, and then the next one."""
    executor = worker.executor
    while steps := worker.repository.claim(worker.info.id, limit=ROWS, lease_seconds=LEASE_SECONDS):
        loaded = [each for each in map(executor.load, steps) if not isinstance(each, StepFailed)]
        by_id = {step.id: step for step in steps}
        pictures: dict[int, Any] = {}
        with executor.editor.session(steps[0].params) as session:
            for each in loaded:
                session.admit(each.step.id, each.prepared)
            while len(pictures) < len(loaded):
                session.step()
                pictures |= dict(session.retire())
        finished = [executor.finished(by_id[step_id], picture.encode()) for step_id, picture in pictures.items()]
        executor.announce(finished)
        results = [executor.put(each) for each in finished]
        members = tuple(BatchMember(step.id, 0, int(step.params["steps"])) for step in steps)
        executor.commit(replace(executor.record(steps[0]), members=members), steps[0].lane, results)


ARMS: Mapping[str, Callable[[Worker], None]] = {"pipeline": with_pipeline, "serial": one_after_another}


@dataclass(frozen=True)
class Measured:
    """One arm on one device."""

    device: str
    arm: str
    steps: int
    denoise_steps: int
    seconds: float
    busy: float
    """Share of those seconds."""
    fill: float
    """Share of the slots, over the denoise steps."""


def measure(device: str, arm: str, chains: int, folder: Path) -> Measured:
    """Do the job once, on a database of its own."""
    simulated = device == "simulated"
    editor = TimedEditor(
        SimulatedDevice()
        if simulated
        else EngineEditor(models={"shipped": shipped_folder()}, adapters={}, device="cpu", max_rows=ROWS)
    )
    plan, photos = plan_of(chains, DEVICES[device])
    url = f"sqlite:///{folder / f'{device}-{arm}.db'}"
    upgrade(url)
    repository = SqlRepository(url)
    info = WorkerInfo(arm, "here", os.getpid(), 0.0, "cpu", {})
    repository.register_worker(info)
    store, operations = cast(Any, SlowStore(dict(photos))), cast(Any, None)
    executor = Executor(info.id, repository, store, editor, operations, uri_of, max_input_bytes=10**8)
    run_id = submit(repository, plan)
    ARMS[arm](Worker(info, repository, store, executor, LEASE_SECONDS, ROWS, NoWakeUps()))
    assert repository.run(run_id).steps == {StepState.DONE: len(plan.steps)}
    repository.close()
    clock = editor.clock
    busy = clock.denoise_steps * STEP_SECONDS if simulated else clock.busy_seconds
    fill = clock.row_steps / (ROWS * clock.denoise_steps)
    return Measured(device, arm, len(plan.steps), clock.denoise_steps, clock.wall, busy / clock.wall, fill)


def uri_of(sha256: str, media_type: str) -> str:
    return f"file:///objects/{sha256}"


def main() -> int:
    """Measure, print, compare with the goal; 1 when it is missed."""
    set_up_logging()
    parser = command.parser(__doc__, quick="48 steps instead of 96, 18 of the serial arm")
    options = parser.parse_args()
    chains = {"pipeline": 16, "serial": 6} if options.quick else dict.fromkeys(ARMS, 32)
    with tempfile.TemporaryDirectory(prefix="kontext-bench-") as folder:
        found = [measure(device, arm, chains[arm], Path(folder)) for device in DEVICES for arm in ARMS]
    missed = [each.device for each in found if each.arm == "pipeline" and each.busy < GOAL]
    print(f"{STORE_SECONDS * 1000:g} ms for each read and write; {ROWS} slots; {os.cpu_count()} cores for everything\n")
    print(f"{'device':10} {'arm':9} {'steps':>6} {'denoise steps':>14} {'s':>7} {'slots filled':>13} {'busy':>8}  goal")
    for each in found:
        goal = f"{GOAL:.0%}{' MISSED' if each.device in missed else ''}" if each.arm == "pipeline" else ""
        line = f"{each.device:10} {each.arm:9} {each.steps:6} {each.denoise_steps:14} {each.seconds:7.2f}"
        print(f"{line} {each.fill:13.1%} {each.busy:8.2%}  {goal}".rstrip())
    if options.json is not None:
        data = {"result": [asdict(each) for each in found], "goal": GOAL, "missed": missed}
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
