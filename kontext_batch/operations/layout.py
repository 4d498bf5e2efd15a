"""Bringing pictures to sizes: pad, crop, flatten, lay over. Nothing is ever stretched."""

from __future__ import annotations

import math
import re

from PIL import Image

from engine.geometry import pad_box

TRANSPARENT = (0, 0, 0, 0)
Colour = tuple[int, int, int, int]
"""Red, green, blue, alpha; 0 to 255."""


def parse_colour(text: str) -> Colour:
    """`#RRGGBB`, or `transparent`. Raises `ValueError`."""
    if text == "transparent":
        return TRANSPARENT
    if not re.fullmatch("#[0-9A-Fa-f]{6}", text):
        raise ValueError(f"'{text}' is no colour")
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16), 255


def flatten(image: Image.Image, background: Colour) -> Image.Image:
    """`RGB`: what is transparent shows `background`."""
    if image.mode == "RGB":
        return image
    flat = Image.new("RGB", image.size, background[:3])
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centred part of `image` that fills `size`, at exactly `size`."""
    width, height = size
    scale = max(width / image.width, height / image.height)
    # The part that is seen, in fractions of a pixel: rounding it would stretch the picture a little.
    seen_width, seen_height = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - seen_width) / 2, (image.height - seen_height) / 2
    box = (left, top, left + seen_width, top + seen_height)
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def contain(image: Image.Image, size: tuple[int, int], background: Colour) -> Image.Image:
    """All of `image`, centred at exactly `size`, the rest `background`.

    The result has alpha when the picture or the background has.
    """
    left, top, width, height = pad_box(*image.size, *size)
    placed = image.resize((width, height), Image.Resampling.LANCZOS)
    if placed.size == size:
        return placed
    if image.mode == "RGB" and background[3] == 255:
        canvas = Image.new("RGB", size, background[:3])
    else:
        canvas = Image.new("RGBA", size, background)
        placed = placed.convert("RGBA")
    canvas.paste(placed, (left, top))
    return canvas


def margin_pixels(margin: int | str, size: tuple[int, int]) -> int:
    """Pixels of `24`, `24px`, or `3%` of the shorter side. Raises `ValueError`."""
    if isinstance(margin, int):
        pixels = margin
    elif match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", margin):
        pixels = _rounded(float(match[1]) / 100 * min(size))
    elif match := re.fullmatch(r"([0-9]+)(?:px)?", margin):
        pixels = int(match[1])
    else:
        raise ValueError(f"'{margin}' is no margin")
    if pixels < 0:
        raise ValueError("a margin is not negative")
    return pixels


def lay_over(canvas: Image.Image, logo: Image.Image, anchor: str, margin: int, scale: float | None) -> None:
    """Put `logo` on `canvas` in place. `scale`: its width as a part of the canvas's; None: its own pixels.

    It is made smaller where it would reach into the margin, and keeps its aspect.
    """
    room = max(1, canvas.width - 2 * margin), max(1, canvas.height - 2 * margin)
    width = float(logo.width) if scale is None else scale * canvas.width
    height = width * logo.height / logo.width
    shrink = min(1.0, room[0] / width, room[1] / height)
    size = max(1, _rounded(width * shrink)), max(1, _rounded(height * shrink))
    placed = logo.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    vertical, horizontal = _sides(anchor)
    left = _start(horizontal, canvas.width, size[0], margin)
    top = _start(vertical, canvas.height, size[1], margin)
    if canvas.mode == "RGBA":
        canvas.alpha_composite(placed, (left, top))
    else:
        canvas.paste(placed, (left, top), placed.getchannel("A"))


def _rounded(value: float) -> int:
    """Half up, as `engine.geometry` does it."""
    return math.floor(value + 0.5)


def _sides(anchor: str) -> tuple[str, str]:
    """Vertical and horizontal side of `top-left`, `left`, `center`, ... Raises `ValueError`."""
    match = re.fullmatch(r"(top|bottom)?-?(left|right)?|center", anchor)
    if match is None or not anchor.strip("-") or anchor.startswith("-") or anchor.endswith("-"):
        raise ValueError(f"'{anchor}' is no anchor")
    return match[1] or "center", match[2] or "center"


def _start(side: str, whole: int, length: int, margin: int) -> int:
    if side in ("left", "top"):
        return min(margin, whole - length)
    if side in ("right", "bottom"):
        return max(0, whole - length - margin)
    return (whole - length) // 2
