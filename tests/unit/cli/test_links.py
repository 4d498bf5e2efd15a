"""`steps link`: a picture for somebody without credentials."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest
from moto import mock_aws

from kontext_batch.cli import main


@pytest.fixture
def in_a_bucket(studio: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The studio, with its artifacts in S3."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "open-sesame")
    monkeypatch.setenv("KONTEXT_BATCH_OBJECTS", "s3://store/of-acme")
    with mock_aws(config={"core": {"mock_credentials": False}}):
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="store")
        assert main.main(["run", "sizes.yaml"]) == 0
        yield studio


def test_a_link_to_a_picture_in_a_bucket_expires(in_a_bucket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for given, seconds in ([], 3600), (["--expires", "1"], 1), (["--expires", "604800"], 604800):
        assert main.main(["steps", "link", "out/mug_small.png", *given]) == 0
        link = capsys.readouterr().out.strip()
        asked = parse_qs(urlsplit(link).query)
        assert urlsplit(link).path.startswith("/of-acme/objects/")
        assert asked["X-Amz-Expires"] == [str(seconds)]
        assert "open-sesame" not in link
        signature = asked["X-Amz-Signature"][0]
        assert main.main(["audit", "list", "--limit", "1", "--json"]) == 0
        told = capsys.readouterr().out
        [row] = json.loads(told)
        assert (row["action"], row["details"]) == ("steps link", {"seconds": seconds})
        assert signature not in told
        assert "http" not in told


@pytest.mark.parametrize("seconds", ["0", "-1", "604801", "never"])
def test_a_link_works_for_a_second_to_seven_days(
    in_a_bucket: Path, capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    assert main.main(["steps", "link", "out/mug_small.png", "--expires", seconds]) == 2
    assert "http" not in capsys.readouterr().out


def test_a_picture_that_was_collected_has_no_link(in_a_bucket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["gc", "--keep-bytes", "0", "--yes"]) == 0
    capsys.readouterr()
    assert main.main(["steps", "link", "1"]) == 2
    assert capsys.readouterr().out == ""


def test_a_picture_in_a_folder_is_named_by_its_uri(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    assert main.main(["steps", "link", "made", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told) == 4
    for each in told:
        assert Path(urlsplit(each["link"]).path).read_bytes().startswith(b"\x89PNG")
        assert each["seconds"] == 3600
