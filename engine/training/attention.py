"""Attention as training on a CPU wants it: both passes of it are quick there at a few hundred tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def cpu_attention() -> Iterator[None]:
    """Unfused attention inside: the backward pass of the fused kernel takes three times as long."""
    with sdpa_kernel(SDPBackend.MATH), _PlainInBfloat16():
        yield


class _PlainInBfloat16(TorchFunctionMode):
    """bfloat16 attention without a mask as two matrix products: half the time of torch's own unfused one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and _plain(given) and _bfloat16(args[0]):
            return attention(*args)
        return func(*args, **given)


def _plain(given: Mapping[str, Any]) -> bool:
    """No mask, no dropout, no scale of its own."""
    return all(value is None or value is False or (isinstance(value, float) and not value) for value in given.values())


def _bfloat16(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(..., length, dim) each; softmax in fp32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v
