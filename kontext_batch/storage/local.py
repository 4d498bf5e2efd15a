"""Objects as files of a folder, at `file:` URIs."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from urllib.parse import quote_from_bytes

from kontext_batch.errors import (
    InfrastructureError,
    NotAllowed,
    ObjectChanged,
    ObjectNotFound,
    StepError,
    StorageFull,
    StorageReadOnly,
)
from kontext_batch.ports import LINK_SECONDS, Folder, ObjectInfo
from kontext_batch.storage.uris import FILE_SCHEME, Prefixes, file_path, file_uri, is_hidden, refusal

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_OBJECT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_BLOCK = 1 << 20


class LocalStore:
    """An `ObjectStore` over local folders. What may be written may also be read.

    `list(prefix)` compares text, as S3 does: `file:///a/im` lists `/a/im.png` and `/a/images/x.png`, `file:///a/im/`
    only the latter. A folder that is not there holds nothing. Names are listed in the code point order of their
    paths, symbolic links are followed where they lead to an allowed place and listed with a problem where they do not.

    Two writers of one host, or of hosts that share a file system with hard links, may race. Where there are no hard
    links `write_if_absent` is safe only between processes of one host.
    """

    def __init__(self, read_prefixes: Iterable[str], write_prefixes: Iterable[str]) -> None:
        """Both are `file:` URIs of folders, which need not exist yet. Raises `NotAllowed` for malformed ones."""
        self._given = tuple(read_prefixes), tuple(write_prefixes)
        writable = [file_path(uri) for uri in self._given[1]]
        self._writable = Prefixes(writable)
        self._readable = Prefixes([*map(file_path, self._given[0]), *writable])

    def extended(self, write_prefixes: Iterable[str]) -> LocalStore:
        """One that may use these places as well."""
        return LocalStore(self._given[0], (*self._given[1], *write_prefixes))

    def head(self, uri: str) -> ObjectInfo:
        path = self._to_read(uri)
        with _errors(uri, write=False):
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise ObjectNotFound(f"{uri} is no file")
            return _info(file_path(uri), found)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        path = file_path(prefix)
        if not self._readable.hold(path.rstrip("/")):
            raise refusal(prefix, "read", self._readable, FILE_SCHEME)
        folder, _, start = path.rpartition("/")
        return self._walk(folder, start, ())

    def read(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        path = self._to_read(uri)
        with _errors(uri, write=False):
            # O_NONBLOCK: a FIFO that somebody left in the folder must not hold a worker for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                before = os.fstat(descriptor)
                if not stat.S_ISREG(before.st_mode):
                    raise ObjectNotFound(f"{uri} is no file")
                if etag is not None and _etag(before) != etag:
                    raise ObjectChanged(f"{uri} has changed since it was listed")
                if max_bytes is not None and before.st_size > max_bytes:
                    raise StepError(f"{uri} has {before.st_size} bytes, more than the {max_bytes} allowed")
                data = file.read() if max_bytes is None else file.read(max_bytes + 1)
                if max_bytes is not None and len(data) > max_bytes:
                    raise StepError(f"{uri} grew past the {max_bytes} bytes allowed while it was read")
                if etag is not None and _etag(os.fstat(descriptor)) != etag:
                    raise ObjectChanged(f"{uri} was written to while it was read")
                return data

    def write(self, uri: str, data: bytes, *, media_type: str) -> ObjectInfo:
        folder, name = self._to_write(uri)
        target = os.path.join(folder, name)
        with _errors(uri, write=True):
            _refuse_folder(uri, target)
            with _temporary(folder, data) as temporary:
                found = os.stat(temporary)
                os.replace(temporary, target)
            _sync_folder(folder)
            return _info(file_path(uri), found)

    def write_if_absent(self, uri: str, data: bytes, *, media_type: str) -> bool:
        folder, name = self._to_write(uri)
        target = os.path.join(folder, name)
        with _errors(uri, write=True):
            _refuse_folder(uri, target)
            if os.path.lexists(target):
                return False
            with _temporary(folder, data) as temporary:
                if not _link(temporary, target, folder):
                    return False
            _sync_folder(folder)
            return True

    def link(self, uri: str, *, seconds: int) -> str:
        assert seconds in LINK_SECONDS
        return self.head(uri).uri

    def delete(self, uri: str) -> None:
        folder, name = self._to_write(uri)
        target = os.path.join(folder, name)
        with _errors(uri, write=True), suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_ISDIR(os.lstat(target).st_mode):
                return  # no object lies there
            os.unlink(target)
            _sync_folder(folder)

    def folder(self, uri: str, *, write: bool = False) -> Folder:
        path = file_path(uri).rstrip("/")
        prefixes, verb = (self._writable, "written") if write else (self._readable, "read")
        if not prefixes.hold(path):
            raise refusal(uri, verb, prefixes, FILE_SCHEME)
        with _errors(uri, write=write):
            real = os.path.realpath(path or "/")
            if not _real(prefixes).hold(real):
                raise NotAllowed(f"{uri} leads by a symbolic link out of the folders that may be {verb}")
            if write:
                _refuse_closed(uri, real)
            folders, links = _folders_and_links(real)
        return Folder(file_uri(real.rstrip("/") + "/"), folders, links)

    # ------------------------------------------------------------------------------------------- what is allowed

    def _to_read(self, uri: str) -> str:
        """The real path to read, no symbolic link left in it."""
        path = _object_path(uri)
        if not self._readable.hold(path):
            raise refusal(uri, "read", self._readable, FILE_SCHEME)
        with _errors(uri, write=False):
            real = os.path.realpath(path)
        if not _real(self._readable).hold(real):
            raise NotAllowed(f"{uri} leads by a symbolic link out of the folders that may be read")
        return real

    def _to_write(self, uri: str) -> tuple[str, str]:
        """Real folder and name. The name itself may be a link: it is replaced or removed, never followed."""
        path = _object_path(uri)
        if not self._writable.hold(path):
            raise refusal(uri, "written", self._writable, FILE_SCHEME)
        folder, name = os.path.split(path)
        with _errors(uri, write=True):
            real = os.path.realpath(folder)
        if not _real(self._writable).hold(real):
            raise NotAllowed(f"{uri} leads by a symbolic link out of the folders that may be written")
        return real, name

    # ---------------------------------------------------------------------------------------------------- listing

    def _walk(self, folder: str, start: str, above: tuple[str, ...]) -> Iterator[ObjectInfo]:
        """Files below `folder` whose relative path begins with `start`, one folder in memory at a time."""
        with _errors(file_uri(folder or "/"), write=False):
            real = os.path.realpath(folder or "/")
            if real in above:
                return  # a link back up
            if self._readable.hold(folder) and not _real(self._readable).hold(real):
                yield _leads_out(folder + "/")
                return
            try:
                with os.scandir(folder or "/") as entries:
                    found = [entry for entry in entries if entry.name.startswith(start)]
            except (FileNotFoundError, NotADirectoryError):
                return
            shown = [entry for entry in found if not is_hidden(entry.name, start)]
            folders = {entry.name for entry in shown if _quietly_is_dir(entry)}
        # A folder sorts as `name/`, so that whole paths come in code point order: `a-b`, `a/b`, `a0`.
        for entry in sorted(shown, key=lambda e: os.fsencode(e.name + "/" * (e.name in folders))):
            path = f"{folder}/{entry.name}"
            if not self._readable.hold(path):
                continue  # a sibling of an allowed folder that the text of the prefix happens to match
            if entry.name in folders:
                yield from self._walk(path, "", (*above, real))
            elif (info := self._listed(path, entry)) is not None:
                yield info

    def _listed(self, path: str, entry: os.DirEntry[str]) -> ObjectInfo | None:
        with _errors(file_uri(path), write=False):
            if entry.is_symlink() and not _real(self._readable).hold(os.path.realpath(path)):
                return _leads_out(path)
            try:
                found = entry.stat()
            except OSError as error:
                if error.errno in _NO_OBJECT | {errno.ELOOP}:
                    return None  # a link to nothing, or a file removed since the folder was read
                raise
            return _info(path, found) if stat.S_ISREG(found.st_mode) else None


def _object_path(uri: str) -> str:
    path = file_path(uri)
    if path.endswith("/"):
        raise NotAllowed(f"{uri} names a folder, not an object")
    return path


def _real(prefixes: Prefixes) -> Prefixes:
    """The folders that the prefixes lead to now; looked up each time, for they may not exist from the start."""
    return Prefixes(os.path.realpath(root or "/") for root in prefixes.roots)


def _etag(found: os.stat_result) -> str:
    return f"{found.st_size:x}-{found.st_mtime_ns:x}-{found.st_ino:x}"


def _info(path: str, found: os.stat_result) -> ObjectInfo:
    modified = datetime.fromtimestamp(found.st_mtime, UTC)
    return ObjectInfo(uri=file_uri(path), etag=_etag(found), bytes=found.st_size, modified=modified)


def _leads_out(path: str) -> ObjectInfo:
    problem = "leads by a symbolic link out of the folders that may be read"
    return ObjectInfo(uri=file_uri(path), etag="", bytes=0, modified=datetime.fromtimestamp(0, UTC), problem=problem)


def _quietly_is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _refuse_folder(uri: str, target: str) -> None:
    if os.path.isdir(target) and not os.path.islink(target):
        raise NotAllowed(f"{uri}: a folder is there already")


def _refuse_closed(uri: str, folder: str) -> None:
    """Raise what making a file in `folder`, and `folder` itself where it is not there, would meet; make nothing."""
    while not os.path.lexists(folder) and folder != "/":
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageReadOnly(f"{uri} may not be written: {folder} is closed to this user, or read-only")


def _folders_and_links(folder: str) -> tuple[frozenset[str], dict[str, str]]:
    """What `Folder` tells of the names in `folder`; nothing of a folder that is not there or does not show them."""
    folders: set[str] = set()
    links: dict[str, str] = {}
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                leads_to = os.path.realpath(os.path.join(folder, entry.name))
                links[quote_from_bytes(os.fsencode(entry.name))] = file_uri(leads_to)
            elif entry.is_dir(follow_symlinks=False):
                folders.add(entry.name)
    return frozenset(folders), links


@contextmanager
def _temporary(folder: str, data: bytes) -> Iterator[str]:
    """`data`, on the disk for good, under a hidden name in `folder`; afterwards the name is gone."""
    _make_folders(folder)
    path = os.path.join(folder, f".kontext-batch-{secrets.token_hex(8)}.tmp")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view[:_BLOCK]) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        yield path
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _make_folders(folder: str) -> None:
    """`folder` and those above it, each one's name on the disk for good."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for path in reversed(missing):
        try:
            os.mkdir(path)
        except FileExistsError:
            pass  # another writer made it meanwhile
        except FileNotFoundError as error:
            if not os.path.isdir(os.path.dirname(path)):
                raise  # removed meanwhile: the next try makes it
            # /proc and its like say so of every name.
            raise StorageReadOnly(f"{file_uri(path)}: no folder can be made there") from error
        _sync_folder(os.path.dirname(path))


def _link(temporary: str, target: str, folder: str) -> bool:
    """Give `temporary` the name `target` unless it is taken; says whether it did."""
    try:
        os.link(temporary, target)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    # exFAT, some network and FUSE file systems: take turns on the folder, then rename.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.lexists(target):
            return False
        os.rename(temporary, target)
        return True
    finally:
        os.close(descriptor)


def _sync_folder(folder: str) -> None:
    """Put the folder's names on the disk: a database row that is committed later must not outlive its file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder, and need not
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _errors(uri: str, *, write: bool) -> Iterator[None]:
    """The operating system's errors as ours, in this one place."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno == errno.ENAMETOOLONG:
            raise NotAllowed(f"{uri}: a name in it is too long for the file system") from error
        if error.errno == errno.ELOOP:
            raise NotAllowed(f"{uri} leads through a loop of symbolic links") from error
        if write:
            if error.errno in _FULL:
                raise StorageFull(f"{uri} cannot be written: {reason}") from error
            if error.errno in _DENIED:
                raise StorageReadOnly(f"{uri} may not be written: {reason}") from error
            if error.errno in {errno.ENOTDIR, errno.EISDIR}:
                raise NotAllowed(f"{uri}: a file stands where a folder is needed, or the other way round") from error
        elif error.errno in _NO_OBJECT:
            raise ObjectNotFound(f"{uri} is not there") from error
        elif error.errno in _DENIED:
            raise NotAllowed(f"{uri} may not be read: {reason}") from error
        raise InfrastructureError(f"{uri}: {reason}") from error
