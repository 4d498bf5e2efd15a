"""How commands log, and that they tell no credential."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from kontext_batch.cli import main
from kontext_batch.cli.checks import Check


def test_no_password_is_told_whatever_breaks(
    studio: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KONTEXT_BATCH_DATABASE_URL", "postgresql://kontext:pw%40-1234@127.0.0.1:1/kontext")

    def break_off(*args: object, **kwargs: object) -> None:
        raise RuntimeError("postgresql://kontext:pw%40-1234@127.0.0.1:1/kontext took pw@-1234 for a name")

    monkeypatch.setattr("kontext_batch.cli.common.opened", break_off)
    assert main.main(["runs", "list", "--json"]) == 1
    told = capsys.readouterr()
    kept = Path(json.loads(told.out.splitlines()[-1])["traceback"])
    for text in (told.out, told.err, kept.read_text()):
        assert "RuntimeError" in text
        assert "1234" not in text
    kept.unlink()


def test_the_settings_say_how_commands_log(
    studio: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*args: object, **named: object) -> Iterator[Check]:
        structlog.get_logger().info("heard")
        structlog.get_logger().debug("unheard")
        yield from ()

    monkeypatch.setattr("kontext_batch.cli.checks.all_checks", look)
    monkeypatch.setenv("KONTEXT_BATCH_LOG_FORMAT", "json")
    monkeypatch.setenv("KONTEXT_BATCH_LOG_LEVEL", "info")
    assert main.main(["doctor"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "heard"
    monkeypatch.setenv("KONTEXT_BATCH_LOG_FORMAT", "xml")
    assert main.main(["doctor"]) == 0  # a setting that is wrong is told by what needs the settings
