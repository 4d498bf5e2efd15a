"""A picture that may not be read is a problem of that picture, not of the whole plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from kontext_batch.cli import main
from kontext_batch.errors import NotAllowed, ObjectNotFound
from kontext_batch.storage.local import LocalStore
from tests.unit.cli.conftest import FINISH_ONLY

TABLE = FINISH_ONLY.replace(
    'item: {glob: "photos/*"}', 'item: {table: items.csv, key: sku, files: {file: "photos/${item.sku}.png"}}'
)


@pytest.fixture
def closed(studio: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """Name of a photo -> what reading it raises; the mode of a file says nothing to root, who may run these tests."""
    closed: dict[str, Exception] = {}
    read = LocalStore.read

    def guarded(self: LocalStore, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        error = closed.get(uri.rpartition("/")[2])
        if error is not None:
            raise error
        return read(self, uri, etag=etag, max_bytes=max_bytes)

    monkeypatch.setattr(LocalStore, "read", guarded)
    (studio / "items.csv").write_text("sku\nmug\nbag\n")
    uri = (studio / "photos" / "mug.png").as_uri()
    closed["mug.png"] = NotAllowed(f"{uri} may not be read: Permission denied")
    return closed


@pytest.mark.parametrize(("recipe", "line"), [(FINISH_ONLY, 5), (TABLE, 5)])
def test_an_unreadable_photo_is_told_with_the_line_of_the_recipe(
    studio: Path, closed: dict[str, Exception], capsys: pytest.CaptureFixture[str], recipe: str, line: int
) -> None:
    (studio / "sizes.yaml").write_text(recipe)
    assert main.main(["run", "sizes.yaml"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"sizes.yaml:{line}:")
    assert "row 'mug'" in told
    assert "may not be read: Permission denied" in told
    assert "on_missing: skip" in told


@pytest.mark.parametrize("recipe", [FINISH_ONLY, TABLE])
def test_an_unreadable_photo_is_skipped_where_the_recipe_says_so(
    studio: Path, closed: dict[str, Exception], capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    (studio / "sizes.yaml").write_text(recipe.replace('"photos/*"', '"photos/*", on_missing: skip').replace(
        '.png"}}', '.png"}, on_missing: skip}'
    ))  # fmt: skip
    assert main.main(["run", "sizes.yaml"]) == 0
    assert "skipped item=mug: " in capsys.readouterr().err
    closed["mug.png"] = ObjectNotFound("gone since it was listed")
    assert main.main(["plan", "sizes.yaml"]) == 0
    assert "gone since it was listed" in capsys.readouterr().out
    closed.clear()  # as by chmod, which changes no ETag
    assert main.main(["run", "sizes.yaml"]) == 0
    assert "skipped" not in capsys.readouterr().err
    assert len(list((studio / "out").glob("*.png"))) == 4


def test_a_name_with_a_control_character_is_a_problem_of_that_file(
    studio: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (studio / "photos" / "a\x1b[31mb.png").write_bytes((studio / "photos" / "mug.png").read_bytes())
    assert main.main(["plan", "sizes.yaml"]) == 2
    told = capsys.readouterr().err
    assert r"row 'a\x1b[31mb'" in told
    (studio / "sizes.yaml").write_text(FINISH_ONLY.replace('"photos/*"', '"photos/*", on_missing: skip'))
    assert main.main(["plan", "sizes.yaml"]) == 0
    assert r"skipped item=a\x1b[31mb: " in (shown := capsys.readouterr().out)
    assert "\x1b" not in told + shown
