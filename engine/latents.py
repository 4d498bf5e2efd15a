"""Pictures, latents, tokens and their positions. Packing: 2x2 latents make one token, channel order (c, ph, pw)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from engine.errors import RequestError

PATCH = 2
"""Latents to a token, in each direction."""


@dataclass(frozen=True, slots=True)
class Latents:
    """An image as the sampler leaves it: packed fp32 tokens (n, channels), so that it can be handed on undecoded."""

    tokens: Tensor
    width: int
    """Pixels of the image that the latents stand for."""
    height: int


def image_to_tensor(image: Image.Image) -> Tensor:
    """Picture to fp32 (3, H, W) in [-1, 1]; transparency is dropped, not blended. Raises `RequestError`."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise RequestError(f"a picture of mode {image.mode} has more than 8 bits a channel; convert it to RGB first")
    try:
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    except OSError as error:  # Pillow reads a file when its pixels are first needed
        raise RequestError(f"a picture cannot be read: {error}") from error
    return rearrange(pixels, "h w c -> c h w").float() / 127.5 - 1.0


def tensor_to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], clamped and rounded to bytes."""
    levels = ((pixels.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(rearrange(levels, "c h w -> h w c").numpy(), "RGB")


def pack(latents: Tensor) -> Tensor:
    """(..., c, h, w) to tokens (..., h/2 * w/2, 4c), row by row."""
    return rearrange(latents, "... c (h ph) (w pw) -> ... (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens (..., rows * columns, 4c) to (..., c, 2 rows, 2 columns); the inverse of `pack`."""
    return rearrange(tokens, "... (h w) (c ph pw) -> ... c (h ph) (w pw)", h=rows, w=columns, ph=PATCH, pw=PATCH)


def grid_ids(rows: int, columns: int, *, time: int = 0, top: int = 0, left: int = 0) -> Tensor:
    """Positions (rows * columns, 3) of a grid of tokens: time index, row, column; fp32."""
    row, column = torch.meshgrid(torch.arange(rows) + top, torch.arange(columns) + left, indexing="ij")
    return torch.stack([torch.full_like(row, time), row, column], dim=-1).reshape(-1, 3).float()


def context_ids(grids: list[tuple[int, int]], layout: str) -> list[Tensor]:
    """Positions of each context image, given their grids (rows, columns), the canvas first (ENGINE.md 1.5).

    `index`: image i has time index i, as in the paper (a model trained for several images).
    `offset`: all have time index 1; each is laid beside or under the area used so far, keeping it squarer. This is
    what works with the released model.
    """
    if layout == "index":
        return [grid_ids(rows, columns, time=index) for index, (rows, columns) in enumerate(grids, start=1)]
    if layout != "offset":
        raise RequestError(f"reference_layout {layout!r} is neither 'index' nor 'offset'")
    ids, height, width = [], 0, 0
    for rows, columns in grids:
        top, left = (0, width) if rows + height > columns + width else (height, 0)
        ids.append(grid_ids(rows, columns, time=1, top=top, left=left))
        height, width = max(height, rows + top), max(width, columns + left)
    return ids


def draw_noise(tokens: int, channels: int, rows: int, columns: int, seed: int) -> Tensor:
    """Packed fp32 noise (tokens, channels) from one CPU generator: the same whatever else is in the batch.

    Drawn as (1, c, h, w) latents and then packed, as diffusers does, so that equal seeds give equal noise.
    """
    generator = torch.Generator("cpu").manual_seed(int(seed))
    latent_channels = channels // PATCH**2
    noise = torch.randn(1, latent_channels, PATCH * rows, PATCH * columns, generator=generator, dtype=torch.float32)
    packed = pack(noise)[0]
    assert packed.shape == (tokens, channels)
    return packed
