from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, JpegImagePlugin

from kontext_batch.errors import StepError
from kontext_batch.operations import encoding
from kontext_batch.operations.encoding import FORMATS, LOWEST_QUALITY, encode
from kontext_batch.operations.finish import finish
from kontext_batch.operations.pictures import BadPicture, srgb_profile
from kontext_batch.ports import LoadedPicture
from tests.unit.operations.making import (
    BLACK,
    BLUE,
    GREEN,
    RED,
    WHITE,
    adobe_rgb_profile,
    decoded,
    encoded,
    loaded,
    noise,
    pixel,
    plain,
)

LIMIT = 10_000_000


def params(width: int = 40, height: int = 40, **changes: Any) -> dict[str, Any]:
    return {
        "size": {"width": width, "height": height},
        "fit": "pad",
        "box": None,
        "background": "#0000FF",
        "format": "png",
        "quality": None,
        "max_bytes": None,
        "icc": "srgb",
        "overlay": [],
        **changes,
    }


def finished(image: Image.Image | bytes, *logos: Image.Image, **changes: Any) -> Image.Image:
    pictures = [loaded(image), *(loaded(logo, "logo", position) for position, logo in enumerate(logos))]
    return decoded(finish(params(**changes), pictures, max_pixels=LIMIT).data)


def box_of(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of exactly this colour."""
    same = (np.asarray(image.convert("RGB")) == colour).all(axis=2)
    return Image.fromarray(same).getbbox()


# -------------------------------------------------------------------------------------------------------- pad and crop


def test_pad_shows_all_of_the_picture_and_fills_the_rest() -> None:
    made = finished(plain((100, 50), RED), width=60, height=60)

    assert made.size == (60, 60)
    assert made.mode == "RGB"
    assert box_of(made, RED) == (0, 15, 60, 45)
    assert made.tobytes().count(bytes(BLUE)) >= 60 * 30
    assert {pixel(made, x, y) for x in range(60) for y in (*range(15), *range(45, 60))} == {BLUE}


def test_crop_fills_the_size_from_the_middle() -> None:
    bands = plain((120, 40), GREEN)
    bands.paste(RED, (40, 0, 80, 40))

    made = finished(bands, width=20, height=20, fit="crop")

    assert made.size == (20, 20)
    assert {pixel(made, x, y) for x in range(3, 17) for y in range(20)} == {RED}


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("size", [(97, 61), (61, 97), (333, 100), (500, 499)])
def test_a_circle_stays_a_circle(size: tuple[int, int], fit: str) -> None:
    picture = plain((301, 203), BLACK)
    ImageDraw.Draw(picture).ellipse((125, 76, 175, 126), fill=WHITE)

    made = finished(picture, width=size[0], height=size[1], fit=fit, background="#000000")
    rows, columns = np.nonzero(np.asarray(made.convert("L")) > 127)

    assert made.size == size
    width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
    assert abs(int(width) - int(height)) <= 1
    assert abs(columns.mean() - (size[0] - 1) / 2) < 1
    assert abs(rows.mean() - (size[1] - 1) / 2) < 1


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_the_same_size_keeps_every_pixel(fit: str) -> None:
    picture = noise((37, 29))

    assert finished(picture, width=37, height=29, fit=fit).tobytes() == picture.tobytes()


@pytest.mark.parametrize(("source", "size"), [((1000, 1), (10, 10)), ((1, 1000), (7, 300)), ((3, 3), (1, 1))])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_extreme_sizes_are_exact_too(source: tuple[int, int], size: tuple[int, int], fit: str) -> None:
    assert finished(plain(source, RED), width=size[0], height=size[1], fit=fit).size == size


def test_the_box_is_cut_out_first() -> None:
    canvas = plain((100, 80), GREEN)
    canvas.paste(RED, (10, 20, 70, 60))

    made = finished(canvas, box={"x": 10, "y": 20, "width": 60, "height": 40}, width=120, height=80)

    assert box_of(made, RED) == (0, 0, 120, 80)
    assert set(np.asarray(made).reshape(-1, 3)[:, 1]) == {0}, "nothing of the padding bleeds in"


@pytest.mark.parametrize(
    "box", [(0, 0, 101, 80), (-1, 0, 10, 10), (0, 0, 0, 10), (95, 0, 10, 10)], ids=["wide", "left", "empty", "right"]
)
def test_a_box_outside_of_the_picture_is_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(StepError, match="not inside of 100x80"):
        finished(plain((100, 80), RED), box=dict(zip(("x", "y", "width", "height"), box, strict=True)))


# --------------------------------------------------------------------------------------------------------------- alpha


def cutout() -> Image.Image:
    """Left half red, right half transparent green."""
    picture = plain((40, 40), (*RED, 255), "RGBA")
    picture.paste((*GREEN, 0), (20, 0, 40, 40))
    return picture


@pytest.mark.parametrize("name", ["png", "webp", "avif"])
def test_alpha_stays_where_the_format_has_it(name: str) -> None:
    made = finished(cutout(), format=name, quality=None if name == "png" else 95)

    assert made.mode == "RGBA"
    assert pixel(made, 5, 20)[3] == 255
    assert pixel(made, 35, 20)[3] == 0


def test_jpeg_shows_the_background_through_what_is_transparent() -> None:
    made = finished(cutout(), format="jpeg", quality=100)

    assert made.mode == "RGB"
    assert np.abs(np.subtract(pixel(made, 35, 20), BLUE)).max() < 8
    assert np.abs(np.subtract(pixel(made, 5, 20), RED)).max() < 8


def test_half_transparent_mixes_with_the_background() -> None:
    made = finished(plain((40, 40), (*RED, 128), "RGBA"), format="jpeg", quality=100)

    assert np.abs(np.subtract(pixel(made, 20, 20), (128, 0, 127))).max() <= 3


def test_colour_under_transparency_does_not_bleed_when_resized() -> None:
    made = finished(cutout(), width=17, height=17, background="#FF0000", format="jpeg", quality=100)

    assert np.asarray(made)[:, :, 1].max() < 12, "the transparent green shows nowhere"


def test_padding_of_a_transparent_picture_is_background_or_transparent() -> None:
    filled = finished(cutout(), width=60, height=40)
    clear = finished(cutout(), width=60, height=40, background="transparent")

    assert pixel(filled, 2, 20) == (*BLUE, 255)
    assert pixel(filled, 45, 20)[3] == 0
    assert pixel(clear, 2, 20)[3] == 0
    assert pixel(clear, 15, 20) == (*RED, 255)
    assert finished(plain((40, 40), RED), width=60, height=40, background="transparent").mode == "RGBA"
    with pytest.raises(StepError, match="jpeg file cannot have a transparent background"):
        finished(cutout(), background="transparent", format="jpeg")


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_what_it_says_in_srgb_without_metadata(name: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    source = encoded(
        noise((50, 40)), "JPEG", exif=exif, comment=b"secret word", dpi=(300, 300), icc_profile=adobe_rgb_profile()
    )

    result = finish(params(64, 48, format=name, quality=80), [loaded(source)], max_pixels=LIMIT)
    made = decoded(result.data)

    assert (made.format or "").lower() == name
    assert made.size == (result.width, result.height) == (64, 48)
    assert result.media_type == f"image/{name}"
    assert made.info["icc_profile"] == srgb_profile()
    assert not dict(made.getexif())
    assert b"secret" not in result.data
    assert b"Adobe" not in result.data.replace(srgb_profile(), b"")
    assert "comment" not in made.info
    assert min(result.timings.values()) >= 0
    assert set(result.timings) == {"render", "encode"}


@pytest.mark.parametrize("name", FORMATS)
def test_equal_inputs_give_equal_bytes(name: str) -> None:
    wanted = params(300, 200, format=name, quality=70, overlay=[{"anchor": "left", "margin": 3, "scale": 0.2}])
    pictures = [loaded(noise((310, 190))), loaded(cutout(), "logo")]

    assert len({finish(wanted, pictures, max_pixels=LIMIT).data for _ in range(3)}) == 1


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_quality_is_followed(name: str) -> None:
    low, middle, high = (len(encode(noise((60, 60)), name, quality, None).data) for quality in (35, 60, 95))

    assert low < middle < high


def test_colour_keeps_its_resolution_at_high_quality() -> None:
    sampling = [
        JpegImagePlugin.get_sampling(decoded(encode(noise((32, 32)), "jpeg", quality, None).data))
        for quality in (90, 89)
    ]

    assert sampling == [0, 2]


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_a_byte_limit_is_met_at_the_highest_quality_that_fits(name: str) -> None:
    picture = noise((80, 60))
    limit = len(encode(picture, name, 61, None).data) + 1

    met = encode(picture, name, 88, limit)

    assert len(met.data) <= limit
    assert met.quality is not None
    assert 61 <= met.quality < 88
    assert len(encode(picture, name, met.quality + 1, None).data) > limit
    assert met == encode(picture, name, met.quality, None)
    assert finish(
        params(80, 60, format=name, quality=88, max_bytes=limit), [loaded(picture)], max_pixels=LIMIT
    ).data == (met.data)


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_a_byte_limit_that_would_spoil_the_picture_is_told(name: str) -> None:
    picture = noise((80, 60))
    smallest = len(encode(picture, name, LOWEST_QUALITY, None).data)

    assert encode(picture, name, 88, smallest).quality in (LOWEST_QUALITY, LOWEST_QUALITY + 1)  # avif has 64 steps
    with pytest.raises(StepError, match=rf"80x60 {name} has {smallest} bytes at quality 30, .* max_bytes is "):
        encode(picture, name, 88, smallest - 1)
    assert encode(picture, name, 10, None).quality == 10, "a recipe may ask for less itself"
    with pytest.raises(StepError, match="at quality 10"):
        encode(picture, name, 10, 50)


def test_the_search_for_a_quality_takes_few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []
    real = encoding._save

    def counted(*args: Any, **options: Any) -> bytes:
        attempts.append(args[2])
        return real(*args, **options)

    monkeypatch.setattr(encoding, "_save", counted)
    picture = noise((80, 60))
    encode(picture, "jpeg", 95, len(real(picture, FORMATS["jpeg"], 64, None)))

    assert len(attempts) <= 9


def test_png_is_packed_harder_and_else_told() -> None:
    picture = noise((8, 6)).resize((400, 300), Image.Resampling.NEAREST)
    quick = len(encode(picture, "png", None, None).data)
    packed = encode(picture, "png", None, quick - 1)
    assert len(packed.data) < quick
    assert decoded(packed.data).tobytes() == picture.tobytes()

    with pytest.raises(StepError, match=r"png has \d+ bytes .* choose jpeg, webp or avif"):
        encode(noise((80, 60)), "png", None, 1_000)


def test_sides_that_a_format_cannot_have_are_told() -> None:
    with pytest.raises(StepError, match="20000x1: a side of a webp file is at most 16383 pixels"):
        encode(plain((20_000, 1), RED), "webp", 80, None)


# ------------------------------------------------------------------------------------------------------------ overlays

PLACES = {
    "top-left": (5, 5),
    "top": (45, 5),
    "top-right": (85, 5),
    "left": (5, 35),
    "center": (45, 35),
    "right": (85, 35),
    "bottom-left": (5, 65),
    "bottom": (45, 65),
    "bottom-right": (85, 65),
}


def overlay(anchor: str = "bottom-right", margin: Any = 0, scale: float | None = None) -> dict[str, Any]:
    return {"anchor": anchor, "margin": margin, "scale": scale}


@pytest.mark.parametrize("anchor", PLACES)
def test_each_anchor_is_where_it_says(anchor: str) -> None:
    made = finished(plain((100, 80), BLUE), plain((10, 10), RED), width=100, height=80, overlay=[overlay(anchor, 5)])

    left, top = PLACES[anchor]
    assert box_of(made, RED) == (left, top, left + 10, top + 10)
    assert np.asarray(made).reshape(-1, 3).tolist().count(list(BLUE)) == 100 * 80 - 100


@pytest.mark.parametrize(("margin", "pixels"), [("10%", 8), ("2.5%", 2), ("12px", 12), ("7", 7), (0, 0)])
def test_a_margin_is_pixels_or_percent_of_the_shorter_side(margin: Any, pixels: int) -> None:
    made = finished(
        plain((100, 80), BLUE), plain((10, 10), RED), width=100, height=80, overlay=[overlay("top-left", margin)]
    )

    assert box_of(made, RED) == (pixels, pixels, pixels + 10, pixels + 10)


def test_scale_is_a_part_of_the_results_width_and_keeps_the_aspect() -> None:
    made = finished(
        plain((200, 100), BLUE), plain((80, 20), RED), width=200, height=100, overlay=[overlay("top-left", 0, 0.25)]
    )

    assert box_of(made, RED) == (0, 0, 50, 13)


@pytest.mark.parametrize(
    ("logo", "scale", "expected"),
    [((400, 100), None, (10, 10, 90, 30)), ((30, 300), 0.5, (10, 10, 16, 70))],
    ids=["too wide", "too high"],
)
def test_a_logo_too_large_is_made_smaller_to_keep_its_margin(
    logo: tuple[int, int], scale: float | None, expected: tuple[int, int, int, int]
) -> None:
    made = finished(
        plain((100, 80), BLUE), plain(logo, RED), width=100, height=80, overlay=[overlay("top-left", 10, scale)]
    )

    assert box_of(made, RED) == expected


def test_a_margin_that_leaves_no_room_still_puts_the_logo_inside() -> None:
    made = finished(plain((40, 40), BLUE), plain((10, 10), RED), overlay=[overlay("top-left", 100)])

    assert box_of(made, RED) == (39, 39, 40, 40)


def test_logos_are_transparent_where_they_are_and_lie_in_order() -> None:
    glass = plain((10, 10), (*WHITE, 128), "RGBA")
    glass.paste((0, 0, 0, 0), (5, 0, 10, 10))
    places = [overlay("top-left"), overlay("top-left"), overlay("bottom-right")]
    wanted = params(overlay=places)
    pictures = [
        loaded(plain((10, 10), GREEN), "logo", 2),
        loaded(glass, "logo", 1),
        loaded(plain((40, 40), BLACK)),
        loaded(plain((10, 10), RED), "logo", 0),
    ]

    made = decoded(finish(wanted, pictures, max_pixels=LIMIT).data)

    assert np.abs(np.subtract(pixel(made, 2, 2), (255, 128, 128))).max() <= 1, "glass over red"
    assert pixel(made, 7, 2) == RED
    assert pixel(made, 35, 35) == GREEN


def test_a_logo_covers_a_transparent_picture() -> None:
    made = finished(cutout(), plain((10, 10), GREEN), overlay=[overlay("right")])

    assert pixel(made, 35, 20) == (*GREEN, 255)
    assert pixel(made, 35, 35)[3] == 0


def test_logos_are_brought_to_srgb_too() -> None:
    logo = encoded(plain((10, 10), (100, 150, 100)), icc_profile=adobe_rgb_profile())
    pictures = [loaded(plain((40, 40), BLACK)), loaded(logo, "logo")]

    made = decoded(finish(params(overlay=[overlay("center")]), pictures, max_pixels=LIMIT).data)

    assert pixel(made, 20, 20)[0] < 90


# ------------------------------------------------------------------------------------------------------------- refused


def test_bad_pictures_are_told_and_a_logo_by_its_number() -> None:
    with pytest.raises(BadPicture, match=r"^not an image"):
        finished(b"a text")
    with pytest.raises(BadPicture, match=r"^damaged or cut short"):
        finished(encoded(noise((99, 99)), "JPEG")[:3000])
    logos = [loaded(plain((4, 4), RED), "logo", 0), loaded(b"", "logo", 1)]
    with pytest.raises(BadPicture, match=r"^logo 2: empty \(0 bytes\)"):
        finish(params(overlay=[overlay(), overlay()]), [loaded(plain((9, 9), RED)), *logos], max_pixels=LIMIT)


def test_the_limit_of_pixels_holds_for_pictures_and_logos() -> None:
    small, large = loaded(plain((10, 10), RED)), plain((20, 20), RED)

    with pytest.raises(BadPicture, match="20x20 is more"):
        finish(params(), [loaded(large)], max_pixels=100)
    with pytest.raises(BadPicture, match="logo 1: 20x20 is more"):
        finish(params(overlay=[overlay()]), [small, loaded(large, "logo")], max_pixels=100)


@pytest.mark.parametrize(
    "changes",
    [
        {"fit": "stretch"},
        {"background": "red"},
        {"size": {"width": 0, "height": 4}},
        {"size": {}},
        {"box": [1, 2, 3, 4]},
        {"overlay": [{"anchor": "middle", "margin": 0, "scale": None}]},
        {"overlay": [{"anchor": "left", "margin": "wide", "scale": None}]},
        {"overlay": [{"anchor": "left", "margin": -1, "scale": None}]},
        {"format": "gif"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_parameters_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(StepError):
        finished(plain((9, 9), RED), *([plain((4, 4), RED)] if "overlay" in changes else []), **changes)


def test_missing_pictures_are_refused() -> None:
    image = loaded(plain((9, 9), RED))
    cases: list[tuple[list[LoadedPicture], int]] = [([], 0), ([image, image], 0), ([image], 1), ([image], 2)]
    for pictures, overlays in cases:
        with pytest.raises(StepError, match="reads one image and"):
            finish(params(overlay=[overlay()] * overlays), pictures, max_pixels=LIMIT)


def test_results_open_in_pillow_without_a_warning() -> None:
    """Warnings are errors here."""
    for name in FORMATS:
        data = finish(params(format=name, quality=80), [loaded(noise((40, 40)))], max_pixels=LIMIT).data
        Image.open(BytesIO(data)).verify()
