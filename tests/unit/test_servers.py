"""What becomes of a test whose server is not there, and what the chaos run must have met."""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import unproved
from tests.proxy import Mood
from tests.servers import NoServer, needed


def missing() -> str:
    raise NoServer("no RabbitMQ here")


def test_a_missing_server_is_a_told_skip_at_a_desk_and_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no RabbitMQ here"):
        needed(missing)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(NoServer, match="no RabbitMQ here"):
        needed(missing)
    assert needed(lambda: "there") == "there"


def test_a_chaos_run_in_which_something_did_not_happen_fails() -> None:
    met = dict.fromkeys(Mood, 1)
    assert unproved(1, met) == []
    assert unproved(0, met) == ["no stale writer was fenced: nothing was proved about them"]
    assert unproved(3, met | {Mood.CUT: 0}) == ["no request met a store that is CUT"]
