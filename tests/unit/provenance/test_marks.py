"""Files say which step made them, in every format that results are written in."""

from __future__ import annotations

from io import BytesIO

import pytest
from PIL import Image

from kontext_batch.errors import StepError
from kontext_batch.operations.encoding import FORMATS, encode
from kontext_batch.operations.pictures import encode_png, open_picture
from kontext_batch.planning.marking import EDITED, Ancestry, xmp_packet
from kontext_batch.provenance.marks import step_key_of

KEY = "b2:" + "ab" * 20
XMP = xmp_packet(KEY, Ancestry(model=True, photo=True))


def noise(size: int = 64) -> Image.Image:
    return Image.effect_noise((size, size), 80).convert("RGB")


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_tells_its_step_and_its_pixels_are_those_without_a_mark(name: str) -> None:
    image = noise()
    marked, plain = encode(image, name, 80, None, xmp=XMP).data, encode(image, name, 80, None).data

    assert step_key_of(marked) == KEY
    assert step_key_of(plain) is None
    assert EDITED.encode() in marked
    assert open_picture(marked).tobytes() == open_picture(plain).tobytes()
    assert encode(image, name, 80, None, xmp=XMP).data == marked, "equal wishes give equal bytes"
    info = Image.open(BytesIO(marked)).info
    assert "exif" not in info
    assert info["icc_profile"]


def test_the_picture_of_a_model_too() -> None:
    assert step_key_of(encode_png(noise(), xmp=XMP)) == KEY
    assert step_key_of(encode_png(noise())) is None


def test_the_mark_counts_within_a_byte_limit() -> None:
    image = noise(256)
    limit = len(encode(image, "jpeg", 95, None).data)
    made = encode(image, "jpeg", 95, limit, xmp=XMP)
    assert len(made.data) <= limit
    assert made.quality is not None
    assert made.quality < 95
    assert step_key_of(made.data) == KEY

    packed = len(encode(image, "png", None, None).data)
    with pytest.raises(StepError, match="max_bytes"):
        encode(image, "png", None, packed // 2, xmp=XMP)


def test_the_metadata_of_a_source_goes_nowhere() -> None:
    source = BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    noise().save(source, "JPEG", exif=exif, xmp=b"<x:xmpmeta>secret owner</x:xmpmeta>", comment=b"secret word")
    for name in FORMATS:
        assert b"secret" not in encode(open_picture(source.getvalue()), name, 80, None, xmp=XMP).data


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x89PNG\r\n\x1a\n", encode_png(noise())[:60]])
def test_what_is_no_picture_names_no_step(data: bytes) -> None:
    assert step_key_of(data) is None
