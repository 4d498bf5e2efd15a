"""Linears in fp8: weights with one scale for each output feature, inputs with one for each token.

Two thirds of the memory that the weights take in bfloat16 and, on cards from compute capability 8.9, about twice its
matrix products. It is no exact mode: e4m3 has 3 bits of mantissa, so that each product is off by up to 6 %, and a sum
of thousands by far less. Modulations, embedders and the first and last linears stay as they are: they take little of
the time, and everything passes through them.
"""

from __future__ import annotations

from torch import Tensor, nn

from engine.linear import Linear, quantised

BLOCK_LINEARS = (".qkv", ".proj", "_mlp.0", "_mlp.2", ".linear1", ".linear2")
"""Ends of the names of the linears that are quantised: all in the blocks but the modulations."""


def block_linears(model: nn.Module) -> dict[str, Linear]:
    """The linears that are quantised, by the names of their weights."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.endswith(BLOCK_LINEARS)
    }


def in_fp8(linear: Linear, weight: Tensor) -> Tensor:
    """`weight` in fp8, to be put into `linear`, which is given its scales."""
    values, linear.weight_scale = quantised(weight)
    return values


def quantise(model: nn.Module) -> None:
    """Turn the weights of the block linears into fp8, one at a time, in place."""
    for linear in block_linears(model).values():
        linear.weight = nn.Parameter(in_fp8(linear, linear.weight), requires_grad=False)
