"""`finish`: exact pixels, sRGB, a file format and a byte limit. No model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from kontext_batch.errors import StepError
from kontext_batch.operations import layout
from kontext_batch.operations.encoding import encode, format_named
from kontext_batch.operations.pictures import BadPicture, open_picture
from kontext_batch.ports import LoadedPicture, MadePicture

VERSION = 1
"""Raised when equal parameters make other pixels; part of the step keys."""


@dataclass(frozen=True, slots=True)
class _Overlay:
    anchor: str
    margin: int
    scale: float | None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The parameters (documented in `planning.params`), read once."""

    size: tuple[int, int]
    fit: str
    box: tuple[int, int, int, int] | None
    """Left, top, right, bottom."""
    background: layout.Colour
    format: str
    quality: int | None
    max_bytes: int | None
    overlays: tuple[_Overlay, ...]

    @staticmethod
    def read(params: Mapping[str, Any]) -> _Wanted:
        size = int(params["size"]["width"]), int(params["size"]["height"])
        box = params.get("box")
        fit = params["fit"]
        if fit not in ("pad", "crop"):
            raise ValueError(f"fit '{fit}'")
        if min(size) < 1:
            raise ValueError(f"size {size}")
        return _Wanted(
            size=size,
            fit=fit,
            box=None if box is None else (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]),
            background=layout.parse_colour(params["background"]),
            format=params["format"],
            quality=params.get("quality"),
            max_bytes=params.get("max_bytes"),
            overlays=tuple(
                _Overlay(each["anchor"], layout.margin_pixels(each["margin"], size), each.get("scale"))
                for each in params.get("overlay", ())
            ),
        )


def finish(
    params: Mapping[str, Any], pictures: Sequence[LoadedPicture], *, max_pixels: int, xmp: bytes | None = None
) -> MadePicture:
    """One picture of role `image`, one of role `logo` for each overlay. Raises `StepError`."""
    started = time.perf_counter()
    try:
        wanted = _Wanted.read(params)
    except (KeyError, TypeError, ValueError) as error:
        raise StepError(f"finish: the parameters are malformed ({error})") from error
    image, logos = _by_role(pictures, len(wanted.overlays))
    has_alpha = format_named(wanted.format).has_alpha
    if wanted.background[3] < 255 and not has_alpha:
        raise StepError(f"finish: a {wanted.format} file cannot have a transparent background")

    picture = open_picture(image.data, max_pixels=max_pixels)
    if wanted.box is not None:
        left, top, right, bottom = wanted.box
        if not (0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height):
            raise StepError(f"finish: the box {wanted.box} is not inside of {picture.width}x{picture.height}")
        picture = picture.crop(wanted.box)
    if not has_alpha:
        picture = layout.flatten(picture, wanted.background)
    if wanted.fit == "crop":
        made = layout.cover(picture, wanted.size)
    else:
        made = layout.contain(picture, wanted.size, wanted.background)
    _lay_over(made, wanted.overlays, logos, max_pixels)
    rendered = time.perf_counter()
    data = encode(made, wanted.format, wanted.quality, wanted.max_bytes, xmp=xmp).data
    timings = {"render": rendered - started, "encode": time.perf_counter() - rendered}
    return MadePicture(data, format_named(wanted.format).media_type, made.width, made.height, timings)


def _by_role(pictures: Sequence[LoadedPicture], overlays: int) -> tuple[LoadedPicture, list[LoadedPicture]]:
    images = [each for each in pictures if each.role == "image"]
    logos = sorted((each for each in pictures if each.role == "logo"), key=lambda each: each.position)
    if len(images) != 1 or len(logos) != overlays:
        raise StepError(f"finish reads one image and {overlays} logos, not {len(images)} and {len(logos)}")
    return images[0], logos


def _lay_over(made: Image.Image, overlays: Sequence[_Overlay], logos: Sequence[LoadedPicture], max_pixels: int) -> None:
    for number, (overlay, logo) in enumerate(zip(overlays, logos, strict=True), 1):
        try:
            picture = open_picture(logo.data, max_pixels=max_pixels)
            layout.lay_over(made, picture, overlay.anchor, overlay.margin, overlay.scale)
        except BadPicture as error:
            raise BadPicture(f"logo {number}: {error}") from error
        except ValueError as error:
            raise StepError(f"finish: the parameters are malformed ({error})") from error
