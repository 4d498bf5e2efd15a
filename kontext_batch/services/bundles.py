"""A recipe with its table and pictures in one `.zip`, which nobody trusts.

Everything that the directory of the archive says is checked before a byte is unpacked, and what is unpacked is bounded
by what it said. Nothing is ever written under a name that was not checked.
"""

from __future__ import annotations

import io
import re
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kontext_batch.errors import Problem, RecipeError
from kontext_batch.planning import inbox, uris
from kontext_batch.recipes.source import MAX_BYTES, read_yaml

ENCRYPTED = 0x1
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ARCHIVES = (".zip", ".jar", ".7z", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")
ZIP_MAGIC = b"PK\x03\x04"
XLSX = ".xlsx"
"""A table, and by chance a zip."""
LONGEST_NAME = 255
RATIO_FROM = 1_000_000
"""Bytes from which a member is asked how well it was compressed: a small table of one word repeated is no bomb."""

_DRIVE = re.compile(r"[A-Za-z]:")
_BESIDE = re.compile(r"(^|/)(__MACOSX/|\.DS_Store$|Thumbs\.db$|desktop\.ini$)")
"""What macOS and Windows put beside, without being asked."""


@dataclass(frozen=True, slots=True)
class BundleLimits:
    """What an archive may come to."""

    max_bytes: int = 100 * 10**6
    """Of the archive."""
    max_unpacked: int = 500 * 10**6
    """Of all its members together."""
    max_members: int = 2000
    max_ratio: float = 200.0
    """Of a large member's size to what it takes in the archive."""


class Bundle:
    """An archive whose directory is sound."""

    def __init__(self, data: bytes, *, shown: str, limits: BundleLimits) -> None:
        """`shown`: how problems name it. Raises `RecipeError` with everything that the directory is refused for."""
        self.shown = shown
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
            raise RecipeError([Problem(shown, 0, 0, "", f"this is no zip archive ({error})")]) from error
        self._members = [each for each in self._archive.infolist() if not _BESIDE.search(each.filename)]
        problems = [*self._of_each(limits), *self._of_all(limits)]
        if problems:
            raise RecipeError(problems)
        self.recipe = self._only_recipe()
        """Name of the member that is the recipe."""

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of each file. Raises `RecipeError` at one that is not what the directory says."""
        for member in self._files():
            yield member.filename, self._read(member)

    def _files(self) -> list[zipfile.ZipInfo]:
        return [each for each in self._members if not each.is_dir()]

    def _of_each(self, limits: BundleLimits) -> Iterator[Problem]:
        for member in self._members:
            for fault in _faults(member, limits):
                yield self._problem(member, fault)

    def _of_all(self, limits: BundleLimits) -> Iterator[Problem]:
        if len(self._members) > limits.max_members:
            yield self._whole(f"{len(self._members)} files; at most {limits.max_members} are taken")
        total = sum(each.file_size for each in self._members)
        if total > limits.max_unpacked:
            yield self._whole(f"{total} bytes unpacked; at most {limits.max_unpacked} are taken")
        taken: dict[str, zipfile.ZipInfo] = {}
        for member in self._files():
            name = _folded(member.filename)
            if name in taken:
                other = taken[name].filename
                same = "is there twice" if other == member.filename else f"and {other} are one file on many disks"
                yield self._problem(member, same)
            taken[name] = member
        for member in self._members:
            parts = _folded(member.filename).rstrip("/").split("/")
            above = {"/".join(parts[:depth]) for depth in range(1, len(parts) + member.is_dir())}
            if not above.isdisjoint(taken):
                yield self._problem(member, "lies in a folder that is a file as well")

    def _only_recipe(self) -> str:
        """The one YAML file that is a recipe; the others are what it imports."""
        texts = [each for each in self._files() if each.filename.lower().endswith(inbox.RECIPES)]
        large = [each for each in texts if each.file_size > MAX_BYTES]
        if large:
            raise RecipeError([self._problem(each, f"larger than {MAX_BYTES // 1024} KiB") for each in large])
        recipes = [each.filename for each in texts if not is_imported(self._read(each))]
        if not recipes:
            raise RecipeError([self._whole("no recipe is in it: one .yaml file is expected")])
        if len(recipes) > 1:
            names = ", ".join(sorted(recipes)[:5])
            raise RecipeError([self._whole(f"{len(recipes)} recipes are in it ({names}); a bundle has one")])
        return recipes[0]

    def _read(self, member: zipfile.ZipInfo) -> bytes:
        try:
            with self._archive.open(member) as file:
                data = file.read(member.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise RecipeError([self._problem(member, f"cannot be unpacked ({error})")]) from error
        if len(data) != member.file_size:
            raise RecipeError([self._problem(member, "has another size than the archive says")])
        if data.startswith(ZIP_MAGIC) and not member.filename.lower().endswith(XLSX):
            raise RecipeError([self._problem(member, "is an archive in the archive")])
        return data

    def _problem(self, member: zipfile.ZipInfo, message: str) -> Problem:
        name = member.orig_filename if member.orig_filename.isprintable() else repr(member.orig_filename)
        return Problem(f"{self.shown}/{name[:LONGEST_NAME]}", 0, 0, "", message)

    def _whole(self, message: str) -> Problem:
        return Problem(self.shown, 0, 0, "", message)


def is_imported(data: bytes) -> bool:
    """Whether a YAML file is one that recipes import (`kind: brand`), and no recipe."""
    source, _ = read_yaml(data, file="")
    return isinstance(source.data, Mapping) and "kind" in source.data


def member_uri(folder: str, name: str) -> str:
    """Where a member lies below `folder`, a URI that ends in `/`."""
    return uris.literal(uris.expand([(name, True)], folder, pattern=False))


def _faults(member: zipfile.ZipInfo, limits: BundleLimits) -> Iterator[str]:
    """What is wrong with one entry of the directory. Its own spelling counts: `filename` is a repaired one."""
    name = member.orig_filename
    segments = name.removesuffix("/").split("/")
    if not name.isprintable():
        yield "has NUL or control characters in its name"
    elif name.startswith("/") or _DRIVE.match(name):
        yield "has an absolute path"
    elif "\\" in name:
        yield "has a backslash in its name; write folders with '/'"
    elif ".." in segments or "." in segments or "" in segments:
        yield "has '.', '..' or nothing between two '/' in its path"
    elif max(len(segment.encode("utf-8", "replace")) for segment in segments) > LONGEST_NAME:
        yield f"has a name of more than {LONGEST_NAME} bytes"
    elif name != member.filename:
        yield "has a name that is read differently by different programs"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind == stat.S_IFLNK:
        yield "is a symbolic link"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        yield "is neither a file nor a folder"
    if member.flag_bits & ENCRYPTED:
        yield "is encrypted"
    if member.compress_type not in METHODS:
        yield f"is compressed by method {member.compress_type}; only 'deflate' is read"
    if name.lower().endswith(ARCHIVES):
        yield "is an archive in the archive"
    if member.file_size > RATIO_FROM and member.file_size > limits.max_ratio * max(1, member.compress_size):
        yield f"is compressed to 1/{limits.max_ratio:.0f} of its size or less, as bombs are"


def _folded(name: str) -> str:
    """Equal for names that are one file on a disk that keeps no case or one Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).lower())
