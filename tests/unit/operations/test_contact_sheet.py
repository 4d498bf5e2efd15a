from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from kontext_batch.errors import StepError
from kontext_batch.operations.contact_sheet import Grid, contact_sheet
from kontext_batch.operations.pictures import BadPicture, srgb_profile
from kontext_batch.planning.labels import as_ascii, can_be_drawn
from tests.unit.operations.making import BLACK, BLUE, GREEN, RED, WHITE, decoded, loaded, pixel, plain

LIMIT = 10_000_000
COLOURS = [RED, GREEN, BLUE, (255, 255, 0), (0, 255, 255)]


def params(labels: list[str | None], **changes: Any) -> dict[str, Any]:
    return {
        "columns": 3,
        "cell": {"width": 96, "height": 64},
        "labels": labels,
        "background": "#FFFFFF",
        "format": "png",
        "quality": None,
        "icc": "srgb",
        **changes,
    }


def sheet_of(labels: list[str | None], **changes: Any) -> Image.Image:
    cells = [loaded(plain((96, 64), COLOURS[n]), "cell", n) for n in range(len(labels))]
    return decoded(contact_sheet(params(labels, **changes), cells, max_pixels=LIMIT).data)


def grid(count: int, *, labelled: bool) -> Grid:
    return Grid.of(count, 3, (96, 64), labelled=labelled)


def inked(sheet: Image.Image, box: tuple[int, int, int, int], background: int) -> tuple[int, int, int, int] | None:
    """Box of what differs from the background, inside of `box`."""
    part = np.asarray(sheet.crop(box).convert("L")).astype(int)
    return Image.fromarray(np.abs(part - background) > 60).getbbox()


def test_pictures_lie_in_rows_in_the_order_of_their_positions() -> None:
    cells = [loaded(plain((96, 64), COLOURS[n]), "cell", n) for n in (3, 0, 4, 2, 1)]
    result = contact_sheet(params([None] * 5), cells, max_pixels=LIMIT)
    sheet, where = decoded(result.data), grid(5, labelled=False)

    assert sheet.size == (result.width, result.height) == where.size == (3 * 98 + 2, 2 * 66 + 2)
    for index, colour in enumerate(COLOURS):
        left, top = where.corner(index)
        assert np.asarray(sheet.crop((left, top, left + 96, top + 64))).reshape(-1, 3).tolist() == (
            [list(colour)] * 96 * 64
        )
    assert pixel(sheet, 1, 1) == WHITE
    assert pixel(sheet, *where.corner(5)) == WHITE, "the last row is not full"
    assert sheet.info["icc_profile"] == srgb_profile()


def test_a_sheet_is_no_wider_than_its_pictures() -> None:
    assert sheet_of([None, None]).size == (2 * 98 + 2, 66 + 2)
    assert sheet_of([None, None], columns=1).size == (98 + 2, 2 * 66 + 2)


def test_pictures_keep_their_aspect_in_the_cell() -> None:
    cells = [loaded(plain((10, 20), RED), "cell", 0)]
    sheet = decoded(contact_sheet(params([None]), cells, max_pixels=LIMIT).data)
    same = (np.asarray(sheet) == RED).all(axis=2)

    assert Image.fromarray(same).getbbox() == (2 + 32, 2, 2 + 64, 2 + 64)


def test_transparency_shows_the_background() -> None:
    cells = [loaded(plain((96, 64), (*RED, 0), "RGBA"), "cell", 0)]
    sheet = decoded(contact_sheet(params([None], background="#00FF00"), cells, max_pixels=LIMIT).data)

    assert sheet.convert("RGB").getcolors() == [(100 * 68, GREEN)]


def test_labels_stand_under_their_cells_in_the_middle() -> None:
    sheet, where = sheet_of(["RX-100", None, "ja"]), grid(3, labelled=True)
    assert sheet.size[1] == 64 + where.label_height + 2 * where.gap

    def below(index: int) -> tuple[int, int, int, int]:
        left, top = where.corner(index)
        return left, top + 64, left + 96, top + 64 + where.label_height

    first, second, third = (inked(sheet, below(index), 255) for index in range(3))
    assert second is None
    assert first is not None
    assert third is not None
    assert abs((first[0] + first[2]) / 2 - 48) <= 2
    assert first[2] - first[0] > third[2] - third[0]
    assert sheet.tobytes() == sheet_of(["RX-100", None, "ja"]).tobytes()
    assert sheet.tobytes() != sheet_of(["RX-200", None, "ja"]).tobytes()


def test_labels_are_light_on_dark_and_dark_on_light() -> None:
    where = grid(1, labelled=True)
    left, top = where.corner(0)
    box = (left, top + 64, left + 96, top + 64 + where.label_height)

    light = np.asarray(sheet_of(["RX"], background="#FFFFFF").crop(box))
    dark = np.asarray(sheet_of(["RX"], background="#101010").crop(box))

    assert light.min() < 100
    assert dark.max() > 180


@pytest.mark.parametrize("label", ["a very long name of a product " * 4, "W" * 400, "line one\nline two\tthree " * 3])
def test_a_label_too_long_stays_in_its_cell(label: str) -> None:
    sheet, where = sheet_of([None, label, None]), grid(3, labelled=True)
    left, top = where.corner(1)
    band = (0, top + 64, sheet.width, top + 64 + where.label_height + where.gap)

    found = inked(sheet, band, 255)

    assert found is not None
    assert left - 1 <= found[0] < found[2] <= left + 96 + 1
    assert found[3] <= where.label_height


def test_labels_are_spelled_with_the_letters_of_the_font() -> None:
    assert as_ascii("Größe 42 –\n señor’s Œuvre\t№") == "Grosse 42 - senor's OEuvre No"
    assert as_ascii("RX-100 写真 ja") == "RX-100 ?? ja"
    assert can_be_drawn("Größe 42 – Łódź?")
    assert not can_be_drawn("RX-100 写真 ja")
    # No character of the font draws the box that stands for a missing glyph.
    font = ImageFont.load_default(20)
    missing = bytes(font.getmask("写"))
    assert not [char for char in map(chr, range(33, 127)) if bytes(font.getmask(char)) == missing]


def test_an_empty_label_is_none() -> None:
    assert sheet_of(["", None]).tobytes() == sheet_of([None, None]).tobytes()


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_a_sheet_has_the_format_that_is_wanted(name: str) -> None:
    cells = [loaded(plain((96, 64), RED), "cell", 0)]
    result = contact_sheet(params(["x"], format=name, quality=80), cells, max_pixels=LIMIT)

    assert result.media_type == f"image/{name}"
    assert (decoded(result.data).format or "").lower() == name


def test_a_sheet_that_is_too_large_is_refused_before_it_is_drawn() -> None:
    cells = [loaded(plain((96, 64), RED), "cell", n) for n in range(30)]

    with pytest.raises(StepError, match=r"30 cells make 296x662, more than the 0.1 million pixels"):
        contact_sheet(params([None] * 30), cells, max_pixels=100_000)


def test_bad_cells_and_bad_parameters_are_told() -> None:
    good = loaded(plain((9, 9), BLACK), "cell", 0)

    with pytest.raises(BadPicture, match=r"^cell 2: not an image"):
        contact_sheet(params([None, None]), [good, loaded(b"text", "cell", 1)], max_pixels=LIMIT)
    for wanted, cells in (
        (params([None, None]), [good]),
        (params([]), []),
        (params([None], columns=0), [good]),
        (params([None], cell={"width": 0, "height": 3}), [good]),
        (params([None], background="white"), [good]),
        (params([None], background="transparent"), [good]),
        (params([None], format="tiff"), [good]),
    ):
        with pytest.raises(StepError):
            contact_sheet(wanted, cells, max_pixels=LIMIT)
