"""What a block does between its linears and its attention, one kernel each: Triton on cuda, plain torch elsewhere, or
torch's own compiler's where that is asked for.

    modulated    layer norm, times 1 + scale, plus shift
    add_gated    x += gate y
    norm_rotate  root mean square norm of queries and keys, and their rotation

GELU needs none: the linears take it into their own kernels (engine.linear).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import accumulate, pairwise
from shutil import which
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import ConfigError


class Rows:
    """Where each row's tokens lie in a stream of tokens."""

    def __init__(self, slices: Iterable[slice], device: torch.device) -> None:
        self.slices = list(slices)
        self._device = device

    @classmethod
    def counted(cls, counts: Iterable[int], device: torch.device) -> Rows:
        """Rows of so many tokens, one after another."""
        return cls((slice(start, stop) for start, stop in pairwise(accumulate(counts, initial=0))), device)

    @cached_property
    def index(self) -> Tensor:
        """The row of each token, (tokens,) int32, for rows that lie one after another."""
        # Made on the device: a copy from the host could be part of no CUDA graph.
        parts = [
            torch.full((each.stop - each.start,), row, dtype=torch.int32, device=self._device)
            for row, each in enumerate(self.slices)
        ]
        return torch.cat(parts)


class Kernels(Protocol):
    """The three, over the tokens of R rows of C channels."""

    def modulated(self, x: Tensor, rows: Rows, shift: Tensor, scale: Tensor) -> Tensor:
        """(tokens, C); `shift` and `scale`, which has its 1 already, (R, C)."""
        ...

    def add_gated(self, x: Tensor, rows: Rows, gate: Tensor, y: Tensor) -> None:
        """In place; `gate` (R, C)."""
        ...

    def norm_rotate(self, qk: Tensor, weight: Tensor, rotation: Tensor | None) -> None:
        """In place, in fp32 inside: (tokens, K, H, D) queries, keys or both, by `weight` (K, D) fp32.

        `rotation`: (tokens, D/2) complex; None turns nothing, as text stands at position 0.
        """
        ...


@cache
def kernels_for(device: torch.device, *, compiled: bool = False) -> Kernels:
    """Those that a device is quickest with; `compiled`: torch.compile's. Raises `ConfigError` where it cannot run."""
    if compiled:
        check_compiler(device)
        from engine.kernels.compiled import Compiled

        return Compiled()
    if device.type == "cuda" and _has_triton():
        from engine.kernels.fused import Fused

        return Fused()
    from engine.kernels.plain import Plain

    return Plain()


def check_compiler(device: torch.device) -> None:
    """Raise `ConfigError` where a device lacks what torch.compile needs; tried by a kernel of one operation."""
    if device.type == "cuda":
        if not _has_triton():
            raise ConfigError("compile: on cuda it needs triton and a C compiler; install them")
    else:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if which(compiler) is None:
            raise ConfigError(f"compile: on a CPU it needs a C++ compiler; install {compiler}, or name another in CXX")
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch about itself
            torch.compile(torch.neg, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # a compiler without its headers, a cache that cannot be written: there are many ways
        raise ConfigError(f"compile: no kernel can be built here ({' '.join(str(error).split())[:200]})") from error


def _has_triton() -> bool:
    """Which builds its launcher with a C compiler, which slim images lack."""
    return find_spec("triton") is not None and any(map(which, ("cc", "gcc", "clang")))
