"""Tiny random models of sizes other than the reference case's, made by diffusers, and runs of its pipelines."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from torch import Tensor, nn

from engine.pipeline import EditRequest, KontextEngine
from tests.engine.conftest import CASE

TEXT_LENGTH = 32


@dataclass(frozen=True)
class Sizes:
    """Of a tiny model. Text widths are the reference case's, whose encoders are used."""

    heads: int = 3
    head_dim: int = 16
    axes: tuple[int, int, int] = (4, 6, 6)
    double: int = 1
    single: int = 3
    latent_channels: int = 16
    guidance: bool = True
    seed: int = 7


def write_model(folder: Path, sizes: Sizes) -> Path:
    """A model folder as diffusers itself saves it."""
    shutil.copytree(CASE / "model", folder, ignore=shutil.ignore_patterns("transformer", "vae"))
    torch.manual_seed(sizes.seed)
    transformer = FluxTransformer2DModel(
        in_channels=4 * sizes.latent_channels,
        num_layers=sizes.double,
        num_single_layers=sizes.single,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.heads,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=sizes.guidance,
        axes_dims_rope=sizes.axes,
    )
    shake(transformer, seed=sizes.seed)
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 24),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=4,
        sample_size=256,
        scaling_factor=0.5,
        shift_factor=-0.2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.save_pretrained(folder / "vae")
    return folder


def shake(module: nn.Module, *, seed: int, strength: float = 0.1) -> None:
    """Move every parameter, so that biases and norm scales, which start at 0 and 1, count in comparisons."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=strength)


def load_engine(folder: Path) -> KontextEngine:
    return KontextEngine.load(folder, device="cpu", text_length=TEXT_LENGTH)


def load_pipeline(folder: Path, kind: Any = FluxKontextPipeline) -> Any:
    """diffusers' own pipeline over a model folder."""
    with contextlib.redirect_stderr(io.StringIO()):
        pipeline = kind.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_to_image(pipeline: Any) -> Any:
    """diffusers' FLUX.1 pipeline over the same modules: without context."""
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    plain = FluxPipeline(**{name: getattr(pipeline, name) for name in names})
    plain.set_progress_bar_config(disable=True)
    return plain


def run_pipeline(pipeline: Any, request: EditRequest) -> Tensor:
    """Final packed latents (tokens, channels) of one request by diffusers; one context image at most."""
    assert request.width is not None
    assert request.height is not None
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "generator": [torch.Generator("cpu").manual_seed(request.seed)],
        "max_sequence_length": TEXT_LENGTH,
        "output_type": "latent",
    }
    if request.negative_prompt is not None:
        arguments |= {"negative_prompt": request.negative_prompt, "true_cfg_scale": request.true_cfg_scale}
    if isinstance(pipeline, FluxKontextPipeline):
        assert isinstance(request.image, Image.Image)
        arguments |= {"image": request.image, "max_area": request.width * request.height, "_auto_resize": False}
    latents: Tensor = pipeline(**arguments).images[0]
    return latents


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def worst(found: Tensor, wanted: Tensor) -> float:
    """Largest difference; infinite where either is not finite."""
    assert found.shape == wanted.shape
    difference = (found.float() - wanted.float()).abs().max().item()
    return difference if difference == difference else float("inf")


def bfl_weights(engine: KontextEngine) -> dict[str, Tensor]:
    """Of the transformer, in BFL names."""
    return dict(engine.transformer.state_dict())


def check_values(folder: Path, wanted: Mapping[str, Tensor], base: Path) -> None:
    """Loaded from `folder`, every parameter is the value wanted, in memory of its own, and edits follow from them.

    `base` is the model that `folder` was made of: the other components are the same.
    """
    loaded, by_hand = load_engine(folder), load_engine(base)
    found = loaded.transformer.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32, name
        assert torch.equal(found[name], tensor), name
        assert found[name].untyped_storage().nbytes() == found[name].nbytes, name
    by_hand.transformer.load_state_dict(wanted)
    request = EditRequest("make the mug red", image=picture(32, 32), width=32, height=32, steps=2, seed=3)
    assert worst(loaded.edit([request])[0].latents, by_hand.edit([request])[0].latents) < 2e-5


@contextlib.contextmanager
def edited_json(path: Path) -> Iterator[dict[str, Any]]:
    """Change a JSON file in place."""
    data: dict[str, Any] = json.loads(path.read_text())
    yield data
    path.write_text(json.dumps(data))
