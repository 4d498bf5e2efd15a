"""The GPU suite, with a small model in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu_suite import LITTLE, Suite, make_peer
from benchmarks.random_model import SMALL, random_engine
from engine.pipeline import KontextEngine

CPU = torch.device("cpu")


def half(seed: int) -> KontextEngine:
    engine = random_engine(SMALL, seed=seed)
    for part in (engine.transformer, engine.text.t5, engine.text.clip):
        part.bfloat16()
    return engine


@pytest.fixture(scope="module")
def ours() -> KontextEngine:
    return half(0)


@pytest.fixture(scope="module")
def peer(ours: KontextEngine) -> Any:
    return make_peer(ours)


def test_the_peer_takes_no_memory_for_weights(ours: KontextEngine, peer: Any) -> None:
    """But for the last modulation, whose halves diffusers has the other way round."""
    shared = {each.untyped_storage().data_ptr() for each in ours.transformer.parameters()}
    own = {
        name for name, each in peer.transformer.named_parameters() if each.untyped_storage().data_ptr() not in shared
    }
    assert own == {"norm_out.linear.weight", "norm_out.linear.bias"}


@pytest.mark.parametrize(("seed", "failed"), [(0, []), (1, ["ours differs from diffusers"])])
def test_ours_is_held_against_diffusers_in_fp32(ours: KontextEngine, peer: Any, seed: int, failed: list[str]) -> None:
    suite = Suite(replace(LITTLE, dtype=torch.bfloat16), CPU, 100.0)
    suite.check(ours if seed == 0 else half(seed), peer)
    assert suite.failed == failed, suite.notes
    assert {each.dtype for each in peer.transformer.parameters()} == {torch.bfloat16}  # as before
