"""How alike two pictures are, in dB of PSNR. No torch here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

EQUAL = 99.0
"""PSNR that equal pictures count as."""


def psnr(first: Image.Image, second: Image.Image) -> float:
    """In dB over all channels; equal pictures count as 99."""
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return decibels(difference)


def decibels(difference: NDArray[np.float64]) -> float:
    """PSNR of a difference in levels of 0 to 255."""
    squared = float(np.mean(difference**2))
    return EQUAL if squared == 0 else 10 * float(np.log10(255**2 / squared))
