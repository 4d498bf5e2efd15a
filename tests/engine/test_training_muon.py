"""Muon: as torch's own, at a precision of choice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.training.muon import Muon, orthogonalised


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 8), (4, 30), (30, 4)])
def test_an_orthogonalised_matrix_keeps_its_directions_and_loses_its_lengths(shape: tuple[int, int]) -> None:
    given = matrix(*shape) @ torch.diag(torch.linspace(0.3, 3, shape[1]))
    lengths = torch.linalg.svdvals(orthogonalised(given))
    assert lengths.min() > 0.6
    assert lengths.max() < 1.25
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    inside = left.T @ orthogonalised(given) @ right.T  # diagonal where the singular vectors are the same
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-3


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 1e-6), (torch.float32, 2e-2)])
def test_it_steps_as_torch_does(dtype: torch.dtype, near: float) -> None:
    """torch's is bfloat16 inside: in bfloat16 there is no difference, in float32 one of its rounding."""
    mine, theirs = (nn.Parameter(matrix(12, 20)) for _ in range(2))
    ours = Muon([mine], 0.1, 0.05, dtype)
    torchs = torch.optim.Muon([theirs], 0.1, 0.05, adjust_lr_fn="match_rms_adamw")
    start = mine.detach().clone()
    for step in range(3):
        for parameter, optimiser in ((mine, ours), (theirs, torchs)):
            parameter.grad = matrix(12, 20, seed=1 + step)
            optimiser.step()
    moved = (theirs - start).abs().max()
    assert (mine - theirs).abs().max() < near * moved


def test_a_matrix_without_a_gradient_stays() -> None:
    parameter = nn.Parameter(matrix(3, 4))
    before = parameter.detach().clone()
    Muon([parameter], 0.1, 0.05).step()
    assert torch.equal(parameter, before)
