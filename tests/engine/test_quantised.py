"""Quantised checkpoints: what is loaded is what the file's values stand for, and other formats are refused by name.

Each family is written in its real layout, quantised here by hand, and compared with values that were dequantised here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import WeightsError
from engine.keys import flow_to_diffusers
from engine.pipeline import KontextEngine
from engine.weights import fingerprint
from tests.engine.tiny import bfl_weights, check_values, load_engine

PREFIX = "model.diffusion_model."
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"

Tensors = dict[str, Tensor]
Quantise = Callable[[Mapping[str, Tensor]], tuple[Tensors, Tensors]]
"""Of the weights: the tensors of the file, and the values that they stand for."""


def is_scaled(name: str, tensor: Tensor) -> bool:
    """Comfy and BFL scale the linears of the blocks, and leave the rest in BF16."""
    return tensor.ndim == 2 and "blocks." in name


def plain(dtype: torch.dtype) -> Quantise:
    def quantise(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
        stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        return stored, {name: tensor.float() for name, tensor in stored.items()}

    return quantise


def scaled(
    scale_name: str,
    *,
    dtype: torch.dtype = E4M3,
    per_row: int = 0,
    scalar: tuple[int, ...] = (),
    extra: Mapping[str, Tensor] | None = None,
    marker: Tensor | None = None,
    prefix: str = "",
) -> Quantise:
    """`per_row`: rank of a scale for each row; 0 is one number, of shape `scalar`. `extra`: beside each weight."""

    def quantise(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
        stored: Tensors = {} if marker is None else {"scaled_fp8": marker}
        wanted: Tensors = {}
        for name, tensor in tensors.items():
            if not is_scaled(name, tensor):
                stored[name] = tensor.bfloat16()
                wanted[name] = stored[name].float()
                continue
            amax = tensor.abs().amax(dim=1, keepdim=True) if per_row else tensor.abs().amax()
            scale = amax / torch.finfo(dtype).max
            stored[name] = (tensor / scale).to(dtype)
            wanted[name] = stored[name].float() * scale
            module = name.removesuffix(".weight")
            stored[f"{module}.{scale_name}"] = scale.reshape((-1, 1)[:per_row] if per_row else scalar).clone()
            stored |= {f"{module}.{leaf}": value.clone() for leaf, value in (extra or {}).items()}
        return {f"{prefix}{name}": tensor for name, tensor in stored.items()}, wanted

    return quantise


def description(**entries: object) -> Tensor:
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def comfy(name: str = "float8_e4m3fn", **entries: object) -> dict[str, Tensor]:
    return {"comfy_quant": description(format=name, **entries)}


OLD_INPUT = {"scale_input": torch.tensor(0.5)}
NEW_INPUT = {"input_scale": torch.tensor(0.5)}
FAMILIES: dict[str, Quantise] = {
    "plain e4m3": plain(E4M3),
    "plain e5m2": plain(E5M2),
    "Comfy, older": scaled("scale_weight", extra=OLD_INPUT, marker=torch.zeros(0, dtype=E4M3)),
    "Comfy, older, prefix": scaled("scale_weight", marker=torch.zeros(2, dtype=E4M3), scalar=(1,), prefix=PREFIX),
    "Comfy, older, e5m2": scaled("scale_weight", marker=torch.zeros(0, dtype=E5M2), dtype=E5M2),
    "Comfy, older, per row": scaled("scale_weight", marker=torch.zeros(0, dtype=E4M3), per_row=1),
    "Comfy, newer": scaled("weight_scale", extra=comfy() | NEW_INPUT),
    "Comfy, newer, prefix": scaled("weight_scale", extra=comfy(full_precision_matrix_mult=True), prefix=PREFIX),
    "Comfy, newer, e5m2": scaled("weight_scale", extra=comfy("float8_e5m2"), dtype=E5M2, scalar=(1, 1)),
    "Comfy, newer, per row": scaled("weight_scale", extra=comfy(), per_row=2),
    "BFL, per row": scaled("weight_scale", per_row=1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_in_bfl_files(wide_bfl: Path, wide_model: Path, wide: KontextEngine, family: str) -> None:
    stored, wanted = FAMILIES[family](bfl_weights(wide))
    save_file(stored, wide_bfl / "flux1-tiny.safetensors")
    check_values(wide_bfl, wanted, wide_model)


@pytest.mark.parametrize("family", ["plain e4m3", "plain e5m2", "Comfy, newer", "BFL, per row"])
def test_fp8_in_a_diffusers_folder(wide_model: Path, wide: KontextEngine, tmp_path: Path, family: str) -> None:
    """Parts of what BFL fuses have scales of their own."""
    folder = tmp_path / "model"
    shutil.copytree(wide_model, folder)
    stored, values = FAMILIES[family](load_file(folder / TRANSFORMER))
    save_file(stored, folder / TRANSFORMER)
    table = flow_to_diffusers(bfl_weights(wide), wide.config.flow)
    wanted = {name: each.join([values[part] for part in each.names]) for name, each in table.items()}
    check_values(folder, wanted, wide_model)


def test_the_product_is_made_in_float32_and_then_cast(wide_bfl: Path, wide: KontextEngine) -> None:
    stored, wanted = FAMILIES["Comfy, newer"](bfl_weights(wide))
    save_file(stored, wide_bfl / "flux1-tiny.safetensors")
    loaded = KontextEngine.load(wide_bfl, device="cpu", dtype=torch.bfloat16, text_length=32)
    for name, tensor in loaded.transformer.state_dict().items():
        assert torch.equal(tensor, wanted[name].bfloat16()), name


def test_scales_may_lie_in_another_shard(wide_model: Path, wide: KontextEngine, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(wide_model, folder)
    stored, values = FAMILIES["Comfy, newer"](load_file(folder / TRANSFORMER))
    shards = {True: "b.safetensors", False: "a.safetensors"}
    (folder / TRANSFORMER).unlink()
    for of_scales, file in shards.items():
        part = {name: tensor for name, tensor in stored.items() if name.endswith("_scale") == of_scales}
        save_file(part, folder / "transformer" / file)
    index = {"weight_map": {name: shards[name.endswith("_scale")] for name in stored}}
    (folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_engine(folder).transformer.img_in.weight, values["x_embedder.weight"])


def test_an_autoencoder_in_fp8_is_cast_up(model_folder: Path) -> None:
    file = model_folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.to(E4M3) for name, tensor in load_file(file).items()}, file)
    bias = load_engine(model_folder).autoencoder.decoder.conv_in.bias
    assert bias is not None
    assert torch.equal(bias, load_file(file)["decoder.conv_in.bias"].float())


# Files that are not what they say


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(WeightsError) as error:
        load_engine(folder)
    for word in words:
        assert word in str(error.value)


LAYER = "double_blocks.0.img_attn.proj"


def without(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def having(**changes: Tensor) -> Callable[[Tensors], None]:
    """Other tensors beside the weight of `LAYER`."""
    return lambda tensors: tensors.update({f"{LAYER}.{leaf}": tensor for leaf, tensor in changes.items()})


def marked(leaf: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{LAYER}.{leaf}": torch.ones(1)})


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        (
            "Comfy, older",
            without(f"{LAYER}.scale_weight"),
            (f"{LAYER}.weight is fp8 and has no scale", "complete copy"),
        ),
        ("Comfy, newer", without(f"{LAYER}.weight_scale"), (f"{LAYER}.weight is fp8 and has no scale",)),
        ("Comfy, older", lambda tensors: tensors.update({"img_in.bias": torch.ones(256).to(E4M3)}), ("img_in.bias",)),
        ("plain e4m3", lambda tensors: tensors.update(scaled_fp8=torch.zeros(0)), ("is fp8 and has no scale",)),
        ("Comfy, older", without(f"{LAYER}.weight"), (f"{LAYER}.scale", f"without an fp8 {LAYER}.weight")),
        ("Comfy, older", having(weight=torch.ones(256, 256)), (f"without an fp8 {LAYER}.weight",)),
        ("Comfy, older", having(weight_scale=torch.ones(())), (f"{LAYER}.weight_scale is a second scale",)),
        ("Comfy, older", having(scale_weight=torch.ones(3)), (f"{LAYER}.scale_weight is F32 [3]", "[256, 256]")),
        ("Comfy, older", having(scale_weight=torch.ones(1, 256)), ("one for each row",)),
        ("Comfy, older", having(scale_weight=torch.ones(256, 8).to(E4M3)), ("F8_E4M3 [256, 8]",)),
        ("Comfy, older", having(scale_weight=torch.tensor(torch.nan)), (f"{LAYER}.scale_weight is not finite",)),
        ("Comfy, older", having(scale_weight=torch.tensor(torch.inf)), ("undamaged",)),
        ("Comfy, newer", having(**comfy("nvfp4")), (f"{LAYER}.comfy_quant says nvfp4", "GGUF", "BF16")),
        ("Comfy, newer", having(**comfy("int8_tensorwise")), ("says int8_tensorwise", "GGUF", "BF16")),
        ("Comfy, newer", having(**comfy("float8_e5m2")), ("says float8_e5m2", "weight is float8_e4m3fn")),
        ("Comfy, newer", having(**comfy(convrot=True)), ("with convrot", "GGUF")),
        ("Comfy, newer", having(comfy_quant=description(kind="x")), ("names no format",)),
        ("Comfy, newer", having(comfy_quant=torch.tensor(list(b"[[]"), dtype=torch.uint8)), ("JSON",)),
        ("Comfy, newer", having(comfy_quant=torch.tensor([255, 254], dtype=torch.uint8)), ("JSON",)),
        ("Comfy, newer", having(comfy_quant=torch.tensor(list(b"[3]"), dtype=torch.uint8)), ("names no format",)),
        ("Comfy, newer", having(comfy_quant=torch.full((4096,), 91, dtype=torch.uint8)), ("512 bytes",)),
        ("Comfy, newer", having(comfy_quant=torch.ones(3)), ("512 bytes",)),
        ("plain e4m3", marked("weight.absmax"), ("bitsandbytes nf4", "GGUF", "BF16")),
        ("plain e4m3", marked("weight.nested_absmax"), ("1 surplus",)),
        ("plain e4m3", marked("SCB"), ("bitsandbytes int8", "GGUF")),
        ("plain e4m3", marked("wscales"), ("Nunchaku", "GGUF")),
        ("plain e4m3", marked("weight_scale_2"), ("nvfp4", "GGUF")),
        ("plain e4m3", marked("weight._data"), ("optimum-quanto", "GGUF")),
        ("plain e4m3", having(weight=torch.ones(256, 256, dtype=torch.int8)), (f"{LAYER}.weight is I8", "GGUF")),
        ("plain e4m3", without(f"{LAYER}.weight"), (f"1 missing: {LAYER}.weight",)),
        ("plain e4m3", having(weight=torch.ones(256, 64).to(E4M3)), ("1 wrong shape", "[256, 64]")),
    ],
)
def test_fp8_that_is_refused(
    wide_bfl: Path, wide: KontextEngine, family: str, change: Callable[[Tensors], None], words: tuple[str, ...]
) -> None:
    stored, _ = FAMILIES[family](bfl_weights(wide))
    change(stored)
    save_file(stored, wide_bfl / "flux1-tiny.safetensors")
    refused(wide_bfl, str(wide_bfl / "flux1-tiny.safetensors"), *words)


def test_an_all_in_one_file_is_refused(wide_bfl: Path, wide: KontextEngine) -> None:
    stored, _ = FAMILIES["Comfy, older, prefix"](bfl_weights(wide))
    parts = scaled("scale_weight", marker=torch.zeros(0, dtype=E4M3), prefix="text_encoders.t5xxl.transformer.")
    encoder, _ = parts({"blocks.0.q.weight": torch.ones(4, 4)})
    save_file({**stored, **encoder, "vae.encoder.conv_in.bias": torch.ones(4)}, wide_bfl / "flux1-tiny.safetensors")
    refused(wide_bfl, "surplus: text_encoders.t5xxl.transformer.blocks.0.q.weight", "vae.encoder.conv_in.bias")


def test_fp8_counts_in_the_hash_of_a_model(wide_bfl: Path, wide: KontextEngine) -> None:
    hashes = set()
    for family in ("plain e4m3", "plain e5m2"):
        save_file(FAMILIES[family](bfl_weights(wide))[0], wide_bfl / "flux1-tiny.safetensors")
        hashes.add(fingerprint(wide_bfl))
    assert len(hashes) == 2
