"""Untrusted picture files: probed by their header, opened with care, always ending as 8-bit sRGB.

Formats: JPEG (cameras' MPO too, first picture), PNG, WebP, AVIF, TIFF. Others are named and refused: a short list of
decoders is a small surface. A file with several frames or pages is refused, for nobody said which one is meant.
"""

from __future__ import annotations

from functools import cache
from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from kontext_batch.errors import StepError

DEFAULT_MAX_PIXELS: Final = 100_000_000
"""As `settings.max_pixels`: a 100 MP camera; decoded, 400 MB."""

FORMATS: Final = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")
"""Pillow's names of what is read."""

_ORIENTATION: Final = 0x0112
"""Number of the EXIF tag."""
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_CHANGE_PLACES: Final = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}

# Pillow's own bomb guard is one number for the whole process, and warns below 100 MP. The guard here takes its limit
# for each call and looks before anything is decoded; Pillow's stays as a backstop far above it.
Image.MAX_IMAGE_PIXELS = 1 << 29

_SIGNATURES: Final = (
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"<svg", "SVG"),
)


class BadPicture(StepError):
    """A picture that cannot be used; the message says why, without naming the file."""


def probe(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[str, int, int]:
    """Format (one of `FORMATS`), width and height after EXIF orientation, from the header alone.

    Raises `BadPicture`: empty, no image, another format, several frames, too many pixels. What is damaged behind the
    header shows only in `open_picture`.
    """
    image = _open(data, max_pixels)
    width, height = image.size
    if _turn(image) in _SIDES_CHANGE_PLACES:
        width, height = height, width
    return _format(image), width, height


def open_picture(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """The picture decoded whole: `RGB`, or `RGBA` when something of it is transparent, in sRGB, upright, no metadata.

    Colours come by the embedded profile (relative colorimetric with black point compensation); without one the file
    is taken as sRGB, CMYK as plain inverted RGB. 16 bits are scaled to 8. Raises `BadPicture`.
    """
    image = _open(data, max_pixels)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like at damaged files
        raise BadPicture(f"damaged or cut short: {error}") from error
    profile = image.info.get("icc_profile")
    turn = _turn(image)
    picture = _to_srgb(_to_eight_bits(image), profile)
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255):
        picture = picture.convert("RGB")
    picture.info = {}  # Pillow would write comments and profiles of the source into the result
    return picture


def encode_png(image: Image.Image, *, xmp: bytes | None = None) -> bytes:
    """Lossless, sRGB profile embedded, no metadata but `xmp`; equal pixels give equal bytes (of one zlib)."""
    assert image.mode in ("RGB", "RGBA"), f"{image.mode} is not what open_picture gives"
    plain = image.copy()
    plain.info = {}
    buffer = BytesIO()
    plain.save(buffer, "PNG", compress_level=6, icc_profile=srgb_profile(), pnginfo=png_xmp(xmp))
    return buffer.getvalue()


def png_xmp(xmp: bytes | None) -> PngInfo:
    """Where PNG keeps XMP; Pillow reads it and has no name for writing it."""
    chunks = PngInfo()
    if xmp is not None:
        chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
    return chunks


@cache
def srgb_profile() -> bytes:
    """The sRGB profile that every result carries; the same bytes whenever it is made."""
    made = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    made[24:36] = bytes((0x07, 0xD0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0))  # creation time: 2000-01-01, not now
    return bytes(made)


# ------------------------------------------------------------------------------------------------------------ header


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    if not data:
        raise BadPicture("empty (0 bytes)")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    except UnidentifiedImageError as error:
        raise BadPicture(_not_opened(data)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPicture(f"far more than the {max_pixels / 1e6:g} million pixels allowed") from error
    except MemoryError:
        raise
    except Exception as error:  # header parsers raise whatever they like
        raise BadPicture(f"damaged header: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadPicture(f"{width}x{height} is more than the {max_pixels / 1e6:g} million pixels allowed")
    if frames > 1:
        raise BadPicture(f"holds {frames} frames or pages; one picture is wanted")
    return image


def _not_opened(data: bytes) -> str:
    readable = "JPEG, PNG, WebP, AVIF or TIFF"
    for offset, signature, name in _SIGNATURES:
        if data[offset:].startswith(signature):
            return f"{name} is not read here; save it as {readable}"
    return f"not an image ({readable} is wanted)"


def _format(image: ImageFile.ImageFile) -> str:
    name = image.format or ""
    return "JPEG" if name == "MPO" else name


def _turn(image: ImageFile.ImageFile) -> Image.Transpose | None:
    """What brings the picture upright; damaged metadata says nothing."""
    if _format(image) == "TIFF":
        return None  # Pillow turns these by itself
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return None


# ------------------------------------------------------------------------------------------------------------ pixels


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """`L`, `LA`, `RGB`, `RGBA` or `CMYK`, 8 bits a channel."""
    mode = image.mode
    transparent = "transparency" in image.info
    if mode.startswith("I;16"):
        return _from_sixteen_bits(image)
    if mode in ("P", "PA"):
        return image.convert("RGBA" if transparent or mode == "PA" else "RGB")
    if mode in ("L", "RGB") and transparent:
        return image.convert("RGBA")
    if mode == "1":
        return image.convert("L")
    if mode in ("RGBa", "La"):
        return image.convert({"RGBa": "RGBA", "La": "LA"}[mode])
    if mode == "YCbCr":
        return image.convert("RGB")
    if mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image
    if mode == "RGBX":
        return image.convert("RGB")
    raise BadPicture(f"colour mode {mode} is not read here; save it as RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, scaled: Pillow's own conversion may clip everything above 255 to white."""
    values = np.asarray(image).astype(np.uint16)
    grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha))
    return grey


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """`RGB` or `RGBA` in sRGB."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colour = image.convert({"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode))
    if profile and profile != srgb_profile():
        colour = _by_profile(colour, profile)
    colour = colour.convert("RGB")
    if alpha is not None:
        colour.putalpha(alpha)
    return colour


def _by_profile(colour: Image.Image, profile: bytes) -> Image.Image:
    """Through the profile to sRGB; a profile of another colour space than the picture's says nothing about it."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and colour.mode == "L":
            colour = colour.convert("RGB")
        if space != {"L": "GRAY"}.get(colour.mode, colour.mode):
            return colour
        made = ImageCms.profileToProfile(
            colour,
            source,
            ImageCms.ImageCmsProfile(BytesIO(srgb_profile())),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise BadPicture(f"its colour profile is damaged ({error}); save it again in sRGB") from error
    assert made is not None
    return made
