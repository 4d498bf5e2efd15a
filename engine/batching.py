"""Rows that are sampled together: admit, step, retire.

A row is one request in numbers. It knows tensors, times and guidance; it knows no prompts, pictures or files. Rows
join and leave between denoise steps, and each is at its own time: one step moves every live row one Euler step on, in
as few forward passes as their shapes allow. Rows of one shape (target, context and text tokens) share a pass.

    schedule  decides which rows share a pass        (no tensors)
    forward   computes their velocities              (no policy)
    advance   moves each row on                      (no model)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.sampling import euler_step, guide
from engine.text import TextFeatures
from engine.transformer import FlowTransformer

DEFAULT_MAX_ROWS = 8


@dataclass(slots=True, eq=False)
class Row:
    """One image being sampled."""

    x: Tensor
    """(n, channels) fp32: packed latents at time `times[done]`."""
    context: Tensor
    """(m, channels) fp32: packed latents of the context images; m = 0 without any."""
    ids: Tensor
    """(n + m, 3): positions of target and context tokens."""
    text: TextFeatures
    times: Sequence[float]
    """Steps + 1 times from 1 to 0."""
    guidance: float
    negative: TextFeatures | None = None
    """Features of the negative prompt; None runs without classifier-free guidance."""
    cfg_scale: float = 1.0
    done: int = 0
    """Denoise steps taken."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Target, context and text tokens: rows of equal shape can share a forward pass."""
        return self.x.shape[0], self.context.shape[0], self.text.t5.shape[0]

    @property
    def finished(self) -> bool:
        return self.done == len(self.times) - 1


@dataclass(frozen=True, slots=True)
class Place:
    """One row's place in a forward pass; a row with a negative prompt takes two."""

    row: Row
    negative: bool = False

    @property
    def text(self) -> TextFeatures:
        text = self.row.negative if self.negative else self.row.text
        assert text is not None
        return text


@dataclass(slots=True)
class Batch:
    """The live rows of one model."""

    transformer: FlowTransformer
    max_rows: int = DEFAULT_MAX_ROWS
    """Most rows alive at once, and most places in one forward pass."""
    rows: list[Row] = field(default_factory=list)

    @property
    def free(self) -> int:
        """How many rows may join."""
        return self.max_rows - len(self.rows)

    def admit(self, row: Row) -> None:
        """Let a row join before the next step."""
        assert self.free > 0, "the batch is full"
        self.rows.append(row)

    def step(self) -> None:
        """Move every live row one denoise step on."""
        velocities: dict[tuple[Row, bool], Tensor] = {}
        for places in schedule(self.rows, self.max_rows):
            for place, velocity in zip(places, forward(self.transformer, places), strict=True):
                velocities[place.row, place.negative] = velocity
        for row in self.rows:
            advance(row, velocities[row, False], velocities.get((row, True)))

    def retire(self) -> list[Row]:
        """Let the finished rows leave, in the order in which they joined."""
        finished = [row for row in self.rows if row.finished]
        self.rows = [row for row in self.rows if not row.finished]
        return finished


def schedule(rows: Iterable[Row], most: int) -> list[list[Place]]:
    """Forward passes of at most `most` places, each of one shape."""
    by_shape: dict[tuple[int, int, int], list[Place]] = {}
    for row in rows:
        places = by_shape.setdefault(row.shape, [])
        places.append(Place(row))
        if row.negative is not None:
            places.append(Place(row, negative=True))
    return [places[start : start + most] for places in by_shape.values() for start in range(0, len(places), most)]


@torch.no_grad()
def forward(transformer: FlowTransformer, places: Sequence[Place]) -> list[Tensor]:
    """Velocity (n, channels) fp32 of each place, for the target tokens alone."""
    rows = [place.row for place in places]
    device = rows[0].x.device
    velocity = transformer(
        img=torch.stack([torch.cat([row.x, row.context]) for row in rows]),
        img_ids=torch.stack([row.ids for row in rows]),
        txt=torch.stack([place.text.t5 for place in places]),
        pooled=torch.stack([place.text.pooled for place in places]),
        t=torch.tensor([row.times[row.done] for row in rows], dtype=torch.float32, device=device),
        guidance=torch.tensor([row.guidance for row in rows], dtype=torch.float32, device=device),
    )
    return list(velocity[:, : rows[0].x.shape[0]].float())


def advance(row: Row, velocity: Tensor, negative: Tensor | None) -> None:
    """One Euler step of one row, after classifier-free guidance where the row has a negative prompt."""
    if negative is not None:
        velocity = guide(velocity, negative, row.cfg_scale)
    row.x = euler_step(row.x, velocity, row.times[row.done], row.times[row.done + 1])
    row.done += 1
