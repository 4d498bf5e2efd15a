"""The kernels in torch's own operations, as few as they go; on a CPU their tensors stay in its caches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import Rows


class Plain:
    """See `engine.kernels.Kernels`."""

    def modulated(self, x: Tensor, rows: Rows, shift: Tensor, scale: Tensor) -> Tensor:
        # Shift and scale are a layer norm's own bias and weight, so that one kernel does it all.
        normed = [
            F.layer_norm(x[where], x.shape[-1:], scale[row], shift[row], 1e-6) for row, where in enumerate(rows.slices)
        ]
        return normed[0] if len(normed) == 1 else torch.cat(normed)

    def add_gated(self, x: Tensor, rows: Rows, gate: Tensor, y: Tensor) -> None:
        for row, where in enumerate(rows.slices):
            x[where].addcmul_(gate[row], y[where])

    def norm_rotate(self, qk: Tensor, weight: Tensor, rotation: Tensor | None) -> None:
        x = qk.float()
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x.mul_(length.square_().div_(x.shape[-1]).add_(1e-6).rsqrt_())
        x.mul_(weight[:, None])
        if rotation is not None:
            torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(rotation[:, None, None])
        if x is not qk:
            qk.copy_(x)
