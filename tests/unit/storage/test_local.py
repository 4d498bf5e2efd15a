"""What only a folder can do: links, modes, a full disk, a read-only one."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kontext_batch.errors import (
    InfrastructureError,
    NotAllowed,
    ObjectChanged,
    ObjectNotFound,
    StorageFull,
    StorageReadOnly,
)
from kontext_batch.storage.local import LocalStore
from kontext_batch.storage.uris import file_uri

PNG = "image/png"
WRITES: list[Callable[[LocalStore, str, bytes], Any]] = [
    lambda store, uri, data: store.write(uri, data, media_type=PNG),
    lambda store, uri, data: store.write_if_absent(uri, data, media_type=PNG),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def store(folder: Path) -> LocalStore:
    return LocalStore([], [file_uri(folder)])


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def fail_with(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


# ------------------------------------------------------------------------------------------------------ whole writes


def test_readers_see_old_or_new_bytes_never_a_half(store: LocalStore, folder: Path) -> None:
    versions = [b"a" * 300_000, b"b" * 500_000]
    uri = file_uri(folder / "a.png")
    store.write(uri, versions[0], media_type=PNG)
    stop = threading.Event()

    def keep_writing() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            store.write(uri, versions[turn % 2], media_type=PNG)

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(keep_writing)
        try:
            seen = {store.read(uri) for _ in range(100)}
        finally:
            stop.set()
        writer.result()
    assert seen <= set(versions)


def test_a_new_file_is_whole_before_it_has_its_name(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_fsync, real_link, real_replace = os.fsync, os.link, os.replace

    def fsync(descriptor: int) -> None:
        order.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")
        real_fsync(descriptor)

    def link(source: str, target: str) -> None:
        order.append(f"name {os.stat(source).st_size}")
        real_link(source, target)

    def replace(source: str, target: str) -> None:
        order.append(f"name {os.stat(source).st_size}")
        real_replace(source, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("tells files from folders by /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "replace", replace)

    for write in WRITES:
        order.clear()
        write(store, file_uri(folder / f"{len(files_below(folder))}.png"), b"x" * 70_000)
        assert order == ["sync file", "name 70000", "sync folder"]


def test_new_files_and_folders_get_the_users_mode(store: LocalStore, folder: Path) -> None:
    before = os.umask(0o027)
    try:
        store.write(file_uri(folder / "a" / "b.png"), b"x", media_type=PNG)
    finally:
        os.umask(before)

    assert (folder / "a" / "b.png").stat().st_mode & 0o777 == 0o640
    assert (folder / "a").stat().st_mode & 0o777 == 0o750


def test_without_hard_links_still_exactly_one_of_sixteen_wins(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on exFAT, where `link` answers EPERM; the rename is slow, so that all would pass a look before it."""
    real_rename = os.rename

    def slow_rename(source: str, target: str) -> None:
        time.sleep(0.01)
        real_rename(source, target)

    monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
    monkeypatch.setattr(os, "rename", slow_rename)
    uri = file_uri(folder / "a.png")
    start = threading.Barrier(16)

    def race(number: int) -> bool:
        start.wait(timeout=30)
        return store.write_if_absent(uri, bytes([number]) * 50_000, media_type=PNG)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(race, range(16)))

    assert won.count(True) == 1
    assert store.read(uri) == bytes([won.index(True)]) * 50_000
    assert files_below(folder) == ["a.png"]


def test_read_refuses_a_file_that_is_written_to_meanwhile(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.png").write_bytes(b"old")
    etag = store.head(file_uri(folder / "a.png")).etag
    real_fstat = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        found = real_fstat(descriptor)
        with (folder / "a.png").open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(os, "fstat", fstat)

    with pytest.raises(ObjectChanged, match="while it was read"):
        store.read(file_uri(folder / "a.png"), etag=etag)


# -------------------------------------------------------------------------------------------------- full and read-only


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB. Needs the right to mount (root in CI); elsewhere the simulated faults below stand in."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mount.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_is_told_and_nothing_half_remains(write: Callable[..., Any], tmpfs: Path) -> None:
    store = LocalStore([], [file_uri(tmpfs)])
    (tmpfs / "there.png").write_bytes(b"x" * 30_000)

    with pytest.raises(StorageFull, match=r"new\.png cannot be written: No space left"):
        write(store, file_uri(tmpfs / "new.png"), b"x" * 60_000)
    assert files_below(tmpfs) == ["there.png"]

    write(store, file_uri(tmpfs / "new.png"), b"x" * 20_000)
    assert store.read(file_uri(tmpfs / "new.png")) == b"x" * 20_000


def test_a_full_disk_leaves_the_old_version_in_place(tmpfs: Path) -> None:
    store = LocalStore([], [file_uri(tmpfs)])
    (tmpfs / "a.png").write_bytes(b"old" * 10_000)

    with pytest.raises(StorageFull):
        store.write(file_uri(tmpfs / "a.png"), b"new" * 15_000, media_type=PNG)

    assert (tmpfs / "a.png").read_bytes() == b"old" * 10_000
    assert files_below(tmpfs) == ["a.png"]


@pytest.mark.parametrize("write", WRITES)
def test_a_read_only_disk_is_told(write: Callable[..., Any], tmpfs: Path) -> None:
    store = LocalStore([], [file_uri(tmpfs)])
    (tmpfs / "a.png").write_bytes(b"x")
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)

    with pytest.raises(StorageReadOnly, match="Read-only"):
        write(store, file_uri(tmpfs / "b.png"), b"x")
    with pytest.raises(StorageReadOnly):
        write(store, file_uri(tmpfs / "deep" / "b.png"), b"x")
    with pytest.raises(StorageReadOnly):
        store.delete(file_uri(tmpfs / "a.png"))
    assert store.read(file_uri(tmpfs / "a.png")) == b"x"


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EROFS, StorageReadOnly),
        (errno.EACCES, StorageReadOnly),
        (errno.EIO, InfrastructureError),
    ],
)
@pytest.mark.parametrize("write", WRITES)
def test_simulated_faults_of_a_disk_leave_nothing_behind(
    write: Callable[..., Any],
    code: int,
    expected: type[Exception],
    call: str,
    store: LocalStore,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Simulated, so that the mapping is tested where nothing may be mounted and root passes every permission."""
    monkeypatch.setattr(os, call, fail_with(code))

    with pytest.raises(expected) as told:
        write(store, file_uri(folder / "a.png"), b"x")

    assert type(told.value) is expected
    assert isinstance(told.value.__cause__, OSError)
    monkeypatch.undo()
    assert files_below(folder) == []


def test_a_folder_without_permission_is_read_only_for_an_ordinary_user(store: LocalStore, folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root passes every permission; EACCES is simulated above")
    folder.chmod(0o500)
    try:
        with pytest.raises(StorageReadOnly):
            store.write(file_uri(folder / "a.png"), b"x", media_type=PNG)
    finally:
        folder.chmod(0o700)


def test_a_file_without_permission_is_told_as_not_readable(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: root passes every permission."""
    (folder / "a.png").write_bytes(b"x")
    monkeypatch.setattr(os, "open", fail_with(errno.EACCES))

    with pytest.raises(NotAllowed, match="may not be read: Permission denied"):
        store.read(file_uri(folder / "a.png"))


# ------------------------------------------------------------------------------------------------------------- links


def test_links_that_lead_out_are_refused(store: LocalStore, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "a.png").write_bytes(b"secret")
    (folder / "file.png").symlink_to(secret / "a.png")
    (folder / "dir").symlink_to(secret)

    for path in ("file.png", "dir/a.png"):
        with pytest.raises(NotAllowed, match="symbolic link"):
            store.read(file_uri(folder / path))
        with pytest.raises(NotAllowed, match="symbolic link"):
            store.head(file_uri(folder / path))
    with pytest.raises(NotAllowed, match="symbolic link"):
        store.write(file_uri(folder / "dir" / "new.png"), b"x", media_type=PNG)
    with pytest.raises(NotAllowed, match="symbolic link"):
        store.delete(file_uri(folder / "dir" / "a.png"))
    for prefix, expected in (("", ["dir/", "file.png"]), ("dir/", ["dir/"]), ("file", ["file.png"])):
        listed = list(store.list(file_uri(folder) + "/" + prefix))
        assert [each.uri for each in listed] == [file_uri(folder) + "/" + name for name in expected]
        assert all(each.problem is not None and "symbolic link" in each.problem for each in listed)
    assert files_below(secret) == ["a.png"]


def test_a_link_at_the_target_is_replaced_not_followed(store: LocalStore, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"precious")
    (folder / "a.png").symlink_to(outside)
    (folder / "b.png").symlink_to(outside)

    assert store.write_if_absent(file_uri(folder / "a.png"), b"x", media_type=PNG) is False
    store.write(file_uri(folder / "a.png"), b"x", media_type=PNG)
    store.delete(file_uri(folder / "b.png"))

    assert outside.read_bytes() == b"precious"
    assert files_below(folder) == ["a.png"]
    assert (folder / "a.png").read_bytes() == b"x"


def test_links_that_stay_inside_are_followed(store: LocalStore, folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "real" / "a.png").write_bytes(b"x")
    (folder / "alias").symlink_to(folder / "real")
    (folder / "real" / "up").symlink_to(folder)
    (folder / "dangling.png").symlink_to(folder / "nothing.png")
    (folder / "loop").symlink_to(folder / "loop")

    listed = [info.uri for info in store.list(file_uri(folder) + "/")]

    assert listed == [file_uri(folder / "alias" / "a.png"), file_uri(folder / "real" / "a.png")]
    assert store.read(file_uri(folder / "alias" / "a.png")) == b"x"
    with pytest.raises(ObjectNotFound):
        store.read(file_uri(folder / "dangling.png"))
    with pytest.raises(NotAllowed, match="loop"):
        store.read(file_uri(folder / "loop"))


def test_an_allowed_folder_may_itself_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "named").symlink_to(folder)
    store = LocalStore([], [file_uri(tmp_path / "named") + "/"])
    uri = file_uri(tmp_path / "named" / "a.png")

    store.write(uri, b"x", media_type=PNG)

    assert store.read(uri) == b"x"
    assert [info.uri for info in store.list(file_uri(tmp_path / "named"))] == [uri]


# ------------------------------------------------------------------------------------------------- what is no file


def test_a_fifo_does_not_hold_the_reader(store: LocalStore, folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")

    for call in (store.read, store.head):
        with pytest.raises(ObjectNotFound, match="no file"):
            call(file_uri(folder / "pipe.png"))
    assert list(store.list(file_uri(folder))) == []


def test_a_place_that_takes_no_folder_is_told_as_read_only(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.mkdir", fail_with(errno.ENOENT))  # as /proc does
    for write in WRITES:
        with pytest.raises(StorageReadOnly, match="no folder can be made"):
            write(store, file_uri(folder / "new" / "a.png"), b"x")


def test_a_folder_in_the_way_is_told(store: LocalStore, folder: Path) -> None:
    (folder / "a.png").mkdir()
    (folder / "b.png").write_bytes(b"x")

    for write in WRITES:
        with pytest.raises(NotAllowed, match="folder is there"):
            write(store, file_uri(folder / "a.png"), b"x")
        with pytest.raises(NotAllowed, match="file stands where a folder"):
            write(store, file_uri(folder / "b.png" / "c.png"), b"x")
        with pytest.raises(NotAllowed, match="too long"):
            write(store, file_uri(folder / ("n" * 300)), b"x")
    store.delete(file_uri(folder / "a.png"))

    assert files_below(folder) == ["b.png"]
    assert (folder / "a.png").is_dir()


def test_names_that_are_no_utf8_are_listed_and_read(store: LocalStore, folder: Path) -> None:
    path = os.fsencode(folder) + b"/caf\xe9.png"
    try:
        with open(path, "wb") as file:
            file.write(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")

    (info,) = store.list(file_uri(folder))

    assert info.uri == file_uri(folder) + "/caf%E9.png"
    assert store.read(info.uri, etag=info.etag) == b"x"


def test_folders_with_malformed_uris_are_refused_at_once() -> None:
    with pytest.raises(NotAllowed):
        LocalStore(["s3://bucket"], [])
    with pytest.raises(NotAllowed):
        LocalStore([], ["file:///a/../b"])
