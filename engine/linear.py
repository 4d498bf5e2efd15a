"""The transformer's linears: whole or some rows of them, with what adapters add, by the quickest kernel there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Addition(Protocol):
    """What an adapter adds to the output of a linear."""

    def __call__(self, x: Tensor, start: int, stop: int) -> Tensor | None:
        """To output features `start` to `stop` for the input `x`; None adds nothing there."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """x A' B' + bias for output features `start` to `stop` of a linear; nothing for the others (arXiv 2106.09685)."""

    start: int
    stop: int
    down: Tensor | None
    """A: (rank, in)."""
    up: Tensor | None
    """B: (stop - start, rank)."""
    bias: Tensor | None
    """(stop - start,)."""

    def __call__(self, x: Tensor, start: int, stop: int) -> Tensor | None:
        first, last = max(start, self.start), min(stop, self.stop)
        if first >= last:
            return None
        mine = slice(first - self.start, last - self.start)
        out = None if self.bias is None else self.bias[mine]
        if self.down is not None and self.up is not None:
            out = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up[mine], out)
        assert out is not None, "there are matrices or a bias"
        return F.pad(out, (first - start, stop - last))


FP8 = torch.float8_e4m3fn
LARGEST_FP8 = torch.finfo(FP8).max
SMALL = 1 << 22
"""Multiplications below which starting oneDNN costs more than it gains."""


class Linear(nn.Linear):
    """A linear of which some output features can be asked for alone, and to whose output adapters add."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.additions: list[Addition] = []
        self.weight_scale: Tensor | None = None
        """(out, 1) fp32 where the weight is fp8 (`engine.fp8`)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, 0, self.out_features)

    def rows(self, x: Tensor, start: int, stop: int, *, gelu: bool = False) -> Tensor:
        """Output features `start` to `stop`, (..., in) to (..., stop - start); `gelu`: through tanh GELU."""
        whole = start == 0 and stop == self.out_features
        weight, bias = (self.weight, self.bias) if whole else (self.weight[start:stop], self.bias[start:stop])
        fused = gelu and not self.additions and self.weight_scale is None
        if self.weight_scale is None:
            out = linear(x, weight, bias, gelu=fused)
        else:
            out = multiply_fp8(x, weight, self.weight_scale[start:stop], bias)
        for addition in self.additions:
            added = addition(x, start, stop)
            if added is not None:
                out = out + added
        return F.gelu(out, approximate="tanh") if gelu and not fused else out


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> Tensor:
    """x W' + b, through tanh GELU where asked, in one kernel where the device has one that does both.

    On a CPU without gradients by oneDNN in fp32 as well, where torch itself takes MKL: a tenth to a third quicker on
    AMD (docs/profile.md).
    """
    if not torch.is_grad_enabled() and _has_onednn(x) and x.numel() * weight.shape[0] > SMALL:
        return onednn(x, weight, bias, gelu=gelu)
    if gelu and x.is_cuda and not torch.is_grad_enabled():
        rows = x.reshape(-1, x.shape[-1])
        flat: Tensor = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
        return flat.view(*x.shape[:-1], -1)
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


def _has_onednn(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return (x.dtype == torch.float32 and _onednn_is_built()) or (x.dtype == torch.bfloat16 and multiplies_bfloat16())


def _onednn_is_built() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def multiplies_bfloat16() -> bool:
    """Whether this CPU's matrix products are quick in bfloat16."""
    return _onednn_is_built() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool) -> Tensor:
    """The same by oneDNN; the kernel that torch's own compiler calls for a linear on a CPU."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, *(("gelu", [], "tanh") if gelu else ("none", [], ""))
    )
    return out


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, C) as fp8, and the scales (n, 1) fp32 that give it back: x = fp8 * scale."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp_(min=1e-12) / LARGEST_FP8
    return (x / scale).clamp_(-LARGEST_FP8, LARGEST_FP8).to(FP8), scale


def multiply_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """x W' + b in the dtype of `x`, (..., in) to (..., out), the input quantised on the way."""
    rows = x.reshape(-1, x.shape[-1])
    tokens, scale = quantised(rows)
    out = torch._scaled_mm(
        tokens,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale.t(),
        bias=bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
    )
    return out.view(*x.shape[:-1], -1).to(x.dtype)
