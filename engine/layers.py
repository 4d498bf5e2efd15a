"""The parts of the flow transformer. Module and parameter names are those of the BFL files, so loading needs no map.

B = batch, L = sequence, H = heads, D = head width, C = hidden size, K = which of q, k, v.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engine.linear import Linear
from engine.rope import rotate

TIME_FACTOR = 1000.0  # the model is given t in [0, 1] and embeds 1000 t
EMBEDDING_DIM = 256


def _reference_frequencies() -> Tensor:
    """exp(-ln(10000) k/128) for k < 128, in fp32, the same on every machine.

    `torch.exp` rounds these differently by the CPU's vendor, and 1 ulp here, times 1000, is up to 6e-5 in the final
    latents of a small random net. So the exponentials are rounded from fp64, and the two entries in which the
    reference results (PyTorch on MKL's portable path) round the other way are moved to theirs.
    """
    exponent = -math.log(10_000) * torch.arange(EMBEDDING_DIM // 2, dtype=torch.float32) / (EMBEDDING_DIM // 2)
    frequency = exponent.double().exp().float()
    for index in (12, 106):
        frequency[index] = torch.nextafter(frequency[index], torch.tensor(1.0))
    return frequency


@lru_cache(maxsize=8)
def _frequencies(device: torch.device) -> Tensor:
    return _reference_frequencies().to(device)


def sinusoid(t_B: Tensor) -> Tensor:
    """(B,) values to (B, 256) fp32: cosines first, then sines, of 1000 t at 128 frequencies from 1 down to 1e-4."""
    angle = TIME_FACTOR * t_B.float()[:, None] * _frequencies(t_B.device)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Embedder(nn.Module):
    """Two linears that bring a time, a guidance scale or a pooled text to the hidden size."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = Linear(in_dim, hidden_size)
        self.out_layer = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


class RMSNorm(nn.Module):
    """Root mean square norm over the head width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.additions: list[Tensor] = []
        """(D,) fp32 each: what adapters add to the scale."""

    def weight(self) -> Tensor:
        """The scale as it acts, (1, D) fp32."""
        return sum(self.additions, start=self.scale.float())[None]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight()[0])


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root mean square norm over the last axis, in fp32; the result has the dtype of `x`."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
    return (normed * scale).to(x.dtype)


class QKNorm(nn.Module):
    """Norms of queries and keys, with learnt scales; applied before the rotation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def weight(self) -> Tensor:
        """Both scales as they act, (2, D) fp32: the queries' and the keys'."""
        return torch.cat([self.query_norm.weight(), self.key_norm.weight()])

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


def attention(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Full attention without a mask, with rotated queries and keys; returns (B, L, C)."""
    out = F.scaled_dot_product_attention(rotate(q_BHLD, rotation), rotate(k_BHLD, rotation), v_BHLD)
    return rearrange(out, "B H L D -> B L (H D)")


class Shift(NamedTuple):
    """One modulation: what adaLN adds to, multiplies with and lets through; each (B, 1, C)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Layer norm without affine parameters, then scale and shift."""
        return (1 + self.scale) * layer_norm(x) + self.shift


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Modulation(nn.Module):
    """`count` modulations from the conditioning vector; chunk order shift, scale, gate."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = Linear(dim, 3 * count * dim)

    def forward(self, vec: Tensor) -> list[Shift]:
        chunks = self.lin(F.silu(vec))[:, None].chunk(3 * self.count, dim=-1)
        return [Shift(*chunks[3 * index : 3 * index + 3]) for index in range(self.count)]


class SelfAttention(nn.Module):
    """Weights of one stream's attention; the attention itself runs over both streams."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.norm = QKNorm(dim // num_heads)
        self.proj = Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries and keys, and values; each (B, H, L, D)."""
        q, k, v = rearrange(self.qkv(x), "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        q, k = self.norm(q, k)
        return q, k, v


def mlp(dim: int, inner: int) -> nn.Sequential:
    return nn.Sequential(Linear(dim, inner), nn.GELU(approximate="tanh"), Linear(inner, dim))


class DoubleStreamBlock(nn.Module):
    """Text and image with their own weights, attending to one another."""

    def __init__(self, dim: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.img_mod = Modulation(dim, 2)
        self.img_attn = SelfAttention(dim, num_heads)
        self.img_mlp = mlp(dim, mlp_size)
        self.txt_mod = Modulation(dim, 2)
        self.txt_attn = SelfAttention(dim, num_heads)
        self.txt_mlp = mlp(dim, mlp_size)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)

        image_qkv = self.img_attn.project(img_mod1.apply(img))
        text_qkv = self.txt_attn.project(txt_mod1.apply(txt))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_qkv, image_qkv, strict=True))  # text first
        out = attention(q, k, v, rotation)
        txt_out, img_out = out[:, : txt.shape[1]], out[:, txt.shape[1] :]

        img = img + img_mod1.gate * self.img_attn.proj(img_out)
        img = img + img_mod2.gate * self.img_mlp(img_mod2.apply(img))
        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_out)
        txt = txt + txt_mod2.gate * self.txt_mlp(txt_mod2.apply(txt))
        return clip_half(img), clip_half(txt)


class SingleStreamBlock(nn.Module):
    """Attention and MLP in parallel on the joined sequence (ViT-22B, arXiv 2302.05442)."""

    def __init__(self, dim: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.split = (3 * dim, mlp_size)
        self.linear1 = Linear(dim, 3 * dim + mlp_size)  # rows q, k, v, mlp
        self.linear2 = Linear(dim + mlp_size, dim)  # columns attention, mlp
        self.norm = QKNorm(dim // num_heads)
        self.modulation = Modulation(dim, 1)

    def forward(self, x: Tensor, vec: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        (mod,) = self.modulation(vec)
        qkv, hidden = self.linear1(mod.apply(x)).split(self.split, dim=-1)
        q, k, v = rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=self.num_heads)
        q, k = self.norm(q, k)
        joined = torch.cat([attention(q, k, v, rotation), F.gelu(hidden, approximate="tanh")], dim=-1)
        return clip_half(x + mod.gate * self.linear2(joined))


class LastLayer(nn.Module):
    """Final adaLN (order shift, scale) and projection to packed channels."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.linear = Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear((1 + scale) * layer_norm(x) + shift)
        return out


def clip_half(x: Tensor) -> Tensor:
    """Keep fp16 activations finite (diffusers PR #9097); other dtypes pass."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
