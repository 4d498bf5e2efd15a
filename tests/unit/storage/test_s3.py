"""What only S3 can do: metadata, conditional writes that a server may ignore, answers of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from moto import mock_aws
from structlog.testing import capture_logs

from kontext_batch.errors import (
    InfrastructureError,
    KontextBatchError,
    NotAllowed,
    ObjectChanged,
    ObjectNotFound,
    StorageFull,
    StorageReadOnly,
)
from kontext_batch.hashing import sha256_hex
from kontext_batch.storage.s3 import S3Store, make_client

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PNG = "image/png"
URI = "s3://studio/out/a.png"


@pytest.fixture
def client() -> Iterator[S3Client]:
    with mock_aws():
        client = make_client()
        client.create_bucket(Bucket="studio")
        yield client


@pytest.fixture
def store(client: S3Client) -> S3Store:
    return S3Store(client, ["s3://studio/in", "s3://nowhere"], ["s3://studio/out", "s3://nowhere"])


def count(client: S3Client, event: str) -> list[Any]:
    """The parameters of each request of a kind from now on."""
    seen: list[Any] = []

    def note(params: Any, **_: Any) -> None:
        seen.append(params)

    client.meta.events.register(f"before-parameter-build.s3.{event}", note)
    return seen


def ignore_conditions(client: S3Client, *headers: str) -> None:
    """Make the server one that does not know these headers, as rclone's."""

    def strip(params: Any, **_: Any) -> None:
        for header in headers:
            params["headers"].pop(header, None)

    client.meta.events.register("before-call.s3.*", strip)


def answer_with(client: S3Client, operation: str, *errors: Exception) -> None:
    """Raise these instead of the next requests of a kind; then go on."""
    left = list(errors)

    def fail(**_: Any) -> None:
        if left:
            raise left.pop(0)

    client.meta.events.register(f"before-call.s3.{operation}", fail)


def client_error(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "AnyCall")  # type: ignore[typeddict-item]


def test_objects_carry_their_type_and_hash(store: S3Store, client: S3Client) -> None:
    store.write(URI, b"one", media_type=PNG)
    store.write_if_absent("s3://studio/out/b.avif", b"two", media_type="image/avif")

    first = client.head_object(Bucket="studio", Key="out/a.png")
    second = client.head_object(Bucket="studio", Key="out/b.avif")

    assert (first["ContentType"], first["Metadata"]) == (PNG, {"sha256": sha256_hex(b"one")})
    assert (second["ContentType"], second["Metadata"]) == ("image/avif", {"sha256": sha256_hex(b"two")})


def test_list_goes_over_pages_and_leaves_folder_markers_out(
    store: S3Store, client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put_object(Bucket="studio", Key="out/", Body=b"")
    client.put_object(Bucket="studio", Key="out/x/../y.png", Body=b"a name that this project refuses")
    for number in range(5):
        client.put_object(Bucket="studio", Key=f"out/{number}.png", Body=b"x")
    pages = count(client, "ListObjectsV2")

    def small_pages(params: Any, **_: Any) -> None:
        params["MaxKeys"] = 2

    client.meta.events.register("before-parameter-build.s3.ListObjectsV2", small_pages)
    listing = store.list("s3://studio/out/")

    assert next(listing).uri == "s3://studio/out/0.png"
    assert len(pages) == 1, "the next page is asked for when it is needed"
    assert [info.uri[-5:] for info in listing] == ["1.png", "2.png", "3.png", "4.png"]
    assert len(pages) == 4


# ------------------------------------------------------------------------------------------------ conditional writes


def test_the_probe_tells_servers_apart_and_leaves_nothing(store: S3Store, client: S3Client) -> None:
    assert store.supports_conditional_writes("s3://studio/out") is True
    ignore_conditions(client, "If-None-Match")
    assert store.supports_conditional_writes("s3://studio/out/") is False

    assert "Contents" not in client.list_objects_v2(Bucket="studio")


@pytest.mark.parametrize("refused", [client_error("NotImplemented", 501), client_error("InvalidArgument", 400)])
def test_a_server_that_refuses_the_header_has_no_conditional_writes(
    refused: ClientError, store: S3Store, client: S3Client
) -> None:
    answer_with(client, "PutObject", refused)

    assert store.supports_conditional_writes("s3://studio/out") is False


def test_the_probe_keeps_to_the_write_prefixes(store: S3Store) -> None:
    with pytest.raises(NotAllowed):
        store.supports_conditional_writes("s3://studio/in")


def test_a_server_without_conditional_writes_is_noticed_and_never_overwritten(store: S3Store, client: S3Client) -> None:
    ignore_conditions(client, "If-None-Match")

    with capture_logs() as logs:
        assert store.write_if_absent(URI, b"first", media_type=PNG) is True
        assert store.write_if_absent(URI, b"second", media_type=PNG) is False

    assert store.read(URI) == b"first"
    assert [(entry["log_level"], entry["bucket"]) for entry in logs] == [("warning", "studio")], "once for a bucket"


def test_a_bucket_is_probed_once_and_aws_never(store: S3Store, client: S3Client) -> None:
    puts = count(client, "PutObject")
    store.write_if_absent(URI, b"x", media_type=PNG)
    store.write_if_absent("s3://studio/out/b.png", b"x", media_type=PNG)
    assert len(puts) == 2 + 2

    puts.clear()
    S3Store(client, [], ["s3://studio/out"], conditional_writes=True).write_if_absent(URI, b"x", media_type=PNG)
    assert len(puts) == 1


def test_a_conflict_with_a_write_in_flight_is_tried_again(store: S3Store, client: S3Client) -> None:
    store.write_if_absent("s3://studio/out/warm.png", b"", media_type=PNG)
    conflict = client_error("ConditionalRequestConflict", 409)

    answer_with(client, "PutObject", conflict, conflict)
    assert store.write_if_absent(URI, b"x", media_type=PNG) is True

    answer_with(client, "PutObject", *[conflict] * 5)
    with pytest.raises(InfrastructureError, match="ConditionalRequestConflict"):
        store.write_if_absent("s3://studio/out/b.png", b"x", media_type=PNG)


def test_a_changed_object_is_noticed_on_servers_that_ignore_if_match(store: S3Store, client: S3Client) -> None:
    listed = store.write(URI, b"old", media_type=PNG)
    ignore_conditions(client, "If-Match")
    assert store.read(URI, etag=listed.etag) == b"old"
    store.write(URI, b"new", media_type=PNG)

    with pytest.raises(ObjectChanged):
        store.read(URI, etag=listed.etag)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("error", "reading", "writing"),
    [
        (client_error("NoSuchKey", 404), ObjectNotFound, InfrastructureError),
        (client_error("NoSuchBucket", 404), ObjectNotFound, InfrastructureError),
        (client_error("AccessDenied", 403), NotAllowed, StorageReadOnly),
        (client_error("403", 403), NotAllowed, StorageReadOnly),
        (client_error("InvalidAccessKeyId", 403), InfrastructureError, InfrastructureError),
        (client_error("ExpiredToken", 400), InfrastructureError, InfrastructureError),
        (client_error("SlowDown", 503), InfrastructureError, InfrastructureError),
        (client_error("InternalError", 500), InfrastructureError, InfrastructureError),
        (client_error("KeyTooLongError", 400), NotAllowed, NotAllowed),
        (client_error("XMinioStorageFull", 507), StorageFull, StorageFull),
        (EndpointConnectionError(endpoint_url="http://localhost:1"), InfrastructureError, InfrastructureError),
        (NoCredentialsError(), InfrastructureError, InfrastructureError),
    ],
    ids=lambda value: value.response["Error"]["Code"] if isinstance(value, ClientError) else None,
)
def test_every_answer_becomes_an_error_of_ours(
    error: Exception,
    reading: type[KontextBatchError],
    writing: type[KontextBatchError],
    store: S3Store,
    client: S3Client,
) -> None:
    for operation in ("GetObject", "HeadObject", "PutObject", "DeleteObject", "ListObjectsV2"):
        answer_with(client, operation, error)

    for expected, call in (
        (reading, lambda: store.read(URI)),
        (reading, lambda: store.head(URI)),
        (reading, lambda: list(store.list("s3://studio/out/"))),
        (writing, lambda: store.write(URI, b"x", media_type=PNG)),
        (writing, lambda: store.delete(URI)),
    ):
        with pytest.raises(expected) as told:
            call()
        assert type(told.value) is expected
        assert told.value.__cause__ is error
        assert "s3://studio/out/" in str(told.value)


def test_a_bucket_that_is_not_there_is_told(store: S3Store) -> None:
    with pytest.raises(ObjectNotFound, match="bucket does not exist"):
        store.read("s3://nowhere/a.png")
    with pytest.raises(ObjectNotFound, match="bucket does not exist"):
        next(store.list("s3://nowhere/"))
    with pytest.raises(InfrastructureError, match="bucket does not exist"):
        store.write("s3://nowhere/a.png", b"x", media_type=PNG)


def test_a_link_is_signed_for_one_object_one_method_and_so_many_seconds(store: S3Store) -> None:
    store.write(URI, b"x", media_type=PNG)

    link = urlsplit(store.link(URI, seconds=600))
    asked = parse_qs(link.query)

    assert (link.scheme, link.path) == ("https", "/out/a.png")
    assert asked["X-Amz-Expires"] == ["600"]
    assert asked["X-Amz-SignedHeaders"] == ["host"]
    assert len(asked["X-Amz-Signature"][0]) == 64


def test_malformed_prefixes_are_refused_at_once(client: S3Client) -> None:
    with pytest.raises(NotAllowed):
        S3Store(client, ["file:///a"], [])
    with pytest.raises(NotAllowed):
        S3Store(client, [], ["s3://Not_A_Bucket/x"])


def test_the_client_retries_and_speaks_to_servers_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = make_client(endpoint="http://localhost:9000", region="eu-central-1").meta
    aws = make_client().meta

    assert own.endpoint_url == "http://localhost:9000"
    assert own.region_name == "eu-central-1"
    assert own.config.s3 == {"addressing_style": "path"}  # type: ignore[attr-defined]
    assert own.config.request_checksum_calculation == "when_required"  # type: ignore[attr-defined]
    assert aws.config.retries["mode"] == "standard"  # type: ignore[attr-defined]
