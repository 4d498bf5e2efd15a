"""What approximate sampling takes again instead of computing it: velocities of a row's steps, keys and values of its
context. Opt-in, each with a bound that the user sets; exact sampling uses none of this.

Velocities (in the manner of TeaCache, arXiv 2411.19108, but in the velocity itself): along a row's way the velocity
changes slowly for much of the schedule. From the last two that were computed the next is extrapolated, linearly in t;
whenever one is computed, the extrapolation is held against it, and that error says how many steps may be left out
before it would pass the tolerance. Each row decides by itself, before passes are made, so that rows that skip a step
take no place in any pass.

Context: its tokens attend to the noisy target and are modulated by t, so their keys and values change from step to
step, but little. They are computed at every k-th step of a row, and in between the context takes no part but by them:
about half of the tokens of a 1 MP edit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

MOST_LEFT_OUT = 4
"""Steps that are left out in a row at most."""


@dataclass(slots=True, eq=False)
class Velocities:
    """The velocities of one row, computed and extrapolated."""

    tolerance: float
    last: int
    """The schedule's last step, which is computed in any case, as are the first two."""
    _computed: list[tuple[int, float, Tensor]] = field(default_factory=list)
    """(step, t, velocity) of the last two."""
    _until: int = 0
    """Steps before this one are extrapolated."""

    def due(self, step: int) -> bool:
        """Whether the model is to be asked for this step."""
        return step >= self._until or step >= self.last

    def extrapolated(self, t: float) -> Tensor:
        """The velocity at `t` on the line through the last two that were computed."""
        (_, t_0, v_0), (_, t_1, v_1) = self._computed
        return v_1 + (v_1 - v_0) * ((t - t_1) / (t_1 - t_0))

    def computed(self, step: int, t: float, velocity: Tensor) -> None:
        """Learn from a computed velocity how far the next may be extrapolated."""
        if self._computed and self._computed[-1][1] == t:
            return  # of very many steps of very large pictures some take no time in fp32, and tell nothing
        if len(self._computed) == 2:
            error = ((self.extrapolated(t) - velocity).abs().mean() / velocity.abs().mean()).item()
            gap = step - self._computed[-1][0]
            # A line's error grows with the square of the distance.
            reach = gap * math.sqrt(self.tolerance / error) if error > 0 else math.inf
            self._until = step + 1 + int(min(max(reach - 1, 0), MOST_LEFT_OUT))
        self._computed = [*self._computed[-1:], (step, t, velocity)]


@dataclass(slots=True, eq=False)
class ContextMemory:
    """Keys and values of one place's context, of every block, from the step that last computed them."""

    every: int
    keys: list[Tensor] = field(default_factory=list)
    """(m, H, D) each, rotated."""
    values: list[Tensor] = field(default_factory=list)
    computed: int | None = None
    """The row's step that computed them."""

    def fresh(self, step: int) -> bool:
        """Whether this step of the row may take them as they are; the one that computes them does not."""
        return self.computed is not None and 0 < step - self.computed < self.every

    def renew(self, step: int) -> None:
        """The pass of this step computes them anew."""
        self.keys.clear()
        self.values.clear()
        self.computed = step
