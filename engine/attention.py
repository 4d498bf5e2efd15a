"""Attention without a mask, by the kernel that a device and dtype are quickest with.

The kernel is chosen by name, and asked for by that name alone: where it cannot run there is an error, and never a
silent change to a slower one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.linear import multiplies_bfloat16

Kernel = Literal["cudnn", "flash", "efficient", "blocked", "any"]
"""`any` leaves the choice to torch, where none of the others is known to run."""

SCORES = 1 << 22
"""Most scores that the blocked kernel holds at once."""

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def choose_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The quickest that is known for a device and dtype.

    cuda: cuDNN's in half precision on cards that have it (compute capability 9 and up), flash from 8 on; fp32 has
    neither. cpu: torch's flash; it multiplies bfloat16 in fp32, so that where the CPU multiplies bfloat16 itself two
    matrix products a head are quicker (docs/profile.md). They round the scores to bfloat16, as all else in that dtype.
    """
    if device.type == "cpu":
        return "blocked" if dtype == torch.bfloat16 and multiplies_bfloat16() else "flash"
    if device.type != "cuda":
        return "any"
    if dtype == torch.float32:
        return "efficient"
    capability = torch.cuda.get_device_capability(device)
    if dtype not in (torch.bfloat16, torch.float16) or capability < (8, 0):
        return "any"
    return "cudnn" if capability >= (9, 0) else "flash"


@contextmanager
def kernel_for(device: torch.device, dtype: torch.dtype) -> Iterator[Kernel]:
    """Inside, `attend` runs this kernel and no other."""
    kernel = choose_kernel(device, dtype)
    if kernel in ("blocked", "any"):
        yield kernel
    else:
        with sdpa_kernel(_BACKENDS[kernel]):
            yield kernel


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
    """Softmax attention of one row: q (n, H, D), k and v (L, H, D), to (n, H * D)."""
    q_HnD, k_HLD, v_HLD = (each.transpose(0, 1) for each in (q, k, v))
    if kernel == "blocked":
        return _blocked(q_HnD, k_HLD, v_HLD)
    out = F.scaled_dot_product_attention(q_HnD[None], k_HLD[None], v_HLD[None])
    return out[0].transpose(0, 1).reshape(q.shape[0], -1)


def _blocked(q_HnD: Tensor, k_HLD: Tensor, v_HLD: Tensor) -> Tensor:
    """A head and some queries at a time, so that the scores stay in the cache; softmax is fp32 inside its kernel."""
    heads, count, dim = q_HnD.shape
    out = q_HnD.new_empty(count, heads, dim)
    block = max(1, SCORES // k_HLD.shape[1])
    q_HnD = q_HnD * dim**-0.5
    for head in range(heads):
        keys, values = k_HLD[head].t(), v_HLD[head]
        for start in range(0, count, block):
            scores = torch.softmax(q_HnD[head, start : start + block] @ keys, dim=-1)
            out[start : start + block, head] = scores @ values
    return out.flatten(1)
