"""URIs, their paths and keys, and the prefixes that a store may touch. No I/O.

    file:///photos/RX%20100.jpg  <->  /photos/RX 100.jpg          percent-encoded, as `Path.as_uri()` writes it
    s3://acme-raw/RX 100.jpg     <->  acme-raw, "RX 100.jpg"      the key as it is, as the AWS tools write it

Names are checked on the way in and on the way out: `.` and `..` segments, control characters and what no store can
hold are `NotAllowed`, never repaired.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from urllib.parse import quote_from_bytes, unquote_to_bytes

from kontext_batch.errors import NotAllowed

FILE_SCHEME, S3_SCHEME = "file", "s3"

_MAX_URI = 8192
_MAX_KEY_BYTES = 1024
"""S3's own limit, in UTF-8."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_TEMPORARY = (".part", ".tmp", ".crdownload", "~")


def scheme_of(uri: str) -> str:
    """Lower-case scheme, empty when there is none (a plain path)."""
    match = _SCHEME.match(uri)
    return match[1].lower() if match else ""


def file_uri(path: str | os.PathLike[str]) -> str:
    """The `file:` URI of an absolute path, every byte kept (names that are no UTF-8 too)."""
    absolute = os.fspath(path)
    assert os.path.isabs(absolute), f"a file URI needs an absolute path, not {absolute!r}"
    return "file://" + quote_from_bytes(os.fsencode(absolute))


def file_path(uri: str) -> str:
    """The absolute path of a `file:` URI. A trailing slash stays. Raises `NotAllowed`.

    Characters that Python's and browsers' URIs would encode (a space, `#`, `?`, umlauts) may stand as they are; a
    percent sign is always the start of an encoding.
    """
    _check_text(uri)
    if not uri.startswith("file:///"):
        raise NotAllowed(f"{uri}: a file URI has the form file:///absolute/path")
    encoded = uri.removeprefix("file://")
    if _LONE_PERCENT.search(encoded):
        raise NotAllowed(f"{uri}: '%' starts an encoded byte in a file URI; write a percent sign as %25")
    path = os.fsdecode(unquote_to_bytes(encoded))
    _check_segments(uri, path[1:], empty_allowed=False)
    return path


def s3_uri(bucket: str, key: str) -> str:
    """The `s3:` URI of a key, as it is."""
    return f"s3://{bucket}/{key}"


def s3_place(uri: str) -> tuple[str, str]:
    """Bucket and key of an `s3:` URI; the key is empty for a whole bucket. Raises `NotAllowed`."""
    _check_text(uri)
    if not uri.startswith("s3://"):
        raise NotAllowed(f"{uri}: an S3 URI has the form s3://bucket/key")
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise NotAllowed(f"{uri}: '{bucket}' is no bucket name (3 to 63 of a-z, 0-9, '.' and '-')")
    if len(key.encode()) > _MAX_KEY_BYTES:
        raise NotAllowed(f"{uri[:80]}...: the key is longer than {_MAX_KEY_BYTES} bytes")
    _check_segments(uri, key, empty_allowed=True)
    return bucket, key


def is_hidden(relative: str, start: str = "") -> bool:
    """Whether a path below a listed folder is hidden or unfinished: `.x`, `.git/x`, `x.part`, `x.tmp`, `x~`.

    A first segment that was asked for by its whole name, `start`, is not hidden.
    """
    first, *others = relative.split("/")
    return (first != start and is_hidden_name(first)) or any(is_hidden_name(segment) for segment in others)


def is_hidden_name(name: str) -> bool:
    """`is_hidden` for one segment."""
    return name.startswith(".") or name.endswith(_TEMPORARY)


class Prefixes:
    """Places under which a store may work: each is a folder (of a file system or a bucket) with all below it."""

    def __init__(self, roots: Iterable[str]) -> None:
        """`roots` are paths, or `bucket/key` for S3; a trailing slash means nothing: it is a folder anyway."""
        self.roots = tuple(dict.fromkeys(root.rstrip("/") for root in roots))

    def hold(self, place: str) -> bool:
        """Whether `place` is one of the roots or lies below one; `/a/bc` is not below `/a/b`."""
        return any(place == root or place.startswith(root + "/") for root in self.roots)


def refusal(uri: str, verb: str, prefixes: Prefixes, scheme: str) -> NotAllowed:
    """The error for a place outside of `prefixes`; `verb` is `read` or `written`."""
    roots = [file_uri(root or "/") if scheme == FILE_SCHEME else f"{scheme}://{root}" for root in prefixes.roots]
    allowed = f"allowed: {', '.join(roots)}" if roots else f"no {scheme}: place may be {verb}"
    return NotAllowed(f"{uri} may not be {verb} ({allowed})")


def _check_text(uri: str) -> None:
    if len(uri) > _MAX_URI:
        raise NotAllowed(f"{uri[:80]}...: a URI of {len(uri)} characters is too long")
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        raise NotAllowed(f"{uri!r}: not a text that can be written as UTF-8") from error


def _check_segments(uri: str, path: str, *, empty_allowed: bool) -> None:
    if _CONTROL.search(path):
        raise NotAllowed(f"{uri!r}: a name may not hold NUL or control characters")
    segments = path.split("/")
    if "." in segments or ".." in segments:
        raise NotAllowed(f"{uri}: '.' and '..' may not stand in a path")
    # An empty last segment is a folder; elsewhere only S3 has such names.
    if not empty_allowed and "" in segments[:-1]:
        raise NotAllowed(f"{uri}: '//' may not stand in a path")
