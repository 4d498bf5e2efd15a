"""Reading back what `planning.marking` writes into files."""

from __future__ import annotations

from io import BytesIO
from typing import Final

from PIL import Image

from kontext_batch.planning.marking import marked_key

FORMATS: Final = ("JPEG", "PNG", "WEBP", "AVIF")


def step_key_of(data: bytes) -> str | None:
    """Key of the step that made this picture file, from its header alone; None where the file names none.

    Any bytes may be given. Of a file that was cut, converted or edited elsewhere it is the step whose picture that
    began with, as long as its metadata was kept.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            xmp = image.info.get("xmp")
    except Exception:  # header parsers raise whatever they like; what cannot be opened names nothing
        return None
    return marked_key(xmp) if isinstance(xmp, bytes) else None
