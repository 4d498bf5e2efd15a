"""From pixels to a file: format, quality, byte limit.

Equal pixels and wishes give equal bytes, as long as the libraries stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from types import MappingProxyType
from typing import Any, Final

from PIL import Image

from kontext_batch.errors import StepError
from kontext_batch.operations.pictures import png_xmp, srgb_profile

LOWEST_QUALITY: Final = 30
"""Below it artefacts are plain to see: a byte limit that asks for less is told instead of met."""

_WITHOUT_CHROMA_LOSS: Final = 90
"""From this quality on colour keeps its full resolution: red text on white smears at 4:2:0."""


@dataclass(frozen=True, slots=True)
class Format:
    """One file format that results are written in."""

    pillow: str
    media_type: str
    extension: str
    has_alpha: bool
    has_quality: bool
    max_side: int
    """Pixels; a limit of the format."""


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "jpeg": Format("JPEG", "image/jpeg", "jpg", False, True, 65_500),
        "png": Format("PNG", "image/png", "png", True, False, 2**31 - 1),
        "webp": Format("WEBP", "image/webp", "webp", True, True, 16_383),
        "avif": Format("AVIF", "image/avif", "avif", True, True, 65_535),
    }
)
"""A recipe's name of a format -> what it is."""

DEFAULT_QUALITY: Final = 85
"""For parameters that leave it out; the planner writes it always."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A file in memory."""

    data: bytes
    quality: int | None
    """The quality that it was written at; None for png."""


def format_named(name: str) -> Format:
    """Raises `StepError` for a format that is not written."""
    if name not in FORMATS:
        raise StepError(f"'{name}' is no format for results; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def encode(
    image: Image.Image, name: str, quality: int | None, max_bytes: int | None, *, xmp: bytes | None = None
) -> Encoded:
    """`image` (`RGB`, or `RGBA` where the format has alpha) as a file with the sRGB profile and no metadata but `xmp`.

    Past `max_bytes` the quality goes down as little as it has to, to `LOWEST_QUALITY` at most (not at all when less
    was asked for); png is packed harder. Raises `StepError` that says how large the smallest attempt was.
    """
    wanted = format_named(name)
    assert image.mode == "RGB" or (image.mode == "RGBA" and wanted.has_alpha), f"{image.mode} as {name}"
    if max(image.size) > wanted.max_side:
        raise StepError(f"{_size(image)}: a side of a {name} file is at most {wanted.max_side} pixels")
    if not wanted.has_quality:
        return _encode_png(image, max_bytes, xmp)
    quality = DEFAULT_QUALITY if quality is None else quality
    best = Encoded(_save(image, wanted, quality, xmp), quality)
    if max_bytes is None or len(best.data) <= max_bytes:
        return best
    low, high = min(LOWEST_QUALITY, quality), quality - 1
    smallest = best
    found: Encoded | None = None
    if low <= high:
        smallest = Encoded(_save(image, wanted, low, xmp), low)
        if len(smallest.data) <= max_bytes:
            found = smallest
    if found is None:
        raise StepError(
            f"{_size(image)} {name} has {len(smallest.data)} bytes at quality {smallest.quality}, the lowest that is "
            f"acceptable; max_bytes is {max_bytes}"
        )
    low += 1
    while low <= high:
        middle = (low + high) // 2
        attempt = Encoded(_save(image, wanted, middle, xmp), middle)
        if len(attempt.data) <= max_bytes:
            found, low = attempt, middle + 1
        else:
            high = middle - 1
    return found


def _encode_png(image: Image.Image, max_bytes: int | None, xmp: bytes | None) -> Encoded:
    wanted = FORMATS["png"]
    data = _save(image, wanted, None, xmp)
    if max_bytes is not None and len(data) > max_bytes:
        data = min(data, _save(image, wanted, None, xmp, optimize=True), key=len)
        if len(data) > max_bytes:
            raise StepError(
                f"{_size(image)} png has {len(data)} bytes and loses nothing to become smaller; max_bytes is "
                f"{max_bytes}: choose jpeg, webp or avif, or a smaller size"
            )
    return Encoded(data, None)


def _save(image: Image.Image, wanted: Format, quality: int | None, xmp: bytes | None, **options: Any) -> bytes:
    options["icc_profile"] = srgb_profile()
    if xmp is not None:
        options |= {"pnginfo": png_xmp(xmp)} if wanted.pillow == "PNG" else {"xmp": xmp}
    full_chroma = quality is not None and quality >= _WITHOUT_CHROMA_LOSS
    if wanted.pillow == "JPEG":
        options |= {"quality": quality, "optimize": True, "progressive": True}
        options["subsampling"] = "4:4:4" if full_chroma else "4:2:0"
    elif wanted.pillow == "PNG":
        options.setdefault("compress_level", 6)
    elif wanted.pillow == "WEBP":
        options |= {"quality": quality, "method": 4, "alpha_quality": 100}
    else:
        options |= {"quality": quality, "speed": 6, "subsampling": "4:4:4" if full_chroma else "4:2:0"}
    buffer = BytesIO()
    try:
        image.save(buffer, wanted.pillow, **options)
    except (OSError, ValueError) as error:
        raise StepError(f"{_size(image)} cannot be written as {wanted.pillow}: {error}") from error
    return buffer.getvalue()


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
