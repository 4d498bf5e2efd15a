"""The attention that training uses on a CPU is torch's own, forwards and backwards."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.training import attention
from engine.training.attention import cpu_attention


def outcome(inside: AbstractContextManager[None], dtype: torch.dtype, causal: bool = False) -> tuple[Tensor, ...]:
    """What comes out of attention and the three gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    with inside:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("causal", [False, True])
def test_it_gives_torchs_own_results(dtype: torch.dtype, tolerance: float, causal: bool) -> None:
    found = outcome(cpu_attention(), dtype, causal)
    expected = outcome(nullcontext(), torch.float32, causal)
    assert len(found) == 4
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


def test_only_bfloat16_without_a_mask_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.dtype)
        return q + k + v

    monkeypatch.setattr(attention, "attention", counted)
    outcome(cpu_attention(), torch.float32)
    outcome(cpu_attention(), torch.bfloat16, causal=True)
    x = torch.randn(2, 3, 9, 8)
    with cpu_attention(), torch.autocast("cpu", torch.bfloat16):  # as the text encoders call it
        F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(9, 9), dropout_p=0.0, scale=1.0, is_causal=False)
        F.scaled_dot_product_attention(x, x, x, attn_mask=None, dropout_p=0.0, scale=0.5)
    assert calls == []
    outcome(cpu_attention(), torch.bfloat16)
    with cpu_attention(), torch.autocast("cpu", torch.bfloat16):
        F.scaled_dot_product_attention(x, x, x, attn_mask=None, dropout_p=0.0)
    assert calls == [torch.bfloat16, torch.float32]
