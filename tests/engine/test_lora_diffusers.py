"""Adapters against live diffusers and PEFT: files that they wrote, and files that they read.

diffusers reads kohya files at FLUX.1's own size alone where linear1 is in them (it splits by 3072), and BFL's and
fal's layouts at no other; PEFT itself stands in for fal's, and test_lora.py merges the rest by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.training_utils import _collate_lora_metadata
from safetensors.torch import save_file
from torch import Tensor

from engine.pipeline import EditRequest, KontextEngine
from tests.engine.tiny import Sizes, load_engine, load_pipeline, picture, run_pipeline, worst, write_model

BOUND = 2e-5
REQUEST = EditRequest("make the mug red", image=picture(64, 80), width=64, height=48, steps=3, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("lora") / "model", Sizes(double=2, single=2))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> KontextEngine:
    return load_engine(folder)


@pytest.fixture
def tiny(loaded: KontextEngine) -> Iterator[KontextEngine]:
    yield loaded
    loaded.unload_adapters()


@pytest.fixture
def pipeline(folder: Path) -> Any:
    return load_pipeline(folder)


def latents(engine: KontextEngine) -> Tensor:
    return engine.edit([REQUEST])[0].latents


def randomise(module: torch.nn.Module) -> None:
    """Give the adapters' matrices numbers: B starts at zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def check(engine: KontextEngine, path: Path, wanted: Tensor, *, scale: float = 1.0) -> None:
    before = latents(engine)
    engine.load_adapter(path, scale=scale)
    assert worst(latents(engine), wanted) < BOUND
    assert worst(wanted, before) > 1e-2
    engine.unload_adapters()
    assert torch.equal(latents(engine), before)


TRANSFORMER_MODULES = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("proj_mlp", "proj_out", "net.0.proj", "net.2", "norm.linear", "norm1.linear", "norm1_context.linear"),
    *("norm_out.linear", "x_embedder", "context_embedder", "linear_1", "linear_2"),
]


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 2, "use_rslora": True},
        {"r": 4, "lora_alpha": 2, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 5, "proj_mlp": 1}},
        {"r": 4, "lora_alpha": 2, "lora_bias": True},
    ],
    ids=["plain", "alpha", "rslora", "patterns", "bias"],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a bias for a badly saved matrix
def test_files_that_diffusers_wrote(
    tiny: KontextEngine, pipeline: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    transformer = pipeline.transformer
    transformer.add_adapter(peft.LoraConfig(**options, target_modules=TRANSFORMER_MODULES))
    text_modules = ["q_proj", "out_proj", "fc1"]
    pipeline.text_encoder.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=text_modules))
    randomise(transformer)
    randomise(pipeline.text_encoder)
    FluxKontextPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(transformer),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(pipeline.text_encoder),
        **_collate_lora_metadata({"transformer": transformer, "text_encoder": pipeline.text_encoder}),
    )
    check(tiny, tmp_path / "pytorch_lora_weights.safetensors", run_pipeline(pipeline, REQUEST))


class Author:
    """Random LoRA matrices under names of one's own."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(5)

    def random(self, *shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=self.generator)

    def pair(self, name: str, columns: int, rows: int, down: str, up: str, alpha: float | None = None) -> None:
        self.tensors |= {f"{name}.{down}": self.random(4, columns), f"{name}.{up}": self.random(rows, 4)}
        if alpha is not None:
            self.tensors[f"{name}.alpha"] = torch.tensor(alpha)

    def save(self, path: Path) -> Path:
        save_file(self.tensors, path)
        return path


def kohya(author: Author) -> None:
    """All that diffusers reads in this layout at this size: linear1 it would split by 3072, embedders it drops."""
    for block in range(2):
        for stream in ("img", "txt"):
            name = f"lora_unet_double_blocks_{block}_{stream}"
            for module, columns, rows in (
                ("attn_qkv", 48, 144),
                ("attn_proj", 48, 48),
                ("mlp_0", 48, 192),
                ("mlp_2", 192, 48),
                ("mod_lin", 48, 288),
            ):
                author.pair(f"{name}_{module}", columns, rows, "lora_down.weight", "lora_up.weight", 3.0)
        author.pair(f"lora_unet_single_blocks_{block}_linear2", 240, 48, "lora_down.weight", "lora_up.weight")
        author.pair(f"lora_unet_single_blocks_{block}_modulation_lin", 48, 144, "lora_down.weight", "lora_up.weight", 1)


def kohya_sparse(author: Author) -> None:
    """Fused parts with matrices of their own, one below the other and on the diagonal."""
    for block in range(2):
        name = f"lora_unet_double_blocks_{block}_img_attn_qkv"
        author.tensors[f"{name}.lora_down.weight"] = author.random(12, 48)
        parts = [author.random(48, 4) for _ in range(3)]
        author.tensors[f"{name}.lora_up.weight"] = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        author.tensors[f"{name}.alpha"] = torch.tensor(9.0)


def kohya_comfy(author: Author) -> None:
    for block in range(2):
        for module, columns, rows in (("img_attn.qkv", 48, 144), ("txt_mlp.2", 192, 48)):
            name = f"diffusion_model.double_blocks.{block}.{module}"
            author.pair(name, columns, rows, "lora_down.weight", "lora_up.weight", 3.0)


def kohya_with_diffusers_names(author: Author) -> None:
    for block in range(2):
        for module in ("attn_to_q", "attn_to_k", "attn_to_v", "attn_to_out_0", "attn_add_k_proj", "attn_to_add_out"):
            name = f"lora_transformer_transformer_blocks_{block}_{module}"
            author.pair(name, 48, 48, "lora_down.weight", "lora_up.weight", 3.0)
        name = f"lora_transformer_single_transformer_blocks_{block}_attn_to_v"
        author.pair(name, 48, 48, "lora_down.weight", "lora_up.weight", 2.0)
    author.pair("lora_transformer_x_embedder", 64, 48, "lora_down.weight", "lora_up.weight", 2.0)
    author.pair("lora_transformer_norm_out_linear", 48, 96, "lora_down.weight", "lora_up.weight", 2.0)
    embedder = "lora_transformer_time_text_embed_timestep_embedder_linear_2"
    author.pair(embedder, 48, 48, "lora_down.weight", "lora_up.weight", 2.0)


def kohya_and_peft_in_one(author: Author) -> None:
    for block in range(2):
        name = f"transformer.transformer_blocks.{block}.attn.to_out.0"
        author.pair(name, 48, 48, "lora_A.weight", "lora_B.weight")
        author.pair(f"lora_unet_double_blocks_{block}_img_attn_proj", 48, 48, "lora_down.weight", "lora_up.weight", 1.0)


def xlabs(author: Author) -> None:
    for block in range(2):
        for stream in (1, 2):
            name = f"double_blocks.{block}.processor"
            author.pair(f"{name}.qkv_lora{stream}", 48, 144, "down.weight", "up.weight")
            author.pair(f"{name}.proj_lora{stream}", 48, 48, "down.weight", "up.weight")
        author.pair(f"single_blocks.{block}.processor.qkv_lora", 48, 144, "down.weight", "up.weight")
        author.pair(f"single_blocks.{block}.processor.proj_lora", 240, 48, "down.weight", "up.weight")


def alpha_tensors(author: Author) -> None:
    for block in range(2):
        for module in ("attn.to_q", "attn.to_k", "attn.add_v_proj"):
            name = f"transformer.transformer_blocks.{block}.{module}"
            author.pair(name, 48, 48, "lora_A.weight", "lora_B.weight", 6.0)
        name = f"transformer.single_transformer_blocks.{block}.proj_mlp"
        author.pair(name, 48, 192, "lora_A.weight", "lora_B.weight", 2.0)


@pytest.mark.parametrize(
    "write",
    [
        kohya,
        kohya_sparse,
        kohya_comfy,
        kohya_with_diffusers_names,
        kohya_and_peft_in_one,
        xlabs,
        alpha_tensors,
    ],
)
def test_files_that_diffusers_reads(tiny: KontextEngine, pipeline: Any, tmp_path: Path, write: Any) -> None:
    author = Author()
    write(author)
    path = author.save(tmp_path / "adapter.safetensors")
    pipeline.load_lora_weights(path, adapter_name="it")
    pipeline.set_adapters(["it"], [0.7])
    check(tiny, path, run_pipeline(pipeline, REQUEST), scale=0.7)


def test_files_that_peft_wrote_over_bfl_names(tiny: KontextEngine, tmp_path: Path) -> None:
    """The layout of fal's Kontext trainer, from PEFT itself around a transformer with BFL's names."""
    modules = ["qkv", "proj", "linear1", "linear2", "lin", "img_in", "txt_in", "in_layer", "out_layer"]
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=modules)
    wrapped = peft.get_peft_model(copy.deepcopy(tiny.transformer), config)
    randomise(wrapped)
    path = tmp_path / "fal.safetensors"
    save_file(dict(peft.get_peft_model_state_dict(wrapped)), path)
    other = KontextEngine(
        config=tiny.config,
        transformer=wrapped.merge_and_unload(),
        autoencoder=tiny.autoencoder,
        text=tiny.text,
        device=tiny.device,
    )
    check(tiny, path, latents(other))
    assert tiny.load_adapter(path).family == "peft-bfl"


def test_folders_that_peft_wrote(tiny: KontextEngine, tmp_path: Path) -> None:
    """`save_pretrained` keeps alpha in a file of its own, adapter_config.json."""
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["qkv", "linear2"])
    wrapped = peft.get_peft_model(copy.deepcopy(tiny.transformer), config)
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    other = KontextEngine(
        config=tiny.config,
        transformer=wrapped.merge_and_unload(),
        autoencoder=tiny.autoencoder,
        text=tiny.text,
        device=tiny.device,
    )
    check(tiny, tmp_path / "adapter", latents(other))
