"""Real servers and real worker processes: PostgreSQL, a broker, an S3 server, and a studio that lives in a bucket."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from kombu import Connection
from PIL import Image, ImageDraw

from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.states import StepState
from tests import servers
from tests.acceptance.conftest import PATIENCE, RECIPE, Result, base_environment, models_file, small_model
from tests.contract.database import postgres_server, postgres_template, postgres_url

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["models_file", "postgres_server", "postgres_template", "postgres_url", "small_model"]

NUMBERS = itertools.count()
BUCKET = "studio"
"""One for all tests: SeaweedFS keeps volumes for each."""
OUTPUTS = ["out/bag_beach.png", "out/bag_snow.png", "out/mug_beach.png", "out/mug_snow.png"]


def needed(what: Callable[[], Any]) -> Any:
    """A server, or a told skip at a desk; in CI what is missing is a failure."""
    try:
        return what()
    except servers.NoServer as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    given = os.environ.get("KONTEXT_TEST_REDIS_URL")
    if given:
        yield given
        return
    server = needed(lambda: servers.redis(tmp_path_factory.mktemp("redis")).start())
    yield server.url
    server.kill()


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    given = os.environ.get("KONTEXT_TEST_S3_URL")
    if given:
        yield given
        return
    server = needed(lambda: servers.s3(tmp_path_factory.mktemp("s3")).start())
    yield server.url
    server.kill()


@pytest.fixture
def queue_prefix() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest, queue_prefix: str) -> Iterator[str]:
    """A broker of each kind; the queues of the test are gone afterwards."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else needed(servers.rabbitmq_url)
    yield url
    with Connection(url) as connection:
        for name in ("edits", "operations"):
            with suppress(*connection.channel_errors, *connection.connection_errors):
                connection.default_channel.queue_delete(f"{queue_prefix}.{name}")  # type: ignore[attr-defined]


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

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        log = (self.folder / f"process-{len(self.started)}.log").open("w")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "kontext_batch.cli.main", *arguments],
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

    def submit(self, *, steps: int = 2) -> int:
        """A run of the recipe in the bucket."""
        body = RECIPE.replace("STEPS", str(steps)).replace("OUT", f"{self.uri}/out")
        self.s3.put_object(Bucket=BUCKET, Key=f"{self.place}/shop.yaml", Body=body.encode())
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

    def outputs(self) -> list[str]:
        listed = self.s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.place}/out/")
        return sorted(each["Key"].removeprefix(f"{self.place}/") for each in listed.get("Contents", []))

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


@pytest.fixture
def cluster(
    tmp_path: Path, models_file: Path, postgres_url: str, broker_url: str, queue_prefix: str, s3_url: str
) -> Iterator[Cluster]:
    keys = {"AWS_ACCESS_KEY_ID": "any-key-at-all", "AWS_SECRET_ACCESS_KEY": "any-secret-at-all"}
    client = boto3.client(
        "s3",
        endpoint_url=s3_url,
        region_name="us-east-1",
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
    )
    place = f"{os.getpid()}-{next(NUMBERS)}"
    with suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=BUCKET)
    for name, colour in (("mug", "red"), ("bag", "blue")):
        client.put_object(Bucket=BUCKET, Key=f"{place}/photos/{name}.png", Body=picture(colour))
    environment = {
        **base_environment(models_file),
        **keys,
        "KONTEXT_BATCH_DATABASE_URL": postgres_url,
        "KONTEXT_BATCH_BROKER_URL": broker_url,
        "KONTEXT_BATCH_QUEUE_PREFIX": queue_prefix,
        "KONTEXT_BATCH_S3_ENDPOINT": s3_url,
        "KONTEXT_BATCH_OBJECTS": f"s3://{BUCKET}/{place}/objects",
        "KONTEXT_BATCH_READ_PREFIXES": json.dumps([f"s3://{BUCKET}/{place}/"]),
        "KONTEXT_BATCH_WRITE_PREFIXES": json.dumps([f"s3://{BUCKET}/{place}/out"]),
        "KONTEXT_BATCH_DEVICE": "cpu",
    }
    made = Cluster(tmp_path, place, client, environment)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.wait()
    client.close()
