"""Where artifacts lie: under the hash of their bytes.

    <root>/objects/ab/cd/abcd...64 hex digits....png

Two levels of 256 folders keep any one folder small: a million artifacts are 15 files in each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

FOLDER = "objects"
BUNDLES = "bundles"

EXTENSIONS: Mapping[str, str] = MappingProxyType(
    {
        "image/png": "png",
        "image/jpeg": "jpg",
        "image/webp": "webp",
        "image/avif": "avif",
        "application/json": "json",
        "application/octet-stream": "bin",
    }
)
"""Media type -> extension of everything that is kept as an artifact; `bin` are latents."""

MEDIA_TYPES: Mapping[str, str] = MappingProxyType({extension: media for media, extension in EXTENSIONS.items()})

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ObjectName:
    """What the URI of an artifact says."""

    sha256: str
    media_type: str


@dataclass(frozen=True, slots=True)
class ObjectKeys:
    """The names of artifacts under one root. Called, it is the `ArtifactUri` of the services."""

    root: str
    """URI prefix without a trailing slash: `file:///data/kontext-out`, `s3://bucket` or `s3://bucket/prefix`."""

    def __post_init__(self) -> None:
        if self.root.endswith("/"):
            object.__setattr__(self, "root", self.root.rstrip("/"))
        assert "://" in self.root, f"the root of the artifacts is a URI, not {self.root!r}"

    @property
    def prefix(self) -> str:
        """URI prefix that all artifacts share and nothing else lies under; for `ObjectStore.list`."""
        return f"{self.root}/{FOLDER}/"

    @property
    def bundles(self) -> str:
        """URI of the folder that dropped bundles are unpacked below; ends in `/`."""
        return f"{self.root}/{BUNDLES}/"

    def __call__(self, sha256: str, media_type: str) -> str:
        """URI of the artifact. Raises `ValueError` for what is no sha256 or a media type that is not kept."""
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"not a lower-case sha256: {sha256!r}")
        if media_type not in EXTENSIONS:
            raise ValueError(f"no artifact is of type {media_type!r}; known: {', '.join(EXTENSIONS)}")
        return f"{self.prefix}{sha256[:2]}/{sha256[2:4]}/{sha256}.{EXTENSIONS[media_type]}"

    def parse(self, uri: str) -> ObjectName | None:
        """What the URI names; None when it is not exactly the URI of an artifact under this root."""
        stem, _, extension = uri.rpartition(".")
        sha256 = stem.rpartition("/")[2]
        media_type = MEDIA_TYPES.get(extension)
        if media_type is None or not _SHA256.fullmatch(sha256) or self(sha256, media_type) != uri:
            return None
        return ObjectName(sha256, media_type)
