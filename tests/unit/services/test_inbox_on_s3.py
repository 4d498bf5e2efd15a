"""An inbox in a bucket that tells a queue of what is put there, on a server that speaks S3 and SQS (moto)."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from kontext_batch.bootstrap import Application, open_application
from kontext_batch.planning.inbox import DropState
from kontext_batch.planning.states import RunState
from kontext_batch.registry import ModelEntry, Registry
from kontext_batch.services.inbox import Watcher
from kontext_batch.settings import Inbox, InboxBudget, Settings
from tests.unit.services.conftest import ToyEditor

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

RECIPE = """\
version: 1
name: s3-shop
owner: studio@acme.example
budget: {gpu_minutes: 5, outputs: 4}
inputs:
  item: {table: items.csv, key: sku, files: {packshot: "s3://raw/acme/${item.sku}.*"}}
steps:
  clean: {op: edit, model: toy, image: "${item.packshot}", prompt: Remove the background.}
outputs:
  - {from: "${clean}", to: "s3://dam/acme/${item.sku}.${ext}"}
"""


@dataclass
class Bucket:
    """The bucket, the queue, and an application that watches both."""

    s3: S3Client
    sqs: Any
    queue: str
    app: Application

    def put(self, key: str, data: str | bytes = RECIPE, *, bucket: str = "drops") -> None:
        self.s3.put_object(Bucket=bucket, Key=key, Body=data.encode() if isinstance(data, str) else data)

    def names(self, bucket: str = "drops") -> list[str]:
        return sorted(each["Key"] for each in self.s3.list_objects_v2(Bucket=bucket).get("Contents", []))

    def json(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.s3.get_object(Bucket="drops", Key=key)["Body"].read())
        return found

    def left(self) -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        counts = self.sqs.get_queue_attributes(QueueUrl=self.queue, AttributeNames=names)["Attributes"]
        return sum(map(int, counts.values()))

    def tick(self, **changes: Any) -> list[int]:
        return replace(self.app.watcher(), **changes).tick(self.app.inbox_planner)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setattr("kontext_batch.editor.count_tokens", lambda model, prompt: 5)
    s3 = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    sqs = boto3.client("sqs", endpoint_url=server, region_name="us-east-1")
    for name in ("drops", "raw", "dam", "store"):
        s3.create_bucket(Bucket=name)
    queue = sqs.create_queue(QueueName=f"q{time.monotonic_ns()}")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    s3.put_bucket_notification_configuration(
        Bucket="drops",
        NotificationConfiguration={"QueueConfigurations": [{"QueueArn": arn, "Events": ["s3:ObjectCreated:*"]}]},
    )
    photo = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(photo, "PNG")
    models_file = tmp_path / "models.json"
    entry = ModelEntry(path=tmp_path, sha256="a" * 64, signature="", layout="bfl", native_area=4096, text_length=64)
    Registry().with_model("toy", entry).write(models_file)
    inbox = Inbox(
        prefix="s3://drops/inbox/acme/",
        owner="studio@acme.example",
        budget=InboxBudget(gpu_minutes=60),
        read=("s3://raw/acme",),
        write=("s3://dam/acme",),
    )
    settings = Settings(
        models_file=models_file,
        device="cpu",
        objects="s3://store",
        s3_endpoint=server,
        inboxes=(inbox,),
        inbox_queue=queue,
    )
    app = open_application(settings, workspace=tmp_path / "ws")
    made = Bucket(s3, sqs, queue, app)
    made.put("acme/A1.png", photo.getvalue(), bucket="raw")
    made.put("inbox/acme/items.csv", "sku\nA1\n")
    yield made
    app.close()
    for name in ("drops", "raw", "dam", "store"):
        for key in made.names(name):
            s3.delete_object(Bucket=name, Key=key)
        s3.delete_bucket(Bucket=name)


def test_a_recipe_in_a_bucket_runs_at_once(bucket: Bucket) -> None:
    bucket.put("inbox/acme/x.yaml")
    [run_id] = bucket.tick()
    assert bucket.json("inbox/acme/x.status.json")["state"] == "running"
    worker = bucket.app.worker()
    worker.executor = replace(worker.executor, editor=ToyEditor())
    assert worker.run_until_done(run_id).state is RunState.DONE
    assert bucket.names("dam") == ["acme/A1.png", "acme/A1.png.lineage.json"]
    for _ in range(100):  # the last answers are due some seconds after the first ones
        if "inbox/acme/x.report.html" in bucket.names():
            break
        time.sleep(0.1)
        bucket.tick()
    assert bucket.json("inbox/acme/x.status.json")["state"] == "done"
    assert bucket.names() == [
        f"inbox/acme/{name}" for name in ("items.csv", "x.plan.txt", "x.report.html", "x.status.json", "x.yaml")
    ]
    report = bucket.s3.head_object(Bucket="drops", Key="inbox/acme/x.report.html")
    assert report["ContentType"] == "text/html; charset=utf-8"
    bucket.put("inbox/acme/x.yaml")  # the same bytes have the same ETag
    assert bucket.tick() == []


def test_an_event_is_enough(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "inbox/acme/a b+ü 100%.yaml"
    bucket.put(key)
    with monkeypatch.context() as patch:
        patch.setattr(Watcher, "_listed", lambda self: iter(()))
        assert len(bucket.tick()) == 1
    assert bucket.json("inbox/acme/a b+ü 100%.status.json")["state"] == "running"
    assert bucket.left() == 3  # told of the answers, which are no recipes
    bucket.tick()
    assert bucket.left() == 0


def test_a_lost_event_loses_nothing_and_a_doubled_one_adds_nothing(bucket: Bucket) -> None:
    bucket.put("inbox/acme/x.yaml")
    bucket.sqs.purge_queue(QueueUrl=bucket.queue)
    assert len(bucket.tick()) == 1
    place = {"bucket": {"name": "drops"}, "object": {"key": "inbox/acme/x.yaml"}}
    record = {"eventName": "ObjectCreated:Put", "s3": place}
    for _ in range(3):
        bucket.sqs.send_message(QueueUrl=bucket.queue, MessageBody=json.dumps({"Records": [record]}))
    assert bucket.tick() == []
    assert len(bucket.app.repository.runs()) == 1


def test_a_queue_that_is_away_is_no_hindrance(bucket: Bucket) -> None:
    bucket.put("inbox/acme/x.yaml")
    bucket.sqs.delete_queue(QueueUrl=bucket.queue)
    assert len(bucket.tick()) == 1


def test_watchers_at_once_start_one_run(bucket: Bucket) -> None:
    for number in range(3):
        recipe = RECIPE.replace("s3-shop", f"shop-{number}").replace("dam/acme/", f"dam/acme/{number}/")
        bucket.put(f"inbox/acme/{number}.yaml", recipe)
    together = threading.Barrier(3)
    started: list[int] = []

    def watch() -> None:
        together.wait()
        started.extend(bucket.tick())

    watchers = [threading.Thread(target=watch) for _ in range(3)]
    for each in watchers:
        each.start()
    for each in watchers:
        each.join()
    assert sorted(started) == [1, 2, 3]
    assert sorted(run.recipe for run in bucket.app.repository.runs()) == ["shop-0", "shop-1", "shop-2"]
    assert {row.state for row in bucket.app.repository.drops()} == {DropState.ACCEPTED}


def test_a_recipe_that_is_replaced_after_it_was_listed_runs_as_it_is_then(bucket: Bucket) -> None:
    bucket.put("inbox/acme/x.yaml", RECIPE.replace("Remove", "Keep"))
    found = list(bucket.app.store.list("s3://drops/inbox/acme/"))
    bucket.put("inbox/acme/x.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watcher, "_listed", lambda self: (each for each in found if each.uri.endswith(".yaml")))
        assert bucket.tick(events=None) == []
    assert [row.state for row in bucket.app.repository.drops()] == [DropState.GONE]
    [run_id] = bucket.tick()
    assert "Remove" in bucket.app.repository.recipe_text(run_id)


def test_other_peoples_places_are_out_of_reach(bucket: Bucket) -> None:
    bucket.put("inbox/acme/x.yaml", RECIPE.replace("s3://raw/acme", "s3://raw/globex"))
    bucket.put("inbox/acme/y.yaml", RECIPE.replace("s3://dam/acme", "s3://dam/globex"))
    bucket.put("inbox/globex/z.yaml")
    assert bucket.tick() == []
    for stem, verb in (("x", "read"), ("y", "write")):
        told = bucket.s3.get_object(Bucket="drops", Key=f"inbox/acme/{stem}.errors.txt")["Body"].read().decode()
        assert told.startswith(f"{stem}.yaml:")
        assert f"lies outside of what this recipe may {verb}" in told
    assert not [key for key in bucket.names() if key.startswith("inbox/globex/z.")][1:]


def test_an_empty_cancel_file_cancels_each_time_it_is_put(bucket: Bucket) -> None:
    bucket.put("inbox/acme/x.yaml")
    [run_id] = bucket.tick()
    for _ in range(2):
        time.sleep(1.1)  # S3 keeps whole seconds
        bucket.put("inbox/acme/x.cancel", "")
        bucket.tick()
        assert bucket.app.repository.run(run_id).state is RunState.CANCELLED
        bucket.app.repository.retry_run(run_id)
        bucket.tick()
        assert bucket.app.repository.run(run_id).state is RunState.RUNNING
