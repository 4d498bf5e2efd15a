"""What `python -m engine.training CONFIG.yaml` does: read the file, train in stretches, write the result.

A config names its kind: `autoencoder`, `flow` (transformer and text encoders; both from nothing, or on from a finished
model), `finetune` (a finished model's transformer alone) or `lora` (an adapter beside it).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from torch import nn

from engine.autoencoder import Autoencoder
from engine.config import AutoencoderConfig, ModelConfig
from engine.errors import ConfigError, EngineError
from engine.geometry import nearest_size, token_grid
from engine.keys import autoencoder_to_diffusers
from engine.pipeline import KontextEngine, choose_device
from engine.training.adapter import TARGETS, LowRankAdapter
from engine.training.autoencoder import reconstruction_psnr, train_autoencoder
from engine.training.data import EncodedPairs, FlowData, drawn_latents, encode_pairs, read_pairs
from engine.training.flow import FlowWithText, freeze_unused_guidance, train_flow
from engine.training.instructions import SHARES
from engine.training.loop import LoopConfig
from engine.training.report import plot, preview
from engine.weights import TensorFiles, find_model, load_autoencoder, load_strictly, read_json, save_component

PRIMITIVES = "100000"
"""Kernels that oneDNN keeps. Batches of many shapes need more than its 1,024, and making one takes longer than using
it: a step of the shipped model's flow, of 11 sizes, took 1.8 s instead of 0.7."""
KINDS = ("autoencoder", "flow", "finetune", "lora")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """One training; paths are taken from the working directory."""

    kind: str
    folder: Path
    """Checkpoints, metrics and what can be recomputed; a training goes on from what lies there."""
    loop: LoopConfig
    batch: int = 32
    pool: int = 9000
    """Pictures or pairs that are drawn, where no table of pairs is given."""
    pairs: Path | None = None
    """CSV with the columns before, after, instruction."""
    size: tuple[int, int] | None = None
    """Width and height of the pairs of a table; left out, the model's size nearest to square."""
    base: Path | None = None
    """The model to fine-tune or to go on from, in either layout."""
    vae: Path | None = None
    """Folder of a trained autoencoder, for a `flow` from nothing; for `autoencoder`, the one to go on from."""
    freeze_encoder: bool = False
    """Train the autoencoder's decoder alone, so that a flow trained on its latents stays right."""
    context_dropout: float = 0.0
    """Share of edits that are trained without their context image."""
    time_mean: float | None = None
    """Mean of the logit-normal times; left out, the one that the sampler's shift has for the target's size. A higher
    one gives more of the training to the first steps, which decide what is edited."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Weights of the kinds of drawn edits, `SHARES` for those left out."""
    rank: int = 8
    targets: tuple[str, ...] = TARGETS
    export: Path | None = None
    """Where the finished model, autoencoder or adapter (a safetensors file) is written."""
    dtype: str = "fp32"
    """Of the exported transformer: fp32, bf16 or fp16; autoencoder and text encoders are always fp32."""
    threads: int | None = None
    device: str = "auto"
    """`auto` is cuda, mps or cpu, in that order. The autoencoder of `kind: autoencoder` is trained on the CPU."""
    preview_every: int = 0
    """Steps between sheets of source, edit and target in `folder/previews`; 0 makes none."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a YAML file. Raises `ConfigError`."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not readable as YAML ({error})") from error
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path}: a mapping is expected")
        return cls.from_dict(data, where=str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "training config") -> Self:
        values = dict(data)
        _known(cls, values, where)
        loop = values.get("loop")
        if not isinstance(loop, Mapping):
            raise ConfigError(f"{where}: loop is a mapping with at least `steps`")
        _known(LoopConfig, loop, f"{where}: loop")
        for name in ("folder", "pairs", "base", "vae", "export"):
            if values.get(name) is not None:
                values[name] = Path(values[name])
        for name in ("size", "targets"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        try:
            config = cls(**{**values, "loop": LoopConfig(**loop)})
        except TypeError as error:
            raise ConfigError(f"{where}: {error}") from error
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"{where}: kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.kind in ("finetune", "lora") and self.base is None:
            raise ConfigError(f"{where}: {self.kind} needs `base`, the model to start from")
        if self.kind == "flow" and (self.vae is None) == (self.base is None):
            raise ConfigError(
                f"{where}: flow needs `vae`, the folder of a trained autoencoder, or else `base`, a model to go on from"
            )
        if self.freeze_encoder and self.vae is None:
            raise ConfigError(f"{where}: freeze_encoder needs `vae`, the autoencoder whose encoder stays")
        for name, value in (("batch", self.batch), ("loop: accumulate", self.loop.accumulate)):
            if value < 1:
                raise ConfigError(f"{where}: {name} is {value}; at least 1 is needed")
        if not isinstance(self.shares, Mapping) or not set(self.shares) <= set(SHARES):
            raise ConfigError(f"{where}: shares {self.shares!r} are no weights of {', '.join(SHARES)}")
        weights = self.all_shares().values()
        if not all(isinstance(each, int | float) and 0 <= each < math.inf for each in weights) or not any(weights):
            raise ConfigError(f"{where}: shares are numbers of at least 0, one of them more")
        if self.dtype not in DTYPES:
            raise ConfigError(f"{where}: dtype {self.dtype!r} is none of {', '.join(DTYPES)}")

    def all_shares(self) -> dict[str, float]:
        """The weight of every kind of drawn edit."""
        return {**SHARES, **self.shares}


def _known(kind: type, values: Mapping[str, Any], where: str) -> None:
    names = {field.name for field in fields(kind)}
    if unknown := sorted(set(values) - names):
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(sorted(names))}")


def train(config: TrainingConfig, *, say: Say = print) -> None:
    """Train, or go on with, what the config describes, and write its export."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.loop.seed)
    if config.kind == "autoencoder":
        _train_autoencoder(config, say)
    else:
        _train_flow(config, say)


def read_autoencoder(folder: Path) -> Autoencoder:
    """A trained autoencoder from its folder in the diffusers layout."""
    config = AutoencoderConfig.from_diffusers(read_json(folder / "config.json"))
    with torch.device("meta"):
        module = Autoencoder(config)
    table = autoencoder_to_diffusers(module.state_dict(), config)
    return load_strictly(module, table, TensorFiles(folder), device=torch.device("cpu"), dtype=torch.float32)


def _train_autoencoder(config: TrainingConfig, say: Say) -> None:
    start = read_autoencoder(config.vae) if config.vae is not None else None
    module = train_autoencoder(
        config.folder,
        config.loop,
        batch=config.batch,
        pool=config.pool,
        start=start,
        freeze_encoder=config.freeze_encoder,
        say=say,
    )
    say(f"PSNR of fresh pictures: {reconstruction_psnr(module):.2f} dB")
    if config.export is not None:
        save_component(module, config.export)
        say(f"wrote {config.export}")
    plot(config.folder, say)


def _train_flow(config: TrainingConfig, say: Say) -> None:
    device = choose_device(config.device)
    if config.vae is not None:
        module, autoencoder = FlowWithText.new(config.folder).to(device), read_autoencoder(config.vae).to(device)
    else:
        assert config.base is not None
        module = FlowWithText.load(config.base, device)
        autoencoder = load_autoencoder(find_model(config.base), device=device)
    trained: nn.Module = module
    if config.kind == "flow":
        module.requires_grad_(True)
        freeze_unused_guidance(module.flow)
    elif config.kind == "finetune":
        trained = module.flow
    elif config.kind == "lora":
        trained = LowRankAdapter(module.flow, config.rank, config.targets)
    parts = _data(config, autoencoder)
    engine = KontextEngine(
        config=ModelConfig(flow=module.flow.config, autoencoder=autoencoder.config),
        transformer=module.flow,
        autoencoder=autoencoder,
        text=module.text,
        device=device,
    )

    def show(step: int) -> None:
        try:
            preview(engine, parts, config.folder / "previews" / f"{step:06}.png")
        except EngineError as error:  # early on a picture may not be finite
            say(f"no preview of step {step}: {error}")

    train_flow(
        module,
        trained,
        [FlowData.of(part, module.text.token_ids) for part in parts],
        config.loop,
        config.folder,
        batch=config.batch,
        context_dropout=config.context_dropout,
        time_mean=config.time_mean,
        say=say,
        preview=show,
        preview_every=config.preview_every,
    )
    if config.export is not None:
        if isinstance(trained, LowRankAdapter):
            trained.save(config.export)
        else:
            module.cpu().export(config.export, autoencoder.cpu(), DTYPES[config.dtype])
        say(f"wrote {config.export}")
    plot(config.folder, say)


def _data(config: TrainingConfig, autoencoder: Autoencoder) -> list[EncodedPairs]:
    if config.pairs is None:
        return drawn_latents(autoencoder, config.pool, config.loop.seed, config.folder / "pairs", config.all_shares())
    side = autoencoder.config.sample_size
    width, height = config.size or nearest_size(side, side, area=side**2)
    token_grid(width, height)
    return [encode_pairs(autoencoder, read_pairs(config.pairs, width, height))]
