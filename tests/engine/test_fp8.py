"""Linears in fp8: what they compute, which ones they are, and how far images are from those of bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.fp8 import block_linears, quantise
from engine.likeness import psnr
from engine.linear import FP8, Linear, LowRank, multiply_fp8, quantised
from engine.pipeline import EditRequest, KontextEngine
from engine.weights import TensorFiles, find_model, load_transformer
from kontext_batch.registry import shipped_folder
from tests.engine.test_packed import model
from tests.engine.tiny import picture, worst


def test_rows_keep_their_own_scales() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 7.0])[:, None]
    values, scale = quantised(x)
    assert values.dtype == FP8
    assert scale.shape == (5, 1)
    back = values.float() * scale
    assert ((back - x).abs() <= x.abs().amax(1, keepdim=True) / 16).all()  # 3 bits of mantissa
    assert torch.equal(back[3], torch.zeros(64))


def test_a_product_in_fp8_is_that_of_the_rounded_factors() -> None:
    torch.manual_seed(1)
    x, weight, bias = torch.randn(3, 7, 64).bfloat16(), torch.randn(48, 64), torch.randn(48).bfloat16()
    w, w_scale = quantised(weight)
    tokens, scale = quantised(x.reshape(-1, 64))
    wanted = (tokens.float() * scale) @ (w.float() * w_scale).t() + bias.float()
    found = multiply_fp8(x, w, w_scale, bias)
    assert found.shape == (3, 7, 48)
    assert found.dtype == torch.bfloat16
    assert worst(found.view(-1, 48), wanted) < 0.2  # bfloat16 rounds 32 to 0.25
    exact = x.float().view(-1, 64) @ weight.t() + bias.float()
    assert (found.view(-1, 48) - exact).std() / exact.std() < 0.06


def test_the_linears_of_the_blocks_are_quantised_and_no_others() -> None:
    flow = model().bfloat16()
    quantise(flow)
    kinds = {name: module.weight.dtype for name, module in flow.named_modules() if isinstance(module, Linear)}
    fp8 = {name for name, kind in kinds.items() if kind == FP8}
    assert {name.split(".", 2)[2] for name in fp8 if name.startswith("double")} == {
        f"{stream}_{part}" for stream in ("img", "txt") for part in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    }
    assert {name.split(".", 2)[2] for name in fp8 if name.startswith("single")} == {"linear1", "linear2"}
    assert len(fp8) == 2 * 8 + 3 * 2


def test_weights_are_quantised_as_they_are_loaded(bfl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two of one reader's are in bfloat16 at once, so that loading takes no more memory than what is loaded."""
    files = find_model(bfl_folder)
    wanted = load_transformer(files, device=torch.device("cpu"), dtype=torch.bfloat16)
    quantise(wanted)
    names = block_linears(wanted).keys()
    waiting: list[str] = []
    most = 0
    get = TensorFiles.get

    def got(files: TensorFiles, name: str) -> torch.Tensor:
        nonlocal most
        if name in names:
            waiting.append(name)
            most = max(most, len(waiting))
        return get(files, name)

    def done(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        waiting.pop()
        return quantised(weight)

    monkeypatch.setattr(TensorFiles, "get", got)
    monkeypatch.setattr("engine.fp8.quantised", done)
    monkeypatch.setattr("engine.weights.READERS", 1)
    found = load_transformer(files, device=torch.device("cpu"), dtype=FP8)
    assert most == 1
    for name, linear in block_linears(found).items():
        same = block_linears(wanted)[name]
        assert torch.equal(linear.weight.view(torch.uint8), same.weight.view(torch.uint8)), name
        assert linear.weight_scale is not None
        assert same.weight_scale is not None
        assert torch.equal(linear.weight_scale, same.weight_scale), name
    assert {name for name, each in found.named_parameters() if each.dtype == FP8} == names


def test_parts_of_a_linear_and_adapters_act_in_fp8_as_well() -> None:
    torch.manual_seed(2)
    linear = Linear(32, 48).requires_grad_(False).bfloat16()
    x = torch.randn(16, 32).bfloat16()
    weight, linear.weight_scale = quantised(linear.weight)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    plain = linear(x)
    assert torch.equal(linear.rows(x, 16, 32), plain[:, 16:32])
    low = LowRank(0, 48, torch.randn(2, 32).bfloat16(), torch.randn(48, 2).bfloat16(), None)
    linear.additions.append(low)
    added = low(x, 0, 48)
    assert added is not None
    assert torch.equal(linear(x), plain + added)


def test_images_in_fp8_are_near_and_not_the_same() -> None:
    request = EditRequest("make the mug red", image=picture(128, 128), width=128, height=128, steps=4)
    exact = KontextEngine.load(shipped_folder(), device="cpu", dtype=torch.bfloat16)
    quick = KontextEngine.load(shipped_folder(), device="cpu", dtype=FP8)
    found = [
        psnr(quick.edit([each])[0].image, exact.edit([each])[0].image)
        for each in (request, replace(request, seed=1, prompt="a blue mug"))
    ]
    assert all(25 < each < 99 for each in found), found


def test_a_model_in_fp8_is_not_saved(tmp_path: Path) -> None:
    engine = KontextEngine.load(shipped_folder(), device="cpu", dtype=FP8)
    with pytest.raises(ConfigError, match="not saved"):
        engine.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_device_that_cannot_multiply_fp8_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.pipeline.choose_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"compute capability 8\.9"):
        KontextEngine.load(shipped_folder(), device="cuda", dtype=FP8)
