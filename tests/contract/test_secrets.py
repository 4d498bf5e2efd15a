"""Credentials stay where they are: in the environment. Not in the database, not in files, not in what is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import sqlalchemy as sa
from moto import mock_aws
from PIL import Image

from kontext_batch.cli import main
from kontext_batch.lineage import migrate
from kontext_batch.lineage.tables import metadata
from tests.contract.test_database_roles import PASSWORD, Roles, roles
from tests.unit.cli.conftest import studio

__all__ = ["roles", "studio"]

SECRETS = {
    "KONTEXT_BATCH_BROKER_URL": "redis://:open-sesame-of-the-broker@127.0.0.1:1/0",
    "AWS_ACCESS_KEY_ID": "AKIAOPENSESAME",
    "AWS_SECRET_ACCESS_KEY": "open-sesame-of-the-store",
    "AWS_SESSION_TOKEN": "open-sesame-of-the-session",
}
SECRET_WORDS = (PASSWORD, "open-sesame", "AKIAOPENSESAME")


@pytest.fixture
def in_a_bucket(studio: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The studio, with its artifacts in S3 and secrets in the environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KONTEXT_BATCH_OBJECTS", "s3://store/of-acme")
    with mock_aws(config={"core": {"mock_credentials": False}}):
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="store")
        yield studio


def dumped(url: str) -> str:
    """Every value of every row, as text."""
    engine = sa.create_engine(url)
    with engine.connect() as conn:
        rows = [row for table in metadata.sorted_tables for row in conn.execute(sa.select(table)).all()]
    engine.dispose()
    return "\n".join(str(value) for row in rows for value in row)


def test_no_credential_is_stored_or_told(
    roles: Roles, in_a_bucket: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate.upgrade(roles.owner)
    monkeypatch.setenv("KONTEXT_BATCH_DATABASE_URL", roles.worker)
    recipe = in_a_bucket / "sizes.yaml"
    recipe.write_text(recipe.read_text() + "schedule: {cron: '0 22 * * *'}\n")
    photo = in_a_bucket / "photos" / "mug.png"
    Image.effect_noise((64, 64), 50).save(photo)
    photo.write_bytes(photo.read_bytes()[:2000])
    assert main.main(["--verbose", "run", "sizes.yaml"]) == 3, "one photo is cut short: its error is stored"
    assert main.main(["--verbose", "submit", "sizes.yaml"]) == 0
    assert main.main(["schedules", "add", "sizes.yaml"]) == 0
    for line in ("doctor", "runs show 1", "steps show made", "steps logs made", "status", "runs list --json"):
        main.main(line.split())
    told = capsys.readouterr()
    places = {
        "the database": dumped(roles.superuser),
        "standard output": told.out,
        "standard error": told.err,
        "a file": "\n".join(each.read_bytes().decode("latin-1") for each in in_a_bucket.rglob("*") if each.is_file()),
    }
    assert "studio@acme.example" in places["the database"], "it was dumped"
    assert "damaged or cut short" in places["the database"]
    assert "workers could not be rung" in told.err, "the broker was asked for"
    for place, text in places.items():
        assert [word for word in SECRET_WORDS if word in text] == [], place


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgresql://studio:open-sesame@127.0.0.1:1/kontext"),
        ("DATABASE_URL", "postgresql://studio:open-sesame@127.0.0.1:port/kontext"),
        ("DATABASE_URL", "postgresql//studio:open-sesame@127.0.0.1/kontext"),
        ("DATABASE_URL", "mysql://studio:open-sesame@127.0.0.1/kontext"),
        ("BROKER_URL", "amqp://studio:open-sesame@127.0.0.1:1//"),
        ("BROKER_URL", "redis://:open-sesame@127.0.0.1:port/0"),
        ("BROKER_URL", "nothing://studio:open-sesame@127.0.0.1/0"),
    ],
)
def test_a_url_that_is_not_usable_is_told_without_its_password(
    studio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(f"KONTEXT_BATCH_{name}", value)
    assert main.main(["doctor"]) == 1
    told = capsys.readouterr()
    assert f"FAIL {'database' if name == 'DATABASE_URL' else 'broker'}: " in told.out
    assert "open-sesame" not in told.out + told.err
    assert "internal error" not in told.err
