"""Real servers and real worker processes: PostgreSQL, a broker, an S3 server, and a studio that lives in a bucket."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kombu import Connection

from tests import servers
from tests.acceptance.conftest import base_environment, models_file, small_model
from tests.cluster.installation import Cluster, connect, picture, settings_for
from tests.contract.database import postgres_server, postgres_template, postgres_url

__all__ = ["models_file", "postgres_server", "postgres_template", "postgres_url", "small_model"]

NUMBERS = itertools.count()
OUTPUTS = ["out/bag_beach.png", "out/bag_snow.png", "out/mug_beach.png", "out/mug_snow.png"]


@pytest.fixture
def queue_prefix() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest, queue_prefix: str) -> Iterator[str]:
    """A broker of each kind; the queues of the test are gone afterwards."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else servers.needed(servers.rabbitmq_url)
    yield url
    with Connection(url) as connection:
        for name in ("edits", "operations"):
            with suppress(*connection.channel_errors, *connection.connection_errors):
                connection.default_channel.queue_delete(f"{queue_prefix}.{name}")  # type: ignore[attr-defined]


@pytest.fixture
def cluster(
    tmp_path: Path, models_file: Path, postgres_url: str, broker_url: str, queue_prefix: str, s3_url: str
) -> Iterator[Cluster]:
    place = f"{os.getpid()}-{next(NUMBERS)}"
    client = connect(s3_url)
    environment = {
        **base_environment(models_file),
        **settings_for(place, database_url=postgres_url, broker_url=broker_url, s3_url=s3_url),
        "KONTEXT_BATCH_QUEUE_PREFIX": queue_prefix,
    }
    made = Cluster(tmp_path, place, client, environment)
    for name, colour in (("mug", "red"), ("bag", "blue")):
        made.put(f"photos/{name}.png", picture(colour))
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.wait()
    client.close()
