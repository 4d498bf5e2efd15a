"""An installation on real servers, and the processes of `kontext-batch` that run in it."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from PIL import Image, ImageDraw

from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.sidecars import is_sidecar
from kontext_batch.planning.states import StepState
from tests.acceptance.conftest import PATIENCE, RECIPE, Result

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ROOT = Path(__file__).parents[2]
BUCKET = "studio"
"""One for all tests: SeaweedFS keeps volumes for each."""


KEYS = {"AWS_ACCESS_KEY_ID": "any-key-at-all", "AWS_SECRET_ACCESS_KEY": "any-secret-at-all"}
"""The test servers let any in."""


def connect(s3_url: str) -> S3Client:
    """A client of the server, with the bucket made."""
    client = boto3.client(
        "s3",
        endpoint_url=s3_url,
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )
    with suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=BUCKET)
    return client


def settings_for(place: str, *, database_url: str, broker_url: str, s3_url: str) -> dict[str, str]:
    """Environment of an installation whose bucket's folder is `place`."""
    return {
        **KEYS,
        "KONTEXT_BATCH_DATABASE_URL": database_url,
        "KONTEXT_BATCH_BROKER_URL": broker_url,
        "KONTEXT_BATCH_S3_ENDPOINT": s3_url,
        "KONTEXT_BATCH_OBJECTS": f"s3://{BUCKET}/{place}/objects",
        "KONTEXT_BATCH_READ_PREFIXES": json.dumps([f"s3://{BUCKET}/{place}/"]),
        "KONTEXT_BATCH_WRITE_PREFIXES": json.dumps([f"s3://{BUCKET}/{place}/out"]),
        "KONTEXT_BATCH_DEVICE": "cpu",
    }


@dataclass
class Cluster:
    """An installation, its bucket, and the processes that were started in it."""

    folder: Path
    place: str
    """Its folder in the bucket."""
    s3: S3Client
    environment: Mapping[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"s3://{BUCKET}/{self.place}"

    def start(
        self, *arguments: str, module: str = "kontext_batch.cli.main", **environment: str
    ) -> subprocess.Popen[str]:
        log = (self.folder / f"process-{len(self.started)}.log").open("w")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=self.folder,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.started.append(process)
        return process

    def run(self, *arguments: str, **environment: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "kontext_batch.cli.main", *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def worker(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """A worker that has said hello."""
        before = {each.id for each in self.workers()}
        process = self.start("workers", "start", *arguments, **environment)
        self.wait_for(lambda: any(each.id not in before for each in self.workers()), process)
        return process

    def toy_worker(self, **environment: str) -> subprocess.Popen[str]:
        """Likewise, with the engine of `tests.chaos.engine`, on steps of every kind."""
        before = {each.id for each in self.workers()}
        process = self.start(module="tests.chaos.worker", PYTHONPATH=str(ROOT), **environment)
        self.wait_for(lambda: any(each.id not in before for each in self.workers()), process)
        return process

    def put(self, name: str, data: bytes) -> None:
        """Into the installation's folder of the bucket."""
        self.s3.put_object(Bucket=BUCKET, Key=f"{self.place}/{name}", Body=data)

    def read(self, name: str) -> bytes:
        return self.s3.get_object(Bucket=BUCKET, Key=f"{self.place}/{name}")["Body"].read()

    def names(self, folder: str) -> list[str]:
        """What lies below a folder, with the folder's name."""
        listed = self.s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.place}/{folder}/")
        return sorted(each["Key"].removeprefix(f"{self.place}/") for each in listed.get("Contents", []))

    def submit(self, *, steps: int = 2, place: str = "deep snow") -> int:
        """A run of the recipe in the bucket; `place` is where the second scene plays."""
        body = RECIPE.replace("STEPS", str(steps)).replace("OUT", f"{self.uri}/out").replace("deep snow", place)
        return self.submit_text(body)

    def submit_text(self, body: str) -> int:
        self.put("shop.yaml", body.encode())
        done = self.run("submit", f"{self.uri}/shop.yaml", "--json")
        assert done.code == 0, done.err
        return int(next(event["run"] for event in done.events if event["event"] == "submitted"))

    def repository(self) -> SqlRepository:
        return SqlRepository(self.environment["KONTEXT_BATCH_DATABASE_URL"])

    def ask(self, question: Callable[[SqlRepository], Any]) -> Any:
        repository = self.repository()
        try:
            return question(repository)
        finally:
            repository.close()

    def workers(self) -> list[Any]:
        return list(self.ask(lambda repository: repository.workers()))

    def wait_for(self, condition: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            for process in processes:
                assert process.poll() is None, self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def wait_until_done(self, run_id: int, *processes: subprocess.Popen[str]) -> None:
        self.wait_for(lambda: self.ask(lambda repository: repository.run(run_id)).finished is not None, *processes)

    def states(self, run_id: int) -> dict[StepState, int]:
        return dict(self.ask(lambda repository: repository.run(run_id)).steps)

    def leased(self, run_id: int) -> bool:
        """Whether somebody computes a step of the run."""
        return self.states(run_id).get(StepState.LEASED, 0) > 0

    def outputs(self) -> list[str]:
        """The pictures; their sidecars lie beside them."""
        return [name for name in self.names("out") if not is_sidecar(name)]

    def outcomes(self, run_id: int) -> list[list[str | None]]:
        """For each step of the run, how its attempts ended."""

        def look(repository: SqlRepository) -> list[list[str | None]]:
            rows = repository.run_steps(run_id)
            return [[attempt.outcome for attempt in repository.attempts(row.id)] for row in rows]

        return list(self.ask(look))

    def end(self, process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> int:
        process.send_signal(number)
        return process.wait(timeout=PATIENCE)

    def logs(self) -> str:
        return "\n".join(f"{file.name}:\n{file.read_text()}" for file in sorted(self.folder.glob("*.log")))


def picture(colour: str) -> bytes:
    image = Image.new("RGB", (80, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 54), fill=colour)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
