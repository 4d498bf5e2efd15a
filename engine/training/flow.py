"""Train the shipped model's transformer and text encoders together, on pairs of drawn pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine.autoencoder import Autoencoder
from engine.config import FlowConfig
from engine.latents import context_ids, grid_ids, pack
from engine.text import CLIP_LENGTH
from engine.training.instructions import corpus, random_example
from engine.training.loop import Loop, LoopConfig, Loss, Moment
from engine.training.objective import flow_loss
from engine.training.products import render
from engine.training.texts import TEXT_LENGTH, make_clip, make_clip_tokenizer, make_t5, make_t5_tokenizer
from engine.transformer import FlowTransformer
from engine.weights import save_model

TINY = FlowConfig(
    hidden_size=160,
    num_heads=4,
    depth_double=2,
    depth_single=4,
    text_dim=128,
    pooled_dim=64,
    axes_dims=(8, 16, 16),
    guidance_embed=True,
)
PROMPT_DROPOUT = 0.05
"""Share of empty prompts, so that classifier-free guidance has something to lean away from."""
GUIDANCE_RANGE = (1.0, 5.0)
"""Guidance is drawn at random and carries no information: the shipped model learns to ignore it."""
GRID = (8, 8)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pictures before and after, as bytes (count, 3, 128, 128), and the words between them."""

    before: Tensor
    after: Tensor
    has_before: Tensor
    """(count,) bool: False for text-to-image."""
    prompts: list[str]


def pair_pool(count: int, seed: int, folder: Path) -> Pairs:
    """`count` drawn pairs, kept in `folder` once they are drawn."""
    names = {name: folder / f"{name}.npy" for name in ("before", "after", "has_before")}
    words = folder / "prompts.json"
    if not words.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        before = np.zeros((count, 3, 128, 128), np.uint8)
        after = np.zeros_like(before)
        has_before = np.zeros(count, bool)
        prompts = []
        for index in range(count):
            example = random_example(rng)
            after[index] = np.asarray(render(example.after)).transpose(2, 0, 1)
            if example.before is not None:
                before[index] = np.asarray(render(example.before)).transpose(2, 0, 1)
                has_before[index] = True
            prompts.append(example.instruction)
        for name, array in (("before", before), ("after", after), ("has_before", has_before)):
            np.save(names[name], array)
        words.write_text(json.dumps(prompts))
    arrays = {name: torch.from_numpy(np.load(path)) for name, path in names.items()}
    return Pairs(**arrays, prompts=json.loads(words.read_text()))


@torch.no_grad()
def encode_all(autoencoder: Autoencoder, pictures: Tensor, cache: Path) -> Tensor:
    """Packed latents (count, 64, 64) of pictures given as bytes, kept in `cache`."""
    if not cache.is_file():
        parts = [pack(autoencoder.encode(part.float() / 127.5 - 1)) for part in torch.split(pictures, 64)]
        np.save(cache, torch.cat(parts).numpy())
    return torch.from_numpy(np.load(cache))


class FlowWithText(nn.Module):
    """What is trained: the transformer and both text encoders."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        lines = corpus()
        self.clip_tokenizer = make_clip_tokenizer(lines, folder / "tokenizer")
        self.t5_tokenizer = make_t5_tokenizer(lines, folder / "tokenizer_2")
        self.flow = FlowTransformer(TINY)
        self.clip = make_clip(self.clip_tokenizer)
        self.t5 = make_t5(self.t5_tokenizer)
        for module in self.flow.modules():  # small random outputs at the start, as DiT does (arXiv 2212.09748)
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.flow.final_layer.linear.weight)

    def token_ids(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """CLIP (count, 77) and T5 (count, TEXT_LENGTH) ids."""
        clip = self.clip_tokenizer(
            prompts, padding="max_length", truncation=True, max_length=CLIP_LENGTH, return_tensors="pt"
        )
        t5 = self.t5_tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        return clip.input_ids, t5.input_ids

    def velocity(
        self, x: Tensor, t: Tensor, context: Tensor | None, ids: tuple[Tensor, Tensor], guidance: Tensor
    ) -> Tensor:
        """Velocity of the target tokens (B, n, 64)."""
        pooled = self.clip(ids[0]).pooler_output
        text = self.t5(ids[1]).last_hidden_state
        positions = [grid_ids(*GRID)] + ([] if context is None else context_ids([GRID], "offset"))
        out: Tensor = self.flow(
            img=x if context is None else torch.cat([x, context], dim=1),
            img_ids=torch.cat(positions).expand(x.shape[0], -1, -1),
            txt=text,
            pooled=pooled,
            t=t,
            guidance=guidance,
        )
        return out[:, : x.shape[1]]

    def save_texts(self, folder: Path) -> None:
        self.clip.save_pretrained(folder / "text_encoder")
        self.t5.save_pretrained(folder / "text_encoder_2")
        lines = corpus()
        make_clip_tokenizer(lines, folder / "tokenizer")
        make_t5_tokenizer(lines, folder / "tokenizer_2")


def train_flow(
    folder: Path,
    config: LoopConfig,
    autoencoder: Autoencoder,
    *,
    batch: int = 64,
    pool: int = 10_000,
    say: Callable[[str], None] = print,
    export: Path | None = None,
) -> FlowWithText:
    """Train, or go on training, in `folder`; writes a whole model to `export` when it ends."""
    torch.manual_seed(config.seed)
    module = FlowWithText(folder)
    loop = Loop(module, config, folder)
    loop.resume()
    pairs = pair_pool(pool, config.seed, folder / "pairs")
    before = encode_all(autoencoder, pairs.before, folder / "before.npy")
    after = encode_all(autoencoder, pairs.after, folder / "after.npy")
    clip_ids, t5_ids = module.token_ids([*pairs.prompts, ""])
    empty = len(pairs.prompts)

    def loss_of(moment: Moment) -> Loss:
        chosen = torch.from_numpy(moment.numpy.integers(0, empty, batch))
        worded = torch.where(torch.from_numpy(moment.numpy.random(batch) < PROMPT_DROPOUT), empty, chosen)
        guidance = torch.from_numpy(moment.numpy.uniform(*GUIDANCE_RANGE, batch)).float()
        total = torch.zeros(())
        for edits in (True, False):  # rows with and without context have different lengths
            rows = (pairs.has_before[chosen] == edits).nonzero()[:, 0]
            if not len(rows):
                continue
            context = before[chosen[rows]] if edits else None
            ids = (clip_ids[worded[rows]], t5_ids[worded[rows]])

            def velocity(
                x: Tensor,
                t: Tensor,
                context: Tensor | None = context,
                ids: tuple[Tensor, Tensor] = ids,
                scale: Tensor = guidance[rows],
            ) -> Tensor:
                return module.velocity(x, t, context, ids, scale)

            total = total + flow_loss(velocity, after[chosen[rows]], moment.torch) * len(rows) / batch
        return total, {}

    loop.run(loss_of, say=say)
    loop.use_average()
    module.eval()
    if export is not None:
        save_model(export, transformer=module.flow, autoencoder=autoencoder, save_texts=module.save_texts)
    return module
