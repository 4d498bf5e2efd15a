"""Chains of the benchmark: true results are known, and a perfect model is told from one that does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from PIL import Image

from benchmarks.multi_turn import TURNS, draw_chains, run
from engine.latents import Latents
from engine.pipeline import EditRequest, EditResult, KontextEngine
from engine.training.products import render


def test_every_turn_changes_what_the_turn_before_left() -> None:
    for chain in draw_chains(20):
        scenes = [chain.start, *(scene for _, scene in chain.turns)]
        assert len(scenes) == TURNS + 1
        assert all(before != after for before, after in pairwise(scenes))
        assert len({(scene.product, scene.x, scene.y, scene.size) for scene in scenes}) == 1


class Stub:
    """Returns the truth, or its canvas; notes what it was given."""

    def __init__(self, truth: list[Image.Image], *, right: bool) -> None:
        self.truth, self.right, self.canvases = truth, right, list[object]()

    def edit(self, requests: Sequence[EditRequest]) -> list[EditResult]:
        results = []
        for request in requests:
            made = self.truth.pop(0)
            self.canvases.append(request.image)
            image = made if self.right or not isinstance(request.image, Image.Image) else request.image
            results.append(EditResult(image, torch.zeros(64, 64), request.seed, 128, 128))
        return results


def test_a_perfect_model_loses_nothing_and_an_idle_one_much() -> None:
    chains = draw_chains(3)
    truth = [render(chain.turns[turn][1]) for turn in range(TURNS) for chain in chains]
    perfect = run(cast(KontextEngine, Stub(list(truth), right=True)), chains, steps=1, latents=False)
    assert perfect == [[99.0] * 3] * TURNS
    idle = run(cast(KontextEngine, Stub(list(truth), right=False)), chains, steps=1, latents=False)
    assert max(idle[-1]) < 30


def test_latents_are_handed_on_from_the_second_turn() -> None:
    chains = draw_chains(2)
    stub = Stub([render(chain.turns[turn][1]) for turn in range(TURNS) for chain in chains], right=True)
    run(cast(KontextEngine, stub), chains, steps=1, latents=True)
    kinds = [isinstance(canvas, Latents) for canvas in stub.canvases]
    assert kinds == [False] * 2 + [True] * 2 * (TURNS - 1)
