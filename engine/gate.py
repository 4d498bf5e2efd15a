"""Whether approximate sampling is good enough on some weights: its images beside the exact ones, and what it saves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engine.geometry import TOKEN_SIDE
from engine.likeness import psnr
from engine.modes import EXACT, Approximation
from engine.pipeline import EditRequest, KontextEngine
from engine.training.evaluate import held_out
from engine.training.products import render

SETTINGS = (
    Approximation(step_tolerance=0.02),
    Approximation(step_tolerance=0.05),
    Approximation(step_tolerance=0.1),
    Approximation(context_every=2),
    Approximation(context_every=4),
    Approximation(step_tolerance=0.05, context_every=2),
)
"""What is tried where nothing is asked for."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one setting, over all images."""

    approximation: Approximation
    median: float
    """PSNR to the exact images, in dB; equal images count as 99."""
    worst: float
    quicker: float
    """Seconds of exact sampling over its own, encoding and decoding left out."""


def drawn_requests(engine: KontextEngine, count: int, steps: int) -> list[EditRequest]:
    """Edits of drawn products, of every kind in turn, at the model's native size."""
    side = round(engine.config.native_area**0.5 / TOKEN_SIDE) * TOKEN_SIDE
    return [
        EditRequest(
            example.instruction,
            image=None if example.before is None else render(example.before, side, side),
            width=side,
            height=side,
            steps=steps,
            seed=seed,
        )
        for seed, example in enumerate(held_out(count))
    ]


def gate(
    engine: KontextEngine,
    requests: Sequence[EditRequest],
    settings: Sequence[Approximation] = SETTINGS,
    *,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> list[Verdict]:
    """Make the images exactly and by each setting, after two steps of each that do not count. `on_done`: told of images
    made and images in all.

    The engine samples as before afterwards.
    """
    before = engine.approximation
    arms = (EXACT, *settings)
    total, done = len(arms) * len(requests), 0
    apart: list[list[float]] = [[] for _ in arms]
    seconds = [0.0 for _ in arms]
    try:
        for approximation in arms:  # kernels are chosen and compiled for each arm's shapes before anything is timed
            engine.approximation = approximation
            engine.edit([replace(requests[0], steps=2)])  # the second is the first that takes context from memory
        for request in requests:
            exact = None
            for arm, approximation in enumerate(arms):  # turn about, so that all meet the machine in the same mood
                engine.approximation = approximation
                (result,) = engine.edit([request])
                exact = exact or result.image
                apart[arm].append(psnr(result.image, exact))
                seconds[arm] += result.timings["sample"]
                done += 1
                on_done(done, total)
    finally:
        engine.approximation = before
    return [
        Verdict(approximation, statistics.median(apart[arm]), min(apart[arm]), seconds[0] / seconds[arm])
        for arm, approximation in enumerate(arms)
        if arm > 0
    ]
