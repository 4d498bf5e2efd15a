"""Low-rank adapters that are trained beside a frozen transformer (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import AdapterError
from engine.keys import SWAPPED, flow_to_diffusers
from engine.linear import Linear
from engine.transformer import FlowTransformer

TARGETS = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "linear1", "linear2")
"""Ends of the names of the linears that are adapted: everything in the blocks but the modulation."""


class LowRankAdapter(nn.Module):
    """y + B A x on the named linears of a transformer, which itself stays as it is. B starts as zero; the scale is 1.

    The transformer is frozen from then on; its outputs change at once with the adapter's parameters.
    """

    def __init__(self, flow: FlowTransformer, rank: int, targets: Sequence[str] = TARGETS) -> None:
        super().__init__()
        if rank < 1:
            raise AdapterError(f"rank {rank}: an adapter needs at least 1")
        flow.requires_grad_(False)
        linears = {
            name: module
            for name, module in flow.named_modules()
            if isinstance(module, Linear) and name.endswith(tuple(targets)) and name != SWAPPED
        }
        if not linears:
            raise AdapterError(f"no linear of the transformer has a name that ends in {', '.join(targets)}")
        self.names = list(linears)
        device = next(flow.parameters()).device
        self.down = nn.ParameterList(torch.empty(rank, each.in_features, device=device) for each in linears.values())
        self.up = nn.ParameterList(torch.zeros(each.out_features, rank, device=device) for each in linears.values())
        for down in self.down:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self._translations = flow_to_diffusers(flow.state_dict(), flow.config)
        for index, linear in enumerate(linears.values()):
            linear.additions.append(_Addition(self, index))

    def tensors(self) -> dict[str, Tensor]:
        """In the names of diffusers and PEFT: parts of a fused linear share A and split the rows of B."""
        out: dict[str, Tensor] = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            translation = self._translations[f"{name}.weight"]
            for part, rows in zip(translation.names, translation.split(up.detach()), strict=True):
                module = f"transformer.{part.removesuffix('.weight')}"
                out[f"{module}.lora_A.weight"] = down.detach().clone()
                out[f"{module}.lora_B.weight"] = rows.clone()
        return out

    def save(self, path: Path) -> None:
        """Write the adapter as one safetensors file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors(), path, metadata={"format": "pt"})


class _Addition:
    """What the low-rank part adds to a linear's output."""

    def __init__(self, adapter: LowRankAdapter, index: int) -> None:
        self.adapter, self.index = adapter, index

    def __call__(self, x: Tensor, start: int, stop: int) -> Tensor:
        down, up = self.adapter.down[self.index], self.adapter.up[self.index]
        return F.linear(F.linear(x, down), up[start:stop])
