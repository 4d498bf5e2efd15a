"""How a result is computed, as one word: the dtype, whether torch.compile made the kernels, and what approximate
sampling leaves out. No torch here.

`float32`, `bfloat16`, `float8`; `float32+compiled`; `bfloat16+steps=0.05+context=4` is approximate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from engine.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16", "float64", "float8")
"""`float8` is bfloat16 with the linears of the blocks in fp8."""


@dataclass(frozen=True, slots=True)
class Approximation:
    """How far results may be from the exact ones; the default is not at all. Raises `ConfigError`."""

    step_tolerance: float = 0.0
    """Relative error of an extrapolated velocity, as foreseen; 0 computes every step. Typical values 0.02 to 0.1."""
    context_every: int = 1
    """Steps of a row from one computation of its context to the next; 1 computes it every time."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.step_tolerance) and 0 <= self.step_tolerance < 1):
            raise ConfigError(f"step_tolerance {self.step_tolerance} is not from 0 to below 1")
        if self.context_every < 1:
            raise ConfigError(f"context_every {self.context_every}: at least 1 is needed")

    @property
    def exact(self) -> bool:
        return self.step_tolerance == 0 and self.context_every == 1

    @property
    def keeps_context(self) -> bool:
        """Whether rows keep keys and values of their context from step to step."""
        return self.context_every > 1


EXACT = Approximation()


@dataclass(frozen=True, slots=True)
class Mode:
    """What a result's numbers depend on besides its request and its model."""

    dtype: str
    approximation: Approximation = EXACT
    compiled: bool = False
    """Whether torch.compile made the kernels between linears and attention, which round otherwise."""

    def __str__(self) -> str:
        near = self.approximation
        compiled = "+compiled" if self.compiled else ""
        steps = f"+steps={float(near.step_tolerance)!r}" if near.step_tolerance else ""
        context = f"+context={near.context_every}" if near.keeps_context else ""
        return self.dtype + compiled + steps + context

    @classmethod
    def parse(cls, text: str) -> Self:
        """The mode that a word stands for; raises `ConfigError` for one that this version does not know."""
        dtype, *parts = text.split("+")
        compiled = "compiled" in parts
        settings = dict(part.partition("=")[::2] for part in parts if part != "compiled")
        try:
            near = Approximation(float(settings.pop("steps", 0)), int(settings.pop("context", 1)))
        except ValueError as error:
            raise ConfigError(f"the numeric mode {text!r} is not known here ({error})") from error
        if settings or dtype not in DTYPES:
            raise ConfigError(f"the numeric mode {text!r} is not known here")
        return cls(dtype, near, compiled)
