"""Train the flow transformer on pairs of pictures: from nothing, text encoders and all, or on from a finished model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Tokenizer

from engine.autoencoder import Autoencoder
from engine.config import FlowConfig
from engine.kernels import check_compiler
from engine.latents import context_ids, grid_ids
from engine.text import TextEncoder
from engine.training.data import FlowData
from engine.training.instructions import corpus
from engine.training.loop import Loop, LoopConfig, Loss, Moment
from engine.training.objective import PAPER, Objective, flow_loss
from engine.training.texts import make_clip, make_clip_tokenizer, make_t5, make_t5_tokenizer
from engine.transformer import FlowTransformer
from engine.weights import find_model, load_transformer, save_model

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
"""What the shipped model began as: 3.7 M parameters, beside 0.5 M in its text encoders."""
PROMPT_DROPOUT = 0.05
"""Share of empty prompts, so that classifier-free guidance has something to lean away from."""
GUIDANCE = 2.5
"""Any value, where the model is not guidance-distilled: see `start_like_dit`."""
CPU = torch.device("cpu")
COMPILED_SHAPES = 64
"""Of one kind of block, before torch gives up and runs it uncompiled: with and without context, grad or none."""


class FlowWithText(nn.Module):
    """The transformer and both text encoders."""

    def __init__(self, flow: FlowTransformer, text: TextEncoder) -> None:
        super().__init__()
        self.flow = flow
        self.text = text
        self.clip, self.t5 = text.clip, text.t5  # modules of this one, so that they can be trained

    @classmethod
    def new(cls, folder: Path, config: FlowConfig = TINY) -> FlowWithText:
        """The shipped model's sizes at random, and its tokenizers.

        They are made once and then read from `folder`: made again, equally frequent pieces change places.
        """
        folders = {name: folder / name for name in ("tokenizer", "tokenizer_2")}
        if not (folders["tokenizer_2"] / "spiece.model").is_file():
            make_clip_tokenizer(corpus(), folders["tokenizer"])
            make_t5_tokenizer(corpus(), folders["tokenizer_2"])
        clip_tokenizer = CLIPTokenizer.from_pretrained(folders["tokenizer"], local_files_only=True)
        t5_tokenizer = T5Tokenizer.from_pretrained(folders["tokenizer_2"], local_files_only=True)
        flow = FlowTransformer(config)
        text = TextEncoder(make_clip(clip_tokenizer), make_t5(t5_tokenizer), folders)
        start_like_dit(flow)
        return cls(flow, text)

    @classmethod
    def load(cls, folder: Path, device: torch.device = CPU, *, deepen: int = 0) -> FlowWithText:
        """A finished model to go on from; its text encoders are frozen, as the paper's are.

        `deepen` single blocks are added behind its own.
        """
        files = find_model(folder)
        flow = deepened(load_transformer(files, device=device, dtype=torch.float32), deepen).requires_grad_(True)
        freeze_unused_guidance(flow)
        return cls(flow, TextEncoder.load(files, device=device, dtype=torch.float32, text_length=None))

    def velocity(
        self,
        x: Tensor,  # (B, n, channels): the target's tokens
        t: Tensor,  # (B,)
        context: Tensor | None,  # (B, n, channels), or none for text-to-image
        ids: tuple[Tensor, Tensor],  # as from `token_ids`
        grid: tuple[int, int],
    ) -> Tensor:
        """Velocity of the target tokens (B, n, channels)."""
        positions = [grid_ids(*grid)] + ([] if context is None else context_ids([grid], "offset"))
        out: Tensor = self.flow(
            img=x if context is None else torch.cat([x, context], dim=1),
            img_ids=torch.cat(positions).to(x.device).expand(x.shape[0], -1, -1),
            txt=self.t5(ids[1]).last_hidden_state,
            pooled=self.clip(ids[0]).pooler_output,
            t=t,
            guidance=torch.full_like(t, GUIDANCE) if self.flow.config.guidance_embed else None,
        )
        return out[:, : x.shape[1]]

    def export(self, folder: Path, autoencoder: Autoencoder, dtype: torch.dtype) -> None:
        """Write a whole model in the diffusers layout, its transformer in `dtype`, the rest in fp32. Changes itself.

        diffusers brings transformer and autoencoder to fp32 when it loads them, and text encoders to what their files
        have: a folder whose small text encoders are fp32 loads there as it is.
        """
        self.flow.to(dtype)
        save_model(folder, transformer=self.flow, autoencoder=autoencoder, save_texts=self.text.save)


def start_like_dit(flow: FlowTransformer) -> None:
    """Every block starts as the identity and the output as zero (adaLN-Zero, arXiv 2212.09748).

    A model that is not guidance-distilled has nothing to learn about the guidance scale: its embedder is zero and is
    not trained. The model is built as Kontext-dev is, and gives the same picture for every scale.
    """
    for name, module in flow.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(("_mod.lin", "modulation.lin", "adaLN_modulation.1", "final_layer.linear")):
                nn.init.zeros_(module.weight)
    if flow.guidance_in is not None:
        for parameter in flow.guidance_in.parameters():
            nn.init.zeros_(parameter)
    freeze_unused_guidance(flow)


def deepened(flow: FlowTransformer, blocks: int) -> FlowTransformer:
    """The same model with so many single blocks more, which start as the identity: it computes what it did before."""
    if blocks == 0:
        return flow
    config = replace(flow.config, depth_single=flow.config.depth_single + blocks)
    deeper = FlowTransformer(config)
    start_like_dit(deeper)
    deeper.load_state_dict({**deeper.state_dict(), **flow.state_dict()})
    return deeper.to(next(flow.parameters()).device)


def freeze_unused_guidance(flow: FlowTransformer) -> None:
    """Leave a guidance embedder of zeros as it is: the model is not guidance-distilled."""
    if flow.guidance_in is not None and not any(parameter.any() for parameter in flow.guidance_in.parameters()):
        flow.guidance_in.requires_grad_(False)


def compile_blocks(flow: FlowTransformer) -> None:
    """Compile each block where it stands; names and values of the parameters stay. Raises `ConfigError`.

    The first shapes are compiled as they are, from then on batch and length are variables.
    """
    check_compiler(next(flow.parameters()).device)
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    for block in (*flow.double_blocks, *flow.single_blocks):
        block.compile()


def edit_loss(
    module: FlowWithText,
    parts: Sequence[FlowData],
    moment: Moment,
    batch: int,
    *,
    context_dropout: float = 0.0,
    objective: Objective = PAPER,
) -> Tensor:
    """The objective over a random batch of one size. Rows without context, for text-to-image, leave its tokens out."""
    device = next(module.parameters()).device
    counts = np.array([len(part.pairs.after) for part in parts])
    data = parts[moment.numpy.choice(len(parts), p=counts / counts.sum())]
    pairs = data.pairs
    empty = len(pairs.after)
    chosen = torch.from_numpy(moment.numpy.integers(0, empty, batch))
    worded = torch.where(torch.from_numpy(moment.numpy.random(batch) < PROMPT_DROPOUT), empty, chosen)
    kept = torch.from_numpy(moment.numpy.random(batch) >= context_dropout) & pairs.has_before[chosen]
    total = torch.zeros((), device=device)
    for with_context in (True, False):  # their sequences differ in length
        rows = (kept == with_context).nonzero()[:, 0]
        if not len(rows):
            continue
        context = pairs.before[chosen[rows]].to(device) if with_context else None
        ids = (data.clip_ids[worded[rows]].to(device), data.t5_ids[worded[rows]].to(device))

        def velocity(
            x: Tensor, t: Tensor, context: Tensor | None = context, ids: tuple[Tensor, Tensor] = ids
        ) -> Tensor:
            return module.velocity(x, t, context, ids, pairs.grid)

        loss = flow_loss(velocity, pairs.after[chosen[rows]].to(device), moment.torch, objective)
        total = total + loss * len(rows) / batch
    return total


def train_flow(
    module: FlowWithText,
    trained: nn.Module,
    parts: Sequence[FlowData],
    config: LoopConfig,
    folder: Path,
    *,
    batch: int = 32,
    context_dropout: float = 0.0,
    objective: Objective = PAPER,
    say: Callable[[str], None] = print,
    preview: Callable[[int], None] | None = None,
    preview_every: int = 0,
) -> None:
    """Train `trained` (the module itself, its flow, or an adapter on it), or go on training, in `folder`.

    `preview` is called every `preview_every` steps with the step, while the averaged parameters are in place; they are
    at the end too.
    """
    loop = Loop(trained, config, folder, hidden=lambda name: "_blocks." in name)
    loop.resume()

    def loss_of(moment: Moment) -> Loss:
        figures: Mapping[str, float] = {}
        loss = edit_loss(module, parts, moment, batch, context_dropout=context_dropout, objective=objective)
        return loss, figures

    def on_step(step: int) -> None:
        if preview is not None and preview_every and step % preview_every == 0:
            with loop.averaged():
                preview(step)

    loop.run(loss_of, say=say, on_step=on_step)
    loop.use_average()
    module.eval()
