"""FLUX.1's autoencoder: images (B, 3, H, W) in [-1, 1] to latents (B, 16, H/8, W/8) and back (ENGINE.md 1.2).

Module names are those of the BFL file `ae.safetensors`.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engine import bands
from engine.config import AutoencoderConfig

BAND_AREA = 2**16
"""Pixels of a band: 64 rows of a picture 1024 wide."""


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class AttnBlock(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))
        return x + projected


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        out: Tensor = shortcut + h
        return out


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The residual blocks of one resolution, then down or up to the next."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_channels, config.groups
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for index, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
            level = Level(before, width, config.res_blocks, groups)
            if index < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = group_norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_channels, config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        levels = []
        for index in reversed(range(len(widths))):
            before = widths[min(index + 1, len(widths) - 1)]
            level = Level(before, widths[index], config.res_blocks + 1, groups)
            if index > 0:
                level.upsample = Upsample(widths[index])
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # named by resolution, run from the coarsest
        self.norm_out = group_norm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Autoencoder(nn.Module):
    """Encoder and decoder with the scale and shift of the latents.

    Pictures of more than `band_area` pixels are computed in bands: the same within rounding, in half the memory.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.band_area = BAND_AREA

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw latents, each (B, 16, H/8, W/8); training draws from them."""
        rows = self._band_rows(image.shape[3])
        banded = rows * self.config.factor < image.shape[2]
        moments: Tensor = bands.encode(self.encoder, image, rows) if banded else self.encoder(image)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar

    def encode(self, image: Tensor) -> Tensor:
        """Latents of an image: the mean, not a sample, as both references do."""
        return self.config.scale * (self.moments(image)[0] - self.config.shift)

    def decode(self, latents: Tensor) -> Tensor:
        """Image in about [-1, 1]; the caller clamps."""
        z = latents / self.config.scale + self.config.shift
        rows = self._band_rows(z.shape[3] * self.config.factor)
        out: Tensor = bands.decode(self.decoder, z, rows) if rows < z.shape[2] else self.decoder(z)
        return out

    def _band_rows(self, width: int) -> int:
        """Rows of latents that make a band of a picture of this width in pixels."""
        return max(1, self.band_area // (width * self.config.factor))
