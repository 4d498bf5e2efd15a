"""What a zip may be, and every way in which one is refused."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping

import pytest

from kontext_batch.errors import RecipeError
from kontext_batch.services.bundles import Bundle, BundleLimits, member_uri

Members = Mapping[str, bytes]
RECIPE = b"version: 1\nname: shop\n"


def packed(members: Members, *, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name) if name.endswith("/") else name, data)
    return out.getvalue()


def with_entry(change: Callable[[zipfile.ZipInfo], None], data: bytes = b"data") -> bytes:
    """A recipe and a member `other` that was made odd."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("shop.yaml", RECIPE)
        entry = zipfile.ZipInfo("other")
        change(entry)
        archive.writestr(entry, data)
    return out.getvalue()


def opened(data: bytes, **limits: float) -> Bundle:
    return Bundle(data, shown="x.zip", limits=BundleLimits(**limits))  # type: ignore[arg-type]


def refusal(data: bytes, **limits: float) -> str:
    with pytest.raises(RecipeError) as caught:
        list(opened(data, **limits).files())
    return str(caught.value)


def test_a_sound_bundle_gives_its_files() -> None:
    members = {
        "spring/shop.yaml": RECIPE,
        "spring/brand.yaml": b"kind: brand\n",
        "spring/photos/": b"",
        "spring/photos/RX 100 ü.png": b"\x89PNG",
        "spring/items.xlsx": packed({"sheet.xml": b"<x/>"}),
    }
    bundle = opened(packed({**members, "__MACOSX/spring/._shop.yaml": b"?", "spring/.DS_Store": b"?"}))
    assert bundle.recipe == "spring/shop.yaml"
    assert dict(bundle.files()) == {name: data for name, data in members.items() if not name.endswith("/")}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../evil.png", "'..'"),
        ("a/../../evil.png", "'..'"),
        ("/etc/passwd", "absolute"),
        ("C:evil.png", "absolute"),
        ("c:/evil.png", "absolute"),
        ("a\\..\\evil.png", "backslash"),
        ("a//evil.png", "nothing between"),
        ("./evil.png", "'.'"),
        ("a\nb.png", "control characters"),
        ("x" * 300 + ".png", "255 bytes"),
        ("more.zip", "archive in the archive"),
        ("more.tar.gz", "archive in the archive"),
    ],
)
def test_a_name_that_leads_astray_is_refused(name: str, words: str) -> None:
    assert words in refusal(packed({"shop.yaml": RECIPE, name: b"x"}))


def test_a_name_with_nul_is_refused() -> None:
    data = packed({"shop.yaml": RECIPE, "evil.png#.txt": b"x"}).replace(b"evil.png#", b"evil.png\0")
    assert "NUL" in refusal(data)


@pytest.mark.parametrize(
    ("kind", "words"), [(stat.S_IFLNK, "symbolic link"), (stat.S_IFIFO, "neither a file"), (stat.S_IFCHR, "neither")]
)
def test_only_files_and_folders_are_unpacked(kind: int, words: str) -> None:
    def change(entry: zipfile.ZipInfo) -> None:
        entry.external_attr = (kind | 0o777) << 16

    assert words in refusal(with_entry(change, b"/etc/passwd"))


def test_an_encrypted_member_is_refused() -> None:
    data = bytearray(packed({"shop.yaml": RECIPE}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(signature) + offset
        struct.pack_into("<H", data, at, struct.unpack_from("<H", data, at)[0] | 1)
    assert "is encrypted" in refusal(bytes(data))


def test_other_compressions_are_refused() -> None:
    assert "method 14" in refusal(packed({"shop.yaml": RECIPE}, compression=zipfile.ZIP_LZMA))


def test_bombs_are_refused_by_what_they_say() -> None:
    assert "as bombs are" in refusal(packed({"shop.yaml": RECIPE, "zeros.png": bytes(3_000_000)}))
    assert "at most 1000 are taken" in refusal(
        packed({"shop.yaml": RECIPE, "a.png": bytes(600), "b.png": bytes(600)}), max_unpacked=1000
    )
    many = {f"{number}.png": b"" for number in range(20)}
    assert "21 files; at most 10" in refusal(packed({"shop.yaml": RECIPE, **many}), max_members=10)


def test_a_member_that_is_larger_than_it_says_is_refused() -> None:
    data = bytearray(packed({"shop.yaml": RECIPE, "a.png": bytes(500_000)}))
    at = data.rindex(b"PK\x01\x02") + 24
    struct.pack_into("<I", data, at, 10)
    told = refusal(bytes(data))
    assert "x.zip/a.png" in told
    assert "cannot be unpacked" in told or "another size" in told


def test_a_zip_under_another_name_is_refused() -> None:
    assert "x.zip/a.png: is an archive" in refusal(packed({"shop.yaml": RECIPE, "a.png": packed({"b": b"c"})}))


def test_names_that_clash_are_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("shop.yaml", RECIPE)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("shop.yaml", RECIPE)
    assert "is there twice" in refusal(out.getvalue())
    assert "are one file on many disks" in refusal(packed({"shop.yaml": RECIPE, "A.png": b"", "a.png": b""}))
    assert "lies in a folder that is a file" in refusal(packed({"shop.yaml": RECIPE, "a": b"", "A/b.png": b""}))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.png": b""}, "x.zip: no recipe is in it"),
        ({"brand.yaml": b"kind: brand\n"}, "no recipe is in it"),
        ({"a.yaml": RECIPE, "b/c.yml": RECIPE}, "2 recipes are in it (a.yaml, b/c.yml)"),
        ({"a.yaml": RECIPE + b"#" * 300_000}, "larger than 256 KiB"),
    ],
)
def test_a_bundle_has_one_recipe(members: Members, words: str) -> None:
    assert words in refusal(packed(members))


@pytest.mark.parametrize("data", [b"", b"no zip", packed({"shop.yaml": RECIPE})[:-30]])
def test_what_is_no_zip_is_told(data: bytes) -> None:
    assert "x.zip: this is no zip archive" in refusal(data)


def test_damage_is_told_with_the_member() -> None:
    data = bytearray(packed({"shop.yaml": RECIPE, "a.png": bytes(range(256)) * 10}, compression=zipfile.ZIP_STORED))
    data[data.index(b"a.png") + 50] ^= 1
    assert "x.zip/a.png: cannot be unpacked (Bad CRC-32" in refusal(bytes(data))


def test_all_faults_of_a_directory_are_told_at_once() -> None:
    told = refusal(packed({"shop.yaml": RECIPE, "../a.png": b"", "/b.png": b"", "c.zip": b""}))
    assert len(told.splitlines()) == 3


def test_members_lie_below_their_folder_whatever_they_are_called() -> None:
    assert member_uri("file:///o/bundles/ab/", "a b/100%[1]*.png") == "file:///o/bundles/ab/a%20b/100%25%5B1%5D%2A.png"
    assert member_uri("s3://o/bundles/ab/", "a b/100%[1]*.png") == "s3://o/bundles/ab/a b/100%[1]*.png"
