"""A browser for the module, and a report of a run in which some things failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests import browser
from tests.servers import needed
from tests.unit.report.made import Shop

HOSTILE = '</script><img src=x onerror="window.hit=1">'
OUT_OF_MEMORY = "the device has no room for a batch of one"


def fault(node: str, axes: Any) -> str | None:
    if node == "staged" and (axes["item"], axes["scene"]) == ("bag", "snow"):
        return OUT_OF_MEMORY
    return f"damaged: {HOSTILE}" if node == "clean" and axes["item"] == HOSTILE else None


@pytest.fixture(scope="module")
def spring(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Four products, three scenes, two channels: one scene and one product failed, one file was not delivered."""
    shop = Shop(
        tmp_path_factory.mktemp("shop"),
        ["mug", "bag", "RX-100 Größe 42", HOSTILE],
        {"terrace": "a stone terrace", "snow": "deep snow", "podium": "a podium of ice"},
        ["shop", "hero"],
        fault=fault,
        undelivered="mug_terrace_shop.jpg",
    )
    shop.submit().work()
    shop.written = shop.writer().write(shop.run_id, shop.report, shop.store)
    return shop


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """Chromium with a window of 1280 x 800."""
    with ExitStack() as opened:
        yield needed(lambda: opened.enter_context(browser.chromium()))
