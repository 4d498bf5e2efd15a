"""What a model needs of a device's memory, and what is done when that is more than it has.

Four things share the device: the weights, what rows keep from step to step, the activations of a denoise step, and the
picture that is decoded (in bands, always: see `engine.bands`). When they do not fit, the text encoders, a third of
FLUX.1's weights, stay on the CPU: a prompt is encoded once, a step is computed dozens of times. What is left decides
how many rows fit, and how many tokens a forward pass may have: a row with a negative prompt has twice a row's.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from engine.autoencoder import BAND_AREA, Autoencoder
from engine.config import AutoencoderConfig, FlowConfig, ModelConfig
from engine.errors import ConfigError
from engine.fp8 import block_linears
from engine.geometry import TOKEN_SIDE
from engine.linear import FP8
from engine.modes import EXACT, Approximation
from engine.text import MAX_TEXT_LENGTH, t5_dtype
from engine.transformer import FlowTransformer
from engine.weights import ModelFiles, read_json

RESERVE = 1_500_000_000
"""Bytes kept free: the context of the driver, workspaces of the libraries, fragments, features of prompts."""
STEPS = 28
"""Denoise steps that a row is planned with: as many as a request has that says nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How many each part of a model has."""

    transformer: int
    block_linears: int
    """Those of the transformer that fp8 has in one byte each."""
    t5: int
    clip: int
    autoencoder: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes that each part takes, and what follows for a device of `memory` bytes."""

    memory: int
    transformer: int
    t5: int
    clip: int
    autoencoder: int
    row: int
    """Of one row at the model's native area, with one context picture of it and no negative prompt: its activations in
    a denoise step, and what it keeps from step to step.
    """
    decode: int
    """Activations while a picture of the native area is decoded, or encoded."""
    offload_texts: bool
    """Whether the text encoders stay on the CPU."""
    rows: int
    """How many rows fit, of those asked for; 0: the model does not fit."""
    tokens: int
    """Of one forward pass whose activations fit beside what these rows keep."""

    @property
    def weights(self) -> int:
        """Bytes of the weights of the whole model, wherever they lie."""
        return self.transformer + self.t5 + self.clip + self.autoencoder


def count_parameters(config: ModelConfig, *, clip: CLIPTextConfig, t5: T5Config) -> Parameters:
    """Parameters of models of these sizes; they are built on the meta device, where they take no memory."""
    with torch.device("meta"):
        transformer = FlowTransformer(config.flow)
        parts: dict[str, nn.Module] = {
            "transformer": transformer,
            "t5": T5EncoderModel(t5),
            "clip": CLIPTextModel(clip),
            "autoencoder": Autoencoder(config.autoencoder),
        }
    return Parameters(
        **{name: sum(each.numel() for each in part.parameters()) for name, part in parts.items()},
        block_linears=sum(each.weight.numel() for each in block_linears(transformer).values()),
    )


def memory_plan(
    config: ModelConfig,
    parameters: Parameters,
    *,
    memory: int,
    dtype: torch.dtype,
    rows: int,
    approximation: Approximation = EXACT,
    may_offload: bool = True,
) -> MemoryPlan:
    """How a model of these sizes lies in `memory` bytes of a device, with at most `rows` rows at once.

    `approximation`: with which rows are sampled. `may_offload`: whether the text encoders can lie elsewhere, in memory
    that is not the device's.
    """
    smaller = parameters.block_linears if dtype == FP8 else 0
    dtype = torch.bfloat16 if dtype == FP8 else dtype
    transformer = parameters.transformer * dtype.itemsize - smaller * (dtype.itemsize - FP8.itemsize)
    t5, clip = parameters.t5 * t5_dtype(dtype).itemsize, parameters.clip * dtype.itemsize
    autoencoder = parameters.autoencoder * torch.float32.itemsize
    token = _token_bytes(config.flow, dtype)
    kept = _kept_bytes(config, dtype, approximation)
    row = kept + token * (2 * _picture_tokens(config) + MAX_TEXT_LENGTH)
    decode = _decode_bytes(config.autoencoder, config.native_area)
    # Pictures are decoded between steps, so that they share the room of the activations.
    left = memory - RESERVE - transformer - autoencoder
    work = max(row, kept + decode)
    offload = may_offload and left - t5 - clip < work
    if not offload:
        left -= t5 + clip
    rows = min(rows, left // row, (left - decode) // kept) if left >= work else 0
    return MemoryPlan(
        memory=memory,
        transformer=transformer,
        t5=t5,
        clip=clip,
        autoencoder=autoencoder,
        row=row,
        decode=decode,
        offload_texts=offload,
        rows=rows,
        tokens=max(0, left - rows * kept) // token,
    )


def plan_for(
    files: ModelFiles,
    device: torch.device,
    *,
    memory: int,
    dtype: torch.dtype,
    rows: int,
    approximation: Approximation = EXACT,
) -> MemoryPlan:
    """The plan of a model folder in `memory` bytes of a device; its configs alone are read. Raises `ConfigError`."""
    clip, t5 = (read_json(folder / "config.json") for folder in (files.clip, files.t5))
    try:
        parameters = count_parameters(
            files.config, clip=CLIPTextConfig.from_dict(clip.get("text_config", clip)), t5=T5Config.from_dict(t5)
        )
    except Exception as error:  # transformers raises what it likes for entries of a wrong type or size
        raise ConfigError(f"{files.clip} or {files.t5}: no usable config.json ({error})") from error
    may_offload = device.type == "cuda"  # elsewhere the CPU has the same memory
    return memory_plan(
        files.config,
        parameters,
        memory=memory,
        dtype=dtype,
        rows=rows,
        approximation=approximation,
        may_offload=may_offload,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a model may take now."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, for the next to take
    return torch.cuda.mem_get_info(device)[0] + unused


def total_memory(device: torch.device) -> int:
    """Bytes that a model may have when nothing else runs on the device; of the CPU's memory, what is free now."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else free_memory(device)


def _picture_tokens(config: ModelConfig) -> int:
    """Of a picture of the native area."""
    return config.native_area // TOKEN_SIDE**2


def _kept_bytes(config: ModelConfig, dtype: torch.dtype, approximation: Approximation) -> int:
    """Of a row from step to step: modulations (`engine.packed.Condition`), and its context's keys and values."""
    flow = config.flow
    widths = STEPS * (12 * flow.depth_double + 3 * flow.depth_single + 2)
    if approximation.keeps_context:
        widths += 2 * (flow.depth_double + flow.depth_single) * _picture_tokens(config)
    return widths * flow.hidden_size * dtype.itemsize


def _token_bytes(config: FlowConfig, dtype: torch.dtype) -> int:
    """Of a block in the middle of its work: stream, q, k and v before and after their rotation, and both MLP widths.

    Counted over FLUX.1's sizes these are 21 hidden sizes, with an MLP of 4; a seventh is added.
    """
    return int(config.hidden_size * (12 + 3 * config.mlp_ratio)) * dtype.itemsize


def _decode_bytes(config: AutoencoderConfig, area: int) -> int:
    """See `engine.bands`: the activations of the widest point, and of a band six times that of its level."""
    first, second = config.block_channels[:2]
    widest = max(2 * first, second) * torch.float32.itemsize
    return min(3 * widest * area, widest * area + 6 * widest * BAND_AREA)
