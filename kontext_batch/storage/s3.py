"""Objects in S3 and in servers that speak its protocol, at `s3:` URIs. With `events`, the only import of boto3."""

from __future__ import annotations

import base64
import hashlib
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import boto3
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

from kontext_batch.errors import (
    InfrastructureError,
    KontextBatchError,
    NotAllowed,
    ObjectChanged,
    ObjectNotFound,
    StepError,
    StorageFull,
    StorageReadOnly,
)
from kontext_batch.ports import LINK_SECONDS, Folder, ObjectInfo
from kontext_batch.storage.uris import S3_SCHEME, Prefixes, is_hidden, refusal, s3_place, s3_uri

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = structlog.get_logger(__name__)

_CONFLICT_TRIES = 5
"""AWS answers 409 to a conditional write that meets another in flight, and asks to try again."""
_NOT_THERE = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_CHANGED = {"412", "PreconditionFailed"}
_CONFLICT = {"409", "ConditionalRequestConflict", "OperationAborted"}
_DENIED = {"403", "AccessDenied", "AllAccessDisabled", "AccountProblem", "MethodNotAllowed"}
_FULL = {"507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
_BAD_NAME = {"KeyTooLongError", "InvalidBucketName", "InvalidURI"}


def make_client(*, endpoint: str | None = None, region: str | None = None, max_connections: int = 32) -> S3Client:
    """A client that retries throttling and lost connections, for all threads of a process.

    `endpoint` is the URL of a server other than AWS. Credentials come from where boto3 looks for them, never from a
    recipe.
    """
    own_server = endpoint is not None
    config = Config(
        retries={"mode": "standard", "max_attempts": 5},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=max_connections,
        signature_version="s3v4",
        s3={"addressing_style": "path" if own_server else "auto"},
        # Other servers often do not know the checksum trailers that boto3 adds by itself; each put carries a plain
        # sha256 header instead.
        request_checksum_calculation="when_required" if own_server else "when_supported",
        response_checksum_validation="when_required" if own_server else "when_supported",
    )
    return boto3.client("s3", endpoint_url=endpoint, region_name=region or "us-east-1", config=config)


class S3Store:
    """An `ObjectStore` over buckets. What may be written may also be read.

    `list` leaves out folder markers (keys that end with `/`) and names that this project refuses (a `..` segment).
    Put objects carry their media type and, as metadata `sha256`, the hash of their bytes.
    """

    def __init__(
        self,
        client: S3Client,
        read_prefixes: Iterable[str],
        write_prefixes: Iterable[str],
        *,
        conditional_writes: bool | None = None,
    ) -> None:
        """Prefixes are `s3:` URIs, each a folder of a bucket. Raises `NotAllowed` for malformed ones.

        `conditional_writes` says whether the server honours `If-None-Match`, as AWS does; None: find out by a probe
        at the first `write_if_absent` in each bucket. Without it that method looks before it writes, which two
        writers at once can both pass.
        """
        self._client = client
        writable = ["/".join(s3_place(uri)) for uri in write_prefixes]
        self._writable = Prefixes(writable)
        self._readable = Prefixes([*("/".join(s3_place(uri)) for uri in read_prefixes), *writable])
        self._conditional_writes = conditional_writes
        self._probed: dict[str, bool] = {}
        self._probing = threading.Lock()

    def head(self, uri: str) -> ObjectInfo:
        bucket, key = self._to_read(uri)
        with _errors(uri, write=False):
            answer = self._client.head_object(Bucket=bucket, Key=key)
        return ObjectInfo(uri, _bare(answer["ETag"]), answer["ContentLength"], answer["LastModified"])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        bucket, start = s3_place(prefix)
        if not self._readable.hold(f"{bucket}/{start}".rstrip("/")):
            raise refusal(prefix, "read", self._readable, S3_SCHEME)
        return self._list(prefix, bucket, start)

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        bucket, key = self._to_read(uri)
        condition: dict[str, Any] = {} if etag is None else {"IfMatch": f'"{etag}"'}
        with _errors(uri, write=False):
            answer = self._client.get_object(Bucket=bucket, Key=key, **condition)
            with answer["Body"] as body:
                if etag is not None and _bare(answer["ETag"]) != etag:  # a server that does not know IfMatch
                    raise ObjectChanged(f"{uri} has changed since it was listed")
                size = answer["ContentLength"]
                if max_bytes is not None and size > max_bytes:
                    raise StepError(f"{uri} has {size} bytes, more than the {max_bytes} allowed")
                return body.read()

    def write(self, uri: str, data: bytes, *, media_type: str) -> ObjectInfo:
        bucket, key = self._to_write(uri)
        with _errors(uri, write=True):
            answer = self._put(bucket, key, data, media_type)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        modified = parsedate_to_datetime(date).astimezone(UTC) if date else datetime.now(UTC)
        return ObjectInfo(uri, _bare(answer["ETag"]), len(data), modified)

    def write_if_absent(self, uri: str, data: bytes, *, media_type: str) -> bool:
        bucket, key = self._to_write(uri)
        if not self._knows_conditional_writes(bucket, key):
            try:
                self.head(uri)
                return False
            except ObjectNotFound:
                self.write(uri, data, media_type=media_type)
                return True
        with _errors(uri, write=True):
            return self._put_new(bucket, key, data, media_type)

    def link(self, uri: str, *, seconds: int) -> str:
        """Signed here, with this process's credentials; those of a role may end before `seconds` are over."""
        assert seconds in LINK_SECONDS
        bucket, key = self._to_read(uri)
        self.head(uri)
        with _errors(uri, write=False):
            return self._client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=seconds, HttpMethod="GET"
            )

    def delete(self, uri: str) -> None:
        bucket, key = self._to_write(uri)
        with _errors(uri, write=True):
            self._client.delete_object(Bucket=bucket, Key=key)

    def supports_conditional_writes(self, prefix: str) -> bool:
        """Whether the server honours `If-None-Match` under `prefix`, found out with a hidden object that is removed.

        Raises what `write` raises.
        """
        folder = prefix if prefix.endswith("/") else prefix + "/"
        uri = f"{folder}.kontext-batch-probe-{secrets.token_hex(8)}"
        bucket, key = self._to_write(uri)
        with _errors(uri, write=True):
            try:
                self._put_new(bucket, key, b"first", "application/octet-stream")
                return not self._put_new(bucket, key, b"second", "application/octet-stream")
            except ClientError as error:
                # Some servers know the header and refuse it.
                if _status(error) == 501 or _code(error) in {"NotImplemented", "InvalidArgument"}:
                    return False
                raise
            finally:
                self._client.delete_object(Bucket=bucket, Key=key)

    def folder(self, uri: str, *, write: bool = False) -> Folder:
        """A bucket has no folders and no links: the place is what it is called."""
        place = "/".join(s3_place(uri)).rstrip("/")
        prefixes = self._writable if write else self._readable
        if not prefixes.hold(place):
            raise refusal(uri, "written" if write else "read", prefixes, S3_SCHEME)
        return Folder(uri)

    # ------------------------------------------------------------------------------------------- what is allowed

    def _to_read(self, uri: str) -> tuple[str, str]:
        return self._checked(uri, self._readable, "read")

    def _to_write(self, uri: str) -> tuple[str, str]:
        return self._checked(uri, self._writable, "written")

    def _checked(self, uri: str, prefixes: Prefixes, verb: str) -> tuple[str, str]:
        bucket, key = s3_place(uri)
        if not key or key.endswith("/"):
            raise NotAllowed(f"{uri} names a folder, not an object")
        if not prefixes.hold(f"{bucket}/{key}"):
            raise refusal(uri, verb, prefixes, S3_SCHEME)
        return bucket, key

    # --------------------------------------------------------------------------------------------------- requests

    def _list(self, prefix: str, bucket: str, start: str) -> Iterator[ObjectInfo]:
        folder, _, name = start.rpartition("/")
        cut = len(folder) + 1 if folder or start.startswith("/") else 0
        pages = iter(self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start))
        while True:
            with _errors(prefix, write=False):
                page = next(pages, None)
            if page is None:
                return
            for item in page.get("Contents", ()):
                key = item["Key"]
                if key.endswith("/") or is_hidden(key[cut:], name) or not self._may_list(bucket, key):
                    continue
                yield ObjectInfo(s3_uri(bucket, key), _bare(item["ETag"]), item["Size"], item["LastModified"])

    def _may_list(self, bucket: str, key: str) -> bool:
        try:
            self._to_read(s3_uri(bucket, key))
        except NotAllowed:
            return False
        return True

    def _put(self, bucket: str, key: str, data: bytes, media_type: str, **condition: Any) -> Any:
        digest = hashlib.sha256(data)
        return self._client.put_object(
            Bucket=bucket,
            Key=key,
            Body=data,
            ContentType=media_type,
            ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
            Metadata={"sha256": digest.hexdigest()},
            **condition,
        )

    def _put_new(self, bucket: str, key: str, data: bytes, media_type: str) -> bool:
        for attempt in range(1, _CONFLICT_TRIES + 1):
            try:
                self._put(bucket, key, data, media_type, IfNoneMatch="*")
                return True
            except ClientError as error:
                if _code(error) in _CHANGED or _status(error) == 412:
                    # A put of ours whose answer got lost is retried by botocore and meets itself here: for equal
                    # bytes False is as good as True to every caller.
                    return False
                if (_code(error) not in _CONFLICT and _status(error) != 409) or attempt == _CONFLICT_TRIES:
                    raise
        raise AssertionError("the last try returns or raises")

    def _knows_conditional_writes(self, bucket: str, key: str) -> bool:
        if self._conditional_writes is not None:
            return self._conditional_writes
        with self._probing:
            if bucket not in self._probed:
                folder = s3_uri(bucket, key).rpartition("/")[0]
                self._probed[bucket] = self.supports_conditional_writes(folder)
                if not self._probed[bucket]:
                    log.warning("server ignores conditional writes: two writers at once may overwrite", bucket=bucket)
            return self._probed[bucket]


def _bare(etag: str) -> str:
    return etag.strip('"')


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def _errors(uri: str, *, write: bool) -> Iterator[None]:
    """boto3's errors as ours, in this one place."""
    try:
        yield
    except ClientError as error:
        raise _translated(uri, error, write=write) from error
    except ParamValidationError as error:
        raise NotAllowed(f"{uri} is no name that S3 can hold: {error}") from error
    except BotoCoreError as error:  # no connection, a timeout, no credentials, a body cut short
        raise InfrastructureError(f"{uri}: {error}") from error


def _translated(uri: str, error: ClientError, *, write: bool) -> KontextBatchError:
    code = _code(error)
    if code in _NOT_THERE:
        if write:
            return InfrastructureError(f"{uri} cannot be written: its bucket does not exist")
        return ObjectNotFound(f"{uri}: its bucket does not exist" if code == "NoSuchBucket" else f"{uri} is not there")
    if code in _CHANGED:
        return ObjectChanged(f"{uri} has changed since it was listed")
    if code in _FULL or _status(error) == 507:
        return StorageFull(f"{uri} cannot be written: {code}")
    if code in _DENIED:
        if write:
            return StorageReadOnly(f"{uri} may not be written with these credentials ({code})")
        return NotAllowed(f"{uri} may not be read with these credentials ({code})")
    if code in _BAD_NAME:
        return NotAllowed(f"{uri} is no name that S3 can hold ({code})")
    return InfrastructureError(f"{uri}: {error}")
