"""A report in a bucket that nobody may read, opened by a link, in a real browser."""

from __future__ import annotations

import secrets
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from kontext_batch.report.write import title_of
from kontext_batch.storage.router import open_store
from tests.browser import open_report, wait
from tests.servers import s3_credentials
from tests.unit.report.made import Shop
from tests.unit.report.test_page import ENTER, complaints, js, loaded, opened, press


def test_whoever_has_the_link_sees_the_report(
    tmp_path: Path, s3_url: str, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_credentials().items():
        monkeypatch.setenv(name, value)
    bucket = f"review-{secrets.token_hex(4)}"
    folder = f"s3://{bucket}/spring/"
    store = open_store((), [folder], s3_endpoint=s3_url)
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
