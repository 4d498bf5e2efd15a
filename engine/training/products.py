"""Procedural product pictures with known edits: the training data of the shipped model.

A `Scene` is what a picture shows; an edit is a change of the Scene, so the true result of every instruction is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 38, 42),
    "orange": (240, 128, 32),
    "yellow": (246, 208, 52),
    "green": (46, 142, 70),
    "teal": (32, 150, 150),
    "blue": (44, 96, 204),
    "navy": (28, 40, 96),
    "purple": (122, 62, 168),
    "pink": (240, 138, 178),
    "brown": (128, 80, 46),
    "black": (34, 34, 38),
    "white": (244, 244, 242),
    "grey": (142, 144, 148),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ("plain", "studio", "table")
"""One colour; a sweep that fades downwards; a wall over a darker table top."""

BADGES = ("SALE", "NEW", "HOT", "ECO", "TOP")
"""Words of the badge in the upper right corner."""

Background = Literal["plain", "studio", "table"]
Float = NDArray[np.float32]
SUPERSAMPLE = 3


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that a picture shows. Places are shares of the square in the picture's middle."""

    product: str
    colour: str
    pattern: str = "plain"
    background: str = "plain"
    background_colour: str = "white"
    x: float = 0.5
    """Centre of the product."""
    y: float = 0.52
    size: float = 0.62
    """Height of the product."""
    shadow: bool = True
    badge: str = ""
    """One of `BADGES`, or none."""


Shape = Callable[[ImageDraw.ImageDraw, Callable[[float, float], tuple[float, float]], float], None]
"""Draws into a mask: gets the pen, the map from product coordinates in [-1, 1] to pixels, and pixels to a unit."""


def _box(
    place: Callable[[float, float], tuple[float, float]], x0: float, y0: float, x1: float, y1: float
) -> list[float]:
    return [*place(x0, y0), *place(x1, y1)]


def _mug(pen: ImageDraw.ImageDraw, at: Callable[[float, float], tuple[float, float]], unit: float) -> None:
    pen.ellipse(_box(at, 0.25, -0.5, 0.95, 0.45), outline=255, width=int(0.17 * unit))
    pen.rounded_rectangle(_box(at, -0.8, -0.85, 0.55, 0.85), radius=0.18 * unit, fill=255)


def _bottle(pen: ImageDraw.ImageDraw, at: Callable[[float, float], tuple[float, float]], unit: float) -> None:
    pen.rounded_rectangle(_box(at, -0.46, -0.3, 0.46, 1.0), radius=0.16 * unit, fill=255)
    pen.polygon([at(-0.44, -0.2), at(-0.18, -0.62), at(0.18, -0.62), at(0.44, -0.2)], fill=255)
    pen.rectangle(_box(at, -0.18, -1.0, 0.18, -0.55), fill=255)


def _shirt(pen: ImageDraw.ImageDraw, at: Callable[[float, float], tuple[float, float]], unit: float) -> None:
    outline = [(-0.3, -0.85), (0.3, -0.85), (1.0, -0.45), (0.78, 0.0), (0.55, -0.15), (0.55, 0.9)]
    mirrored = [(-x, y) for x, y in reversed(outline[2:])]
    pen.polygon([at(x, y) for x, y in [*outline, *mirrored]], fill=255)
    pen.ellipse(_box(at, -0.24, -1.02, 0.24, -0.66), fill=0)


def _bag(pen: ImageDraw.ImageDraw, at: Callable[[float, float], tuple[float, float]], unit: float) -> None:
    pen.arc(_box(at, -0.4, -1.0, 0.4, 0.3), 180, 360, fill=255, width=int(0.13 * unit))
    pen.polygon([at(-0.7, -0.35), at(0.7, -0.35), at(0.86, 0.9), at(-0.86, 0.9)], fill=255)


def _shoe(pen: ImageDraw.ImageDraw, at: Callable[[float, float], tuple[float, float]], unit: float) -> None:
    pen.polygon([at(-0.95, -0.5), at(-0.3, -0.5), at(0.2, 0.0), at(0.75, 0.12), at(1.0, 0.5), at(-0.95, 0.5)], fill=255)
    pen.ellipse(_box(at, 0.4, 0.05, 1.02, 0.62), fill=255)
    pen.rectangle(_box(at, -0.98, 0.42, 1.0, 0.62), fill=255)


def _lamp(pen: ImageDraw.ImageDraw, at: Callable[[float, float], tuple[float, float]], unit: float) -> None:
    pen.polygon([at(-0.35, -0.95), at(0.35, -0.95), at(0.7, 0.0), at(-0.7, 0.0)], fill=255)
    pen.rectangle(_box(at, -0.07, -0.05, 0.07, 0.9), fill=255)
    pen.rounded_rectangle(_box(at, -0.45, 0.8, 0.45, 0.97), radius=0.07 * unit, fill=255)


def _chair(pen: ImageDraw.ImageDraw, at: Callable[[float, float], tuple[float, float]], unit: float) -> None:
    pen.rounded_rectangle(_box(at, -0.55, -0.98, 0.55, 0.0), radius=0.12 * unit, fill=255)
    pen.rounded_rectangle(_box(at, -0.65, 0.05, 0.65, 0.32), radius=0.08 * unit, fill=255)
    for x in (-0.6, 0.45):
        pen.rectangle(_box(at, x, 0.25, x + 0.15, 0.98), fill=255)


def _crate(pen: ImageDraw.ImageDraw, at: Callable[[float, float], tuple[float, float]], unit: float) -> None:
    pen.rectangle(_box(at, -0.75, -0.4, 0.75, 0.8), fill=255)
    pen.rectangle(_box(at, -0.85, -0.62, 0.85, -0.34), fill=255)


def _vase(pen: ImageDraw.ImageDraw, at: Callable[[float, float], tuple[float, float]], unit: float) -> None:
    pen.ellipse(_box(at, -0.62, -0.35, 0.62, 0.95), fill=255)
    pen.polygon(
        [at(-0.34, -0.95), at(0.34, -0.95), at(0.2, -0.5), at(0.3, 0.0), at(-0.3, 0.0), at(-0.2, -0.5)], fill=255
    )


def _cap(pen: ImageDraw.ImageDraw, at: Callable[[float, float], tuple[float, float]], unit: float) -> None:
    pen.pieslice(_box(at, -0.75, -0.45, 0.75, 1.15), 180, 360, fill=255)
    pen.rounded_rectangle(_box(at, -0.2, 0.25, 1.05, 0.5), radius=0.1 * unit, fill=255)


SHAPES: dict[str, Shape] = {
    "mug": _mug,
    "bottle": _bottle,
    "shirt": _shirt,
    "bag": _bag,
    "shoe": _shoe,
    "lamp": _lamp,
    "chair": _chair,
    "box": _crate,
    "vase": _vase,
    "cap": _cap,
}
PRODUCTS = tuple(SHAPES)
FOOT = {"mug": 0.85, "shirt": 0.92, "bag": 0.9, "shoe": 0.62, "box": 0.8, "cap": 0.5}
"""Where a product stands, in product coordinates; 0.98 for the others."""
HORIZON = 0.62
"""Edge of the table top, as a share of the square in the middle."""


def render(scene: Scene, width: int = 128, height: int = 128) -> Image.Image:
    """The picture of a scene; the same scene and size always give the same bytes.

    What is hard-edged is drawn as a mask at three times the size and averaged down; light and colours are mixed at the
    picture's own size.
    """
    side = min(width, height)
    unit = scene.size * side / 2
    centre_x, centre_y = width / 2 + (scene.x - 0.5) * side, height / 2 + (scene.y - 0.5) * side

    def at(x: float, y: float) -> tuple[float, float]:
        return SUPERSAMPLE * (centre_x + x * unit), SUPERSAMPLE * (centre_y + y * unit)

    canvas = _backdrop(scene, width, height)
    if scene.shadow:
        foot = FOOT.get(scene.product, 0.98)
        shade = Image.new("L", (width, height))
        box = [(centre_x + x * unit, centre_y + (foot + y) * unit) for x, y in ((-0.95, -0.12), (0.95, 0.14))]
        ImageDraw.Draw(shade).ellipse(box, fill=255)
        canvas *= 1 - 0.3 * _share(shade.filter(ImageFilter.GaussianBlur(0.06 * unit)))
    x: Float = (((np.arange(SUPERSAMPLE * width) + 0.5) / SUPERSAMPLE - centre_x) / unit).astype(np.float32)
    y: Float = (((np.arange(SUPERSAMPLE * height) + 0.5) / SUPERSAMPLE - centre_y) / unit).astype(np.float32)
    body = Image.new("L", (SUPERSAMPLE * width, SUPERSAMPLE * height))
    SHAPES[scene.product](ImageDraw.Draw(body), at, SUPERSAMPLE * unit)
    covered = _share(body.reduce(SUPERSAMPLE))
    base = np.array(COLOURS[scene.colour], np.float32)
    paint = base * covered
    if scene.pattern != "plain":
        marked = Image.fromarray(_marked(scene.pattern, x[None, :], y[:, None]).astype(np.uint8) * np.uint8(255))
        ink = np.array((245, 245, 243) if base.mean() < 190 else (60, 62, 70), np.float32)
        paint += (ink - base) * _share(ImageChops.darker(body, marked).reduce(SUPERSAMPLE))
    across = x[SUPERSAMPLE // 2 :: SUPERSAMPLE, None]
    paint *= 1.04 - 0.2 * np.clip((across + 1) / 2, 0, 1)  # light from the left
    canvas = canvas * (1 - covered) + np.minimum(paint, 255)
    picture = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), "RGB")
    if scene.badge:
        _pin(scene.badge, picture, side)
    return picture


def _share(mask: Image.Image) -> Float:
    """A mask as (height, width, 1) in [0, 1]."""
    return np.asarray(mask, np.float32)[..., None] / np.float32(255)


def _backdrop(scene: Scene, width: int, height: int) -> Float:
    colour = np.array(COLOURS[scene.background_colour], np.float32)
    canvas: Float = np.broadcast_to(colour, (height, width, 3)).astype(np.float32)
    if scene.background == "studio":
        canvas *= (1.06 - 0.3 * np.linspace(0, 1, height, dtype=np.float32))[:, None, None]
    elif scene.background == "table":
        edge = round(height / 2 + (HORIZON - 0.5) * min(width, height))
        canvas[edge:] = canvas[edge:] * 0.62 + 12
    return np.minimum(canvas, np.float32(255))


def _marked(pattern: str, x: Float, y: Float) -> NDArray[np.bool_]:
    """Where a pattern puts its ink, over product coordinates."""
    if pattern == "striped":
        return np.broadcast_to((y * 2.6) % 1 < 0.42, (y.size, x.size))
    if pattern == "dotted":
        dots: NDArray[np.bool_] = ((x * 2.8) % 1 - 0.5) ** 2 + ((y * 2.8) % 1 - 0.5) ** 2 < 0.075
        return dots
    checks: NDArray[np.bool_] = ((x * 2.2) % 1 < 0.5) ^ ((y * 2.2) % 1 < 0.5)
    return checks


@cache
def _badge(word: str, side: int) -> Image.Image:
    """A white word on a dark red label with a white rim, for pictures whose shorter side is `side`."""
    wide, high = round(0.36 * side), round(0.17 * side)
    label = Image.new("RGBA", (SUPERSAMPLE * wide, SUPERSAMPLE * high))
    pen = ImageDraw.Draw(label)
    edge = (SUPERSAMPLE * wide - 1, SUPERSAMPLE * high - 1)
    pen.rounded_rectangle([(0, 0), edge], 0.03 * SUPERSAMPLE * side, fill="white")
    rim = SUPERSAMPLE
    pen.rounded_rectangle([(rim, rim), (edge[0] - rim, edge[1] - rim)], 0.025 * SUPERSAMPLE * side, fill=(168, 20, 40))
    font = ImageFont.load_default(0.125 * SUPERSAMPLE * side)
    pen.text((edge[0] / 2, edge[1] / 2), word, fill="white", font=font, anchor="mm", stroke_width=1)
    return label.reduce(SUPERSAMPLE)


def _pin(word: str, picture: Image.Image, side: int) -> None:
    badge, margin = _badge(word, side), round(0.04 * side)
    picture.paste(badge, (picture.width - badge.width - margin, margin), badge)


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene whose product can be told from its background."""
    colour = str(rng.choice(list(COLOURS)))
    background = str(rng.choice(BACKGROUNDS))
    return Scene(
        product=str(rng.choice(PRODUCTS)),
        colour=colour,
        pattern=str(rng.choice(PATTERNS, p=[0.52, 0.16, 0.16, 0.16])),
        background=background,
        background_colour=another(rng, colour),
        x=float(rng.uniform(0.42, 0.58)),
        y=float(rng.uniform(0.49, 0.57)),
        size=float(rng.uniform(0.52, 0.72)),
        shadow=bool(rng.random() < 0.85),
        badge=str(rng.choice(BADGES)) if rng.random() < 0.15 else "",
    )


def another(rng: np.random.Generator, *taken: str) -> str:
    """A colour name that is none of `taken`."""
    return str(rng.choice([name for name in COLOURS if name not in taken]))


def on_white(scene: Scene) -> Scene:
    """The product cut out on plain white."""
    return replace(scene, background="plain", background_colour="white", shadow=False)
