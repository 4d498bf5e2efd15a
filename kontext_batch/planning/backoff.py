"""When something that failed is tried again."""

from __future__ import annotations


def doubling_delay(tries: int, *, first: float, longest: float, spread: float) -> float:
    """Seconds to wait after try number `tries` (1-based) failed: `first`, then twice as long each time, to `longest`.

    `spread`, 0 to 1, moves it from half to one and a half of that, so that what failed together comes back apart.
    """
    return float(min(longest, first * 2 ** (tries - 1)) * (0.5 + spread))
