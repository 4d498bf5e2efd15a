"""Procedural product pictures with known edits: the training data of the shipped model.

A `Scene` is what a picture shows; an edit is a change of the Scene, so the true result of every instruction is known.
Pictures are drawn at three times their size and averaged down, so that edges are smooth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

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

Background = Literal["plain", "studio", "table"]
Float = NDArray[np.float32]
SUPERSAMPLE = 3


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that a picture shows."""

    product: str
    colour: str
    pattern: str = "plain"
    background: str = "plain"
    background_colour: str = "white"
    x: float = 0.5
    """Centre of the product, share of the width."""
    y: float = 0.52
    size: float = 0.62
    """Height of the product, share of the shorter side."""
    shadow: bool = True


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
    pen.pieslice(_box(at, -0.75, -0.75, 0.75, 0.85), 180, 360, fill=255)
    pen.rounded_rectangle(_box(at, -0.2, -0.05, 1.05, 0.2), radius=0.1 * unit, fill=255)


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


def render(scene: Scene, width: int = 128, height: int = 128) -> Image.Image:
    """The picture of a scene; the same scene and size always give the same bytes."""
    w, h = SUPERSAMPLE * width, SUPERSAMPLE * height
    unit = scene.size * min(w, h) / 2
    centre_x, centre_y = scene.x * w, scene.y * h

    def at(x: float, y: float) -> tuple[float, float]:
        return centre_x + x * unit, centre_y + y * unit

    canvas = _backdrop(scene, w, h)
    if scene.shadow:
        shade = _mask(w, h, lambda pen: pen.ellipse(_box(at, -0.9, 0.78, 0.9, 1.12), fill=255))
        shade = np.asarray(
            Image.fromarray((shade * 255).astype(np.uint8)).reduce(SUPERSAMPLE).resize((w, h)), np.float32
        )
        canvas = (canvas * (1 - 0.22 * shade[..., None] / 255)).astype(np.float32)
    body = _mask(w, h, lambda pen: SHAPES[scene.product](pen, at, unit))
    surface = _surface(scene, w, h, centre_x, centre_y, unit)
    canvas = canvas * (1 - body[..., None]) + surface * body[..., None]
    picture = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), "RGB")
    return picture.reduce(SUPERSAMPLE)


def _mask(w: int, h: int, draw: Callable[[ImageDraw.ImageDraw], object]) -> Float:
    mask = Image.new("L", (w, h))
    draw(ImageDraw.Draw(mask))
    return np.asarray(mask, np.float32) / np.float32(255)


def _backdrop(scene: Scene, w: int, h: int) -> Float:
    colour = np.array(COLOURS[scene.background_colour], np.float32)
    down = np.linspace(0, 1, h, dtype=np.float32)[:, None, None]
    canvas: Float = np.broadcast_to(colour, (h, w, 3)).astype(np.float32)
    if scene.background == "studio":
        canvas = (canvas * (1.06 - 0.3 * down)).astype(np.float32)
    elif scene.background == "table":
        canvas = np.where(down > 0.68, canvas * 0.62 + 12, canvas).astype(np.float32)
    return np.minimum(canvas, np.float32(255))


def _surface(scene: Scene, w: int, h: int, centre_x: float, centre_y: float, unit: float) -> Float:
    """Colour of the product at every pixel: base, pattern, then light from the left."""
    base = np.array(COLOURS[scene.colour], np.float32)
    ink = np.array((245, 245, 243) if base.mean() < 190 else (60, 62, 70), np.float32)
    x = (np.arange(w, dtype=np.float32)[None, :] - centre_x) / unit
    y = (np.arange(h, dtype=np.float32)[:, None] - centre_y) / unit
    if scene.pattern == "striped":
        marked = np.broadcast_to((y * 2.6) % 1 < 0.42, (h, w))
    elif scene.pattern == "dotted":
        marked = ((x * 2.8) % 1 - 0.5) ** 2 + ((y * 2.8) % 1 - 0.5) ** 2 < 0.075
    elif scene.pattern == "checked":
        marked = ((x * 2.2) % 1 < 0.5) ^ ((y * 2.2) % 1 < 0.5)
    else:
        marked = np.zeros((h, w), bool)
    colour = np.where(marked[..., None], ink, base)
    light = 1.04 - 0.2 * np.clip((x + 1) / 2, 0, 1)
    return np.minimum(colour * light[..., None], 255).astype(np.float32)


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
        x=float(rng.uniform(0.4, 0.6)),
        y=float(rng.uniform(0.45, 0.57)),
        size=float(rng.uniform(0.5, 0.74)),
        shadow=bool(rng.random() < 0.85),
    )


def another(rng: np.random.Generator, *taken: str) -> str:
    """A colour name that is none of `taken`."""
    return str(rng.choice([name for name in COLOURS if name not in taken]))


def on_white(scene: Scene) -> Scene:
    """The product cut out on plain white."""
    return replace(scene, background="plain", background_colour="white", shadow=False)
