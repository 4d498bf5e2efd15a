"""`doctor` says of each part what is wrong and what to do, and shows no credential."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import boto3
import pytest
import torch
from moto import mock_aws

from engine.config import KONTEXT_DEV
from engine.kernels import kernels_for
from engine.memory import MemoryPlan, count_parameters, memory_plan
from engine.text import clip_l_config, t5_xxl_config
from kontext_batch import editor
from kontext_batch.bootstrap import adapters
from kontext_batch.bootstrap.adapters import CommandFilter
from kontext_batch.cli import checks, main
from kontext_batch.registry import Registry
from kontext_batch.settings import load_settings
from kontext_batch.storage import s3

CASE = Path(__file__).parents[2] / "data" / "reference" / "case-1" / "model"
SHA256 = "a" * 64
S3, SQS = "s3://store/of-acme", "https://sqs.us-east-1.amazonaws.com/123456789012/drops"
FILTER_ALL, FILTER_NONE = "cat >/dev/null", "cat >/dev/null; echo --key=open-sesame >&2; exit 1"


@pytest.fixture
def place(studio: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder before its first run, and an AWS where nothing is made yet; nothing is set."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "open-sesame")
    with mock_aws():
        yield studio


@pytest.fixture
def bucket(place: Path) -> Any:
    """A client of S3, with the bucket `store`."""
    client = s3.make_client()
    client.create_bucket(Bucket="store")
    return client


def doctor(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    capsys.readouterr()
    code = main.main(["doctor", "--json"])
    told = capsys.readouterr()
    assert "open-sesame" not in told.out + told.err
    return code, {each["name"]: each for each in json.loads(told.out)}


@pytest.mark.parametrize(
    ("name", "setting", "value", "found", "advice"),
    [
        ("settings", "BATCH_ROWS", "none", "batch_rows: Input should be", "mend the file or the variable"),
        ("settings", "CONFIG", "a: redis://:open-sesame@h: x", "not readable as YAML", "mend the file"),
        ("database", "DATABASE_URL", "sqlite:///new.db", "", "db upgrade"),
        ("store", "OBJECTS", "sizes.yaml/objects", "sizes.yaml", "may be written to"),
        ("store", "OBJECTS", "s3://nowhere/of-acme", "its bucket does not exist", "may be written to"),
        ("inboxes", "INBOXES", json.dumps([{"prefix": "a", "owner": "o", "write": ["a/b"], "budget": {"outputs": 1}}]),
         "where recipes are dropped", "mend the setting inboxes"),
        ("inbox queue", "INBOX_QUEUE", "drops", "no URL of a queue: https://", "the URL that SQS shows"),
        ("inbox queue", "INBOX_QUEUE", "https://u:open-sesame@host:port/1/drops", "no URL of a queue", "the URL that"),
        ("inbox queue", "INBOX_QUEUE", "https://u:open-sesame/1@host/drops", "no URL of a queue", "the URL that"),
        ("inbox queue", "INBOX_QUEUE", SQS + "-of-nobody", "drops-of-nobody", "may receive from it"),
        ("inbox queue", "INBOX_QUEUE", "http://u:open-sesame@127.0.0.1:1/1/drops", "connect to", "may receive from it"),
        ("content filter", "CONTENT_FILTER", "no-such-filter --key=open-sesame", "not found", "by hand"),
        ("content filter", "CONTENT_FILTER", "sleep 5 # open-sesame", "no answer within 0.5 seconds", "by hand"),
        ("tokens", "TOKENS_FILE", "no-such.yaml", "FileNotFoundError", "`SHA256: NAME`"),
        ("tokens", "TOKENS_FILE", "- a", "`SHA256: NAME` are expected", "`SHA256: NAME`"),
        ("tokens", "TOKENS_FILE", f"{SHA256}: ci\nopen-sesame: ci\n{SHA256[1:]}b: [a]", "in line 2, 3", "SHA256: "),
        ("models", "MODELS_FILE", "[", "models.json", "mend or remove"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_what_to_do(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, setting: str, value: str, found: str, advice: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(adapters, "CommandFilter", partial(CommandFilter, timeout=0.5))
    file = {"CONFIG": "x.yaml", "TOKENS_FILE": "tokens.yaml", "MODELS_FILE": "models.json"}.get(setting)
    if file is not None and value != "no-such.yaml":
        (place / file).write_text(value)
        value = file
    monkeypatch.setenv(f"KONTEXT_BATCH_{setting}", value)
    code, told = doctor(capsys)
    assert (code, told[name]["ok"]) == (1, False)
    assert found in told[name]["found"]
    assert advice in told[name]["advice"]
    assert {each for each in told if not told[each]["ok"]} <= {name, "shared store"}


def test_a_disk_that_is_nearly_full_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "kontext-out").mkdir()
    monkeypatch.setattr(checks, "LEAST_FREE", 10**18)
    assert main.main(["doctor"]) == 1
    assert re.search(r"^FAIL space: \d+ MB free\n     make room, or run `gc`$", capsys.readouterr().out, re.M)


def test_compiling_without_a_compiler_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels_for.cache_clear()
    monkeypatch.setenv("KONTEXT_BATCH_COMPILE", "true")
    monkeypatch.setattr("engine.kernels.which", lambda name: None)
    code, told = doctor(capsys)
    assert (code, told["device"]["ok"]) == (1, False)
    assert "needs a C++ compiler" in told["device"]["found"]
    monkeypatch.setattr("engine.kernels.which", lambda name: name)
    assert "computing in float32+compiled" in doctor(capsys)[1]["device"]["found"]


def test_what_is_sound_is_told_too(
    place: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "tokens.yaml").write_text(f"{SHA256}: ci-nightly\n")
    values = {"OBJECTS": S3, "INBOX_QUEUE": SQS, "CONTENT_FILTER": FILTER_ALL, "TOKENS_FILE": "tokens.yaml"}
    for name, value in values.items():
        monkeypatch.setenv(f"KONTEXT_BATCH_{name}", value)
    sqs = boto3.client("sqs", region_name="us-east-1")
    sqs.create_queue(QueueName="drops")
    sqs.send_message(QueueUrl=SQS, MessageBody="for the beat")
    code, told = doctor(capsys)
    assert code == 0
    assert {name: each["found"] for name, each in told.items()}.items() >= {
        "conditional writes": "the server honours If-None-Match",
        "inbox queue": f"{SQS} answers",
        "content filter": "allows a plain grey picture",
        "tokens": "tokens.yaml names 1",
    }.items()
    assert len(sqs.receive_message(QueueUrl=SQS)["Messages"]) == 1, "it is there for the beat still"
    assert "Contents" not in bucket.list_objects_v2(Bucket="store")


def test_what_works_within_limits_is_warned_of(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that ignores `If-None-Match`, and a filter that allows nothing."""

    def strip(params: Any, **_: Any) -> None:
        params["headers"].pop("If-None-Match", None)

    bucket.meta.events.register("before-call.s3.*", strip)
    monkeypatch.setattr(s3, "make_client", lambda **_: bucket)
    monkeypatch.setenv("KONTEXT_BATCH_OBJECTS", S3)
    monkeypatch.setenv("KONTEXT_BATCH_CONTENT_FILTER", FILTER_NONE)
    code, told = doctor(capsys)
    warned = {name for name, each in told.items() if each["warned"]}
    assert (code, warned) == (0, {"conditional writes", "content filter"})
    assert main.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [number] = [number for number, line in enumerate(lines) if line.startswith("warn conditional writes: ")]
    assert "ignores If-None-Match" in lines[number]
    assert "let no two runs deliver to the same path" in lines[number + 1]


@pytest.mark.parametrize(
    ("memory", "warned", "found", "advice"),
    [
        (80, False, "33.9 GB of weights and 1.3 GB for each picture, of 80.0 GB: 8 of batch_rows 8 fit", ""),
        (32, True, "of 32.0 GB: 4 of batch_rows 8 fit, with the text encoders on the CPU", "each new prompt takes"),
        (24, True, "of 24.0 GB: it does not fit", "take a device with more memory"),
    ],
)
def test_what_a_model_needs_of_the_memory_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    memory: int, warned: bool, found: str, advice: str,
) -> None:  # fmt: skip
    """As of Kontext-dev on a device of so many GB; what is registered is the reference case."""

    def kontext_dev(path: Path, *, device: str, mode: str, rows: int) -> MemoryPlan:
        assert (path, device, rows) == (CASE, "auto", 8)
        sizes = count_parameters(KONTEXT_DEV, clip=clip_l_config(), t5=t5_xxl_config())
        return memory_plan(KONTEXT_DEV, sizes, memory=memory * 10**9, dtype=torch.bfloat16, rows=rows)

    assert main.main(["models", "add", "kontext-dev", str(CASE), "--no-load"]) == 0
    monkeypatch.setattr(editor, "needed_memory", kontext_dev)
    code, told = doctor(capsys)
    line = told["memory of kontext-dev"]
    assert (code, line["ok"], line["warned"]) == (0, True, warned)
    assert found in line["found"]
    assert line["advice"].startswith(advice)


def test_what_is_known_of_a_licence_outlasts_a_model_that_is_registered_anew(place: Path) -> None:
    def entry() -> tuple[str, bool]:
        found = Registry.read(load_settings().models_file).models["mine"]
        return found.licence, found.requires_filter

    add = ["models", "add", "mine", str(CASE), "--no-load"]
    assert main.main([*add, "--licence", "strict", "--requires-filter"]) == 0
    assert main.main(add) == 0
    assert entry() == ("strict", True)
    assert main.main([*add, "--licence", "free", "--no-filter"]) == 0
    assert entry() == ("free", False)


def test_memory_is_that_of_this_machine(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model whose files are gone needs none."""
    for name, path in (("small", CASE), ("gone", copytree(CASE, place / "gone"))):
        assert main.main(["models", "add", name, str(path), "--no-load"]) == 0
    rmtree(place / "gone")
    monkeypatch.setattr("engine.memory.free_memory", lambda device: 10**12)
    _, told = doctor(capsys)
    assert told["memory of small"]["found"].endswith("of 1000.0 GB: 8 of batch_rows 8 fit")
    assert "memory of gone" not in told
