"""The FLUX.1 flow transformer (arXiv 2506.15742, section 3).

What is special about it: text and image are one sequence, text first; the context image's tokens are appended to the
target's and told apart by the first rotary axis alone; nothing is masked; time, guidance and pooled text act through
one conditioning vector. The model predicts the velocity v = noise - data at time t, t = 1 being noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import FlowConfig
from engine.layers import EMBEDDING_DIM, DoubleStreamBlock, Embedder, LastLayer, SingleStreamBlock, sinusoid
from engine.linear import Linear
from engine.rope import rotations


class FlowTransformer(nn.Module):
    """Velocity of packed latents, given text, context, time and guidance."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.img_in = Linear(config.in_channels, size)
        self.txt_in = Linear(config.text_dim, size)
        self.time_in = Embedder(EMBEDDING_DIM, size)
        self.vector_in = Embedder(config.pooled_dim, size)
        self.guidance_in = Embedder(EMBEDDING_DIM, size) if config.guidance_embed else None
        block = (size, config.num_heads, config.mlp_size)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*block) for _ in range(config.depth_double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*block) for _ in range(config.depth_single))
        self.final_layer = LastLayer(size, config.in_channels)

    def forward(
        self,
        img: Tensor,  # (B, L, in_channels): target tokens, then context tokens
        img_ids: Tensor,  # (B, L, 3): time index, row, column
        txt: Tensor,  # (B, T, text_dim): T5 features, padding included
        pooled: Tensor,  # (B, pooled_dim): CLIP
        t: Tensor,  # (B,): in [0, 1], 1 is noise
        guidance: Tensor | None = None,  # (B,): the scale itself, such as 2.5
    ) -> Tensor:
        """Velocity (B, L, in_channels) for every image position; the sampler reads the target's alone."""
        dtype = self.img_in.weight.dtype
        vec = self.conditioning(pooled, t, guidance)
        x_img, x_txt = self.img_in(img.to(dtype)), self.txt_in(txt.to(dtype))
        text_ids = torch.zeros(*txt.shape[:2], 3, device=img_ids.device, dtype=img_ids.dtype)
        rotation = rotations(torch.cat([text_ids, img_ids], dim=1), self.config.axes_dims, self.config.theta)

        for block in self.double_blocks:
            x_img, x_txt = block(x_img, x_txt, vec, rotation)
        x = torch.cat([x_txt, x_img], dim=1)
        for block in self.single_blocks:
            x = block(x, vec, rotation)
        out: Tensor = self.final_layer(x[:, txt.shape[1] :], vec)
        return out

    def conditioning(self, pooled: Tensor, t: Tensor, guidance: Tensor | None) -> Tensor:
        """The vector (B, C) through which time (B,), guidance (B,) and pooled text (B, pooled_dim) act; B of 1 is that
        of all.
        """
        dtype = self.img_in.weight.dtype
        vec: Tensor = self.time_in(sinusoid(t).to(dtype)) + self.vector_in(pooled.to(dtype))
        if self.guidance_in is not None:
            assert guidance is not None, "this model embeds guidance"
            vec = vec + self.guidance_in(sinusoid(guidance).to(dtype))
        return vec
