"""The kernels as torch.compile makes them from their formulas; fp32 inside, whatever the tensors' dtype.

Each is compiled once for a width and dtype, for one row and for several, and then takes any number of tokens: nothing
but time differs between the first batch of a size and the next. On a CPU they are slower than the plain ones
(docs/profile.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.kernels import Rows

VARIANTS = 64
"""Of one kernel in a process: widths, dtypes, one row or several. More raise an error; torch itself allows 8."""


def _modulated(x: Tensor, row: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x.float() - x.float().mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    return (normed * scale[row] + shift[row]).to(x.dtype)


def _add_gated(x: Tensor, row: Tensor, gate: Tensor, y: Tensor) -> None:
    x.copy_(x.float() + gate[row].float() * y)


def _norm_rotate(qk: Tensor, weight: Tensor, rotation: Tensor | None) -> None:
    """`rotation`: (tokens, D/2, 2) cosine and sine."""
    x = qk.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight[:, None]
    if rotation is not None:
        even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        cos, sin = rotation[:, None, None].unbind(-1)
        x = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    qk.copy_(x)


class Compiled:
    """See `engine.kernels.Kernels`."""

    def __init__(self) -> None:
        self._modulated, self._add_gated = _compiled(_modulated), _compiled(_add_gated)
        self._norm_rotate = _compiled(_norm_rotate)

    def modulated(self, x: Tensor, rows: Rows, shift: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self._modulated(x, rows.index, shift, scale)
        return out

    def add_gated(self, x: Tensor, rows: Rows, gate: Tensor, y: Tensor) -> None:
        self._add_gated(x, rows.index, gate, y)

    def norm_rotate(self, qk: Tensor, weight: Tensor, rotation: Tensor | None) -> None:
        # The compiler knows no complex numbers.
        self._norm_rotate(qk, weight, None if rotation is None else torch.view_as_real(rotation))


def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """For any number of tokens and rows, which are first in every shape. The rest is fixed: loops of known length are
    two to three times as quick.
    """
    # Whole or an error: where a part ran uncompiled, results would differ in their last bits.
    made = torch.compile(kernel, dynamic=True, fullgraph=True)

    def call(*tensors: Tensor | None) -> Any:
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.mark_static(tensor, list(range(1, tensor.ndim)))
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):  # a thread has settings of its own
            return made(*tensors)

    return call
