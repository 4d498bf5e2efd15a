"""Whether a step computes what it should and nothing else: operations counted in a pass against the closed form.

A multiplication and an addition are two operations; norms, activations and rotations are left out of both. Counted for
the middle model on this machine, dense as in the paper and packed as the engine samples; and for Kontext-dev without
weights (on the meta device), packed: one denoise step of an edit at 1024x1024 with a context of the same size, and what
a row computes once when it joins. Goal: within 0.5 %.

Then the kernels that a GPU launches in a packed step of one row: how long that takes at 5 us each, and from how many
tokens on the step's operations take longer at 600 TFLOP/s, so that a CUDA graph has nothing to gain (engine.graphs).

    python -m benchmarks.flops [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import math
import sys
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import command
from benchmarks.random_model import MIDDLE, TEXT_LENGTH, random_transformer
from engine import linear as linears
from engine.config import KONTEXT_DEV, FlowConfig
from engine.kernels import Rows
from engine.latents import context_ids, grid_ids
from engine.layers import EMBEDDING_DIM
from engine.packed import Place, condition, velocities
from engine.sampling import schedule
from engine.text import TextFeatures
from engine.transformer import FlowTransformer
from engine.weights import read_json
from kontext_batch.registry import shipped_folder

GOAL = 0.005
STEPS = 28


LAUNCH_SECONDS, SPEED = 5e-6, 600e12
"""Of a kernel; of an H100 at large products, operations a second."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of one row."""

    text: int
    target: int
    context: int

    @property
    def all(self) -> int:
        return self.text + self.target + self.context


def linear(tokens: int, inner: int, outer: int) -> int:
    return 2 * tokens * inner * outer


def attention(queries: int, keys: int, width: int) -> int:
    """Scores, and the mean of the values by them."""
    return 2 * 2 * queries * keys * width


def double_block(config: FlowConfig, row: Tokens) -> int:
    """Queries, keys and values, projection and MLP of both streams; attention over all."""
    size = config.hidden_size
    each = linear(row.all, size, 3 * size) + linear(row.all, size, size) + 2 * linear(row.all, size, config.mlp_size)
    return each + attention(row.all, row.all, size)


def single_block(config: FlowConfig, row: Tokens, queries: int) -> int:
    """Keys and values of all tokens; the rest of so many."""
    size, inner = config.hidden_size, config.mlp_size
    own = linear(queries, size, size + inner) + linear(queries, size + inner, size)
    return linear(row.all, size, 2 * size) + own + attention(queries, row.all, size)


def packed_step(config: FlowConfig, row: Tokens) -> int:
    """One denoise step of one row as the engine samples it."""
    blocks = config.depth_double * double_block(config, row) + (config.depth_single - 1) * single_block(
        config, row, row.all
    )
    ends = linear(row.target, config.in_channels, config.hidden_size) * 2
    return blocks + single_block(config, row, row.target) + ends


def modulations(config: FlowConfig, times: int) -> int:
    """Time, guidance and pooled text to every block's modulation, at so many times."""
    size = config.hidden_size
    parts = 12 * config.depth_double + 3 * config.depth_single + 2
    embedder = linear(1, EMBEDDING_DIM, size) + linear(1, size, size)
    guidance = embedder if config.guidance_embed else 0
    pooled = linear(1, config.pooled_dim, size) + linear(1, size, size)
    return times * embedder + guidance + pooled + linear(times, size, parts * size)


def condition_once(config: FlowConfig, row: Tokens, steps: int) -> int:
    """What a row computes when it joins."""
    ends = linear(row.text, config.text_dim, config.hidden_size) + linear(
        row.context, config.in_channels, config.hidden_size
    )
    return modulations(config, steps) + ends


def dense_step(config: FlowConfig, row: Tokens) -> int:
    """One forward pass as in the paper."""
    image = row.target + row.context
    ends = linear(image, config.in_channels, config.hidden_size) * 2
    text = linear(row.text, config.text_dim, config.hidden_size)
    blocks = config.depth_double * double_block(config, row) + config.depth_single * single_block(config, row, row.all)
    return blocks + ends + text + modulations(config, 1)


def counted(work: Callable[[], object]) -> int:
    """Operations that torch was asked for, oneDNN's linears and the CPU's attention among them."""

    def of_linear(x: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    def of_attention(q: Sequence[int], k: Sequence[int], *args: Any, **kwargs: Any) -> int:
        return attention(math.prod(q[:-1]), k[-2], q[-1])

    mapping: dict[Any, Any] = {
        torch.ops.mkldnn._linear_pointwise: of_linear,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_attention,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return int(counter.get_total_flops())


class Case:
    """A transformer with one row of a picture and a context of `side` tokens each way."""

    def __init__(self, flow: FlowTransformer, side: int, text: int) -> None:
        config, device = flow.config, flow.img_in.weight.device
        self.flow, self.config = flow, config
        self.tokens = Tokens(text, side * side, side * side)
        self.x = torch.randn(side * side, config.in_channels, device=device)
        self.ids = torch.cat([grid_ids(side, side), *context_ids([(side, side)], "offset")])
        self.text = TextFeatures(
            torch.randn(text, config.text_dim, device=device), torch.randn(config.pooled_dim, device=device)
        )
        self.times = schedule(STEPS, side * side)

    def join(self) -> Place:
        made = condition(self.flow, text=self.text, context=self.x, ids=self.ids, times=self.times, guidance=2.5)
        return Place(self.x, made, 0)

    @torch.no_grad()
    def dense(self) -> None:
        device = self.x.device
        self.flow(
            img=torch.cat([self.x, self.x])[None],
            img_ids=self.ids[None].to(device),
            txt=self.text.t5[None],
            pooled=self.text.pooled[None],
            t=torch.ones(1, device=device),
            guidance=torch.ones(1, device=device),
        )

    def rows(self) -> dict[str, tuple[int, int]]:
        """What is computed -> (counted, closed form)."""
        place = self.join()
        found = {
            "joining": (counted(self.join), condition_once(self.config, self.tokens, STEPS)),
            "packed step": (counted(lambda: velocities(self.flow, [place])), packed_step(self.config, self.tokens)),
        }
        if not self.x.is_meta:  # its rotations are computed from the positions, which must be there
            found["dense step"] = counted(self.dense), dense_step(self.config, self.tokens)
        return found


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class OneEach:
    """`engine.kernels.Kernels` of one operation each, as Triton's are."""

    def modulated(self, x: Tensor, rows: Rows, shift: Tensor, scale: Tensor) -> Tensor:
        assert rows.index.shape[0] == x.shape[0]  # its making is counted
        return x.clone()

    def add_gated(self, x: Tensor, rows: Rows, gate: Tensor, y: Tensor) -> None:
        x.neg_()

    def norm_rotate(self, qk: Tensor, weight: Tensor, rotation: Tensor | None) -> None:
        qk.neg_()


def launches(config: FlowConfig) -> int:
    """Kernels of a packed step of one row; they do not hang on the width, which is small here."""
    narrow = replace(config, hidden_size=32, num_heads=2, axes_dims=(4, 6, 6), text_dim=16, pooled_dim=16)
    case = Case(FlowTransformer(narrow).requires_grad_(False).eval(), 4, 8)
    place = case.join()
    # GELU within the linear, as on a GPU.
    with patch.multiple(linears, SMALL=0, _has_onednn=lambda x: True), Launches() as counter:
        velocities(case.flow, [place], kernels=OneEach())
    return int(counter.count)


def most_tokens(config: FlowConfig, seconds: float) -> int:
    """Of a row, half of them context, whose step takes at most so long."""
    text = TEXT_LENGTH
    within = range(1 << 14)
    return text + 2 * bisect(within, seconds * SPEED, key=lambda side: packed_step(config, Tokens(text, side, side)))


def launching() -> dict[str, dict[str, float]]:
    """By model: kernels, seconds of their launches, and tokens up to which those are longer than the work."""
    shipped = FlowConfig.from_diffusers(read_json(shipped_folder() / "transformer" / "config.json"))
    found: dict[str, dict[str, float]] = {}
    for name, config in {"shipped": shipped, "middle": MIDDLE.flow, "Kontext-dev": KONTEXT_DEV.flow}.items():
        count = launches(config)
        seconds = count * LAUNCH_SECONDS
        found[name] = {"kernels": count, "seconds": seconds, "tokens": most_tokens(config, seconds)}
    return found


def main() -> int:
    options = command.parser(__doc__, quick="no difference: it takes a second").parse_args()
    middle = Case(random_transformer(MIDDLE.flow), 16, TEXT_LENGTH)
    with torch.device("meta"):
        flow = FlowTransformer(KONTEXT_DEV.flow).requires_grad_(False).eval()
    cases = {"middle model, 256x256": middle, "Kontext-dev, 1024x1024": Case(flow, 64, 512)}
    table = Table(title="operations of one edit of one row")
    for column in ("model", "what", "counted", "closed form", "off by"):
        table.add_column(column, justify="left" if column in ("model", "what") else "right")
    found: dict[str, dict[str, float]] = {}
    for name, case in cases.items():
        for what, (count, form) in case.rows().items():
            off = count / form - 1
            table.add_row(name, what, f"{count / 1e12:.5f} T", f"{form / 1e12:.5f} T", f"{off:+.3%}")
            found[f"{name}: {what}"] = {"counted": count, "closed_form": form, "off": off}
    Console(width=110).print(table)
    dev = cases["Kontext-dev, 1024x1024"]
    dense, packed = dense_step(dev.config, dev.tokens), packed_step(dev.config, dev.tokens)
    print(f"Kontext-dev, 1024x1024, closed forms: dense {dense / 1e12:.1f} T, packed {packed / dense:.1%} of that")
    table = Table(title="launching the kernels of a packed step")
    for column in ("model", "kernels", "launched in", "longer than the work up to"):
        table.add_column(column, justify="left" if column == "model" else "right")
    graphs = launching()
    for name, each in graphs.items():
        tokens = f"{each['tokens']:,.0f} tokens"
        table.add_row(name, f"{each['kernels']:.0f}", f"{each['seconds'] * 1000:.2f} ms", tokens)
    Console(width=110).print(table)
    worst = max(abs(each["off"]) for each in found.values())
    print(f"furthest from the closed form: {worst:.3%} (goal: at most {GOAL:.1%})")
    if options.json:
        options.json.write_text(json.dumps({"rows": found, "goal": GOAL, "launches": graphs}, indent=2) + "\n")
    return int(worst > GOAL)


if __name__ == "__main__":
    sys.exit(main())
