from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_batch.errors import NotAllowed
from kontext_batch.hashing import sha256_hex
from kontext_batch.storage.keys import EXTENSIONS, ObjectKeys, ObjectName
from kontext_batch.storage.uris import Prefixes, file_path, file_uri, is_hidden, s3_place, s3_uri, scheme_of

SHA = sha256_hex(b"a picture")

characters = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/")
segments = st.text(characters, min_size=1, max_size=12).filter(lambda text: text not in {".", ".."})


@given(st.lists(segments, min_size=1, max_size=4))
def test_every_path_and_key_comes_back_from_its_uri(parts: list[str]) -> None:
    path = "/" + "/".join(parts)

    assert file_path(file_uri(path)) == path
    assert file_uri(path) == Path(path).as_uri()
    assert s3_place(s3_uri("studio", path[1:])) == ("studio", path[1:])


@given(st.binary(min_size=1, max_size=20).filter(lambda name: not re.search(rb"[\x00-\x1f\x7f/]", name)))
def test_file_names_that_are_no_utf8_come_back_too(name: bytes) -> None:
    path = "/in/" + os.fsdecode(name)
    if name in {b".", b".."} or re.search("[\x80-\x9f]", path):
        return

    uri = file_uri(path)

    assert uri.isascii()
    assert file_path(uri) == path


def test_a_file_uri_may_hold_what_people_type() -> None:
    assert file_path("file:///in/größe 1#a?.png") == "/in/größe 1#a?.png"
    assert file_path("file:///in/gr%C3%B6%C3%9Fe%201.png") == "/in/größe 1.png"
    assert file_path("file:///in/folder/") == "/in/folder/"


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("file:///in/50%.png", "%25"),
        ("file:///in/%2e%2e/etc/passwd", "'.' and '..'"),
        ("file:///in/a%00.png", "control"),
        ("file:///in/a\x1b[31m.png", "control"),
        ("file:///in//a.png", "//"),
        ("file:///in/\ud800.png", "UTF-8"),
        ("file://server/share/a.png", "file:///absolute/path"),
        ("file:///" + "a" * 9000, "too long"),
    ],
)
def test_file_uris_that_are_refused(uri: str, told: str) -> None:
    with pytest.raises(NotAllowed, match=re.escape(told)):
        file_path(uri)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://Studio/a.png", "no bucket name"),
        ("s3:///a.png", "no bucket name"),
        ("s3://st/a.png", "no bucket name"),
        ("s3://studio/a/../b.png", "'.' and '..'"),
        ("s3://studio/" + "ü" * 513, "1024 bytes"),
        ("s3://studio/a\n.png", "control"),
    ],
)
def test_s3_uris_that_are_refused(uri: str, told: str) -> None:
    with pytest.raises(NotAllowed, match=re.escape(told)):
        s3_place(uri)


def test_s3_keys_stand_as_they_are() -> None:
    assert s3_place("s3://studio/a%20b +.png") == ("studio", "a%20b +.png")
    assert s3_place("s3://studio//a//b.png") == ("studio", "/a//b.png")
    assert s3_place("s3://studio") == ("studio", "")
    assert s3_place("s3://studio/" + "ü" * 512)[1] == "ü" * 512


def test_scheme_of() -> None:
    assert [scheme_of(uri) for uri in ("S3://b/k", "file:///a", "https://x", "/a/b", "a.png", "")] == [
        "s3",
        "file",
        "https",
        "",
        "",
        "",
    ]


def test_a_prefix_holds_itself_and_what_is_below_but_no_namesake() -> None:
    prefixes = Prefixes(["/a/b/", "bucket"])

    assert all(prefixes.hold(place) for place in ("/a/b", "/a/b/c", "bucket", "bucket/key"))
    assert not any(prefixes.hold(place) for place in ("/a/bc", "/a", "", "buckets/key", "/"))
    assert Prefixes(["/"]).hold("/etc")
    assert not Prefixes([]).hold("/etc")


def test_hidden_names() -> None:
    assert all(is_hidden(path) for path in (".a", "a/.b/c", "a.part", "a/b.tmp", "a~", "x.crdownload"))
    assert not any(is_hidden(path) for path in ("a", "a/b.c", "party", "a.parted"))
    assert not is_hidden(".git/a", ".git")
    assert is_hidden(".git/.a", ".git")


# ------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("root", ["file:///data/kontext%20out", "s3://bucket", "s3://bucket/a/b"])
@pytest.mark.parametrize("media_type", EXTENSIONS)
def test_an_artifact_uri_names_hash_and_type(root: str, media_type: str) -> None:
    keys = ObjectKeys(root)
    uri = keys(SHA, media_type)

    assert uri == f"{root}/objects/{SHA[:2]}/{SHA[2:4]}/{SHA}.{EXTENSIONS[media_type]}"
    assert uri.startswith(keys.prefix)
    assert keys.parse(uri) == ObjectName(SHA, media_type)
    assert ObjectKeys(root + "/") == keys


@pytest.mark.parametrize("sha256", ["", "ab", SHA.upper(), SHA + "0", SHA[:-1] + "g", SHA + "\n", "../" + SHA[3:]])
def test_what_is_no_sha256_gets_no_key(sha256: str) -> None:
    with pytest.raises(ValueError, match="sha256"):
        ObjectKeys("s3://bucket")(sha256, "image/png")


def test_what_is_not_kept_gets_no_key() -> None:
    with pytest.raises(ValueError, match="text/html"):
        ObjectKeys("s3://bucket")(SHA, "text/html")


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://bucket/objects/{SHA[:2]}/{SHA[2:4]}/{SHA}.exe",
        f"s3://bucket/objects/{SHA[:2]}/{SHA[2:4]}/{SHA}",
        f"s3://bucket/objects/{SHA[2:4]}/{SHA[:2]}/{SHA}.png",
        f"s3://bucket/objects/{SHA}.png",
        f"s3://other/objects/{SHA[:2]}/{SHA[2:4]}/{SHA}.png",
        f"s3://bucket/x/objects/{SHA[:2]}/{SHA[2:4]}/{SHA}.png",
        f"s3://bucket/objects/{SHA[:2]}/{SHA[2:4]}/{SHA.upper()}.png",
        f"s3://bucket/objects/{SHA[:2]}/{SHA[2:4]}/{SHA}.png/",
        "",
    ],
)
def test_what_is_no_artifact_uri_is_told_apart(uri: str) -> None:
    assert ObjectKeys("s3://bucket").parse(uri) is None
