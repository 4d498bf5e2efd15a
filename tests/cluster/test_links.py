"""Links against a server that checks signatures: what one opens, and for how long."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from kontext_batch.storage.s3 import S3Store, make_client
from tests import servers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
KEYS = "any-key-at-all", "open-sesame-open-sesame"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[servers.Server]:
    started = servers.needed(lambda: servers.s3(tmp_path, keys=KEYS).start())
    yield started
    started.kill()


@pytest.fixture
def store(server: servers.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # another test's, with the keys of moto
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEYS[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS[1])
    client = make_client(endpoint=server.url)
    deadline = time.monotonic() + 60
    while True:  # its port is open before it can store anything
        with suppress(ClientError):
            client.create_bucket(Bucket="studio")
            break
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.2)
    store = S3Store(client, ["s3://studio"], ["s3://studio"])
    for name in ("one", "other"):
        store.write(f"s3://studio/{name}.png", name.encode(), media_type="image/png")
    yield store
    client.close()


def status(link: str, method: str = "GET") -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(link, method=method), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_link_opens_one_object_for_reading_until_it_expires(store: S3Store) -> None:
    link = store.link("s3://studio/one.png", seconds=2)
    lasting = store.link("s3://studio/one.png", seconds=600)

    with urllib.request.urlopen(link, timeout=10) as answer:
        assert answer.read() == b"one"
    assert status(lasting.partition("?")[0]) == 403, "without the signature"
    assert status(lasting.replace("one.png", "other.png")) == 403, "another object"
    assert status(lasting.replace("Expires=600", "Expires=6000")) == 403, "another time"
    assert status(lasting, "PUT") == status(lasting, "DELETE") == 403, "another method"
    time.sleep(3)
    assert status(link) == 403, "expired"
    assert status(lasting) == 200
