"""How far two results are apart: pictures in dB and where, latents by their largest difference."""

from __future__ import annotations

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load

from engine.likeness import decibels
from kontext_batch.errors import StepError
from kontext_batch.operations.pictures import DEFAULT_MAX_PIXELS, open_picture
from kontext_batch.ports import PictureDifference


class PixelJudge:
    """`ports.Judge`."""

    def __init__(self, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        self._max_pixels = max_pixels

    def pictures(self, first: bytes, second: bytes) -> PictureDifference:
        one, other = self._opened(first), self._opened(second)
        if one.size != other.size:
            return PictureDifference(one.size, other.size)
        if one.mode != other.mode:
            one, other = one.convert("RGBA"), other.convert("RGBA")
        difference = np.asarray(one, np.int16) - np.asarray(other, np.int16)
        levels = np.abs(difference).max(axis=2)
        rows, columns = levels.any(axis=1).nonzero()[0], levels.any(axis=0).nonzero()[0]
        if not len(rows):
            return PictureDifference(one.size, other.size)
        top, left = int(rows[0]), int(columns[0])
        y, x = np.unravel_index(int(levels.argmax()), levels.shape)
        return PictureDifference(
            one.size,
            other.size,
            psnr=decibels(difference.astype(np.float64)),
            box=(left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1),
            worst=(int(x), int(y), int(levels[y, x])),
        )

    def latents(self, first: bytes, second: bytes) -> float:
        try:
            one, other = load(first)["latents"], load(second)["latents"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise StepError(f"the latents cannot be read ({error})") from error
        if one.shape != other.shape:
            raise StepError(f"the latents are of another shape: {one.shape} and {other.shape}")
        return float(np.abs(one.astype(np.float64) - other).max(initial=0.0))

    def _opened(self, data: bytes) -> Image.Image:
        return open_picture(data, max_pixels=self._max_pixels)
