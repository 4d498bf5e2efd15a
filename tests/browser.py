"""A real Chromium, driven by Selenium: Debian's packages `chromium` and `chromium-driver`."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.servers import NoServer

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
)
WAIT_SECONDS = 30.0


@contextmanager
def chromium(*, width: int = 1280, height: int = 800) -> Iterator[Any]:
    """A driver with a window of that size. Raises `NoServer` where there is no Chromium."""
    browser = os.environ.get("KONTEXT_TEST_CHROMIUM") or shutil.which("chromium")
    driver = os.environ.get("KONTEXT_TEST_CHROMEDRIVER") or shutil.which("chromedriver")
    if browser is None or driver is None:
        raise NoServer("no Chromium: install Debian's packages chromium and chromium-driver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError as error:
        raise NoServer("no Selenium: install the extra `test`") from error

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        started = webdriver.Chrome(options=options, service=Service(driver))
        try:
            resize(started, width, height)
            yield started
        finally:
            started.quit()


def resize(driver: Any, width: int, height: int) -> None:
    """What the page has to itself, in CSS pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(driver: Any, **features: str) -> None:
    """What the person prefers: `prefer(driver, color_scheme="dark")`."""
    named = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})


def wait(condition: Callable[[], Any], what: str = "") -> Any:
    """What the condition gives once that is true."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, what or "it did not come about"
        time.sleep(0.02)
    return found


def open_report(driver: Any, url: str) -> None:
    """Load it anew, whatever is shown, and wait until its pictures are laid out."""
    driver.get("about:blank")
    driver.get(url)
    wait(lambda: driver.execute_script("return document.documentElement.dataset.ready === 'true'"), "no report")
