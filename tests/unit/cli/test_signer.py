"""A signer that the settings name: used by `run`, tried by `doctor`, and told before anything is made when it fails."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kontext_batch.bootstrap.adapters import signer_of
from kontext_batch.cli import main
from kontext_batch.provenance.marks import step_key_of
from kontext_batch.settings import Settings, load_settings
from tests.unit.provenance.certificates import signing

pytest.importorskip("c2pa", reason="the extra c2pa is not installed")

Configure = Callable[..., None]


@pytest.fixture
def signer(studio: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Name a signer whose certificate is valid for so long."""

    def configure(*, days: float = 365) -> None:
        files = signing(tmp_path_factory.mktemp("signing"), days=days)
        monkeypatch.setenv("KONTEXT_BATCH_C2PA_CERTIFICATES", str(files.certificates))
        monkeypatch.setenv("KONTEXT_BATCH_C2PA_PRIVATE_KEY", str(files.private_key))

    return configure


def doctor(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    main.main(["doctor", "--json"])
    (found,) = [each for each in json.loads(capsys.readouterr().out) if each["name"] == "c2pa signer"]
    return dict(found)


def files(studio: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (studio / "out").iterdir()}


def test_a_run_signs_what_it_delivers_and_does_it_once(studio: Path, signer: Configure) -> None:
    signer()
    assert main.main(["run", "sizes.yaml"]) == 0
    made = signer_of(load_settings())
    assert made is not None
    delivered = files(studio)
    assert len(delivered) == 8
    for name, data in delivered.items():
        if name.endswith(".png"):
            assert made.signed_from(data, "image/png") is not None
            assert step_key_of(data) is not None
    assert main.main(["run", "sizes.yaml"]) == 0
    assert files(studio) == delivered


@pytest.mark.parametrize("command", [["run", "sizes.yaml"], ["workers", "start", "--operations"]])
@pytest.mark.parametrize("fault", ["expired", "no extra"])
def test_a_signer_that_cannot_sign_ends_the_command_before_anything_is_made(
    studio: Path,
    signer: Configure,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    fault: str,
) -> None:
    signer(days=-1 if fault == "expired" else 365)
    if fault == "no extra":
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "c2pa" else found(name))
    assert main.main(command) == 2
    assert ("has expired" if fault == "expired" else "kontext-batch[c2pa]") in capsys.readouterr().err
    assert not (studio / "out").exists()
    assert not (studio / "kontext-out" / "kontext.db").exists()


def test_the_doctor_tries_it_and_warns_before_it_ends(
    studio: Path, signer: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    signer()
    found = doctor(capsys)
    assert (found["ok"], found["warned"]) == (True, False)
    assert "'Acme Studio' signs until" in found["found"]
    signer(days=20)
    assert doctor(capsys)["warned"]
    signer(days=-1)
    found = doctor(capsys)
    assert not found["ok"]
    assert "has expired" in found["found"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"c2pa_certificates": "a.pem"}, "belong together"),
        ({"c2pa_private_key": "a.pem"}, "belong together"),
        ({"c2pa_timestamp_url": "https://stamp.example"}, "is of a signer"),
        ({"c2pa_timestamp_url": "ftp://stamp.example"}, "c2pa_timestamp_url"),
        ({"c2pa_algorithm": "rot13"}, "c2pa_algorithm"),
    ],
)
def test_half_a_signer_is_told(given: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Settings(**given)  # type: ignore[arg-type]
