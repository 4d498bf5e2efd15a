"""Sizes: the 17 Kontext ratios at any native area, the nearest one, and pixel, latent and token arithmetic.

Integers only; no torch, so that planning may import it. Widths come before heights. ENGINE.md 2.3.
"""

from __future__ import annotations

import math
from functools import cache

TOKEN_SIDE = 16
"""Pixels of a side to one token: 8 of the autoencoder times 2 of the packing."""

KONTEXT_AREA = 1024 * 1024
"""Pixels that Kontext was trained for."""

_TALL = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
KONTEXT_SIZES: tuple[tuple[int, int], ...] = (
    *_TALL,
    (1024, 1024),
    *((height, width) for width, height in reversed(_TALL)),
)
"""The 17 sizes (width, height) that Kontext was trained on, from the tallest to the widest."""


@cache
def sizes(area: int = KONTEXT_AREA) -> tuple[tuple[int, int], ...]:
    """The sizes of a model whose native area is `area` pixels: the 17 ratios, each side a multiple of 16.

    At small areas several ratios meet in one size; each size is listed once, from the tallest to the widest.
    """
    if area == KONTEXT_AREA:
        return KONTEXT_SIZES
    if area < TOKEN_SIDE**2:
        raise ValueError(f"a native area of {area} pixels is less than one token of {TOKEN_SIDE}x{TOKEN_SIDE}")
    found: dict[tuple[int, int], None] = {}
    for width, height in KONTEXT_SIZES:
        found[_nearest_grid(width / height, area)] = None
    return tuple(sorted(found, key=lambda size: size[0] / size[1]))


def _nearest_grid(ratio: float, area: int) -> tuple[int, int]:
    """The size of about `area` pixels (within 10 % where one exists) whose ratio is nearest to `ratio`.

    Of equal ratios the one nearest to the area, so that a tall size is always its wide size on end.
    """
    tokens = area / TOKEN_SIDE**2
    best: tuple[float, float, float, int, int] | None = None
    for columns in range(1, math.ceil(tokens) + 1):
        fewest = max(1, math.floor(tokens * 0.9 / columns))
        for rows in range(fewest, math.ceil(tokens * 1.1 / columns) + 1):
            off = abs(rows * columns / tokens - 1)
            excess = off if off > 0.1 else 0.0
            candidate = (excess, round(abs(math.log(columns / rows / ratio)), 9), off, columns, rows)
            if best is None or candidate < best:
                best = candidate
    assert best is not None
    return best[3] * TOKEN_SIDE, best[4] * TOKEN_SIDE


def nearest_size(width: int, height: int, *, area: int = KONTEXT_AREA) -> tuple[int, int]:
    """The size whose ratio is nearest to width/height; of equals the one of smaller width (BFL's rule)."""
    if width < 1 or height < 1:
        raise ValueError(f"{width}x{height} is not the size of a picture")
    ratio = width / height
    return min(sizes(area), key=lambda size: (abs(size[0] / size[1] - ratio), size[0]))


def token_grid(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of tokens; sides must be multiples of 16."""
    if width % TOKEN_SIDE or height % TOKEN_SIDE or width < 1 or height < 1:
        raise ValueError(f"{width}x{height} pixels: sides must be multiples of {TOKEN_SIDE}")
    return height // TOKEN_SIDE, width // TOKEN_SIDE


def token_count(width: int, height: int) -> int:
    """Tokens of an image of this size."""
    rows, columns = token_grid(width, height)
    return rows * columns


def latent_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of the autoencoder's latents of an image of this size (8 pixels to one)."""
    rows, columns = token_grid(width, height)
    return columns * 2, rows * 2


Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""


def pad_box(width: int, height: int, into_width: int, into_height: int) -> Box:
    """Where a picture lies, centred, when it is scaled to be whole inside another size; the rest is padding."""
    _check_sizes(width, height, into_width, into_height)
    if width * into_height >= height * into_width:
        w, h = into_width, max(1, _rounded(height * into_width, width))
    else:
        w, h = max(1, _rounded(width * into_height, height)), into_height
    return (into_width - w) // 2, (into_height - h) // 2, w, h


def crop_box(width: int, height: int, into_width: int, into_height: int) -> Box:
    """The centred part of a picture that fills another size when it is scaled to cover it."""
    _check_sizes(width, height, into_width, into_height)
    if width * into_height >= height * into_width:
        w, h = max(1, _rounded(into_width * height, into_height)), height
    else:
        w, h = width, max(1, _rounded(into_height * width, into_width))
    return (width - w) // 2, (height - h) // 2, w, h


def _rounded(numerator: int, denominator: int) -> int:
    """Half up; never banker's, which would shift a box by a pixel between even and odd sizes."""
    return (2 * numerator + denominator) // (2 * denominator)


def _check_sizes(*sides: int) -> None:
    if min(sides) < 1:
        raise ValueError(f"sizes must be positive, not {sides}")
