"""Rotary position embedding over three axes (time index, row, column); RoFormer (arXiv 2104.09864) as FLUX.1 uses it.

Adjacent pairs (2i, 2i+1) of the head width rotate; the axes take consecutive shares of it. B = batch, L = sequence,
H = heads, D = head width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def angles(ids: Tensor, axes_dims: tuple[int, ...], theta: float) -> Tensor:
    """Angles (..., L, D/2) in fp64, on the CPU, for positions `ids` (..., L, axes).

    fp64 as in diffusers: the fp32 angles of the reference code are up to 7e-6 off.
    """
    shares = []
    for axis, dim in enumerate(axes_dims):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        shares.append(ids[..., axis].cpu().double()[..., None] * frequency)
    return torch.cat(shares, dim=-1)


def rotations(ids: Tensor, axes_dims: tuple[int, ...], theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions `ids` (B, L, axes): two fp32 tensors (B, 1, L, D/2)."""
    angle = angles(ids, axes_dims, theta)[:, None]
    return angle.cos().float().to(ids.device), angle.sin().float().to(ids.device)


def rotate(x_BHLD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of `x_BHLD` by its position's angle, in fp32; the result has the dtype of `x_BHLD`."""
    cos, sin = rotation
    even, odd = rearrange(x_BHLD.float(), "B H L (D two) -> two B H L D", two=2)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BHLD.dtype)
