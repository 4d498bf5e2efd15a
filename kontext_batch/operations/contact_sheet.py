"""`contact_sheet`: many pictures on one sheet, in rows, each with a label under it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from kontext_batch.errors import StepError
from kontext_batch.operations import layout
from kontext_batch.operations.encoding import encode, format_named
from kontext_batch.operations.pictures import BadPicture, open_picture
from kontext_batch.planning.labels import as_ascii
from kontext_batch.ports import LoadedPicture, MadePicture

VERSION = 1
"""Raised when equal parameters make other pixels; part of the step keys."""

ELLIPSIS = "..."


@dataclass(frozen=True, slots=True)
class Grid:
    """Where everything lies on a sheet; pixels."""

    columns: int
    rows: int
    cell: tuple[int, int]
    gap: int
    """Around and between the cells."""
    font_size: int
    label_height: int
    """Below each cell; 0 when nothing is labelled."""

    @staticmethod
    def of(count: int, columns: int, cell: tuple[int, int], *, labelled: bool) -> Grid:
        """The grid for `count` pictures (1 or more)."""
        columns = min(columns, count)
        shorter = min(cell)
        font_size = max(9, min(32, shorter // 18))
        return Grid(
            columns=columns,
            rows=-(-count // columns),
            cell=cell,
            gap=max(2, shorter // 32),
            font_size=font_size,
            label_height=font_size * 3 // 2 if labelled else 0,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Of the whole sheet."""
        width, height = self.cell[0] + self.gap, self.cell[1] + self.label_height + self.gap
        return self.columns * width + self.gap, self.rows * height + self.gap

    def corner(self, index: int) -> tuple[int, int]:
        """Left and top of a cell, row by row."""
        row, column = divmod(index, self.columns)
        left = self.gap + column * (self.cell[0] + self.gap)
        return left, self.gap + row * (self.cell[1] + self.label_height + self.gap)


@dataclass(frozen=True, slots=True)
class _Wanted:
    columns: int
    cell: tuple[int, int]
    labels: tuple[str | None, ...]
    background: layout.Colour
    format: str
    quality: int | None

    @staticmethod
    def read(params: Mapping[str, Any]) -> _Wanted:
        wanted = _Wanted(
            columns=int(params["columns"]),
            cell=(int(params["cell"]["width"]), int(params["cell"]["height"])),
            labels=tuple(params["labels"]),
            background=layout.parse_colour(params["background"]),
            format=params["format"],
            quality=params.get("quality"),
        )
        if wanted.columns < 1 or min(wanted.cell) < 1:
            raise ValueError(f"{wanted.columns} columns of {wanted.cell}")
        return wanted


def contact_sheet(
    params: Mapping[str, Any], pictures: Sequence[LoadedPicture], *, max_pixels: int, xmp: bytes | None = None
) -> MadePicture:
    """One picture of role `cell` for each label (which may be null). Raises `StepError`.

    The sheet itself may have `max_pixels` at most. Labels are drawn in ASCII (`planning.labels`); the plan notes those
    that lose letters by it. A label that is too long ends in `...`.
    """
    started = time.perf_counter()
    try:
        wanted = _Wanted.read(params)
    except (KeyError, TypeError, ValueError) as error:
        raise StepError(f"contact_sheet: the parameters are malformed ({error})") from error
    cells = sorted((each for each in pictures if each.role == "cell"), key=lambda each: each.position)
    if not cells or len(cells) != len(wanted.labels):
        raise StepError(f"contact_sheet: {len(wanted.labels)} labels for {len(cells)} pictures")
    if wanted.background[3] < 255:
        raise StepError("contact_sheet: the background must be a colour")

    grid = Grid.of(len(cells), wanted.columns, wanted.cell, labelled=any(wanted.labels))
    width, height = grid.size
    if width * height > max_pixels:
        raise StepError(
            f"contact_sheet: {len(cells)} cells make {width}x{height}, more than the {max_pixels / 1e6:g} million "
            "pixels allowed; choose a smaller cell"
        )
    sheet = Image.new("RGB", grid.size, wanted.background[:3])
    for index, (cell, label) in enumerate(zip(cells, wanted.labels, strict=True)):
        left, top = grid.corner(index)
        try:
            picture = open_picture(cell.data, max_pixels=max_pixels)
        except BadPicture as error:
            raise BadPicture(f"cell {index + 1}: {error}") from error
        flat = layout.flatten(picture, wanted.background)
        sheet.paste(layout.contain(flat, grid.cell, wanted.background), (left, top))
        if label:
            _draw_label(sheet, grid, (left, top + grid.cell[1]), label, wanted.background)
    rendered = time.perf_counter()
    data = encode(sheet, wanted.format, wanted.quality, None, xmp=xmp).data
    timings = {"render": rendered - started, "encode": time.perf_counter() - rendered}
    return MadePicture(data, format_named(wanted.format).media_type, sheet.width, sheet.height, timings)


def _draw_label(sheet: Image.Image, grid: Grid, corner: tuple[int, int], text: str, background: layout.Colour) -> None:
    font = ImageFont.load_default(grid.font_size)
    text = as_ascii(text)
    if font.getlength(text) > grid.cell[0]:
        while text and font.getlength(text + ELLIPSIS) > grid.cell[0]:
            text = text[:-1]
        text += ELLIPSIS
    # The eye's weights of red, green and blue: black on light, white on dark.
    light = 0.299 * background[0] + 0.587 * background[1] + 0.114 * background[2] > 128
    middle = corner[0] + grid.cell[0] / 2, corner[1] + grid.label_height / 2
    ImageDraw.Draw(sheet).text(middle, text, fill=(0, 0, 0) if light else (255, 255, 255), font=font, anchor="mm")
