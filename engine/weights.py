"""Weights on disk: find the layout, check every name and shape, load strictly; write the diffusers layout.

Two layouts are read (ENGINE.md 3): a diffusers folder (`model_index.json`, one folder for each component) and a folder
with BFL files (`flux1-*.safetensors` or `flux1-*.gguf`, `ae.safetensors`, text encoders and tokenizers in folders).
Pickles are not read: they can run code. What is quantised is dequantised on the way in, one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.autoencoder import Autoencoder
from engine.config import KONTEXT_DEV, VARIANTS, AutoencoderConfig, FlowConfig, ModelConfig
from engine.errors import ConfigError, WeightsError
from engine.fp8 import block_linears, in_fp8
from engine.gguf_file import GgufFile
from engine.keys import REPACKAGED_PREFIX, Translation, autoencoder_to_diffusers, flow_to_diffusers, untranslated
from engine.linear import FP8
from engine.quantised import Stored, find_scales, is_weight, read_weight
from engine.transformer import FlowTransformer

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
GGUF = ".gguf"
READERS = 4
"""Threads that read weights: one that waits for each page of a mapped file in turn leaves the disk idle between."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the parts of a model lie."""

    layout: str
    """`diffusers` or `bfl`."""
    transformer: Path
    autoencoder: Path
    """A file, or a folder with one or several safetensors files and their index."""
    clip: Path
    t5: Path
    clip_tokenizer: Path
    t5_tokenizer: Path
    config: ModelConfig


def find_model(path: Path, config: ModelConfig | None = None) -> ModelFiles:
    """Tell the layout of the folder `path` and read its sizes; nothing is loaded.

    Sizes of BFL files come from `config`, else from a `config.json` beside them, else they are Kontext-dev's.
    Raises `WeightsError` and `ConfigError`.
    """
    if not path.is_dir():
        raise WeightsError(f"{path}: not a folder; a model is a diffusers folder or a folder with BFL files")
    texts = {
        "clip": path / "text_encoder",
        "t5": path / "text_encoder_2",
        "clip_tokenizer": path / "tokenizer",
        "t5_tokenizer": path / "tokenizer_2",
    }
    for name in texts.values():
        if not name.is_dir():
            raise WeightsError(f"{path}: the folder {name.name}/ is missing")
    if (path / "transformer" / "config.json").is_file():
        found = _named(path, _diffusers_config)
        if config is not None and config != found:
            raise ConfigError(f"{path}: the config given is not that of the folder's config.json files")
        return ModelFiles(
            layout="diffusers", transformer=path / "transformer", autoencoder=path / "vae", config=found, **texts
        )
    flux = sorted([*path.glob("flux1-*.safetensors"), *path.glob(f"flux1-*{GGUF}")])
    if len(flux) != 1 or not (path / "ae.safetensors").is_file():
        _refuse_pickles(path)
        raise WeightsError(
            f"{path}: neither a diffusers folder (transformer/config.json) nor BFL files "
            f"(one flux1-*.safetensors or flux1-*{GGUF}, here {len(flux)}, and ae.safetensors)"
        )
    if config is None:
        beside = path / "config.json"
        config = (
            _named(beside, lambda file: ModelConfig.from_dict(read_json(file))) if beside.is_file() else KONTEXT_DEV
        )
    return ModelFiles(layout="bfl", transformer=flux[0], autoencoder=path / "ae.safetensors", config=config, **texts)


def _diffusers_config(folder: Path) -> ModelConfig:
    flow, autoencoder = folder / "transformer" / "config.json", folder / "vae" / "config.json"
    return ModelConfig(
        flow=_named(flow, lambda file: FlowConfig.from_diffusers(read_json(file))),
        autoencoder=_named(autoencoder, lambda file: AutoencoderConfig.from_diffusers(read_json(file))),
    )


Config = TypeVar("Config", ModelConfig, FlowConfig, AutoencoderConfig)


def _named(path: Path, read: Callable[[Path], Config]) -> Config:
    """Read a config; its errors begin with the path."""
    try:
        return read(path)
    except ConfigError as error:
        if str(error).startswith(str(path)):
            raise
        raise ConfigError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `ConfigError` names the file when it is missing or no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: missing") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a JSON object is expected")
    return data


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLES)
    if pickles:
        raise WeightsError(f"{folder}: {', '.join(pickles)} is pickled and could run code; convert it to safetensors")


def safetensors_files(where: Path) -> list[Path]:
    """The safetensors files of a component: the file itself, those that an index names, or the only one."""
    if where.is_file():
        return [where]
    if not where.is_dir():
        raise WeightsError(f"{where}: missing")
    indices = sorted(where.glob("*.safetensors.index.json"))
    if indices:
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise WeightsError(f"{indices[0]}: no weight_map of tensor names to file names")
        files = [where / name for name in sorted(set(weight_map.values()))]
        lost = [file.name for file in files if file.parent != where or not file.is_file()]
        if lost or not files:
            raise WeightsError(f"{where}: {indices[0].name} names {', '.join(lost) or 'no file'}, which is not there")
        return files
    files = sorted(where.glob("*.safetensors"))
    if not files:
        _refuse_pickles(where)
        if any(where.glob(f"*{GGUF}")):
            raise WeightsError(
                f"{where}: no safetensors file; GGUF is read of the transformer alone, as flux1-*{GGUF} in a folder "
                "with BFL files"
            )
        raise WeightsError(f"{where}: no safetensors file")
    if len(files) > 1:
        raise WeightsError(f"{where}: {len(files)} safetensors files and no index says which belong together")
    return files


class Tensors(Protocol):
    """The tensors of one component by name, and what they come from; several threads may get them at once."""

    where: Path
    shapes: dict[str, tuple[int, ...]]

    def get(self, name: str) -> Tensor: ...


class TensorFiles:
    """The tensors of a component's safetensors files, read one at a time into fresh memory.

    Raises `WeightsError` for files that are damaged, and for formats that `engine.quantised` does not know.
    """

    def __init__(self, where: Path) -> None:
        self.where = where
        self._stored: dict[str, Stored] = {}
        for file in safetensors_files(where):
            try:
                handle: Any = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file}: not a safetensors file, or damaged or pickled ({error})") from error
            for name in handle.keys():  # noqa: SIM118 - no mapping
                part = handle.get_slice(name)
                short = name.removeprefix(REPACKAGED_PREFIX)
                if short in self._stored:
                    raise WeightsError(f"{file}: {short} is there twice")
                self._stored[short] = Stored(file, name, part.get_dtype(), tuple(part.get_shape()), handle)
        self._scales = find_scales(self._stored)
        self.shapes = {name: tensor.shape for name, tensor in self._stored.items() if is_weight(name)}

    def get(self, name: str) -> Tensor:
        return read_weight(self._stored[name], self._scales.get(name))


Module = TypeVar("Module", FlowTransformer, Autoencoder)


def load_strictly(
    module: Module,
    table: Mapping[str, Translation],
    files: Tensors,
    *,
    device: torch.device,
    dtype: torch.dtype,
    settled: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> Module:
    """Fill `module`, built on the meta device, from `files`; every name and shape must match.

    Each parameter lands in memory of its own: results depend in the last bits on where weights are aligned, and a
    safetensors file maps them at any alignment (ENGINE.md 2.4). `READERS` threads read, which call `files.get`, and
    `settled` for what becomes of each parameter on the device.
    """
    expected: dict[str, tuple[int, ...]] = {}
    own = module.state_dict()
    for name, translation in table.items():
        for part_name, part in zip(translation.names, translation.split(own[name]), strict=True):
            expected[part_name] = tuple(part.shape)
    check_names(str(files.where), expected, files.shapes)

    def read(name: str, translation: Translation) -> Tensor:
        joined = translation.join([files.get(part) for part in translation.names])
        fresh = joined.to(device, dtype, copy=len(translation.names) == 1)  # several parts are joined in fresh memory
        return settled(name, fresh)

    with ThreadPoolExecutor(READERS) as pool:
        state = dict(zip(table, pool.map(read, table, table.values()), strict=True))
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def check_names(where: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one `WeightsError` that lists missing and surplus names and wrong shapes."""
    missing, surplus = expected.keys() - found.keys(), found.keys() - expected.keys()
    shapes = [
        f"{name} {list(found[name])} instead of {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if missing or surplus or shapes:
        raise WeightsError.mismatch(where, missing=missing, surplus=surplus, shapes=shapes)


def load_transformer(files: ModelFiles, *, device: torch.device, dtype: torch.dtype) -> FlowTransformer:
    """The flow transformer of a model, in either layout.

    `dtype` float8_e4m3fn is bfloat16 with each weight of the blocks in fp8 as soon as it is on the device, which never
    holds more of them in bfloat16 than are read at once.
    """
    tensors: Tensors = (
        GgufFile(files.transformer) if files.transformer.suffix == GGUF else TensorFiles(files.transformer)
    )
    width = tensors.shapes.get("img_in.weight", tensors.shapes.get("x_embedder.weight", (0, 0)))[-1]
    if width in VARIANTS and width != files.config.flow.in_channels:
        raise WeightsError(f"{files.transformer}: these are weights of {VARIANTS[width]}, not of Kontext or dev")
    with torch.device("meta"):
        module = FlowTransformer(files.config.flow)
    names = module.state_dict()
    table = flow_to_diffusers(names, files.config.flow) if files.layout == "diffusers" else untranslated(names)
    linears = block_linears(module) if dtype == FP8 else {}
    return load_strictly(
        module,
        table,
        tensors,
        device=device,
        dtype=torch.bfloat16 if dtype == FP8 else dtype,
        settled=lambda name, weight: in_fp8(linears[name], weight) if name in linears else weight,
    )


def load_autoencoder(files: ModelFiles, *, device: torch.device) -> Autoencoder:
    """The autoencoder of a model, in either layout; always fp32, as both references encode.

    Its convolutions are laid out with channels last, for which cpu and cuda have the quicker kernels.
    """
    with torch.device("meta"):
        module = Autoencoder(files.config.autoencoder)
    names, config = module.state_dict(), files.config.autoencoder
    table = autoencoder_to_diffusers(names, config) if files.layout == "diffusers" else untranslated(names)
    tensors = TensorFiles(files.autoencoder)
    load_strictly(module, table, tensors, device=device, dtype=torch.float32)
    if device.type in ("cpu", "cuda"):
        for parameter in module.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def to_diffusers(module: FlowTransformer | Autoencoder) -> dict[str, Tensor]:
    """The state dict of a module in diffusers names; parts of fused weights share their memory."""
    names = module.state_dict()
    if isinstance(module, FlowTransformer):
        table = flow_to_diffusers(names, module.config)
    else:
        table = autoencoder_to_diffusers(names, module.config)
    return {
        target: part.contiguous()
        for name, translation in table.items()
        for target, part in zip(translation.names, translation.split(names[name]), strict=True)
    }


def save_component(module: FlowTransformer | Autoencoder, folder: Path) -> None:
    """Write `config.json` and the weights in the diffusers layout, in shards of at most 10 GB."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", module.config.to_diffusers())
    tensors = to_diffusers(module)
    save_torch_state_dict(
        {  # parts of fused weights as tensors of their own, as safetensors wants them
            name: tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()
            for name, tensor in tensors.items()
        },
        folder,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size="10GB",
        metadata={"format": "pt"},
    )


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


SCHEDULER_CONFIG: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
MODEL_INDEX: Mapping[str, Any] = {
    "_class_name": "FluxKontextPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_model(
    folder: Path,
    *,
    transformer: FlowTransformer,
    autoencoder: Autoencoder,
    save_texts: Callable[[Path], None],
) -> None:
    """Write a whole diffusers folder; `save_texts` writes the four text folders into it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_component(transformer, folder / "transformer")
    save_component(autoencoder, folder / "vae")
    save_texts(folder)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    write_json(folder / "model_index.json", MODEL_INDEX)


def fingerprint(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """sha256 (hex) that stands for a model: over name and sha256 of every file that its results depend on.

    `path` is a model folder or one adapter file. `on_bytes` is told how many bytes were read, for a progress bar.
    """
    files: Iterable[Path] = [path]
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and file.suffix in {".safetensors", GGUF, ".json", ".txt", ".model"}
        )
    total = hashlib.sha256()
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
                if on_bytes is not None:
                    on_bytes(len(chunk))
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        total.update(f"{name}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()
