"""A report in a bucket that nobody may read, opened by a link, in a real browser."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.exceptions import ClientError

from kontext_batch.report.write import title_of
from kontext_batch.storage.router import open_store
from kontext_batch.storage.s3 import make_client
from tests import servers
from tests.browser import open_report, wait
from tests.unit.report.made import Shop
from tests.unit.report.test_page import ENTER, complaints, js, loaded, opened, press

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
KEYS = ("studio", "a-secret-of-the-studio")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a server that lets nobody in but us, with a bucket `review`."""
    (tmp_path / "s3").mkdir()
    started = servers.needed(lambda: servers.s3(tmp_path / "s3", keys=KEYS).start())
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # another test's, with the keys of moto
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEYS[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS[1])
    try:
        client = make_client(endpoint=started.url)
        wait(lambda: _made(client), "its port is open before it can store anything")
        yield started.url
    finally:
        started.kill()


def _made(client: S3Client) -> bool:
    with suppress(ClientError):
        client.create_bucket(Bucket="review")
        return True
    return False


def test_whoever_has_the_link_sees_the_report(tmp_path: Path, server: str, driver: Any) -> None:
    folder = "s3://review/spring/"
    store = open_store((), [folder], s3_endpoint=server)
    shop = Shop(tmp_path / "shop", ["mug"], {"snow": "deep snow"}, ["shop"]).submit().work()
    writer = shop.writer()
    written = writer.write(shop.run_id, folder, store)
    link = writer.share(written, folder, store, title=title_of(shop.repository.run(shop.run_id)), seconds=600)
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(link.partition("?")[0])
    driver.get_log("browser")
    open_report(driver, link)
    press(driver, ENTER)
    opened(driver, "mug · snow · shop")
    for selector in (".grid img", ".stage .before", ".stage .after"):
        loaded(driver, selector)
    wait(lambda: "Change the background to deep snow." in js(driver, "document.querySelector('.facts').textContent"))
    assert complaints(driver) == []
    again = writer.write(shop.run_id, folder, store)
    assert f"{folder}shared.html" not in {info.uri for info in store.list(folder)}, "its links lead to what was before"
    assert again.kept == 4
