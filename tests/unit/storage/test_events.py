"""What a queue tells of new objects: S3's own form, and everything else that may lie in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws

from kontext_batch.errors import InfrastructureError
from kontext_batch.storage.events import SqsEvents, uris_of


def record(key: str, *, event: str = "ObjectCreated:Put", bucket: str = "acme") -> dict[str, Any]:
    return {"eventName": event, "s3": {"bucket": {"name": bucket}, "object": {"key": key}}}


def body(*records: dict[str, Any]) -> str:
    return json.dumps({"Records": records})


def test_keys_are_decoded_as_s3_encodes_them() -> None:
    told = uris_of(body(record("inbox%2Fa+b%2B%C3%BC.yaml"), record("x.yaml", event="s3:ObjectCreated:Copy")))
    assert told == ("s3://acme/inbox/a b+ü.yaml", "s3://acme/x.yaml")


def test_a_topic_may_stand_between() -> None:
    assert uris_of(json.dumps({"Type": "Notification", "Message": body(record("x.yaml"))})) == ("s3://acme/x.yaml",)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "acme"}),
        body(record("x.yaml", event="ObjectRemoved:Delete")),
        "",
        "no JSON",
        "[]",
        "7",
        "{}",
        json.dumps({"Records": [{"eventName": "ObjectCreated:Put", "s3": None}]}),
        json.dumps({"Records": 3}),
        json.dumps({"Type": "Notification", "Message": 3}),
        "[" * 100_000,
    ],
)
def test_what_tells_of_no_new_object_is_nothing(text: str) -> None:
    assert uris_of(text) == ()


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        yield boto3.client("sqs", region_name="eu-central-1").create_queue(QueueName="drops")["QueueUrl"]


def send(queue: str, *texts: str) -> None:
    client = boto3.client("sqs", region_name="eu-central-1")
    for text in texts:
        client.send_message(QueueUrl=queue, MessageBody=text)


def test_notices_come_until_they_are_forgotten(queue: str) -> None:
    events = SqsEvents(queue)
    assert events.receive() == []
    send(queue, *(body(record(f"{number}.yaml")) for number in range(23)), "no JSON")
    notices = events.receive()
    assert sorted(uri for each in notices for uri in each.uris) == sorted(f"s3://acme/{n}.yaml" for n in range(23))
    assert len(notices) == 24  # what says nothing is taken out of the queue too
    events.forget(notices)
    events.forget([])
    client = boto3.client("sqs", region_name="eu-central-1")
    counts = client.get_queue_attributes(
        QueueUrl=queue,
        AttributeNames=["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"],
    )["Attributes"]
    assert set(counts.values()) == {"0"}


def test_a_queue_that_is_not_there_is_the_infrastructures_fault(queue: str) -> None:
    with pytest.raises(InfrastructureError, match=r"the queue .*nowhere"):
        SqsEvents(queue.replace("drops", "nowhere")).receive()
