"""From what an author writes as a place to an absolute URI or pattern, without touching any store.

    photos/*.jpg             relative to the recipe's folder
    /srv/photos/*.jpg        only where the recipe itself lies in a folder
    file:///srv/photos       percent-encoded, as URIs are
    s3://bucket/key          as it is

In patterns `*` and `?` stay inside a folder and `**` goes through folders. What comes from data is never a pattern:
it is percent-encoded in a `file:` URI, and written `[*]` in an `s3:` URI.
"""

from __future__ import annotations

import bisect
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from urllib.parse import quote, unquote

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_WILD = "*?"

Piece = tuple[str, bool]
"""Text, and whether it is data (never a pattern, never `..`)."""


def expand(pieces: Sequence[Piece], base: str, *, pattern: bool, slashes: bool = True) -> str:
    """The absolute URI of an author's place.

    `base`: URI of the recipe's folder, ending in `/`. `pattern`: whether wildcards may be used. `slashes`: whether
    data may hold `/`. Raises `ValueError` that says what is wrong with which part.
    """
    for text, data in pieces:
        _check_piece(text, data, pattern, slashes)
    whole = "".join([text for text, _ in pieces])
    if not whole or not whole.isprintable():
        raise ValueError(f"{whole!r} is no place: empty, or with control characters")
    match = _SCHEME.match(whole)
    if match is None:
        scheme = base.partition(":")[0]
        if whole.startswith("/"):
            if scheme != "file":
                raise ValueError(
                    f"'{whole}': a recipe in a bucket has no file system; write an s3: URI or a relative path"
                )
            return "file://" + _normal(_encode(pieces, "file", quoted=False), whole)
        root, folder = _split_root(base)
        return root + _normal(folder + _encode(pieces, scheme, quoted=False), whole)
    if match[1].lower() not in ("s3", "file"):
        raise ValueError(f"'{whole}': places are paths, s3: and file: URIs, not {match[1]}:")
    text = _encode(pieces, match[1].lower(), quoted=True)
    root, path = _split_root(text)
    if not root:
        raise ValueError(f"'{whole}': write s3://bucket/key or file:///absolute/path")
    return root + _normal(path, whole)


# Paths are made of few distinct pieces, each used thousands of times: looking at each once halves the cost.
@lru_cache(maxsize=65_536)
def _check_piece(text: str, data: bool, pattern: bool, slashes: bool) -> None:
    if not data:
        if not pattern and any(char in text for char in _WILD):
            raise ValueError(f"'{text}': wildcards find files; this is one place")
        return
    if not text:
        raise ValueError("a value in a path is empty")
    if any(part in (".", "..") for part in text.split("/")):
        raise ValueError(f"the value '{text[:60]}' would leave the folder")
    if not slashes and ("/" in text or "\\" in text):
        raise ValueError(f"the value '{text[:60]}' would make a folder; use `| slug`")


def _encode(pieces: Sequence[Piece], scheme: str, *, quoted: bool) -> str:
    """The pieces in the spelling of a scheme. `quoted`: what the author wrote is percent-encoded already."""
    if scheme != "file":
        return "".join([_encoded_s3(text, data) for text, data in pieces])
    return "".join([_encoded_file(text, data, quoted, index == 0) for index, (text, data) in enumerate(pieces)])


@lru_cache(maxsize=65_536)
def _encoded_s3(text: str, data: bool) -> str:
    return re.sub("[*?[]" if data else r"\[", lambda match: f"[{match[0]}]", text)


@lru_cache(maxsize=65_536)
def _encoded_file(text: str, data: bool, quoted: bool, first: bool) -> str:
    head = re.match(r"file://", text, re.IGNORECASE) if quoted and first else None
    rest = text[head.end() :] if head else text
    encoded = quote(rest, safe="/") if data else quote(unquote(rest) if quoted else rest, safe="/" + _WILD)
    return ("file://" if head else "") + encoded


def _split_root(uri: str) -> tuple[str, str]:
    """(`s3://bucket`, `/key`) or (`file://`, `/path`); an empty root when it is neither."""
    match = re.match(r"(?i:(file)://(?=/)|(s3)://([^/]+)(?=/|$))", uri)
    if match is None:
        return "", uri
    root = "file://" if match[1] else f"s3://{match[3]}"
    return root, uri[match.end() :]


def _normal(path: str, shown: str) -> str:
    """An absolute path without `.`, `..` and empty segments; a last slash stays."""
    if path.startswith("/") and "//" not in path and "/." not in path:
        return path
    kept: list[str] = []
    segments = path.split("/")
    for segment in segments:
        if segment == "..":
            if not kept:
                raise ValueError(f"'{shown}' leads out of the root")
            kept.pop()
        elif segment not in ("", "."):
            kept.append(segment)
    folder = "/" if segments[-1] in ("", ".", "..") and kept else ""
    return "/" + "/".join(kept) + folder


def allowed(uri: str, prefixes: Iterable[str] | None) -> bool:
    """Whether a URI or pattern lies under one of the prefixes (folders); None allows everything."""
    if prefixes is None:
        return True
    return any(uri.startswith(prefix.rstrip("/") + "/") for prefix in prefixes)


def one_file(uri: str) -> str:
    """Equal for two URIs that may be one file.

    macOS and Windows keep one file for `Mug.png` and `mug.png`, macOS one for both spellings of `é` in Unicode too. An
    `s3:` key is what it is. No `casefold`: `ß` and `ss` are two letters to every file system.
    """
    if not uri.startswith("file:"):
        return uri
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(uri)).lower())


def is_pattern(uri: str) -> bool:
    """Whether more than one file may match."""
    return any(char in _WILD for char in re.sub(r"\[.\]", "", uri))


def literal_prefix(pattern: str) -> str:
    """What every match begins with."""
    return "".join(each if len(each) == 1 else each[1] for each in _literals(pattern))


def literal(pattern: str) -> str:
    """The URI that a pattern without wildcards stands for."""
    return re.sub(r"\[(.)\]", r"\1", pattern)


def _literals(pattern: str) -> Iterable[str]:
    for token in _tokens(pattern):
        if token[0] in _WILD:
            return
        yield token


def _tokens(pattern: str) -> list[str]:
    return re.findall(r"\[.\]|\*\*/|\*\*|.", pattern, re.DOTALL)


@lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern[str]:
    one = "(?:%[0-9A-Fa-f]{2}|[^/%])" if pattern.startswith("file:") else "[^/]"
    wild = {"*": "[^/]*", "?": one, "**": ".*", "**/": "(?:.*/)?"}
    made = "".join(wild.get(token) or re.escape(token if len(token) == 1 else token[1]) for token in _tokens(pattern))
    return re.compile(made, re.DOTALL)


def folders(patterns: Iterable[str]) -> tuple[str, ...]:
    """The fewest folders (ending in `/`) to list so that every match of every pattern is seen, sorted."""
    found = sorted({literal_prefix(pattern).rpartition("/")[0] + "/" for pattern in patterns})
    kept: list[str] = []
    for folder in found:
        if not kept or not folder.startswith(kept[-1]):
            kept.append(folder)
    return tuple(kept)


def assign(patterns: Iterable[str], uris: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """Pattern -> the URIs that match, sorted. Thousands of patterns over a hundred thousand URIs take seconds."""
    names = sorted(set(uris))
    found: dict[str, tuple[str, ...]] = {}
    for pattern in patterns:
        prefix = literal_prefix(pattern)
        start = bisect.bisect_left(names, prefix)
        if not is_pattern(pattern):
            found[pattern] = (prefix,) if start < len(names) and names[start] == prefix else ()
            continue
        regex = _regex(pattern)
        matches: list[str] = []
        for index in range(start, len(names)):
            name = names[index]
            if not name.startswith(prefix):
                break
            if regex.fullmatch(name):
                matches.append(name)
        found[pattern] = tuple(matches)
    return found


def reaches(pattern: str, folder: str) -> bool:
    """Whether what lies below `folder`, a URI that ends in `/`, could match."""
    wanted, there = pattern.split("/"), folder.split("/")[:-1]
    deep = next((index for index, segment in enumerate(wanted) if "**" in segment), None)
    if deep is None and len(wanted) <= len(there):
        return False
    depth = len(there) if deep is None else min(deep, len(there))
    return _regex("/".join(wanted[:depth])).fullmatch("/".join(there[:depth])) is not None


def file_name(uri: str) -> str:
    """The last segment as people read it."""
    name = uri.rpartition("/")[2]
    return unquote(name) if uri.startswith("file:") else name
