"""The same services with table, photos, artifacts and outputs in S3 (moto)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from moto import mock_aws
from PIL import Image

from kontext_batch.bootstrap import Application, open_application
from kontext_batch.errors import RecipeError
from kontext_batch.planning.sidecars import sidecar_path
from kontext_batch.planning.states import RunState
from kontext_batch.registry import ModelEntry, Registry
from kontext_batch.services.prepare import submit
from kontext_batch.settings import Settings
from tests.unit.services.conftest import ToyEditor

RECIPE = """\
version: 1
name: s3-shop
owner: studio@acme.example
inputs:
  item:
    table: items.csv
    key: sku
    files: {packshot: "s3://raw/photos/${item.sku}_front.*"}
    on_missing: skip
steps:
  clean:
    op: edit
    model: toy
    image: ${item.packshot}
    prompt: Remove the background of ${item.name}.
  finish: {op: finish, image: "${clean}", size: 32x32, format: webp}
outputs:
  - {from: "${finish}", to: "s3://dam/spring/${item.sku}.${ext}"}
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr("kontext_batch.editor.count_tokens", lambda model, prompt: 5)
    with mock_aws():
        client = boto3.client("s3")
        for name in ("raw", "dam", "store", "recipes"):
            client.create_bucket(Bucket=name)
        for sku in ("RX 100", "RX-200"):
            out = io.BytesIO()
            Image.new("RGB", (64, 64), "teal").save(out, "JPEG")
            client.put_object(Bucket="raw", Key=f"photos/{sku}_front.jpg", Body=out.getvalue())
        client.put_object(
            Bucket="recipes", Key="a/items.csv", Body=b"sku,name\nRX 100,Runner\nRX-200,Walker\nRX-300,Gone\n"
        )
        client.put_object(Bucket="recipes", Key="a/s3.yaml", Body=RECIPE.encode())
        yield


@pytest.fixture
def app(bucket: None, tmp_path: Path) -> Iterator[Application]:
    models_file = tmp_path / "models.json"
    entry = ModelEntry(path=tmp_path, sha256="a" * 64, signature="", layout="bfl", native_area=4096, text_length=64)
    Registry().with_model("toy", entry).write(models_file)
    settings = Settings(
        models_file=models_file,
        device="cpu",
        objects="s3://store/objects-of-acme",
        read_prefixes=("s3://raw/photos", "s3://recipes/"),
        write_prefixes=("s3://dam/spring",),
    )
    app = open_application(settings, workspace=tmp_path / "ws")
    yield app
    app.close()


def keys(bucket: str) -> list[str]:
    return sorted(each["Key"] for each in boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", []))


def test_a_recipe_in_a_bucket_runs_to_another_bucket(app: Application) -> None:
    prepared = app.planner().from_recipe("s3://recipes/a/s3.yaml", shown="s3.yaml")
    assert [(row.row, row.file, row.line) for row in prepared.plan.skipped] == [("RX-300", "items.csv", 4)]
    worker = app.worker()
    worker.executor = replace(worker.executor, editor=ToyEditor())
    summary = worker.run_until_done(submit(app.repository, app.wake_ups, prepared, trigger="cli"))
    assert summary.state is RunState.DONE
    pictures = ["spring/RX 100.webp", "spring/RX-200.webp"]
    assert keys("dam") == sorted([*pictures, *map(sidecar_path, pictures)])
    assert all(key.startswith("objects-of-acme/objects/") for key in keys("store"))
    again = app.planner().from_recipe("s3://recipes/a/s3.yaml", shown="s3.yaml")
    assert {each.status for each in again.explained} == {"cached"}


def test_outputs_outside_the_allowed_prefixes_are_refused(app: Application) -> None:
    recipe = RECIPE.replace("s3://dam/spring/", "s3://dam/autumn/")
    boto3.client("s3").put_object(Bucket="recipes", Key="a/s3.yaml", Body=recipe.encode())
    with pytest.raises(RecipeError, match=r"s3\.yaml:18:.*autumn"):
        app.planner().from_recipe("s3://recipes/a/s3.yaml", shown="s3.yaml")
