"""What is listed for a plan, and what becomes of a finished image under each policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from kontext_batch.errors import KontextBatchError, RecipeError
from kontext_batch.hashing import sha256_hex
from kontext_batch.ports import Artifact, PendingDelivery
from kontext_batch.services.deliver import place, versioned
from kontext_batch.storage.uris import file_uri
from tests.unit.services.conftest import Studio


@pytest.mark.parametrize(
    ("path", "version", "expected"),
    [
        ("s3://a/b/c.jpg", 1, "s3://a/b/c.jpg"),
        ("s3://a/b/c.jpg", 2, "s3://a/b/c.v2.jpg"),
        ("file:///x.y/c", 3, "file:///x.y/c.v3"),
    ],
)
def test_versioned_names(path: str, version: int, expected: str) -> None:
    assert versioned(path, version) == expected


def deliver(studio: Studio, data: bytes, policy: str) -> tuple[str, int, bool]:
    sha256 = sha256_hex(data)
    uri = studio.app.artifact_keys(sha256, "image/png")
    studio.app.store.write_if_absent(uri, data, media_type="image/png")
    artifact = Artifact(sha256, uri, "image/png", len(data), 1, 1)
    pending = PendingDelivery(1, 1, file_uri(studio.folder / "out" / "a.png"), policy, artifact)
    placed = place(studio.app.store, pending)
    return placed.path.rpartition("/")[2], placed.version, placed.skipped


def test_version_keeps_what_is_there_and_knows_its_own_bytes(studio: Studio) -> None:
    assert deliver(studio, b"one", "version") == ("a.png", 1, False)
    assert deliver(studio, b"two", "version") == ("a.v2.png", 2, False)
    assert deliver(studio, b"one", "version") == ("a.png", 1, False)
    assert deliver(studio, b"two", "version") == ("a.v2.png", 2, False)
    assert studio.outputs() == ["a.png", "a.v2.png"]


def test_skip_replace_and_fail(studio: Studio) -> None:
    there = studio.folder / "out" / "a.png"
    assert deliver(studio, b"one", "fail") == ("a.png", 1, False)
    assert deliver(studio, b"two", "skip") == ("a.png", 1, True)
    with pytest.raises(KontextBatchError, match="if_exists: fail"):
        deliver(studio, b"two", "fail")
    assert there.read_bytes() == b"one"
    assert deliver(studio, b"two", "replace") == ("a.png", 1, False)
    assert there.read_bytes() == b"two"


def test_a_damaged_artifact_is_not_delivered(studio: Studio) -> None:
    uri = studio.app.artifact_keys(sha256_hex(b"right"), "image/png")
    studio.app.store.write(uri, b"wrong", media_type="image/png")
    artifact = Artifact(sha256_hex(b"right"), uri, "image/png", 5, 1, 1)
    pending = PendingDelivery(1, 1, file_uri(studio.folder / "out" / "a.png"), "version", artifact)
    with pytest.raises(KontextBatchError, match="damaged"):
        place(studio.app.store, pending)
    assert studio.outputs() == []


def test_unusable_photos_are_skipped_and_listed(studio: Studio) -> None:
    photos = studio.folder / "photos"
    (photos / "empty.png").touch()
    (photos / "text.png").write_text("not a picture")
    plan = studio.prepare().plan
    assert {row.row for row in plan.skipped} == {"empty", "text"}
    assert all(row.reason for row in plan.skipped)
    assert len(plan.deliveries) == 4


def test_unusable_photos_fail_the_plan_where_the_recipe_says_so(studio: Studio) -> None:
    studio.recipe.write_text(studio.recipe.read_text().replace("on_missing: skip", "on_missing: fail"))
    (studio.folder / "photos" / "empty.png").touch()
    with pytest.raises(RecipeError, match=r"shop\.yaml:5:.*0 bytes"):
        studio.prepare()


def test_a_photo_is_read_once_for_each_etag(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    studio.prepare()
    reads: list[str] = []
    read = type(studio.app.store).read

    def counted(self: object, uri: str, **options: object) -> bytes:
        reads.append(uri)
        return read(self, uri, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(studio.app.store), "read", counted)
    studio.prepare()
    assert [uri for uri in reads if uri.endswith(".png")] == []
    Image.new("RGB", (64, 64), "lime").save(studio.folder / "photos" / "mug.png")
    studio.prepare()
    assert [Path(uri).name for uri in reads if uri.endswith(".png")] == ["mug.png"]


def test_places_outside_the_prefixes_are_told_with_their_line(studio: Studio) -> None:
    studio.recipe.write_text(studio.recipe.read_text().replace('"out/${item}', '"file:///etc/out/${item}'))
    with pytest.raises(RecipeError, match=r"shop\.yaml:25:.*outputs"):
        studio.prepare()


def test_a_missing_recipe_is_told(studio: Studio) -> None:
    studio.recipe.unlink()
    with pytest.raises(RecipeError, match=r"shop\.yaml: there is no such file"):
        studio.prepare()
