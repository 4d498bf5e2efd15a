"""Adapters: low-rank changes to a model's linears, in the layouts in which people share them (ENGINE.md 3c).

Whatever its layout, a file becomes a list of changes in BFL names: which module, which of its rows, A, B and bias.
They are added to the outputs of the modules. The weights are never touched: unloading gives back the
very model, saving writes the model alone, and several adapters add up.

Layouts, in the order in which they are told apart:

    kohya        ...lora_down.weight, ...lora_up.weight, ...alpha; BFL or diffusers names with underscores or dots
    xlabs        double_blocks.N.processor.{qkv,proj}_lora{1,2}..., single_blocks.N.processor.{qkv,proj}_lora...
    bfl-control  BFL names, B with a bias, new scales for the qk-norms, img_in for twice the channels
    peft-bfl     base_model.model. and BFL names (fal's Kontext trainer)
    diffusers    transformer. and diffusers names (PEFT, ai-toolkit, SimpleTuner); the prefix may be missing
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.errors import AdapterError, ConfigError, WeightsError
from engine.keys import SWAPPED, flow_modules, part_rows, swap_halves
from engine.layers import RMSNorm
from engine.linear import Linear, LowRank
from engine.transformer import FlowTransformer
from engine.weights import read_json, safetensors_files

logger = logging.getLogger(__name__)

TRANSFORMER, CLIP, T5 = "transformer", "text_encoder", "text_encoder_2"

PREFIXES = {
    "text_encoders.clip_l.transformer.": CLIP,
    "text_encoder.": CLIP,
    "lora_te1_": CLIP,
    "lora_te_": CLIP,
    "text_encoders.t5xxl.transformer.": T5,
    "text_encoder_2.": T5,
    "lora_te2_": T5,
    "lora_te3_": T5,
    "model.diffusion_model.": TRANSFORMER,
    "diffusion_model.": TRANSFORMER,
    "lora_unet_": TRANSFORMER,
    "lora_transformer_": TRANSFORMER,
    "transformer.": TRANSFORMER,
}
"""What stands before a module's name, and which part of the model it means; without any it is the transformer."""
WRAPPER = "base_model.model."

ROLES = {
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_B.default.bias": "bias",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_up.bias": "bias",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "bias",
    "down.weight": "down",
    "up.weight": "up",
    "alpha": "alpha",
    "diff_b": "diff_b",
    "diff": "diff",
    "scale": "norm",
    "weight": "norm",
}
"""The end of a tensor's name, and what the tensor is; the first that fits counts."""

REFUSED = {
    "LyCORIS LoKr": (".lokr_",),
    "LyCORIS LoHa": (".hada_",),
    "LyCORIS OFT": (".oft_",),
    "LyCORIS GLoRA": (".a1.weight", ".b1.weight"),
    "LyCORIS IA3": (".on_input",),
    "LyCORIS norms": (".w_norm", ".b_norm"),
    "LoCon with a core tensor": (".lora_mid.",),
    "DoRA": (".dora_scale", ".lora_magnitude_vector"),
}
"""Kinds of adapters that are no plain LoRA, by the names that give them away."""

XLABS_DOUBLE = {
    "processor.qkv_lora1": "img_attn.qkv",
    "processor.qkv_lora2": "txt_attn.qkv",
    "processor.proj_lora1": "img_attn.proj",
    "processor.proj_lora2": "txt_attn.proj",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a module's name in an adapter file stands for."""

    part: str
    module: str
    start: int
    """First row of the module's output that is changed."""
    stop: int
    width: int
    """Columns of the module; 0 for a norm, which has none."""
    swap: bool = False
    """Whether the file holds the rows as (scale, shift)."""

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One change to the output of one module: rows start to stop gain x A' B' + bias, or a norm gets a new scale."""

    target: Target
    down: Tensor | None = None
    """A: (rank, width)."""
    up: Tensor | None = None
    """B: (rows, rank), times alpha / rank."""
    bias: Tensor | None = None
    """(rows,)."""
    norm: Tensor | None = None
    """The scale that replaces the norm's own."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter file, read and checked against a model."""

    path: Path
    family: str
    changes: tuple[Change, ...]
    ignored: tuple[str, ...]
    """What the file holds beyond that, and why it is left out."""


class Adapters:
    """The adapters at work in one model."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.parts = parts
        """`transformer` and, where there are any, `text_encoder` and `text_encoder_2`."""
        self.loaded: list[tuple[Adapter, float]] = []
        """With their scales, in the order of loading."""
        self._undo: list[Callable[[], None]] = []

    def load(self, path: Path, scale: float) -> Adapter:
        """Read, check and apply; the model is unchanged when this raises `AdapterError`."""
        if not math.isfinite(scale):
            raise AdapterError(f"{path}: the scale {scale} is not a finite number")
        adapter = read_adapter(path, self.parts)
        for line in adapter.ignored:
            logger.warning("%s: %s", path, line)
        for change in adapter.changes:
            module = self.parts[change.target.part].get_submodule(change.target.module)
            self._undo.append(_apply(module, change, scale))
        self.loaded.append((adapter, scale))
        return adapter

    def unload(self) -> None:
        """Take all adapters off again."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.loaded.clear()


def _apply(module: nn.Module, change: Change, scale: float) -> Callable[[], None]:
    """Add `scale` times the change to the module's output from now on; returns what takes it off again."""
    if isinstance(module, RMSNorm):
        assert change.norm is not None
        now = module.scale.float()
        return _added(module.additions, scale * (change.norm.to(now.device) - now))
    assert isinstance(module, nn.Linear)
    device, target = module.weight.device, change.target
    dtype = module.bias.dtype if isinstance(module, Linear) else module.weight.dtype  # a weight may be fp8

    def placed(tensor: Tensor | None, factor: float = 1.0) -> Tensor | None:
        return None if tensor is None else (tensor * factor).to(device, dtype)

    addition = LowRank(
        target.start, target.stop, placed(change.down), placed(change.up, scale), placed(change.bias, scale)
    )
    if isinstance(module, Linear):
        return _added(module.additions, addition)

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added = addition(args[0], 0, output.shape[-1])
        return output if added is None else output + added

    return module.register_forward_hook(add).remove


Item = TypeVar("Item")


def _added(additions: list[Item], addition: Item) -> Callable[[], None]:
    additions.append(addition)
    return partial(_remove, additions, addition)


def _remove(additions: list[Item], addition: Item) -> None:
    additions[:] = [each for each in additions if each is not addition]


def read_adapter(path: Path, parts: Mapping[str, nn.Module]) -> Adapter:
    """Read an adapter file and translate it for the model made of `parts`; raises `AdapterError`."""
    path, tensors, metadata = _of_a_kind_that_is_read(path)
    family = detect_family(tensors)
    groups, ignored = _without_repeats(_grouped(path, tensors))
    settings = _peft_settings(path, metadata)
    names = target_names(parts)

    changes: list[Change] = []
    unknown: list[str] = []
    seen: dict[Target, str] = {}
    for name, group in groups.items():
        part, short = split_prefix(name)
        target = names.get((part, short))
        if target is None:
            if reason := _droppable(part, short, group):
                ignored.append(f"{name} is left out: {reason}")
            else:
                unknown.append(name)
            continue
        if target in seen:
            raise AdapterError(f"{path}: {name} and {seen[target]} are the same module")
        seen[target] = name
        alpha = _alpha(path, settings.get(part, {}), name, short, group)
        change, notes = _change(path, name, target, group, alpha)
        ignored.extend(notes)
        if change is not None:
            changes.append(change)
    if unknown:
        raise AdapterError(f"{path}: {_unknown(unknown, names)}")
    if not changes:
        raise AdapterError(f"{path}: no LoRA in this file changes the model")
    return Adapter(path=path, family=family, changes=tuple(changes), ignored=tuple(ignored))


def check_adapter(path: Path) -> None:
    """Whether the file holds a LoRA of a kind that is read, be it of any model; raises `AdapterError`."""
    path, tensors, _ = _of_a_kind_that_is_read(path)
    if not any(group.keys() & {"down", "diff", "diff_b"} for group in _grouped(path, tensors).values()):
        raise AdapterError(f"{path}: no LoRA is in this file")


def detect_family(tensors: Iterable[str]) -> str:
    """The layout of a file with these names; the order is that of diffusers."""
    names = list(tensors)
    for family, mark in (
        ("kohya", ".lora_down.weight"),
        ("xlabs", "processor"),
        ("bfl-control", "query_norm.scale"),
        ("peft-bfl", "base_model"),
    ):
        if any(mark in name for name in names):
            return family
    return "diffusers"


# Reading


def _of_a_kind_that_is_read(path: Path) -> tuple[Path, dict[str, Tensor], Mapping[str, str]]:
    """The file, its tensors and its metadata."""
    path = _adapter_file(path)
    tensors, metadata = _read(path)
    _refuse_kinds(path, tensors)
    return path, tensors, metadata


def _adapter_file(path: Path) -> Path:
    try:
        files = safetensors_files(path)
    except (WeightsError, ConfigError) as error:
        raise AdapterError(str(error)) from error
    if len(files) != 1:
        raise AdapterError(f"{path}: an adapter is one safetensors file, here are {len(files)}")
    return files[0]


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """All tensors in fp32, checked to be finite, and the file's metadata."""
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            handle: Any = file
            for name in handle.keys():  # noqa: SIM118 - no mapping
                tensors[name] = handle.get_tensor(name)
            metadata: Mapping[str, str] = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: not a safetensors file, or damaged or pickled ({error}); a pickle can run code: convert it"
        ) from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith(".alpha"):
            raise AdapterError(f"{path}: {name} is {tensor.dtype}; quantised adapters are not read")
        tensors[name] = tensor.to(torch.float32, copy=True)
        if not torch.isfinite(tensors[name]).all():
            raise AdapterError(f"{path}: {name} holds NaN or infinity")
    return tensors, metadata


def _refuse_kinds(path: Path, tensors: Iterable[str]) -> None:
    for name in tensors:
        for kind, marks in REFUSED.items():
            if any(mark in f".{name}" for mark in marks):
                raise AdapterError(f"{path}: this is {kind} ({name}), which is not supported; only plain LoRA is")


def _grouped(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module name as in the file -> role -> tensor."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for suffix, role in ROLES.items():
            if name.endswith(f".{suffix}"):
                group = groups.setdefault(name.removesuffix(f".{suffix}"), {})
                if role in group:
                    raise AdapterError(f"{path}: {name} gives a second {role} matrix for its module")
                group[role] = tensor
                break
        else:
            raise AdapterError(f"{path}: {name} is no tensor of a LoRA")
    return groups


def _without_repeats(groups: dict[str, dict[str, Tensor]]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Some files hold everything twice, in kohya's and in diffusers' names; diffusers' count, as they do there."""
    if not any(name.startswith(("transformer.", "lora_transformer_")) for name in groups):
        return groups, []
    repeats = [name for name in groups if name.startswith("lora_unet_")]
    kept = {name: group for name, group in groups.items() if name not in repeats}
    return kept, [f"{name} is left out: the file says the same in diffusers' names" for name in repeats]


# Names


def split_prefix(name: str) -> tuple[str, str]:
    """Part of the model and the module's name inside it."""
    part, short = TRANSFORMER, name.removeprefix(WRAPPER)
    for prefix, meant in PREFIXES.items():
        if short.startswith(prefix):
            part, short = meant, short.removeprefix(prefix)
            break
    short = short.removeprefix(WRAPPER)
    if part != TRANSFORMER:
        short = short.removeprefix("text_model.").removeprefix("text_model_")
    return part, short


def target_names(parts: Mapping[str, nn.Module]) -> dict[tuple[str, str], Target]:
    """Every name, dotted and with underscores, under which an adapter may mean a module of this model."""
    dotted: dict[tuple[str, str], Target] = {}
    for part, root in parts.items():
        if isinstance(root, FlowTransformer):
            for name, target in _transformer_names(root).items():
                dotted[part, name] = target
            continue
        for name, module in root.named_modules():
            if isinstance(module, nn.Linear):
                target = Target(part, name, 0, module.out_features, module.in_features)
                dotted[part, name.removeprefix("text_model.")] = target
    underscored = {(part, name.replace(".", "_")): target for (part, name), target in dotted.items()}
    return underscored | dotted


def _transformer_names(transformer: FlowTransformer) -> dict[str, Target]:
    """Names in BFL's, diffusers' and XLabs' manner."""
    config = transformer.config
    names: dict[str, Target] = {}
    for module, theirs in flow_modules(config).items():
        found = transformer.get_submodule(module)
        if isinstance(found, RMSNorm):
            names[module] = names[theirs[0]] = Target(TRANSFORMER, module, 0, found.scale.shape[0], 0)
            continue
        assert isinstance(found, nn.Linear)
        names[module] = Target(TRANSFORMER, module, 0, found.out_features, found.in_features)
        rows = part_rows(module, len(theirs), config) if len(theirs) > 1 else [found.out_features]
        start = 0
        for name, count in zip(theirs, rows, strict=True):
            swap = module == SWAPPED
            names[name] = Target(TRANSFORMER, module, start, start + count, found.in_features, swap)
            start += count
    for index in range(config.depth_double):
        for xlabs, bfl in XLABS_DOUBLE.items():
            names[f"double_blocks.{index}.{xlabs}"] = names[f"double_blocks.{index}.{bfl}"]
    size = config.hidden_size
    for index in range(config.depth_single):
        block = f"single_blocks.{index}"
        names[f"{block}.processor.qkv_lora"] = Target(TRANSFORMER, f"{block}.linear1", 0, 3 * size, size)
        names[f"{block}.processor.proj_lora"] = names[f"{block}.linear2"]
    return names


def _droppable(part: str, short: str, group: Mapping[str, Tensor]) -> str | None:
    """Why a change to a module that adapters do not reach makes no difference; None if it makes one."""
    if part == TRANSFORMER and "embedding" not in short and not group.keys() <= {"diff", "diff_b"}:
        return None
    if "text_projection" in short:
        return "the text features are taken before the projection"
    matrices = {role: tensor for role, tensor in group.items() if role != "alpha"}
    product = matrices.get("down"), matrices.get("up")
    if any(tensor is not None and not tensor.any() for tensor in product):
        matrices = {role: tensor for role, tensor in matrices.items() if role not in ("down", "up")}
    return None if any(tensor.any() for tensor in matrices.values()) else "it is zero"


def _unknown(unknown: list[str], names: Mapping[tuple[str, str], Target]) -> str:
    """One sentence about modules that the model does not have."""
    listed = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
    part, short = split_prefix(unknown[0])
    known = [name for whose, name in names if whose == part]
    near = difflib.get_close_matches(short, known, n=1)
    hint = f"; nearest to the first is {near[0]}" if near else ""
    return f"the model has no module {listed}{hint}. Is the adapter made for a model of these sizes?"


# Scales


def _peft_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's configuration of each part, from the file's metadata or the `adapter_config.json` beside it."""
    beside = path.with_name("adapter_config.json")
    if "lora_adapter_metadata" in metadata:
        try:
            data = json.loads(metadata["lora_adapter_metadata"])
        except ValueError as error:
            raise AdapterError(f"{path}: its lora_adapter_metadata is no JSON ({error})") from error
        if not isinstance(data, dict):
            raise AdapterError(f"{path}: its lora_adapter_metadata is no JSON object")
    elif path.name == "adapter_model.safetensors" and beside.is_file():
        try:
            data = read_json(beside)
        except ConfigError as error:
            raise AdapterError(str(error)) from error
    else:
        return {}
    settings: dict[str, dict[str, Any]] = {TRANSFORMER: {}, CLIP: {}, T5: {}}
    for key, value in data.items():
        part, _, entry = key.partition(".")
        if part in settings and entry:
            settings[part][entry] = value
        else:
            settings[TRANSFORMER][key] = value
    for chosen in settings.values():
        if chosen.get("use_dora"):
            raise AdapterError(f"{path}: this is DoRA (use_dora in its settings), which is not supported")
        if chosen.get("peft_type", "LORA") != "LORA":
            raise AdapterError(f"{path}: this is PEFT's {chosen['peft_type']}, which is not supported; only LoRA is")
    return settings


def _alpha(path: Path, settings: Mapping[str, Any], name: str, short: str, group: Mapping[str, Tensor]) -> float | None:
    """Alpha of one module times what rank-stabilised LoRA adds; None means the rank, so that the scale is 1."""
    try:
        if "alpha" in group:
            return float(group["alpha"].item())
        alpha = settings.get("lora_alpha")
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if any(re.match(rf"(.*\.)?({pattern})$", form) for form in (short, f"text_model.{short}", name)):
                alpha = value
        if alpha is None or "down" not in group:
            return None
        stabilised = math.sqrt(group["down"].shape[0]) if settings.get("use_rslora") else 1.0
        return float(alpha) * stabilised
    except (ValueError, TypeError, AttributeError, RuntimeError, re.error) as error:
        raise AdapterError(f"{path}: no usable alpha for {short} ({error})") from error


# Changes


def _change(
    path: Path, name: str, target: Target, group: Mapping[str, Tensor], alpha: float | None
) -> tuple[Change | None, list[str]]:
    """The change that a group of tensors makes to its target, and notes on what is left out."""
    notes: list[str] = []
    if "norm" in group:
        if target.width or group.keys() != {"norm"}:
            raise AdapterError(f"{path}: {name} is a whole weight, not a LoRA")
        _check_shape(path, name, group["norm"], (target.rows,))
        return Change(target, norm=group["norm"]), notes
    if "diff" in group:
        if group["diff"].any():
            raise AdapterError(f"{path}: {name}.diff replaces whole weights, which is not supported; only LoRA is")
        notes.append(f"{name}.diff is left out: it is zero")
    if not target.width:
        if group.keys() <= {"diff"}:
            return None, notes
        raise AdapterError(f"{path}: {name} is a norm, which no LoRA can change")

    down, up, bias = group.get("down"), group.get("up"), group.get("bias")
    if (down is None) != (up is None) or (down is None and bias is not None):
        raise AdapterError(f"{path}: {name} has only one of its two matrices")
    if down is None or up is None:
        if "alpha" in group:
            raise AdapterError(f"{path}: {name} has an alpha and no matrices")
        change = Change(target)
    else:
        down, up = _matrix(down), _matrix(up)
        rank = down.shape[0]
        if target.module == "img_in" and down.shape == (rank, 2 * target.width):
            down = down[:, : target.width]
            notes.append(
                f"{name}: the columns for a control image are left out, as this model has none; the rest is applied"
            )
        _check_shape(path, f"{name} (A)", down, (rank, target.width))
        _check_shape(path, f"{name} (B)", up, (target.rows, rank))
        factor = (rank if alpha is None else alpha) / rank if rank else 1.0
        change = Change(target, down=down, up=up * factor, bias=None if bias is None else bias * factor)
    if "diff_b" in group:  # a change to the bias itself, as Comfy extracts it; alpha does not scale it
        _check_shape(path, f"{name}.diff_b", group["diff_b"], (target.rows,))
        bias = group["diff_b"] if change.bias is None else change.bias + group["diff_b"]
        change = Change(target, down=change.down, up=change.up, bias=bias)
    if change.bias is not None:
        _check_shape(path, f"{name} (bias)", change.bias, (target.rows,))
    if target.swap:
        change = Change(
            target,
            down=change.down,
            up=None if change.up is None else swap_halves(change.up),
            bias=None if change.bias is None else swap_halves(change.bias),
        )
    return (None if change.up is None and change.bias is None else change), notes


def _matrix(tensor: Tensor) -> Tensor:
    """A linear's matrix; some tools write it as a 1x1 convolution."""
    return tensor[:, :, 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def _check_shape(path: Path, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise AdapterError(f"{path}: {name} has shape {list(tensor.shape)}; this model needs {list(wanted)}")
