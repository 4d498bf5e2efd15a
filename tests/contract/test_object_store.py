"""One suite over every `ObjectStore`: a folder, S3 (moto) and the router in front of each.

A new store writes a fixture only.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest
from moto import mock_aws

from kontext_batch.errors import NotAllowed, ObjectChanged, ObjectNotFound, StepError
from kontext_batch.ports import ObjectStore
from kontext_batch.storage.local import LocalStore
from kontext_batch.storage.router import StoreRouter
from kontext_batch.storage.s3 import S3Store, make_client
from kontext_batch.storage.uris import file_uri, s3_uri

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PNG = "image/png"
BUCKETS = itertools.count()


@dataclass(frozen=True)
class Place:
    """A store that may write below `uri("")`, read below `uri("", root="source")`, and nothing else."""

    store: ObjectStore
    make_uri: Callable[[str], str]
    put_behind: Callable[[str, bytes], None]
    """Put an object without the store, at a path of `make_uri`."""

    def uri(self, name: str, *, root: str = "out") -> str:
        return self.make_uri(f"{root}/{name}")


def local_place(folder: Path, wrap: Callable[[ObjectStore], ObjectStore]) -> Place:
    def make_uri(path: str) -> str:
        return file_uri(f"{folder}/{path}")

    def put_behind(path: str, data: bytes) -> None:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    return Place(wrap(LocalStore([make_uri("source")], [make_uri("out")])), make_uri, put_behind)


def s3_place(client: S3Client, bucket: str, wrap: Callable[[ObjectStore], ObjectStore], folder: str = "") -> Place:
    if not folder:
        client.create_bucket(Bucket=bucket)

    def make_uri(path: str) -> str:
        return s3_uri(bucket, folder + path)

    def put_behind(path: str, data: bytes) -> None:
        client.put_object(Bucket=bucket, Key=folder + path, Body=data)

    return Place(wrap(S3Store(client, [make_uri("source")], [make_uri("out")])), make_uri, put_behind)


@pytest.fixture(scope="module")
def s3_client() -> Iterator[S3Client]:
    """One client for all tests: making one takes a quarter of a second."""
    with mock_aws():  # gives credentials of its own
        yield make_client()


@pytest.fixture(scope="session")
def server_client(s3_url: str) -> Iterator[S3Client]:
    """Of a real server, with a bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "any-key-at-all")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any-secret-at-all")
        client = make_client(endpoint=s3_url)
        client.list_buckets()  # keys are looked up at the first call
    with suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="studio")
    yield client
    client.close()


QUIRKS = {
    "test_list_goes_by_code_points_of_the_whole_path": "SeaweedFS lists by folders: `a/1` before `a.png`",
    "test_list_prefix_is_text_and_a_slash_makes_it_a_folder": "SeaweedFS lists by folders",
    "test_names_that_need_encoding_come_back_as_they_were, quoted": "SeaweedFS drops such a name from its lists",
}
"""What the real server does otherwise than S3: told by name, so that it is noticed when it changes."""


@pytest.fixture(params=["file", "s3", "router over file", "router over s3", "s3 server"])
def place(request: pytest.FixtureRequest, tmp_path: Path, s3_client: S3Client) -> Place:
    scheme = request.param.rpartition(" ")[2]

    def wrap(store: ObjectStore) -> ObjectStore:
        return StoreRouter({scheme: store}) if request.param.startswith("router") else store

    if scheme == "file":
        return local_place(tmp_path, wrap)
    if scheme == "server":
        name = request.node.originalname
        quirk = QUIRKS.get(name) or ('q"' in request.node.name and QUIRKS.get(f"{name}, quoted"))
        if quirk:
            request.applymarker(pytest.mark.xfail(strict=True, reason=quirk))
        client = request.getfixturevalue("server_client")
        return s3_place(client, "studio", wrap, f"contract-{os.getpid()}-{next(BUCKETS)}/")
    return s3_place(s3_client, f"studio-{next(BUCKETS)}", wrap)


def names(place: Place, prefix: str) -> list[str]:
    return [info.uri for info in place.store.list(prefix)]


# --------------------------------------------------------------------------------------------------- read and write


@pytest.mark.parametrize("data", [b"", bytes(range(256)) * 9], ids=["empty", "every byte"])
def test_what_was_written_is_read_back(place: Place, data: bytes) -> None:
    place.store.write(place.uri("a/b/c.png"), data, media_type=PNG)

    assert place.store.read(place.uri("a/b/c.png")) == data


@pytest.mark.parametrize("name", ["RX 100.png", "größe/写真.png", "50%.png", "a+b&c=d.png", "#1?.png", "'q\"\\.png"])
def test_names_that_need_encoding_come_back_as_they_were(place: Place, name: str) -> None:
    uri = place.uri(name)
    info = place.store.write(uri, b"x", media_type=PNG)

    assert info.uri == uri
    assert place.store.head(uri).uri == uri
    assert names(place, place.uri("")) == [uri]
    assert place.store.read(uri) == b"x"


def test_head_tells_size_etag_and_time_without_reading(place: Place) -> None:
    written = place.store.write(place.uri("a.png"), b"12345", media_type=PNG)

    info = place.store.head(place.uri("a.png"))

    assert (info.uri, info.bytes, info.etag) == (place.uri("a.png"), 5, written.etag)
    assert abs(info.modified - datetime.now(UTC)) < timedelta(minutes=1)
    assert abs(written.modified - info.modified) < timedelta(seconds=5)
    assert list(place.store.list(place.uri(""))) == [info]


def test_write_replaces_and_the_etag_follows_the_bytes(place: Place) -> None:
    first = place.store.write(place.uri("a.png"), b"old", media_type=PNG)
    second = place.store.write(place.uri("a.png"), b"new", media_type=PNG)

    assert first.etag != second.etag
    assert place.store.read(place.uri("a.png")) == b"new"


def test_read_with_the_listed_etag_refuses_other_bytes(place: Place) -> None:
    listed = place.store.write(place.uri("a.png"), b"old", media_type=PNG)
    assert place.store.read(place.uri("a.png"), etag=listed.etag) == b"old"

    place.store.write(place.uri("a.png"), b"new", media_type=PNG)

    with pytest.raises(ObjectChanged, match=r"a\.png has changed"):
        place.store.read(place.uri("a.png"), etag=listed.etag)


def test_read_stops_at_max_bytes(place: Place) -> None:
    place.store.write(place.uri("a.png"), b"12345", media_type=PNG)

    assert place.store.read(place.uri("a.png"), max_bytes=5) == b"12345"
    with pytest.raises(StepError, match="5 bytes, more than the 4"):
        place.store.read(place.uri("a.png"), max_bytes=4)


def test_what_is_not_there_is_not_found(place: Place) -> None:
    place.store.write(place.uri("a/b.png"), b"x", media_type=PNG)

    for name in ("nothing.png", "nor/here.png", "a", "a/b.png/c.png"):
        with pytest.raises(ObjectNotFound):
            place.store.head(place.uri(name))
        with pytest.raises(ObjectNotFound):
            place.store.read(place.uri(name))


# -------------------------------------------------------------------------------------------------------------- link


def test_a_link_leads_to_one_object_that_may_be_read(place: Place) -> None:
    place.store.write(place.uri("a b.png"), b"x", media_type=PNG)
    place.put_behind("secret.png", b"x")

    assert unquote(urlsplit(place.store.link(place.uri("a b.png"), seconds=60)).path).endswith("out/a b.png")
    with pytest.raises(ObjectNotFound):
        place.store.link(place.uri("nothing.png"), seconds=60)
    with pytest.raises(NotAllowed):
        place.store.link(place.make_uri("secret.png"), seconds=60)


# -------------------------------------------------------------------------------------------------- write_if_absent


def test_write_if_absent_keeps_what_is_there(place: Place) -> None:
    assert place.store.write_if_absent(place.uri("x/a.png"), b"first", media_type=PNG) is True
    assert place.store.write_if_absent(place.uri("x/a.png"), b"second", media_type=PNG) is False

    assert place.store.read(place.uri("x/a.png")) == b"first"
    assert names(place, place.uri("")) == [place.uri("x/a.png")]


@pytest.mark.parametrize("place", ["file", "router over file", "s3 server"], indirect=True)  # moto looks, then writes
def test_of_sixteen_racing_writers_exactly_one_wins(place: Place) -> None:
    place.store.write_if_absent(place.uri("warm.png"), b"", media_type=PNG)
    start = threading.Barrier(16)
    payloads = [bytes([n]) * 50_000 for n in range(16)]

    for round_ in range(3):
        uri = place.uri(f"deep/{round_}/a.png")

        def race(data: bytes, uri: str = uri) -> bool:
            start.wait(timeout=30)
            return place.store.write_if_absent(uri, data, media_type=PNG)

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(race, payloads))

        assert won.count(True) == 1
        assert place.store.read(uri) == payloads[won.index(True)]


# ----------------------------------------------------------------------------------------------------------- delete


def test_delete_removes_one_object_and_may_be_repeated(place: Place) -> None:
    for name in ("a.png", "ab.png"):
        place.store.write(place.uri(name), b"x", media_type=PNG)

    place.store.delete(place.uri("a.png"))
    place.store.delete(place.uri("a.png"))
    place.store.delete(place.uri("never/was.png"))

    assert names(place, place.uri("")) == [place.uri("ab.png")]


# ------------------------------------------------------------------------------------------------------------- list


def test_list_goes_by_code_points_of_the_whole_path(place: Place) -> None:
    wanted = ["A.png", "a b.png", "a-b.png", "a.png", "a/a.png", "a/z/1.png", "a0.png", "ä.png", "写.png", "😀.png"]
    for name in reversed(wanted):
        place.store.write(place.uri(name), b"x", media_type=PNG)

    assert names(place, place.uri("")) == [place.uri(name) for name in wanted]


def test_list_prefix_is_text_and_a_slash_makes_it_a_folder(place: Place) -> None:
    for name in ("im.png", "im/1.png", "images/2.png", "other/im.png"):
        place.store.write(place.uri(name), b"x", media_type=PNG)

    assert names(place, place.uri("im")) == [place.uri(name) for name in ("im.png", "im/1.png", "images/2.png")]
    assert names(place, place.uri("im/")) == [place.uri("im/1.png")]
    assert names(place, place.uri("images/2.p")) == [place.uri("images/2.png")]
    assert names(place, place.uri("nothing/")) == []
    assert names(place, place.uri("no/such/folder")) == []


def test_list_leaves_hidden_and_unfinished_files_out(place: Place) -> None:
    for name in (".hidden.png", ".git/a.png", "a/.cache/b.png", "a.png.part", "b.png.tmp", "c.png~", "seen.png"):
        place.store.write(place.uri(name), b"x", media_type=PNG)

    assert names(place, place.uri("")) == [place.uri("seen.png")]
    assert names(place, place.uri(".git")) == [place.uri(".git/a.png")], "asked for by its name"


def test_list_is_lazy(place: Place) -> None:
    for number in range(3):
        place.store.write(place.uri(f"{number}/a.png"), b"x", media_type=PNG)

    listing = place.store.list(place.uri(""))

    assert next(listing).uri == place.uri("0/a.png")
    assert iter(listing) is listing


def test_list_of_an_allowed_folder_named_without_slash_shows_no_sibling(place: Place) -> None:
    place.put_behind("source/a.png", b"x")
    place.put_behind("sources/secret.png", b"x")

    assert names(place, place.make_uri("source")) == [place.make_uri("source/a.png")]


# --------------------------------------------------------------------------------------------------- what is allowed

READING: list[Callable[[ObjectStore, str], Any]] = [
    lambda store, uri: store.head(uri),
    lambda store, uri: store.read(uri),
]
WRITING: list[Callable[[ObjectStore, str], Any]] = [
    lambda store, uri: store.write(uri, b"x", media_type=PNG),
    lambda store, uri: store.write_if_absent(uri, b"x", media_type=PNG),
    lambda store, uri: store.delete(uri),
]


def test_a_folder_is_told_as_it_lies_before_anything_is_written(place: Place) -> None:
    assert place.store.folder(place.uri("new/"), write=True).uri == place.uri("new/")
    assert place.store.folder(place.uri("new/", root="source")).uri == place.uri("new/", root="source")
    with pytest.raises(NotAllowed):
        place.store.folder(place.uri("new/", root="source"), write=True)
    assert names(place, place.uri("")) == []


def test_a_read_prefix_may_be_read_and_not_written(place: Place) -> None:
    place.put_behind("source/a.png", b"photo")
    uri = place.uri("a.png", root="source")

    assert place.store.read(uri) == b"photo"
    assert place.store.head(uri).bytes == 5
    for call in WRITING:
        with pytest.raises(NotAllowed, match="may not be written"):
            call(place.store, uri)
    assert place.store.read(uri) == b"photo"


@pytest.mark.parametrize("path", ["other/a.png", "sources/a.png", "outside.png", "out.png"])
def test_places_outside_the_prefixes_are_refused_by_name(place: Place, path: str) -> None:
    place.put_behind(path, b"secret")
    uri = place.make_uri(path)

    for call in READING + WRITING:
        with pytest.raises(NotAllowed) as refused:
            call(place.store, uri)
        assert uri in str(refused.value)
        assert place.make_uri("out") in str(refused.value), "says what is allowed"
    with pytest.raises(NotAllowed):
        place.store.list(place.make_uri(path.rpartition("/")[0] or "o"))


@pytest.mark.parametrize(
    "name",
    ["../source/a.png", "a/../../source/a.png", "./a.png", "..", "a/..", "a\0.png", "a\nb.png", "a\x7f.png", "a/", ""],
)
def test_names_that_are_no_names_are_refused(place: Place, name: str) -> None:
    place.put_behind("source/a.png", b"secret")

    for call in READING + WRITING:
        with pytest.raises(NotAllowed):
            call(place.store, place.uri(name))


@pytest.mark.parametrize("uri", ["", "/etc/passwd", "a.png", "http://x/a.png", "file:a.png", "s3:/studio/out/a.png"])
def test_uris_of_another_form_are_refused(place: Place, uri: str) -> None:
    for call in READING + WRITING:
        with pytest.raises(NotAllowed):
            call(place.store, uri)
    with pytest.raises(NotAllowed):
        place.store.list(uri)
