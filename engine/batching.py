"""Rows that are sampled together: admit, step, retire.

A row is one request in numbers. It knows latents and times; it knows no prompts, pictures or files. Rows join and
leave between denoise steps, and each is at its own time: one step moves every live row one Euler step on, in as few
forward passes as a budget of tokens allows. Rows of any sizes share a pass, since nothing is padded.

    schedule  decides which rows share a pass        (no tensors)
    forward   computes their velocities              (no policy; engine.packed)
    advance   moves each row on                      (no model)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from torch import Tensor

from engine.packed import Condition, Place
from engine.reuse import ContextMemory, Velocities
from engine.sampling import euler_step, guide

DEFAULT_MAX_ROWS = 8
DEFAULT_MAX_TOKENS = 8 * 8704
"""Of one forward pass: eight edits at 1 MP with a context of 1 MP."""

Forward = Callable[[Sequence[Place]], Sequence[Tensor]]
"""Velocity (n, channels) fp32 of each place's target tokens."""


@dataclass(slots=True, eq=False)
class Row:
    """One image being sampled."""

    x: Tensor
    """(n, channels) fp32: packed latents at time `times[done]`."""
    condition: Condition
    """What the prompt, the context and the schedule bring to every forward pass."""
    times: Sequence[float]
    """Steps + 1 times from 1 to 0."""
    negative: Condition | None = None
    """The same for the negative prompt; None runs without classifier-free guidance."""
    cfg_scale: float = 1.0
    done: int = 0
    """Denoise steps taken."""
    velocities: Velocities | None = None
    """Where steps may be left out: the row's velocities; None computes each."""
    memories: tuple[ContextMemory | None, ContextMemory | None] = (None, None)
    """Where the context is not computed at each step: its memory with the prompt, and with the negative one."""

    @property
    def places(self) -> list[Place]:
        """What it asks of the next forward pass: a row with a negative prompt takes two places, one that leaves the
        step out none.
        """
        if self.velocities is not None and not self.velocities.due(self.done):
            return []
        found = [Place(self.x, self.condition, self.done, self.memories[0])]
        if self.negative is not None:
            found.append(Place(self.x, self.negative, self.done, self.memories[1]))
        return found

    @property
    def finished(self) -> bool:
        return self.done == len(self.times) - 1


@dataclass(slots=True)
class Batch:
    """The live rows of one model."""

    forward: Forward
    max_rows: int = DEFAULT_MAX_ROWS
    """Most rows alive at once."""
    max_tokens: int = DEFAULT_MAX_TOKENS
    """Most tokens in one forward pass, unless one place alone has more."""
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
        wanted = [row.places for row in self.rows]
        passes = schedule(chain.from_iterable(wanted), self.max_tokens)
        found = iter([velocity for places in passes for velocity in self.forward(places)])
        for row, places in zip(self.rows, wanted, strict=True):
            advance(row, list(islice(found, len(places))))

    def retire(self) -> list[Row]:
        """Let the finished rows leave, in the order in which they joined."""
        finished = [row for row in self.rows if row.finished]
        self.rows = [row for row in self.rows if not row.finished]
        return finished


def schedule(places: Iterable[Place], most: int) -> list[list[Place]]:
    """Forward passes of at most `most` tokens each, in order; a place that has more gets a pass of its own."""
    passes: list[list[Place]] = []
    free = 0
    for place in places:
        tokens = place.tokens
        if not passes or tokens > free:
            passes.append([])
            free = most
        passes[-1].append(place)
        free -= tokens
    return passes


def advance(row: Row, found: Sequence[Tensor]) -> None:
    """One Euler step of one row by the velocities of its places, if it had any: two of them guide (CFG)."""
    t = row.times[row.done]
    if found:
        velocity = found[0] if len(found) == 1 else guide(found[0], found[1], row.cfg_scale)
        if row.velocities is not None:
            row.velocities.computed(row.done, t, velocity)
    else:
        assert row.velocities is not None, "only extrapolated steps have no place"
        velocity = row.velocities.extrapolated(t)
    row.x = euler_step(row.x, velocity, t, row.times[row.done + 1])
    row.done += 1
