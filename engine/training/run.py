"""What `python -m engine.training CONFIG.yaml` does: train in stretches, write the result."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from engine.autoencoder import Autoencoder
from engine.config import AutoencoderConfig, ModelConfig
from engine.errors import ConfigError, EngineError
from engine.geometry import nearest_size
from engine.keys import autoencoder_to_diffusers
from engine.pipeline import KontextEngine, choose_device
from engine.training.adapter import LowRankAdapter
from engine.training.autoencoder import reconstruction_psnr, train_autoencoder
from engine.training.config import TrainingConfig
from engine.training.data import EncodedPairs, FlowData, drawn_latents, encode_pairs, read_pairs
from engine.training.flow import FlowWithText, compile_blocks, freeze_unused_guidance, train_flow
from engine.training.objective import Objective, pixel_metric
from engine.training.place import alone_in, check_export, export, go_on_with
from engine.training.report import plot, preview
from engine.weights import TensorFiles, find_model, load_autoencoder, load_strictly, read_json, save_component

PRIMITIVES = "100000"
"""Kernels that oneDNN keeps. Batches of many shapes need more than its 1,024, and making one takes longer than using
it: a step of the shipped model's flow, of 11 sizes, took 1.8 s instead of 0.7."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEASURED = 256
"""Pictures over which it is measured what errors of latents do to pixels."""
Say = Callable[[str], None]


def train(config: TrainingConfig, *, say: Say = print) -> None:
    """Train, or go on with, what the config describes, and write its export.

    Raises `ConfigError` before anything is trained for whatever can be told by then.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.loop.seed)
    with alone_in(config.folder):
        check_export(config)
        go_on_with(config, say)
        if config.kind == "autoencoder":
            _train_autoencoder(config, say)
        else:
            _train_flow(config, say)
        plot(config.folder, say)


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
    export(config, lambda place: save_component(module, place), say)


def _train_flow(config: TrainingConfig, say: Say) -> None:
    device = _device(config.device)
    if config.vae is not None:
        module, autoencoder = FlowWithText.new(config.folder).to(device), read_autoencoder(config.vae).to(device)
    else:
        assert config.base is not None
        module = FlowWithText.load(config.base, device, deepen=config.deepen)
        autoencoder = load_autoencoder(find_model(config.base), device=device)
    trained: nn.Module = module
    if config.kind == "flow":
        module.requires_grad_(True)
        freeze_unused_guidance(module.flow)
    elif config.kind == "finetune":
        trained = module.flow
    elif config.kind == "lora":
        trained = LowRankAdapter(module.flow, config.rank, config.targets)
    if config.compile:
        compile_blocks(module.flow)
    parts = _data(config, autoencoder)
    sizes = ", ".join(f"{16 * part.grid[1]}x{16 * part.grid[0]}" for part in parts[:3]) + (", ..." if parts[3:] else "")
    say(f"{sum(len(part.prompts) for part in parts)} pairs of {sizes} on {device}")
    text = module.text
    if config.pairs is not None and any(text.count_tokens(each) > text.text_length for each in parts[0].prompts):
        say(f"some instructions are longer than the {text.text_length} tokens that the model reads: their ends are cut")
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
        objective=Objective(config.time_mean, config.for_steps, _metric(config, autoencoder, parts), config.huber),
        say=say,
        preview=show,
        preview_every=config.preview_every,
    )
    if isinstance(trained, LowRankAdapter):
        export(config, trained.save, say)
        if config.export is not None:
            say(f"recipes may use it after `kontext-batch adapters add NAME {config.export}`, each time that it is new")
    else:
        export(config, lambda place: module.cpu().export(place, autoencoder.cpu(), DTYPES[config.dtype]), say)


def _metric(config: TrainingConfig, autoencoder: Autoencoder, parts: list[EncodedPairs]) -> torch.Tensor | None:
    if not config.pixel_share:
        return None
    device = next(autoencoder.parameters()).device
    seen = max(parts, key=lambda part: len(part.prompts))
    generator = torch.Generator().manual_seed(config.loop.seed)
    return pixel_metric(autoencoder, seen.after[:MEASURED].to(device), seen.grid, config.pixel_share, generator)


def _device(name: str) -> torch.device:
    """Raises `ConfigError` for a device that is not here, or that cannot compute."""
    try:  # torch says AssertionError where it was built without CUDA, RuntimeError for a name that it does not know
        device = choose_device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"device '{name}' cannot be used here: {reason}") from error
    return device


def _data(config: TrainingConfig, autoencoder: Autoencoder) -> list[EncodedPairs]:
    if config.pairs is None:
        return drawn_latents(autoencoder, config.pool, config.loop.seed, config.folder / "pairs", config.all_shares())
    side = autoencoder.config.sample_size
    width, height = config.size or nearest_size(side, side, area=side**2)
    return [encode_pairs(autoencoder, read_pairs(config.pairs, width, height))]
