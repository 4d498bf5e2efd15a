"""Settings come from the environment before the file, and say what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kontext_batch.bootstrap import open_application
from kontext_batch.errors import SettingsError
from kontext_batch.registry import ModelEntry, Registry, signature
from kontext_batch.settings import Settings, load_settings


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("batch_rows: 2\ndevice: cpu\nread_prefixes: [s3://raw/]\n")
    monkeypatch.setenv("KONTEXT_BATCH_CONFIG", str(file))
    monkeypatch.setenv("KONTEXT_BATCH_BATCH_ROWS", "4")
    settings = load_settings()
    assert (settings.batch_rows, settings.device, settings.read_prefixes) == (4, "cpu", ("s3://raw/",))


def test_what_changes_the_numbers_is_part_of_what_is_planned(tmp_path: Path) -> None:
    for settings, mode in (
        (Settings(device="cpu"), "float32"),
        (Settings(device="cpu", batch_invariant=False, cuda_graphs=True), "float32"),
        (Settings(device="cpu", dtype="bfloat16", compile=True, context_every=4), "bfloat16+compiled+context=4"),
    ):
        application = open_application(settings, workspace=tmp_path)
        assert application.planner().numeric_mode == mode
        application.close()


def test_defaults_need_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("batch_rows: 0", "batch_rows"),
        ("batch_row: 3", "batch_row"),
        ("lease_seconds: 5", "lease_seconds"),
        ("content_filter: '  '", "content_filter.*blank"),
        ("- a", "mapping"),
        ("a: [", "YAML"),
    ],
)
def test_faults_name_file_and_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    monkeypatch.setenv("KONTEXT_BATCH_CONFIG", str(file))
    with pytest.raises(SettingsError, match=told) as caught:
        load_settings()
    assert "settings.yaml" in str(caught.value)


@pytest.mark.parametrize("name", ["READ_PREFIXES", "WRITE_PREFIXES"])
def test_a_list_that_is_no_json_is_told_with_an_example(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"KONTEXT_BATCH_{name}", "s3://acme/")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == f'KONTEXT_BATCH_{name}: a JSON list is expected, such as ["s3://acme-pim/"]'


def test_a_named_file_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KONTEXT_BATCH_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(SettingsError, match=r"none\.yaml"):
        load_settings()


def entry(path: Path) -> ModelEntry:
    return ModelEntry(path=path, sha256="0" * 64, signature="", layout="bfl", native_area=1, text_length=1)


def test_the_registry_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "models.json"
    assert Registry.read(file) == Registry()
    registry = Registry().with_model("kontext-dev", entry(tmp_path))
    registry.write(file)
    assert Registry.read(file) == registry


def test_a_damaged_registry_and_a_bad_name_are_told(tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    file.write_text("{")
    with pytest.raises(SettingsError, match=r"models\.json"):
        Registry.read(file)
    with pytest.raises(SettingsError, match="name"):
        Registry().with_model("../x", entry(tmp_path))


def test_a_signature_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = signature(tmp_path)
    (tmp_path / "a").write_text("22")
    assert signature(tmp_path) != before
