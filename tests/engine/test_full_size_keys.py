"""At full size, on the meta device, names and shapes are those of the published files (reference/keys)."""

from __future__ import annotations

import ast

import pytest
import torch
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from engine.autoencoder import Autoencoder
from engine.config import PRESETS
from engine.text import clip_l_config, t5_xxl_config
from engine.transformer import FlowTransformer
from engine.weights import to_diffusers
from tests.engine.conftest import REFERENCE

Shapes = dict[str, tuple[int, ...]]


def published(name: str) -> Shapes:
    lines = (REFERENCE / "keys" / f"{name}.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines)
    return {key: tuple(ast.literal_eval(shape)) for key, shape in rows}


def shapes(state: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("preset", ["flux-kontext-dev", "flux-dev"])
def test_transformer_in_both_layouts(preset: str) -> None:
    with torch.device("meta"):
        module = FlowTransformer(PRESETS[preset].flow)
    assert count(module) == 11_901_408_320
    assert shapes(module.state_dict()) == published("bfl_transformer")
    assert shapes(to_diffusers(module)) == published("diffusers_transformer")


def test_autoencoder_in_both_layouts() -> None:
    with torch.device("meta"):
        module = Autoencoder(PRESETS["flux-kontext-dev"].autoencoder)
    assert count(module) == 83_819_683
    assert shapes(module.state_dict()) == published("bfl_ae")
    assert shapes(to_diffusers(module)) == published("diffusers_vae")


def test_t5_encoder() -> None:
    with torch.device("meta"):
        module = T5EncoderModel(t5_xxl_config())
    found = shapes(module.state_dict())
    found.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    assert found == published("t5_encoder")
    assert count(module) == 4_762_310_656


def test_clip_text_encoder() -> None:
    with torch.device("meta"):
        module = CLIPTextModel(clip_l_config())
    found = {
        f"text_model.{name.removeprefix('text_model.')}": shape for name, shape in shapes(module.state_dict()).items()
    }
    assert found == published("clip_text")
    assert count(module) == 123_060_480
