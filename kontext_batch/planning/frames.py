"""Sizes along a chain: which canvas, which target, and where the original picture lies in what a step makes.

    source 3000x1800 --edit (keep, pad)--> 1392x752: the picture lies at x 69, the rest is padding
                     --finish (size: source)--> that box, scaled back to 3000x1800

Pixels everywhere, integers only. Nothing is ever stretched: `pad` shows all of a picture, `crop` fills all of a
canvas, `recompose` keeps the canvas and lets the model fill the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.geometry import Box, crop_box, nearest_size, pad_box
from kontext_batch.planning.plan import ImageInfo

Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True, slots=True)
class Origin:
    """How to find the picture that a chain began with."""

    box: Box
    """Where its visible part lies in the picture at hand."""
    size: Size
    """How large that part was in the original."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A picture as far as sizes go."""

    size: Size
    trim: Box | None = None
    """What is left when padding that nobody asked for is cut off; None when there is none."""
    origin: Origin | None = None
    """None when there is no way back: generated or recomposed."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a picture is brought to the canvas of an edit, and what the edit makes."""

    canvas: Size
    fit: str
    """`pad` or `crop`."""
    box: Box
    """`pad`: where the whole picture lies in the canvas. `crop`: the part of the picture that fills the canvas."""
    target: Size
    shape: Shape
    """Of the result."""


def source_shape(image: ImageInfo) -> Shape:
    """A source picture is whole and is its own origin."""
    size = (image.width, image.height)
    return Shape(size, None, Origin((0, 0, *size), size))


def fit_canvas(shape: Shape, frame: Size | None, fit: str, area: int) -> Fitted:
    """Sizes of an edit of `shape`.

    `frame`: the ratio that is wanted; None for `keep`. `fit`: `pad`, `crop` or `recompose`. `area`: the model's.
    """
    own = nearest_size(*shape.size, area=area)
    target = own if frame is None else nearest_size(*frame, area=area)
    canvas = own if fit == "recompose" else target
    how = "crop" if fit == "crop" else "pad"
    box = _box(shape.size, canvas, how)
    if canvas != target:
        return Fitted(canvas, how, box, target, Shape(target))
    origin = _moved_origin(shape.origin, shape.size, canvas, how, box)
    if frame is not None:
        # A frame is wanted with all that is in it: its padding is for the model to fill.
        return Fitted(canvas, how, box, target, Shape(target, None, origin))
    trim = _moved(shape.trim or (0, 0, *shape.size), shape.size, canvas, how, box)
    return Fitted(canvas, how, box, target, Shape(target, None if trim == (0, 0, *target) else trim, origin))


def fit_reference(size: Size, area: int) -> tuple[Size, Box]:
    """Size that a reference is brought to, and where it lies in it (always padded)."""
    canvas = nearest_size(*size, area=area)
    return canvas, _box(size, canvas, "pad")


def upscale(region: Size, size: Size, fit: str) -> float:
    """How many times a region of a picture is enlarged to make `size`; below 1 it is made smaller."""
    ratios = size[0] / region[0], size[1] / region[1]
    return max(ratios) if fit == "crop" else min(ratios)


def _box(size: Size, canvas: Size, how: str) -> Box:
    return crop_box(*size, *canvas) if how == "crop" else pad_box(*size, *canvas)


def _moved(inner: Box, size: Size, canvas: Size, how: str, box: Box) -> Box:
    """A box of the picture, in the canvas; cut at its edges."""
    x, y, w, h = box
    edges = []
    for low, length, start, extent, whole, side in (
        (inner[0], inner[2], x, w, size[0], canvas[0]),
        (inner[1], inner[3], y, h, size[1], canvas[1]),
    ):
        if how == "pad":
            first, last = start + _scaled(low, extent, whole), start + _scaled(low + length, extent, whole)
        else:
            first, last = _scaled(low - start, side, extent), _scaled(low + length - start, side, extent)
        first, last = min(max(first, 0), side - 1), max(min(last, side), 1)
        edges.append((first, max(last - first, 1)))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _moved_origin(origin: Origin | None, size: Size, canvas: Size, how: str, box: Box) -> Origin | None:
    if origin is None:
        return None
    visible = list(origin.size)
    if how == "crop":
        for axis in (0, 1):
            low, length = origin.box[axis], origin.box[axis + 2]
            start, extent = box[axis], box[axis + 2]
            seen = min(low + length, start + extent) - max(low, start)
            if seen < 1:
                return None
            visible[axis] = max(1, _scaled(seen, origin.size[axis], length))
    return Origin(_moved(origin.box, size, canvas, how, box), (visible[0], visible[1]))


def _scaled(value: int, numerator: int, denominator: int) -> int:
    """`value * numerator / denominator`, half up."""
    return (2 * value * numerator + denominator) // (2 * denominator)


def size_data(size: Size) -> Mapping[str, Any]:
    """`{width, height}`."""
    return {"width": size[0], "height": size[1]}


def box_data(box: Box) -> Mapping[str, Any]:
    """`{x, y, width, height}`."""
    return {"x": box[0], "y": box[1], "width": box[2], "height": box[3]}
