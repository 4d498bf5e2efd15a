"""What buckets tell of new objects, through an SQS queue. With `s3`, the only import of boto3."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote_plus, urlsplit

import boto3
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from kontext_batch.errors import InfrastructureError, SettingsError
from kontext_batch.ports import Notice
from kontext_batch.storage.uris import s3_uri

log = structlog.get_logger(__name__)

BATCH = 10
"""Most messages that SQS gives, or takes back, at once."""
MOST_BATCHES = 20
"""In one look: what is left is for the next."""


class SqsEvents:
    """`ports.ObjectEvents` of a queue that buckets, or a topic before it, send `s3:ObjectCreated:*` to."""

    def __init__(self, queue_url: str, *, region: str | None = None) -> None:
        """The queue's host is asked, whichever it is. `region`: for a queue whose URL does not tell it.

        Raises `SettingsError` for what is no queue's URL.
        """
        self._url = queue_url
        try:
            place = urlsplit(queue_url)
            host = place.hostname
            if place.scheme not in ("http", "https") or not host or place.port == 0 or not place.path.strip("/"):
                raise ValueError
            told = re.match(r"sqs\.([a-z0-9-]+)\.", host)
            self._client: Any = boto3.client(
                "sqs",
                endpoint_url=f"{place.scheme}://{place.netloc}",
                region_name=told[1] if told else region or "us-east-1",
                config=Config(retries={"mode": "standard", "max_attempts": 3}, connect_timeout=5, read_timeout=20),
            )
        except BotoCoreError as error:  # of the region, or of what boto3 reads by itself
            raise SettingsError(f"inbox_queue: {error}") from error
        except ValueError as error:  # untold: what it cites may be a part of a password
            raise SettingsError("inbox_queue is no URL of a queue: https://HOST/ACCOUNT/NAME is expected") from error

    def receive(self) -> Sequence[Notice]:
        notices: list[Notice] = []
        for _ in range(MOST_BATCHES):
            with _errors(self._url):
                answer = self._client.receive_message(QueueUrl=self._url, MaxNumberOfMessages=BATCH, WaitTimeSeconds=0)
            messages = answer.get("Messages", [])
            notices += [Notice(each["ReceiptHandle"], uris_of(each.get("Body", ""))) for each in messages]
            if not messages:
                break
        return notices

    def check(self) -> None:
        """Receive as a beat does, and take nothing: a message that comes may be received by the next at once.

        Raises `InfrastructureError`.
        """
        with _errors(self._url):
            self._client.receive_message(QueueUrl=self._url, MaxNumberOfMessages=1, VisibilityTimeout=0)

    def forget(self, notices: Sequence[Notice]) -> None:
        for start in range(0, len(notices), BATCH):
            entries = [
                {"Id": str(number), "ReceiptHandle": each.handle}
                for number, each in enumerate(notices[start : start + BATCH])
            ]
            with _errors(self._url):
                self._client.delete_message_batch(QueueUrl=self._url, Entries=entries)


def uris_of(body: str) -> tuple[str, ...]:
    """Which objects a message tells of; none when it is `s3:TestEvent`, tells of removals or is nothing of S3's."""
    try:
        return tuple(_uris(json.loads(body)))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        log.warning("a message of the queue is no notification of S3", error=f"{type(error).__name__}: {error}")
        return ()


def _uris(message: Any) -> Iterator[str]:
    if isinstance(message, Mapping) and message.get("Type") == "Notification" and "Message" in message:
        message = json.loads(message["Message"])  # through an SNS topic
    if message.get("Event") == "s3:TestEvent":
        return
    for record in message["Records"]:
        if str(record.get("eventName", "")).removeprefix("s3:").startswith("ObjectCreated"):
            place = record["s3"]
            yield s3_uri(str(place["bucket"]["name"]), unquote_plus(str(place["object"]["key"])))


@contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise InfrastructureError(f"the queue {url}: {error}") from error
