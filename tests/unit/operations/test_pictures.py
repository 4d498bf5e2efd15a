from __future__ import annotations

import random
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from kontext_batch.errors import StepError
from kontext_batch.operations.pictures import BadPicture, encode_png, open_picture, probe, srgb_profile
from tests.unit.operations.making import (
    BLUE,
    GREEN,
    RED,
    WHITE,
    adobe_rgb_profile,
    adobe_to_srgb,
    bomb,
    decoded,
    encoded,
    grey_profile,
    noise,
    pixel,
    plain,
    png16,
    to_srgb,
)

# ------------------------------------------------------------------------------------------------------- orientation

# EXIF 2.3: which side of the scene the first row and the first column of the file show.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def scene() -> npt.NDArray[np.uint8]:
    """32 x 16, a colour in each corner: none of the eight orientations looks like another."""
    values = np.zeros((16, 32, 3), np.uint8)
    values[:8, :16], values[:8, 16:], values[8:, :16], values[8:, 16:] = RED, GREEN, BLUE, WHITE
    return values


def as_stored(upright: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    rows, columns = SIDES[orientation]
    if rows in ("left", "right"):
        upright = upright.transpose(1, 0, 2)
    if rows in ("bottom", "right"):
        upright = upright[::-1]
    return np.ascontiguousarray(upright[:, ::-1] if columns in ("bottom", "right") else upright)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", SIDES)
def test_pictures_come_upright(orientation: int, format_: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if format_ in ("PNG", "TIFF") else {"quality": 100}
    data = encoded(Image.fromarray(as_stored(scene(), orientation)), format_, exif=exif, **options)

    assert probe(data) == (format_, 32, 16)
    picture = open_picture(data)

    assert picture.size == (32, 16)
    for corner, colour in {(4, 4): RED, (28, 4): GREEN, (4, 12): BLUE, (28, 12): WHITE}.items():
        assert np.abs(np.subtract(pixel(picture, *corner), colour)).max() < 12
    assert open_picture(encode_png(picture)).size == (32, 16), "turned once, not again"


@pytest.mark.parametrize(
    "damage", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff"]
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_metadata_says_nothing(damage: bytes) -> None:
    """Pillow warns of it and goes on."""
    data = encoded(plain((32, 16), RED), "JPEG", exif=damage)

    assert probe(data) == ("JPEG", 32, 16)
    assert open_picture(data).size == (32, 16)


# ------------------------------------------------------------------------------------------------------------ colour


def test_a_profile_is_followed_to_srgb() -> None:
    for colour in ((100, 150, 100), (200, 120, 90), (128, 128, 128), (255, 255, 255)):
        picture = open_picture(encoded(plain((8, 8), colour), icc_profile=adobe_rgb_profile()))

        assert np.abs(np.subtract(pixel(picture, 3, 3), adobe_to_srgb(colour))).max() < 1.6, colour
    assert np.abs(np.subtract((100, 150, 100), adobe_to_srgb((100, 150, 100)))).max() > 10, "the profile matters"


def test_a_profile_leaves_transparency_alone() -> None:
    image = plain((8, 8), (100, 150, 100, 77), "RGBA")

    found = pixel(open_picture(encoded(image, icc_profile=adobe_rgb_profile())), 3, 3)

    assert found[3] == 77
    assert np.abs(np.subtract(found[:3], adobe_to_srgb((100, 150, 100)))).max() < 1.6


def test_grey_follows_its_own_profile_and_that_of_a_colour_space() -> None:
    dark = Image.new("L", (8, 8), 60)

    linear = pixel(open_picture(encoded(dark, icc_profile=grey_profile(1.0))), 3, 3)
    assert np.abs(np.subtract(linear, to_srgb(np.array([60 / 255] * 3)))).max() < 1.6

    adobe = pixel(open_picture(encoded(dark, icc_profile=adobe_rgb_profile())), 3, 3)
    assert np.abs(np.subtract(adobe, adobe_to_srgb((60, 60, 60)))).max() < 1.6


def test_a_profile_of_another_colour_space_is_ignored() -> None:
    picture = open_picture(encoded(plain((8, 8), (10, 100, 200)), icc_profile=grey_profile(1.0)))

    assert pixel(picture, 3, 3) == (10, 100, 200)


def test_a_damaged_profile_is_told() -> None:
    with pytest.raises(BadPicture, match="colour profile is damaged"):
        open_picture(encoded(plain((8, 8), RED), icc_profile=b"no profile at all"))


def test_cmyk_as_tiff_and_as_adobes_inverted_jpeg() -> None:
    for colour, expected in (((0, 255, 255, 0), RED), ((255, 0, 255, 0), GREEN), ((0, 0, 0, 128), (127, 127, 127))):
        image = plain((16, 16), colour, "CMYK")
        jpeg = encoded(image, "JPEG", quality=100)
        assert b"Adobe" in jpeg[:200], "values are stored inverted, as Photoshop does"

        for data in (jpeg, encoded(image, "TIFF")):
            picture = open_picture(data)
            assert picture.mode == "RGB"
            assert np.abs(np.subtract(pixel(picture, 8, 8), expected)).max() <= 3


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 0x0FFF, 0x8000, 65535 - 257, 65535]], np.uint16)
    expected = [0, 1, 16, 128, 254, 255]

    for data in (encoded(Image.fromarray(values)), encoded(Image.fromarray(values), "TIFF")):
        picture = open_picture(data)
        assert picture.mode == "RGB"
        assert [pixel(picture, x, 0)[0] for x in range(6)] == expected


def test_sixteen_bit_colour_and_alpha_are_scaled_not_clipped() -> None:
    colour = np.array([[[0, 0x8000, 65535], [0x1234, 0xABCD, 0x00FF]]], np.uint16)
    rgb = open_picture(png16(colour, 2))
    assert np.abs(np.array(rgb, dtype=int) - colour / 257).max() <= 1

    with_alpha = np.array([[[0, 0x8000, 65535, 0x4000], [0x1234, 0xABCD, 0x00FF, 65535]]], np.uint16)
    rgba = open_picture(png16(with_alpha, 6))
    assert rgba.mode == "RGBA"
    assert np.abs(np.array(rgba, dtype=int) - with_alpha / 257).max() <= 1

    grey_alpha = np.array([[[0x8000, 0x4000], [65535, 65535]]], np.uint16)
    la = open_picture(png16(grey_alpha, 4))
    assert np.abs(np.array(la, dtype=int)[0, :, 3] - grey_alpha[0, :, 1] / 257).max() <= 1
    assert np.abs(np.array(la, dtype=int)[0, :, 0] - grey_alpha[0, :, 0] / 257).max() <= 1


def test_one_grey_of_sixteen_bits_may_be_transparent() -> None:
    values = np.array([[[0x1234], [0x1235]]], np.uint16)

    picture = open_picture(png16(values, 0, (b"tRNS", b"\x12\x34")))

    assert [pixel(picture, x, 0)[3] for x in (0, 1)] == [0, 255]


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.new("P", (4, 2))
    palette.putpalette([*RED, *GREEN, *BLUE])
    palette.putdata([0, 1, 2, 0, 1, 2, 0, 1])

    opaque = open_picture(encoded(palette))
    one_index = open_picture(encoded(palette, transparency=1))
    each_index = open_picture(encoded(palette, transparency=bytes([255, 128, 0])))

    assert opaque.mode == "RGB"
    assert [pixel(opaque, x, 0) for x in range(3)] == [RED, GREEN, BLUE]
    assert [pixel(one_index, x, 0) for x in (0, 2)] == [(*RED, 255), (*BLUE, 255)]
    assert pixel(one_index, 1, 0)[3] == 0
    assert [pixel(each_index, x, 0)[3] for x in range(3)] == [255, 128, 0]


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("L", (4, 4), 90), {}, (90, 90, 90)),
        (Image.new("L", (4, 4), 90), {"transparency": 90}, (90, 90, 90, 0)),
        (Image.new("LA", (4, 4), (90, 40)), {}, (90, 90, 90, 40)),
        (Image.new("1", (4, 4), 1), {}, WHITE),
        (plain((4, 4), RED), {"transparency": RED}, (*RED, 0)),
        (plain((4, 4), (1, 2, 3, 4), "RGBA"), {}, (1, 2, 3, 4)),
        (plain((4, 4), (1, 2, 3, 255), "RGBA"), {}, (1, 2, 3)),
    ],
    ids=["L", "L with a key", "LA", "1", "RGB with a key", "RGBA", "RGBA that is opaque"],
)
def test_every_mode_becomes_rgb_or_rgba(image: Image.Image, options: dict[str, Any], expected: object) -> None:
    assert pixel(open_picture(encoded(image, **options)), 1, 1) == expected


def test_metadata_is_gone() -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    data = encoded(plain((8, 8), RED), "JPEG", exif=exif, comment=b"secret word", dpi=(300, 300))
    assert b"secret" in data

    picture = open_picture(data)

    assert picture.info == {}
    assert dict(picture.getexif()) == {}
    assert b"secret" not in encode_png(picture)


def test_encode_png_gives_equal_bytes_and_carries_srgb() -> None:
    image = noise((40, 30))
    tagged = image.copy()
    tagged.info = {"dpi": (300, 300), "icc_profile": b"other", "Comment": "x"}

    first, again, third = encode_png(image), encode_png(image.copy()), encode_png(tagged)

    assert first == again == third
    assert decoded(first).info == {"icc_profile": srgb_profile()}
    assert open_picture(first).tobytes() == image.tobytes()


def test_the_srgb_profile_is_the_same_whenever_it_is_made() -> None:
    first = srgb_profile()
    srgb_profile.cache_clear()
    time.sleep(1.1)  # it would hold the second in which it was made

    assert srgb_profile() == first
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(first)))


# ---------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("call", [probe, open_picture])
@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"this is a text, though it is called packshot.png", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image|damaged header"),
        (b"\xff\xd8\xff", "not an image|damaged header"),
        (encoded(plain((4, 4), RED), "GIF"), "GIF is not read here; save it as"),
        (encoded(plain((4, 4), RED), "BMP"), "BMP is not read here"),
        (b"%PDF-1.7 ...", "PDF is not read"),
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1", "HEIC is not read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is not read"),
    ],
    ids=["empty", "text", "PNG signature", "JPEG signature", "GIF", "BMP", "PDF", "HEIC", "SVG"],
)
def test_what_is_no_picture_is_told(data: bytes, told: str, call: Callable[[bytes], object]) -> None:
    with pytest.raises(BadPicture, match=told) as error:
        call(data)
    assert isinstance(error.value, StepError)


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "AVIF", "TIFF"])
def test_several_frames_are_refused(format_: str) -> None:
    frames = [noise((16, 16), seed) for seed in range(3)]
    data = encoded(frames[0], format_, save_all=True, append_images=frames[1:])

    with pytest.raises(BadPicture, match="holds 3 frames"):
        probe(data)


def test_a_cameras_mpo_is_its_first_picture() -> None:
    data = encoded(plain((16, 16), RED), "MPO", save_all=True, append_images=[plain((16, 16), BLUE)])
    assert Image.open(BytesIO(data)).format == "MPO"

    assert probe(data) == ("JPEG", 16, 16)
    assert np.abs(np.subtract(pixel(open_picture(data), 8, 8), RED)).max() < 5


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_a_file_that_is_cut_short_is_told(format_: str) -> None:
    data = encoded(noise((200, 200)), format_)
    cut = data[: len(data) * 2 // 3]

    with pytest.raises(BadPicture):
        open_picture(cut)


def test_the_header_of_a_cut_jpeg_still_tells_its_size() -> None:
    data = encoded(noise((200, 100)), "JPEG")

    assert probe(data[: len(data) // 2]) == ("JPEG", 200, 100)
    with pytest.raises(BadPicture, match="damaged or cut short"):
        open_picture(data[: len(data) // 2])


@pytest.mark.parametrize("call", [probe, open_picture])
@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (20_000, 20_000), (2_000_000, 2_000), (2**31 - 1, 9)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    width: int, height: int, call: Callable[[bytes], object]
) -> None:
    data = bomb(width, height)
    assert len(data) < 200

    started = time.perf_counter()
    with pytest.raises(BadPicture, match="more than the 100 million pixels"):
        call(data)
    assert time.perf_counter() - started < 0.5


def test_the_limit_of_pixels_can_be_set_and_is_the_most_allowed() -> None:
    data = encoded(plain((20, 10), RED))

    assert probe(data, max_pixels=200) == ("PNG", 20, 10)
    assert open_picture(data, max_pixels=200).size == (20, 10)
    for call in (probe, open_picture):
        with pytest.raises(BadPicture, match="20x10 is more than the"):
            call(data, max_pixels=199)
    assert probe(bomb(10_000, 10_000)) == ("PNG", 10_000, 10_000)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_give_a_picture_or_bad_picture_and_nothing_else(format_: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise((24, 16)), format_, exif=exif, icc_profile=adobe_rgb_profile())
    chance = random.Random(7)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 4, 30))):
            # Headers are where the traps are.
            place = chance.randrange(min(len(data), 400) if chance.random() < 0.7 else len(data))
            damaged[place] = chance.randrange(256)
        try:
            picture = open_picture(bytes(damaged), max_pixels=10_000)
            assert picture.mode in ("RGB", "RGBA")
        except BadPicture:
            refused += 1
    assert refused > 10
