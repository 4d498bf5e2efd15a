"""Logs carry the ids of the work, in either format, and no credential in any part of them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator

import pytest
import structlog

from kontext_batch.errors import InfrastructureError
from kontext_batch.observability import hide, mask, masking, set_up_logging
from kontext_batch.observability.logs import about_batch

PASSWORD = "s3cr/e@t:pw"
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(masking, "_known", set())
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers, root.level = handlers, level


@pytest.fixture(params=["text", "json"])
def logged(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], str]:
    """What was logged since it was last asked for."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET)
    set_up_logging(json=request.param == "json", level=logging.INFO)
    return lambda: capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "gone", "kept"),
    [
        ("postgresql://kontext:pw1234@db/kontext is not there", "pw1234", "@db/kontext is not there"),
        (f"redis://:{PASSWORD}@cache:6379/0", "e@t:pw", "@cache:6379/0"),
        ("https://ghp_0123456789@git.example/x", "ghp_0123456789", "git.example/x"),
        ("host=db user=kontext password=pw1234 dbname=k", "pw1234", "dbname=k"),
        ("password='a b c' x=1", "a b c", "x=1"),
        ('{"aws_secret_access_key": "abc/def+ghi", "n": 1}', "abc/def+ghi", '"n": 1'),
        ("https://b.s3/x?X-Amz-Credential=AB%2F&X-Amz-Signature=0a1b2c&n=1", "0a1b2c", "n=1"),
        ("the key AKIAIOSFODNN7EXAMPLE may not", "AKIAIOSFODNN7EXAMPLE", "may not"),
        ("signed by whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw here", "MfKQ9r8G", "here"),
        ("Authorization: Bearer eyJhbGciOi.J9 done", "eyJhbGciOi", "done"),
    ],
)
def test_what_looks_like_a_credential_is_masked(text: str, gone: str, kept: str) -> None:
    assert gone not in mask(text)
    assert kept in mask(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://acme-dam/mug/mug@2x.png is there already",
        "file:///srv/photos/a:b@2x.png",
        "http://127.0.0.1:9000/bucket/key",
        "step 3ab5 failed: sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 differs",
        "512 tokens are too many: the text has 600",
        "made by studio@acme.example at 10:00",
    ],
)
def test_what_is_none_is_left_alone(text: str) -> None:
    assert mask(text) == text


@pytest.mark.parametrize(
    "piece", ["a://a:", "a.a-", 'password="', "token ", "s3://", "a+", "@", "Bearer ", "://:", "token" + " " * 50]
)
def test_masking_takes_no_quadratic_time(piece: str) -> None:
    """200 kB of what an author may have written."""
    text = piece * (200_000 // len(piece))
    started = time.process_time()
    mask(text)
    assert time.process_time() - started < 5


def test_a_known_secret_is_masked_wherever_it_turns_up() -> None:
    hide("correct horse", None, "ab")
    assert mask("it said correct horse, ab") == "it said ***, ab"


def test_a_line_says_whose_work_it_is_about(logged: Callable[[], str]) -> None:
    log = structlog.get_logger("test")
    with about_batch(worker="host-1", lane="edit/tiny", steps=[7, 8], runs=[3, 3]):
        log.warning("step failed", error="it is grey")
    log.warning("after it")
    inside, outside = logged().splitlines()
    assert "host-1" not in outside
    if inside.startswith("{"):
        told = json.loads(inside)
        assert told.pop("timestamp").endswith("Z")
        assert told == {
            "event": "step failed",
            "level": "warning",
            "error": "it is grey",
            "worker": "host-1",
            "lane": "edit/tiny",
            "steps": [7, 8],
            "runs": [3],
        }
    else:
        for part in ("warning", "step failed", "host-1", "edit/tiny", "[7, 8]", "[3]"):
            assert part in inside


def test_no_part_of_a_line_has_a_credential(logged: Callable[[], str]) -> None:
    url = f"postgresql://kontext:{PASSWORD}@db/kontext"

    def connect(database_url: str, password: str) -> None:
        raise InfrastructureError(f"no connection to {database_url}")

    log = structlog.get_logger("test")
    try:
        connect(url, PASSWORD)
    except InfrastructureError as error:
        log.exception("heartbeat failed", url=url, given={"password": PASSWORD, "urls": [url]}, error=error)
    log.warning(f"tried with {AWS_SECRET}", token="abc", tokens=512)
    told = logged()
    assert "Traceback" in told
    assert "InfrastructureError" in told
    assert "512" in told
    for secret in (PASSWORD, "e@t:pw", AWS_SECRET, "abc"):
        assert secret not in told


def test_libraries_log_the_same_way(logged: Callable[[], str]) -> None:
    try:
        raise ValueError(f"amqp://guest:{PASSWORD}@broker//")
    except ValueError:
        logging.getLogger("celery.worker").exception("cannot connect to %s", f"redis://:{PASSWORD}@cache")
    logging.getLogger("celery.worker").debug("unheard")
    told = logged()
    assert "celery.worker" in told
    assert "Traceback" in told
    assert "e@t:pw" not in told
    assert "unheard" not in told
    if told.startswith("{"):
        assert json.loads(told.splitlines()[0])["event"] == "cannot connect to redis://***@cache"


def test_setting_up_again_replaces_what_was_set(logged: Callable[[], str]) -> None:
    set_up_logging(json=True, level=logging.ERROR)
    logging.getLogger("x").error("once")
    assert logged().count("once") == 1
    structlog.get_logger("y").warning("below")
    assert "below" not in logged()
