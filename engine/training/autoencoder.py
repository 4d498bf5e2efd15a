"""Train the shipped model's autoencoder on drawn pictures: L1 and squared error, and a little KL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.autoencoder import Autoencoder
from engine.config import AutoencoderConfig
from engine.latents import image_to_tensor
from engine.training.data import size_counts, stacked
from engine.training.instructions import random_example
from engine.training.loop import Loop, LoopConfig, Loss, Moment
from engine.training.products import render

TINY = AutoencoderConfig(block_channels=(16, 32, 64, 64), res_blocks=1, groups=8, scale=1.0, shift=0.0, sample_size=128)
"""1.0 M parameters; scale and shift are set from the latents when it is trained."""
KL_WEIGHT = 2e-7
SQUARED_WEIGHT = 2.0
CROP, CROPPED_SHARE = 64, 0.85
"""The first share of the steps sees random crops of this side; the rest whole pictures, a quarter as many."""


def picture_pool(count: int, seed: int, area: int = 128 * 128) -> list[Tensor]:
    """About `count` pictures as bytes, one (n, 3, height, width) for each size of `area`; half of them square."""
    rng = np.random.default_rng(seed)
    return [
        stacked(render(random_example(rng).after, width, height) for _ in range(share))
        for (width, height), share in size_counts(count, area).items()
    ]


def reconstruction_loss(module: Autoencoder, images: Tensor, noise: torch.Generator) -> Loss:
    """L1 + 2 MSE + KL of one batch in [-1, 1]; also its PSNR in dB."""
    mean, logvar = module.moments(images)
    logvar = logvar.float().clamp(-30, 20)
    z = mean.float() + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise)
    out = module.decoder(z).float()
    squared = F.mse_loss(out, images)
    kl = 0.5 * (mean.float() ** 2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
    loss = F.l1_loss(out, images) + SQUARED_WEIGHT * squared + KL_WEIGHT * kl
    return loss, {"psnr": (10 * torch.log10(4 / squared.detach())).item(), "kl": kl.item()}


def train_autoencoder(
    folder: Path,
    config: LoopConfig,
    *,
    batch: int = 16,
    pool: int = 6000,
    sizes: AutoencoderConfig = TINY,
    start: Autoencoder | None = None,
    freeze_encoder: bool = False,
    say: Callable[[str], None] = print,
) -> Autoencoder:
    """Train, or go on training, in `folder`; returns the module with averaged weights, scale and shift set.

    With `start` it goes on from a trained one; `freeze_encoder` then trains the decoder alone, and latents, scale and
    shift stay what a flow was trained on.
    """
    torch.manual_seed(config.seed)
    module = Autoencoder(sizes if start is None else start.config)
    if start is not None:
        module.load_state_dict(start.state_dict())
    module.encoder.requires_grad_(not freeze_encoder)
    loop = Loop(module, config, folder, hidden=lambda name: name.endswith("weight") and "conv_out" not in name)
    loop.resume()
    pools = picture_pool(pool, config.seed)
    odds = np.array([len(pictures) for pictures in pools]) / sum(len(pictures) for pictures in pools)

    def loss_of(moment: Moment) -> Loss:
        pictures = pools[moment.numpy.choice(len(pools), p=odds)]
        cropped = moment.step < CROPPED_SHARE * config.steps
        count = batch if cropped else max(1, batch // 4)  # as many pixels
        images = pictures[torch.from_numpy(moment.numpy.integers(0, len(pictures), count))]
        if cropped:
            top = moment.numpy.integers(0, images.shape[-2] - CROP + 1)
            left = moment.numpy.integers(0, images.shape[-1] - CROP + 1)
            images = images[:, :, top : top + CROP, left : left + CROP]
        return reconstruction_loss(module, images.float() / 127.5 - 1, moment.torch)

    loop.run(loss_of, say=say)
    loop.use_average()
    module.eval()
    return module if freeze_encoder else normalised(module, max(pools, key=len)[:512])


@torch.no_grad()
def normalised(module: Autoencoder, pictures: Tensor) -> Autoencoder:
    """The same autoencoder with scale and shift such that its latents have mean 0 and deviation 1."""
    raw = torch.cat([module.moments(part.float() / 127.5 - 1)[0] for part in torch.split(pictures, 32)])
    config = replace(module.config, shift=round(raw.mean().item(), 4), scale=round(1 / raw.std().item(), 4))
    out = Autoencoder(config)
    out.load_state_dict(module.state_dict())
    return out.eval()


@torch.no_grad()
def reconstruction_psnr(module: Autoencoder, *, count: int = 64, seed: int = 10**6) -> float:
    """Mean PSNR in dB over fresh pictures."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(count):
        image = image_to_tensor(render(random_example(rng).after))[None]
        out = module.decode(module.encode(image)).clamp(-1, 1)
        values.append(10 * torch.log10(4 / F.mse_loss(out, image)).item())
    return sum(values) / len(values)
