"""`make chaos`: thousands of steps while workers are killed and frozen, the broker wiped, the database restarted.

Real PostgreSQL, a real broker, a real S3 server and real Celery workers; a toy engine with set timings stands in for
the model. Every fault comes when a share of the run is done, so that the same seed makes the same kind of night.
Exits 1 when a promise is broken, or when no stale writer was fenced off: then nothing was proved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from kontext_batch.lineage.engine import close_database, open_database
from kontext_batch.lineage.migrate import upgrade
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.sidecars import is_sidecar, sidecar_path
from kontext_batch.planning.states import RunState
from tests import servers
from tests.acceptance.conftest import REFERENCE, base_environment
from tests.cluster.installation import BUCKET, ROOT, Cluster, connect, picture, settings_for
from tests.proxy import Mood, Proxy

SCENES = 4
STEPS_OF_AN_ITEM = 1 + 2 * SCENES
LEASE_SECONDS = 30.0
RECIPE = """\
version: 1
name: chaos
owner: studio@acme.example
inputs:
  item: {glob: "photos/*"}
matrix:
  scene: {beach: {place: a beach}, snow: {place: snow}, city: {place: a city}, moon: {place: the moon}}
defaults:
  edit: {model: small, steps: 4}
steps:
  clean: {op: edit, image: "${item.file}", prompt: Remove the background.}
  staged: {op: edit, image: "${clean}", prompt: "Change the background to ${scene.place}."}
  finish: {op: finish, image: "${staged}", size: 32x32, format: png}
outputs:
  - {from: "${finish}", to: "OUT/${item}_${scene}.${ext}"}
"""


@dataclass
class Night:
    """What is to happen, what did, and what was found in the morning."""

    seed: int
    items: int
    kills: int
    stalls: int
    workers: int
    row_seconds: float
    happened: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fault:
    """Something that happens when so large a share of the run is done."""

    at: float
    name: str


def schedule(night: Night, rng: random.Random) -> list[Fault]:
    """All faults, in order."""
    faults = [Fault(rng.uniform(0.02, 0.9), "kill") for _ in range(night.kills)]
    faults += [Fault(0.05 + 0.6 * number / max(1, night.stalls), "stall") for number in range(night.stalls)]
    faults += [Fault(0.25, "wipe the broker"), Fault(0.65, "wipe the broker"), Fault(0.45, "restart the database")]
    faults += [Fault(0.15, "store is busy"), Fault(0.35, "store is slow"), Fault(0.55, "store cuts uploads")]
    faults += [Fault(0.3, "double rings"), Fault(0.5, "lose rings"), Fault(0.75, "restart the database")]
    return sorted(faults, key=lambda fault: fault.at)


class Installation:
    """The servers, the workers and the two beats, and what can be done to them."""

    def __init__(self, night: Night, folder: Path, rng: random.Random) -> None:
        self.night, self.folder, self.rng = night, folder, rng
        self.broker = servers.redis(folder)
        self.store = servers.s3(folder)
        self.database = servers.Postgres(folder / "postgres")
        self.frozen: dict[int, float] = {}
        """pid of a child that stands still -> when it goes on."""
        self.processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        for server in (self.broker, self.store):
            server.start()
        self.database.start()
        self.proxy = Proxy(self.store.port)
        upgrade(self.database.url)
        self.s3 = connect(self.store.url)
        for number in range(self.night.items):
            colour = f"hsl({number * 7 % 360}, {30 + number % 60}%, {20 + number % 50}%)"
            self.s3.put_object(Bucket=BUCKET, Key=f"chaos/photos/p{number:05}.png", Body=picture(colour))
        self.cluster = Cluster(
            self.folder,
            "chaos",
            self.s3,
            {
                **base_environment(register_model(self.folder)),
                **settings_for(
                    "chaos",
                    database_url=self.database.url,
                    broker_url=self.broker.url,
                    s3_url=f"http://127.0.0.1:{self.proxy.port}",
                ),
                "PYTHONPATH": str(ROOT),
                "KONTEXT_BATCH_LEASE_SECONDS": str(LEASE_SECONDS),
                "KONTEXT_TOY_ROW_SECONDS": str(self.night.row_seconds),
            },
        )
        self.run_id = self.cluster.submit_text(RECIPE.replace("OUT", f"{self.cluster.uri}/out"))
        self.engine = open_database(self.database.url)
        self.beats = [self.cluster.start("workers", "beat", "--every", "0.5") for _ in range(2)]
        for _ in range(self.night.workers):
            self.add_worker()

    def add_worker(self) -> None:
        """Each with a clock of its own: an hour early, right, or an hour late."""
        offset = 3600 * (len(self.processes) % 3 - 1)
        self.processes.append(self.cluster.start(module="tests.chaos.worker", KONTEXT_TOY_CLOCK_OFFSET=str(offset)))

    def close(self) -> None:
        for process in [*self.processes, *getattr(self, "beats", [])]:
            if process.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.kill()
            process.wait()
        if hasattr(self, "engine"):
            close_database(self.engine)
        for server in (self.broker, self.store, self.database):
            server.kill()

    # ---- looking

    def rows(self, query: str) -> Sequence[Any]:
        """Patiently: the database may be restarting."""
        for _ in range(100):
            with suppress(sa.exc.DBAPIError), self.engine.connect() as conn:
                return conn.exec_driver_sql(query).all()
            time.sleep(0.2)
        raise TimeoutError("the database does not come back")

    def share_done(self) -> float:
        [(done, total)] = self.rows("SELECT count(*) FILTER (WHERE state = 'done'), count(*) FROM steps")
        return float(done / total)

    def holders(self) -> list[int]:
        """pids of the children that hold steps and are not frozen."""
        found = self.rows(
            "SELECT DISTINCT workers.pid FROM steps JOIN workers ON workers.id = steps.lease_owner"
            " WHERE steps.state = 'leased' AND workers.retired IS NULL"
        )
        return [pid for (pid,) in found if pid not in self.frozen and psutil.pid_exists(pid)]

    def fenced(self) -> int:
        [(count,)] = self.rows("SELECT count(*) FROM attempts WHERE outcome = 'fenced'")
        return int(count)

    # ---- faults

    def strike(self, fault: Fault) -> None:
        match fault.name:
            case "kill":
                self.kill()
            case "stall":
                self.stall()
            case "wipe the broker":
                self.broker.kill()
                time.sleep(1)
                self.broker.start()
            case "restart the database":
                self.database.restart()
            case "store is busy":
                self.proxy.mood = Mood.BUSY
            case "store is slow":
                self.proxy.mood = Mood.SLOW
            case "store cuts uploads":
                self.proxy.mood = Mood.CUT
            case "double rings" | "lose rings":
                self.meddle(lose=fault.name == "lose rings")
        self.night.happened[fault.name] += 1

    def kill(self) -> None:
        """A child in mid batch, or now and then the whole worker; systemd or Kubernetes would start another."""
        while not (pids := self.holders()):
            time.sleep(0.05)
        pid = self.rng.choice(pids)
        with suppress(psutil.NoSuchProcess):
            child = psutil.Process(pid)
            if self.rng.random() < 0.3:
                parent = next((each for each in self.processes if each.pid == child.ppid()), None)
                if parent is not None:
                    parent.kill()
                    parent.wait()
                    self.add_worker()
            child.kill()

    def stall(self) -> None:
        """A child that holds steps stands still until its lease has run out and somebody else has its steps."""
        while True:
            for pid in self.holders():
                with suppress(psutil.NoSuchProcess):
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(0.1)
                    if pid in self.holders():
                        self.frozen[pid] = time.monotonic() + LEASE_SECONDS + 5
                        return
                    os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)

    def thaw(self) -> None:
        for pid, until in list(self.frozen.items()):
            if time.monotonic() >= until:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                del self.frozen[pid]

    def meddle(self, *, lose: bool) -> None:
        from kontext_batch.messaging.app import edits_queue, make_app, operations_queue
        from kontext_batch.messaging.wake_ups import CeleryWakeUps

        app = make_app(self.broker.url, queue_prefix="kontext")
        if lose:
            with app.connection_for_write() as connection:
                for queue in (edits_queue("kontext"), operations_queue("kontext")):
                    connection.default_channel.queue_purge(queue)  # type: ignore[attr-defined]
        else:
            CeleryWakeUps(app, batch_rows=1).wake({"edit": 8, "operations": 8})
        app.close()


def register_model(folder: Path) -> Path:
    """The planner asks the model for its size and for token counts; no worker loads it."""
    model = folder / "small"
    shutil.copytree(REFERENCE, model)
    config = model / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 64}))
    registry = folder / "models.json"
    command = [sys.executable, "-m", "kontext_batch.cli.main", "models", "add", "small", str(model)]
    subprocess.run(command, env=base_environment(registry), check=True, capture_output=True)
    return registry


def pass_the_night(night: Night, place: Installation, rng: random.Random, minutes: float) -> None:
    """Until the run is over, every fault has happened and whoever was frozen has come to."""
    faults = schedule(night, rng)
    mood_until = 0.0
    deadline = time.monotonic() + 60 * minutes
    told = 0.0
    while True:
        share = place.share_done()
        if time.monotonic() >= told:
            told = time.monotonic() + 10
            print(f"{share:6.1%} done; {dict(night.happened)}; {place.fenced()} fenced", flush=True)
        place.thaw()
        if place.proxy.mood is not Mood.FAITHFUL and time.monotonic() >= mood_until:
            place.proxy.mood = Mood.FAITHFUL
        if faults and share >= faults[0].at and share < 1:
            fault = faults.pop(0)
            place.strike(fault)
            if fault.name.startswith("store"):
                mood_until = time.monotonic() + 5
        elif share == 1 and not place.frozen:
            break
        if time.monotonic() > deadline:
            night.broken.append(f"only {share:.1%} was done after {minutes:g} minutes")
            return
        time.sleep(0.1)
    wait = time.monotonic() + 60
    repository = SqlRepository(place.database.url)
    while repository.run(place.run_id).finished is None or (night.stalls and not place.fenced()):
        if time.monotonic() > wait:
            break
        time.sleep(0.5)
    repository.close()
    if faults:
        night.broken.append(f"the run was over before these could happen: {[fault.name for fault in faults]}")


def look_in_the_morning(night: Night, place: Installation) -> dict[str, int]:
    """What was promised, checked row by row and object by object."""
    broken = night.broken
    for process in [*place.processes, *place.beats]:
        process.send_signal(signal.SIGTERM)
    for process in [*place.processes, *place.beats]:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=90)
    repository = SqlRepository(place.database.url)
    summary = repository.run(place.run_id)
    if summary.state is not RunState.DONE:
        broken.append(f"the run is {summary.state}: {dict(summary.steps)}")
    steps = night.items * STEPS_OF_AN_ITEM
    outcomes: dict[int, list[str]] = {}
    for step_id, outcome in place.rows("SELECT step_id, outcome FROM attempts ORDER BY step_id, token"):
        outcomes.setdefault(step_id, []).append(outcome)
    once = sum(each.count("ok") == 1 for each in outcomes.values())
    if once != steps:
        broken.append(f"{steps - once} of {steps} steps were not committed exactly once")
    again = sum(each.index("ok") != len(each) - 1 for each in outcomes.values() if "ok" in each)
    if again:
        broken.append(f"{again} finished steps were computed again")
    broken += [f"verify: {each.rule} ({each.table} {each.id})" for each in repository.verify()]
    collected = place.cluster.run("gc")
    if collected.code:
        broken.append(f"gc ended with {collected.code}: {collected.err}")
    pages = place.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="chaos/")
    keys = {each["Key"] for page in pages for each in page.get("Contents", [])}
    objects = {f"s3://{BUCKET}/{key}" for key in keys if key.startswith("chaos/objects/")}
    known = set(repository.artifact_uris())
    if objects - known:
        broken.append(f"{len(objects - known)} objects without a row after gc, such as {min(objects - known)}")
    if known - objects:
        broken.append(f"{len(known - objects)} rows without an object, such as {min(known - objects)}")
    outputs = {key for key in keys if key.startswith("chaos/out/") and not is_sidecar(key)}
    if len(outputs) != night.items * SCENES:
        broken.append(f"{len(outputs)} outputs instead of {night.items * SCENES}")
    if {key for key in keys if is_sidecar(key)} != set(map(sidecar_path, outputs)):
        broken.append("sidecars and outputs are not one to one")
    repository.close()
    counts = Counter(outcome for each in outcomes.values() for outcome in each)
    broken += unproved(counts["fenced"], place.proxy.met)
    return {
        "seed": night.seed,
        "steps": steps,
        "committed once": once,
        "kills": night.happened["kill"],
        "stalls": night.happened["stall"],
        "fenced commits": counts["fenced"],
        "redone steps": sum(len(each) > 1 for each in outcomes.values()),
        "finished steps redone": again,
        "objects without a row": len(objects - known),
        "rows without an object": len(known - objects),
    }


def unproved(fenced: int, met: Mapping[Mood, int]) -> list[str]:
    """What did not happen, so that a quiet run says nothing about it."""
    missing = [] if fenced else ["no stale writer was fenced: nothing was proved about them"]
    moods = (Mood.BUSY, Mood.CUT, Mood.SLOW)
    return missing + [f"no request met a store that is {mood.name}" for mood in moods if not met[mood]]


@contextmanager
def installed(night: Night, rng: random.Random, *, keep: bool) -> Iterator[Installation]:
    folder = Path(tempfile.mkdtemp(prefix="kontext-chaos-"))
    folder.chmod(0o755)
    place = Installation(night, folder, rng)
    try:
        place.start()
        yield place
    finally:
        place.close()
        if keep or night.broken:
            print(f"logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stalls", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--row-seconds", type=float, default=0.1, help="what an image takes the toy engine")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=20, help="give up after so long")
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(10**6)
    items = -(-given.steps // STEPS_OF_AN_ITEM)
    night = Night(seed, items, given.kills, given.stalls, given.workers, given.row_seconds)
    rng = random.Random(seed)
    started = time.monotonic()
    with installed(night, rng, keep=given.keep) as place:
        pass_the_night(night, place, rng, given.minutes)
        figures: dict[str, Any] = look_in_the_morning(night, place)
    figures["seconds"] = round(time.monotonic() - started)
    figures["faults"] = dict(night.happened)
    figures["broken"] = night.broken
    for name, value in figures.items():
        print(f"{name:>24}  {value}")
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if night.broken else 0


if __name__ == "__main__":
    sys.exit(main())
