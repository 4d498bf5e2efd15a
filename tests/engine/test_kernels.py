"""The kernels between linears and attention against their formulas: plain ones, Triton's, and torch.compile's.

Triton's run in its interpreter, so that no GPU is needed; where triton is not installed they are told and skipped.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import Kernels, Rows, kernels_for
from engine.kernels.plain import Plain
from engine.layers import rms_norm
from engine.packed import Place, velocities
from engine.rope import rotate
from tests.engine.test_packed import cases, model
from tests.engine.tiny import worst

CPU = torch.device("cpu")
HEADS, DIM = 3, 12
WIDTH = HEADS * DIM


@pytest.fixture(params=["plain", "triton", pytest.param("compiled", marks=pytest.mark.slow)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "plain":
        return Plain()
    if request.param == "compiled":
        request.getfixturevalue("compiling")
        return kernels_for(CPU, compiled=True)
    pytest.importorskip("triton", reason="triton is not installed (it comes with torch for CUDA)")
    from engine.kernels.fused import Fused

    return Fused()


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def bound(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 0.06


ROWS = Rows.counted([5, 1, 7], CPU)


def test_modulated(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, shift, scale = torch.randn(13, WIDTH) * 3 + 1, torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    found = kernels.modulated(x.to(dtype), ROWS, shift.to(dtype), scale.to(dtype))
    assert found.dtype == dtype
    wanted = F.layer_norm(x.to(dtype).double(), (WIDTH,), eps=1e-6) * scale[ROWS.index] + shift[ROWS.index]
    assert worst(found, wanted) < bound(dtype)


def test_add_gated(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, y, gate = torch.randn(13, WIDTH).to(dtype), torch.randn(13, WIDTH).to(dtype), torch.randn(3, WIDTH).to(dtype)
    wanted = x.double() + gate.double()[ROWS.index] * y.double()
    kernels.add_gated(x, ROWS, gate, y)
    assert worst(x, wanted) < bound(dtype)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_norm_rotate(kernels: Kernels, dtype: torch.dtype, parts: int, turned: bool) -> None:
    torch.manual_seed(2)
    qkv = torch.randn(13, 3, HEADS, DIM).to(dtype)
    weight, angle = torch.rand(parts, DIM) + 0.5, torch.randn(13, DIM // 2)
    normed = torch.stack([rms_norm(qkv[:, part].float(), weight[part]) for part in range(parts)], dim=1)
    wanted = rotate(normed, (angle.cos()[:, None, None], angle.sin()[:, None, None])) if turned else normed
    value = qkv[:, parts:].clone()
    rotation = torch.polar(torch.ones_like(angle), angle) if turned else None
    kernels.norm_rotate(qkv[:, :parts], weight, rotation)  # in place, in a tensor that holds more
    assert worst(qkv[:, :parts], wanted) < bound(dtype)
    assert torch.equal(qkv[:, parts:], value)


def test_a_device_without_triton_takes_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(kernels_for(CPU), Plain)
    for missing in ("find_spec", "which"):  # triton itself, or a C compiler
        with monkeypatch.context() as patch:
            patch.setattr("engine.kernels.find_spec", lambda name: name)
            patch.setattr(f"engine.kernels.{missing}", lambda name: None)
            assert isinstance(kernels_for.__wrapped__(torch.device("cuda")), Plain)  # not what was found before


def test_rows_know_the_row_of_each_token() -> None:
    assert ROWS.index.tolist() == [0] * 5 + [1] + [2] * 7
    assert ROWS.slices == [slice(0, 5), slice(5, 6), slice(6, 13)]


@pytest.mark.parametrize("kernels", ["plain", "triton"], indirect=True)  # compiled: tests/engine/test_compiled.py
def test_a_whole_pass(kernels: Kernels) -> None:
    flow = model()
    places = [Place(case.x, case.condition(flow), 0) for case in cases()]
    for case, found in zip(cases(), velocities(flow, places, kernels=kernels), strict=True):
        assert worst(found, case.dense(flow, 0)) < 2e-5
