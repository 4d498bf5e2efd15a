"""The GPU suite, with a small model in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu_suite import make_peer
from benchmarks.random_model import SMALL, random_engine
from engine.pipeline import KontextEngine


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
