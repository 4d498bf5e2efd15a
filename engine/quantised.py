"""fp8 weights in safetensors files, and the names of the quantised formats that are not read (ENGINE.md 3d).

A weight is fp8 alone, or fp8 with a scale beside it: `scale_weight` (Comfy's older files, which a tensor `scaled_fp8`
marks) or `weight_scale` (Comfy's newer ones, which describe each layer in `comfy_quant`, and BFL's, which do not). It
stands for `fp8 * scale` in float32. Scales of a layer's input are left aside: they serve fp8 products of matrices, and
ours are of the compute dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import WeightsError

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""The names that safetensors and Comfy have for one dtype."""
MARKER = "scaled_fp8"
DESCRIPTION = "comfy_quant"
SCALES = ("scale_weight", "weight_scale")
BESIDE_WEIGHTS = {*SCALES, "scale_input", "input_scale", DESCRIPTION}
OTHER_FORMATS = {
    "absmax": "bitsandbytes nf4 or fp4",
    "SCB": "bitsandbytes int8",
    "wscales": "Nunchaku SVDQuant",
    "weight_scale_2": "nvfp4",
    "_data": "optimum-quanto",
}
"""Last part of a tensor's name -> the format that has such tensors."""
ADVICE = (
    "of quantised weights, fp8 (plain, or with a scale for each weight or row) and GGUF are read; take one of those, "
    "or the weights in BF16"
)
MOST_DESCRIPTION_BYTES = 512


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in an open safetensors file."""

    file: Path
    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    handle: Any

    def read(self) -> Tensor:
        tensor: Tensor = self.handle.get_tensor(self.name)
        return tensor

    def wrong(self, what: str) -> WeightsError:
        return WeightsError(f"{self.file}: {self.name} {what}")


def is_weight(name: str) -> bool:
    """Whether a tensor is one of the model's own, and not there to read another one."""
    return name != MARKER and name.rpartition(".")[2] not in BESIDE_WEIGHTS


def find_scales(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """For each weight that has one: its scale, one number or one for each row.

    `stored` holds all tensors of a component by name. Raises `WeightsError` for a format that is not read, for a
    scale without its weight, and, where one weight has a scale, for an fp8 weight that has none.
    """
    _refuse_other_formats(stored)
    scales: dict[str, Stored] = {}
    scaled = MARKER in stored
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in BESIDE_WEIGHTS:
            continue
        scaled = True
        weight = stored.get(f"{module}.weight")
        if weight is None or weight.dtype not in FP8:
            raise tensor.wrong(f"is there without an fp8 {module}.weight; {ADVICE}")
        if leaf == DESCRIPTION and (described := _format(tensor)) != FP8[weight.dtype]:
            raise tensor.wrong(f"says {described}, and {module}.weight is {FP8[weight.dtype]}")
        if leaf in SCALES:
            if f"{module}.weight" in scales:
                raise tensor.wrong(f"is a second scale of {module}.weight")
            _check_scale(tensor, weight)
            scales[f"{module}.weight"] = tensor
    if scaled:
        for name, tensor in stored.items():
            if tensor.dtype in FP8 and name not in scales and name.rpartition(".")[2] != MARKER:
                raise tensor.wrong("is fp8 and has no scale, in a file with scales; take a complete copy of it")
    return scales


def read_weight(weight: Stored, scale: Stored | None) -> Tensor:
    """The weight as it lies in its file, or as float32 where that is fp8. Raises `WeightsError` for a broken scale."""
    tensor = weight.read()
    if weight.dtype not in FP8:
        return tensor
    values = tensor.float()
    if scale is not None:
        factors = scale.read().float()
        if not torch.isfinite(factors).all():
            raise scale.wrong("is not finite; take an undamaged copy of the file")
        values *= factors.reshape(-1, 1)
    return values


def _refuse_other_formats(stored: Mapping[str, Stored]) -> None:
    """Names and descriptions come before dtypes: they tell more about what a file is."""
    for name, tensor in stored.items():
        leaf = name.rpartition(".")[2]
        if leaf in OTHER_FORMATS:
            raise tensor.wrong(f"is of the format {OTHER_FORMATS[leaf]}, which is not read; {ADVICE}")
        if leaf == DESCRIPTION and (described := _format(tensor)) not in FP8.values():
            raise tensor.wrong(f"says {described}, a format that is not read; {ADVICE}")
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS and tensor.dtype not in FP8 and name.rpartition(".")[2] != DESCRIPTION:
            raise tensor.wrong(f"is {tensor.dtype}; {ADVICE}")


def _format(description: Stored) -> str:
    """The format that a `comfy_quant` tensor, JSON in bytes, names; no other entry may change what a weight means."""
    if description.dtype != "U8" or len(description.shape) != 1 or description.shape[0] > MOST_DESCRIPTION_BYTES:
        raise description.wrong(f"is no description of at most {MOST_DESCRIPTION_BYTES} bytes")
    try:
        data = json.loads(bytes(description.read().tolist()))
    except ValueError as error:
        raise description.wrong(f"is not readable as JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("format"), str):
        raise description.wrong("names no format")
    if unknown := sorted(set(data) - {"format", "full_precision_matrix_mult"}):
        raise description.wrong(f"says {data['format']} with {', '.join(unknown)}, which is not read; {ADVICE}")
    return str(data["format"])


def _check_scale(scale: Stored, weight: Stored) -> None:
    rows = weight.shape[:1]
    one_number = math.prod(scale.shape) == 1
    if scale.dtype not in FLOATS or len(weight.shape) != 2 or not (one_number or scale.shape in (rows, (*rows, 1))):
        raise scale.wrong(
            f"is {scale.dtype} {list(scale.shape)} for a weight {list(weight.shape)}; one number, or one for each row, "
            "is read"
        )
