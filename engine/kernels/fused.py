"""The kernels in Triton: each reads and writes its tensors once. fp32 inside, whatever the tensors' dtype.

Checked without a GPU by Triton's interpreter (tests/engine/test_kernels.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import Rows


@triton.jit
def _modulated(x, out, index, shift, scale, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One token a program."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    row = tl.load(index + token).to(tl.int64)
    values = tl.load(x + token * width + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values) / width
    centred = tl.where(inside, values - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred) / width + 1e-6)
    factor = tl.load(scale + row * width + column, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(shift + row * width + column, mask=inside, other=0.0).to(tl.float32)
    result = centred * rstd * factor + added
    tl.store(out + token * width + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_gated(x, y, index, gate, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One token a program."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    row = tl.load(index + token).to(tl.int64)
    where = token * width + column
    values = tl.load(x + where, mask=inside).to(tl.float32)
    factor = tl.load(gate + row * width + column, mask=inside).to(tl.float32)
    values += factor * tl.load(y + where, mask=inside).to(tl.float32)
    tl.store(x + where, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate(  # type: ignore[no-untyped-def]
    qk,
    weight,
    rotation,
    token_stride,
    part_stride,
    parts,
    heads,
    PAIRS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    TURNED: tl.constexpr,
):
    """All heads of one part (queries or keys) of one token a program."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    inside = (head < heads) & (pair < PAIRS)
    start = qk + token * token_stride + part * part_stride + head * (2 * PAIRS) + 2 * pair
    even = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(start + 1, mask=inside, other=0.0).to(tl.float32)
    length = tl.sum(even * even + odd * odd, axis=1) / (2 * PAIRS)
    rstd = (1 / tl.sqrt(length + 1e-6))[:, None]
    factor = weight + part * (2 * PAIRS) + 2 * pair
    even = even * rstd * tl.load(factor, mask=pair < PAIRS, other=0.0)
    odd = odd * rstd * tl.load(factor + 1, mask=pair < PAIRS, other=0.0)
    if TURNED:
        angle = rotation + token * (2 * PAIRS) + 2 * pair
        cos = tl.load(angle, mask=pair < PAIRS, other=0.0)
        sin = tl.load(angle + 1, mask=pair < PAIRS, other=0.0)
        even, odd = even * cos - odd * sin, even * sin + odd * cos
    tl.store(start, even.to(qk.dtype.element_ty), mask=inside)
    tl.store(start + 1, odd.to(qk.dtype.element_ty), mask=inside)


class Fused:
    """See `engine.kernels.Kernels`."""

    def modulated(self, x: Tensor, rows: Rows, shift: Tensor, scale: Tensor) -> Tensor:
        tokens, width = x.shape
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        block = triton.next_power_of_2(width)
        _launch(_modulated, (tokens,), x, out, rows.index, shift.contiguous(), scale.contiguous(), width, BLOCK=block)
        return out

    def add_gated(self, x: Tensor, rows: Rows, gate: Tensor, y: Tensor) -> None:
        tokens, width = x.shape
        assert x.is_contiguous()
        assert y.is_contiguous()
        block = triton.next_power_of_2(width)
        _launch(_add_gated, (tokens,), x, y, rows.index, gate.contiguous(), width, BLOCK=block)

    def norm_rotate(self, qk: Tensor, weight: Tensor, rotation: Tensor | None) -> None:
        tokens, parts, heads, dim = qk.shape
        assert qk.stride()[2:] == (dim, 1)
        _launch(
            _norm_rotate,
            (tokens, parts),
            qk,
            weight.contiguous(),
            weight if rotation is None else torch.view_as_real(rotation).contiguous(),
            qk.stride(0),
            qk.stride(1),
            parts,
            heads,
            PAIRS=dim // 2,
            BLOCK_HEADS=triton.next_power_of_2(heads),
            BLOCK_PAIRS=triton.next_power_of_2(dim // 2),
            TURNED=rotation is not None,
        )


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """On the tensors' own device, which need not be the current one; without tokens there is nothing to launch."""
    if grid[0]:
        with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
            kernel[grid](*arguments, **constants)
