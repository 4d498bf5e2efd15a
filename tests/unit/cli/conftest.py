"""A workspace without a model to load, for the commands to work in."""

from __future__ import annotations

from pathlib import Path

import pytest

FINISH_ONLY = """\
version: 1
name: sizes
owner: studio@acme.example
inputs:
  item: {glob: "photos/*"}
matrix:
  size: {small: {px: 16x16}, large: {px: 32x32}}
steps:
  made: {op: finish, image: "${item.file}", size: "${size.px}", format: png}
outputs:
  - {from: "${made}", to: "out/${item}_${size}.${ext}", if_exists: replace}
"""


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a recipe that needs no model."""
    from PIL import Image

    from kontext_batch import bootstrap

    (tmp_path / "photos").mkdir()
    for name, colour in (("mug", "red"), ("bag", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "sizes.yaml").write_text(FINISH_ONLY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KONTEXT_BATCH_MODELS_FILE", str(tmp_path / "models.json"))
    monkeypatch.setattr(bootstrap, "with_shipped", lambda registry, file: registry)
    return tmp_path
