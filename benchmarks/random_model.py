"""A random model of a middle size, in the diffusers layout: what the engine's benchmarks run.

71 M parameters in the transformer (4 double and 8 single blocks of 512), text encoders and an autoencoder whose share
of the work is about that of FLUX.1's. The weights are random, so that its pictures are noise; its speed is that of a
trained model of these sizes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from engine.autoencoder import Autoencoder
from engine.config import AutoencoderConfig, FlowConfig, ModelConfig
from engine.pipeline import KontextEngine
from engine.text import TextEncoder
from engine.transformer import FlowTransformer
from kontext_batch.registry import shipped_folder

TEXT_LENGTH = 128

Module = TypeVar("Module", bound=nn.Module)

MIDDLE = ModelConfig(
    flow=FlowConfig(
        hidden_size=512,
        num_heads=8,
        depth_double=4,
        depth_single=8,
        text_dim=512,
        pooled_dim=256,
        axes_dims=(16, 24, 24),
    ),
    autoencoder=AutoencoderConfig(block_channels=(32, 64, 128, 128), groups=16, sample_size=256),
)
SMALL = ModelConfig(
    flow=FlowConfig(
        hidden_size=96,
        num_heads=4,
        depth_double=1,
        depth_single=2,
        text_dim=512,
        pooled_dim=256,
        axes_dims=(8, 8, 8),
    ),
    autoencoder=AutoencoderConfig(block_channels=(8, 8, 16, 16), groups=4, sample_size=64),
)


def random_transformer(config: FlowConfig, *, seed: int = 0) -> FlowTransformer:
    """With weights of a spread that keeps activations near 1, in fp32."""
    torch.manual_seed(seed)
    return _still(FlowTransformer(config))


def random_engine(config: ModelConfig = MIDDLE, *, seed: int = 0) -> KontextEngine:
    """A whole random model in fp32 on the CPU, with the shipped model's tokenizers."""
    torch.manual_seed(seed)
    tokenizers = {name: shipped_folder() / name for name in ("tokenizer", "tokenizer_2")}
    clip = CLIPTextConfig(
        vocab_size=793,
        hidden_size=config.flow.pooled_dim,
        intermediate_size=4 * config.flow.pooled_dim,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=config.flow.pooled_dim,
        bos_token_id=791,
        eos_token_id=792,
        pad_token_id=792,
    )
    t5 = T5Config(
        vocab_size=244,
        d_model=config.flow.text_dim,
        d_kv=64,
        d_ff=1280,
        num_layers=8,
        num_heads=8,
        feed_forward_proj="gated-gelu",
    )
    return KontextEngine(
        config=config,
        transformer=random_transformer(config.flow, seed=seed),
        autoencoder=_still(Autoencoder(config.autoencoder)),
        text=TextEncoder(_still(CLIPTextModel(clip)), _still(T5EncoderModel(t5)), tokenizers, text_length=TEXT_LENGTH),
        device=torch.device("cpu"),
    )


def _still(module: Module) -> Module:
    return module.requires_grad_(False).eval()


@contextmanager
def random_folder(config: ModelConfig = MIDDLE) -> Iterator[Path]:
    """The same as a folder, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="kontext-bench-") as folder:
        random_engine(config).save(folder)
        yield Path(folder)
