"""Names of the weights in BFL files and in the diffusers layout, as tables, and the two translations (ENGINE.md 3b).

Inside, everything has BFL names. A rule names one BFL module and the diffusers modules that hold its parts, in the
order in which BFL fuses them. The form with a table follows torchtitan's state dict adapter; the content is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import AutoencoderConfig, FlowConfig

REPACKAGED_PREFIX = "model.diffusion_model."
"""In front of all names of the transformer in some files."""
GLOBAL = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
SWAPPED = "final_layer.adaLN_modulation.1"
"""The one module whose halves change places: BFL (shift, scale), diffusers (scale, shift)."""


def flow_modules(config: FlowConfig) -> dict[str, tuple[str, ...]]:
    """BFL module -> diffusers modules, for every module of a transformer of these sizes."""
    modules: dict[str, tuple[str, ...]] = dict(GLOBAL)
    if not config.guidance_embed:
        modules = {bfl: parts for bfl, parts in modules.items() if not bfl.startswith("guidance_in")}
    for kind, table, depth, theirs in (
        ("double_blocks", DOUBLE, config.depth_double, "transformer_blocks"),
        ("single_blocks", SINGLE, config.depth_single, "single_transformer_blocks"),
    ):
        for index in range(depth):
            for bfl, parts in table.items():
                modules[f"{kind}.{index}.{bfl}"] = tuple(f"{theirs}.{index}.{part}" for part in parts)
    return modules


def part_rows(bfl_module: str, parts: int, config: FlowConfig) -> list[int]:
    """Rows of each fused part of a BFL linear: q, k, v and, in single blocks, the MLP."""
    assert parts in (3, 4), f"{bfl_module} has {parts} parts"
    return [config.hidden_size] * 3 + [config.mlp_size] * (parts - 3)


def swap_halves(tensor: Tensor) -> Tensor:
    """(shift, scale) to (scale, shift) along the rows, or back."""
    first, second = tensor.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)


@dataclass(frozen=True, slots=True)
class Translation:
    """How one BFL parameter is made of the file's parameters, and taken apart again."""

    names: tuple[str, ...]
    """In the file, in order."""
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


def _only(parts: list[Tensor]) -> Tensor:
    (part,) = parts
    return part


def _identity(name: str) -> Translation:
    return Translation((name,), _only, lambda whole: [whole])


def flow_to_diffusers(names: Mapping[str, Tensor], config: FlowConfig) -> dict[str, Translation]:
    """For each BFL parameter name of a transformer: its translation into the diffusers layout."""
    modules = flow_modules(config)
    table: dict[str, Translation] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        parts = modules[module]
        targets = tuple(f"{part}.{'weight' if leaf == 'scale' else leaf}" for part in parts)
        if module == SWAPPED:
            table[name] = Translation(
                targets, lambda tensors: swap_halves(_only(tensors)), lambda whole: [swap_halves(whole)]
            )
        elif len(parts) == 1:
            table[name] = _identity(targets[0])
        else:
            rows = part_rows(module, len(parts), config)

            def split(whole: Tensor, rows: list[int] = rows) -> list[Tensor]:
                return list(torch.split(whole, rows, dim=0))

            table[name] = Translation(targets, torch.cat, split)
    return table


_AE_RENAMES = (
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    (".norm_out.", ".conv_norm_out."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".block.", ".resnets."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
)


def autoencoder_to_diffusers(names: Mapping[str, Tensor], config: AutoencoderConfig) -> dict[str, Translation]:
    """For each BFL parameter name of an autoencoder: its translation into the diffusers layout.

    diffusers numbers the decoder's levels from the coarsest, and has linears where BFL has 1x1 convolutions in the
    attention.
    """
    last = len(config.block_channels) - 1
    table: dict[str, Translation] = {}
    for name in names:
        target = name
        for ours, theirs in _AE_RENAMES:
            target = target.replace(ours, theirs)
        half, kind, *rest = target.split(".")
        if kind == "down":
            target = ".".join([half, "down_blocks", *rest])
        elif kind == "up":
            target = ".".join([half, "up_blocks", str(last - int(rest[0])), *rest[1:]])
        if ".attn_1." in name and name.endswith("weight") and ".norm." not in name:
            table[name] = Translation(
                (target,), lambda parts: _only(parts)[:, :, None, None], lambda whole: [whole[:, :, 0, 0]]
            )
        else:
            table[name] = _identity(target)
    return table


def untranslated(names: Mapping[str, Tensor]) -> dict[str, Translation]:
    """The table for BFL files, whose names are ours."""
    return {name: _identity(name) for name in names}
