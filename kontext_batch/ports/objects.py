"""Bytes at URIs: what a store can do, and what is known of what lies there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

LINK_SECONDS = range(1, 7 * 24 * 3600 + 1)
"""How long a link may work. S3's own limit is seven days."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What is known of an object without reading it."""

    uri: str
    etag: str
    """Changes whenever the bytes change. S3: the ETag; a folder: size, mtime_ns and inode."""
    bytes: int
    modified: datetime
    problem: str | None = None
    """Why it is listed and may not be read; then ETag and size mean nothing, and a URI that ends in `/` is a folder."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder as it really lies, for comparing places that differ as text and are one."""

    uri: str
    """No symbolic link is left in it; ends in `/`."""
    folders: frozenset[str] = frozenset()
    """Names in it, decoded, that are folders: no object can take them."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Name in it, as a URI has it, that is a symbolic link -> URI of what it leads to."""


class ObjectStore(Protocol):
    """Bytes at URIs. `s3://bucket/key` and `file:///absolute/path`; one test suite runs over every implementation.

    A store knows which prefixes it may read and which it may write: anything else is `NotAllowed`, checked before
    any I/O, on the normalised URI (no `..`, NUL or control characters, no symbolic link out of a folder).
    """

    def head(self, uri: str) -> ObjectInfo:
        """Raises `ObjectNotFound`, `NotAllowed`, `InfrastructureError`."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose URI starts with `prefix`, in code point order of the paths, lazily.

        A prefix that ends in `/` is a folder. Hidden and unfinished files are left out. What a symbolic link leads to
        that may not be read comes with its `problem`, a folder as one. Raises `NotAllowed` at once.
        """
        ...

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        """The object whole. Raises `ObjectChanged` when `etag` is given and differs, `StepError` past `max_bytes`."""
        ...

    def write(self, uri: str, data: bytes, *, media_type: str) -> ObjectInfo:
        """Put the object, atomically: a reader sees the old bytes, the new bytes or nothing, never a half.

        Raises `StorageFull`, `StorageReadOnly`, `InfrastructureError`.
        """
        ...

    def write_if_absent(self, uri: str, data: bytes, *, media_type: str) -> bool:
        """Put the object unless one is there; says whether it did. Of racing writers exactly one gets True."""
        ...

    def link(self, uri: str, *, seconds: int) -> str:
        """A URL by which somebody without credentials reads this one object until `seconds` (`LINK_SECONDS`) are over.

        A folder has none: it answers with the `file:` URI. Raises what `head` raises: no link leads to nothing.
        """
        ...

    def delete(self, uri: str) -> None:
        """Remove the object; that nothing is there is no error."""
        ...

    def folder(self, uri: str, *, write: bool = False) -> Folder:
        """The folder at `uri`, which ends in `/` and need not exist yet.

        `write`: whether something is to be put there. Raises `NotAllowed`, `StorageReadOnly` or `InfrastructureError`
        where it is plain by now that this cannot be; a store that has no folders finds nothing against it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Notice:
    """A message that something was put somewhere."""

    handle: str
    """What the queue knows it by."""
    uris: tuple[str, ...]
    """None in a message that says nothing of use."""


class ObjectEvents(Protocol):
    """Tells of new objects, soon, at least once and in any order, or not at all: whoever needs them all lists too."""

    def receive(self) -> Sequence[Notice]:
        """What came since; a notice that is not forgotten comes again. Raises `InfrastructureError`."""
        ...

    def forget(self, notices: Sequence[Notice]) -> None:
        """They were acted on. Raises `InfrastructureError`."""
        ...
