"""One `ObjectStore` over all schemes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kontext_batch.errors import NotAllowed
from kontext_batch.ports import Folder, ObjectInfo, ObjectStore
from kontext_batch.storage.local import LocalStore
from kontext_batch.storage.uris import FILE_SCHEME, S3_SCHEME, scheme_of


class StoreRouter:
    """Hands each URI to the store of its scheme. Any other scheme, and a plain path, is `NotAllowed`."""

    def __init__(self, stores: Mapping[str, ObjectStore]) -> None:
        """`stores`: scheme in lower case -> the store of it."""
        self._stores = dict(stores)

    def head(self, uri: str) -> ObjectInfo:
        return self._of(uri).head(uri)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._of(prefix).list(prefix)

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        return self._of(uri).read(uri, etag=etag, max_bytes=max_bytes)

    def write(self, uri: str, data: bytes, *, media_type: str) -> ObjectInfo:
        return self._of(uri).write(uri, data, media_type=media_type)

    def write_if_absent(self, uri: str, data: bytes, *, media_type: str) -> bool:
        return self._of(uri).write_if_absent(uri, data, media_type=media_type)

    def link(self, uri: str, *, seconds: int) -> str:
        return self._of(uri).link(uri, seconds=seconds)

    def delete(self, uri: str) -> None:
        self._of(uri).delete(uri)

    def folder(self, uri: str, *, write: bool = False) -> Folder:
        return self._of(uri).folder(uri, write=write)

    def allow_folders(self, uris: Iterable[str]) -> None:
        """Let these `file:` folders, and all below them, be read and written from now on."""
        held = self._stores.get(FILE_SCHEME)
        assert held is None or isinstance(held, LocalStore)
        self._stores = {**self._stores, FILE_SCHEME: LocalStore((), uris) if held is None else held.extended(uris)}

    def _of(self, uri: str) -> ObjectStore:
        scheme = scheme_of(uri)
        store = self._stores.get(scheme)
        if store is None:
            allowed = ", ".join(f"{name}:" for name in sorted(self._stores)) or "none"
            named = f"the scheme '{scheme}:'" if scheme else "a path without a scheme"
            raise NotAllowed(f"{uri}: {named} is not allowed here (allowed: {allowed})")
        return store


def open_store(
    read_prefixes: Iterable[str],
    write_prefixes: Iterable[str],
    *,
    s3_endpoint: str | None = None,
    s3_region: str | None = None,
) -> StoreRouter:
    """The store for these `file:` and `s3:` prefixes; a scheme that no prefix names is not allowed at all.

    Raises `NotAllowed` for a malformed prefix or another scheme. Touches no network and no file.
    """
    reads, writes = _by_scheme(read_prefixes), _by_scheme(write_prefixes)
    stores: dict[str, ObjectStore] = {}
    for scheme in reads.keys() | writes.keys():
        readable, writable = reads.get(scheme, []), writes.get(scheme, [])
        if scheme == FILE_SCHEME:
            stores[scheme] = LocalStore(readable, writable)
        elif scheme == S3_SCHEME:
            # Here, because boto3 takes a quarter of a second to import, and most people have a folder.
            from kontext_batch.storage.s3 import S3Store, make_client

            client = make_client(endpoint=s3_endpoint, region=s3_region)
            known = True if s3_endpoint is None else None
            stores[scheme] = S3Store(client, readable, writable, conditional_writes=known)
        else:
            place = (readable + writable)[0]
            raise NotAllowed(f"{place}: a prefix is a file: or an s3: URI")
    return StoreRouter(stores)


def _by_scheme(prefixes: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for prefix in prefixes:
        found.setdefault(scheme_of(prefix), []).append(prefix)
    return found
