"""The engine with kernels of torch.compile: what it makes, how often it compiles, and where it cannot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from engine.errors import ConfigError
from engine.kernels import Rows, kernels_for
from engine.kernels.compiled import Compiled
from engine.pipeline import KontextEngine
from tests.engine.test_batching import mixed
from tests.engine.tiny import Sizes, worst, write_model

BOUND = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("compiled") / "model", Sizes(double=2, single=2))


def load(folder: Path, *, dtype: torch.dtype = torch.float32, compiled: bool = True) -> KontextEngine:
    return KontextEngine.load(folder, device="cpu", dtype=dtype, text_length=32, compiled=compiled)


def latents(engine: KontextEngine, *indices: int) -> list[Tensor]:
    return [result.latents for result in engine.edit([mixed()[index] for index in indices])]


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_results_are_those_of_the_plain_kernels_and_no_size_is_compiled_anew(folder: Path, compiling: None) -> None:
    plain, engine = load(folder, compiled=False), load(folder)
    assert isinstance(engine.kernels, Compiled)
    torch._dynamo.reset()
    counters.clear()
    everything = range(len(mixed()))
    latents(engine, 0)
    latents(engine, 0, 1)
    first = graphs()
    # One row or several of: modulated, add_gated, queries and keys turned or not, queries alone and keys alone.
    assert 0 < first <= 12
    for indices in (everything, everything[3:]):
        for found, wanted in zip(latents(engine, *indices), latents(plain, *indices), strict=True):
            assert worst(found, wanted) < BOUND
    request = replace(mixed()[0], width=112, height=80)
    assert worst(engine.edit([request])[0].latents, plain.edit([request])[0].latents) < BOUND
    assert graphs() == first


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_results_stay_so(folder: Path, compiling: None, dtype: torch.dtype) -> None:
    """Also after a restart in which the compiler sees another size first."""
    engine = load(folder, dtype=dtype)
    engine.batch_invariant = True
    torch._dynamo.reset()
    alone = [latents(engine, index)[0] for index in range(len(mixed()))]
    torch._dynamo.reset()
    for order in ((9, 3, 0, 7), tuple(range(len(mixed())))):
        for index, found in zip(order, latents(engine, *order), strict=True):
            assert torch.equal(found, alone[index])


@pytest.mark.slow
def test_threads_compile_as_many_variants_as_it_takes(compiling: None) -> None:
    """Settings of the compiler are each thread's own; a worker loads in one thread and samples in another."""
    kernels = Compiled()
    torch._dynamo.reset()

    def widths() -> list[tuple[int, ...]]:
        cpu, rows = torch.device("cpu"), 3
        made: list[tuple[int, ...]] = []
        with torch.no_grad():
            for width in range(16, 16 * 11, 16):
                scale = torch.ones(1, width)
                x = torch.randn(rows, width)
                made.append(tuple(kernels.modulated(x, Rows.counted([rows], cpu), scale, scale).shape))
        return made

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(widths).result() == [(3, width) for width in range(16, 176, 16)]


def test_with_a_compiler_that_does_not_work_nothing_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    kernels_for.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setenv("CXX", str(broken))
    settings = {"force_disable_caches": True, "cpp.cxx": (None, str(broken)), "compile_threads": 1}
    with torch._inductor.config.patch(settings), pytest.raises(ConfigError, match="no kernel can be built here"):
        load(folder)
    torch._dynamo.reset()


def test_without_a_compiler_nothing_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_for.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler; install no-such-compiler"):
        load(folder)
    monkeypatch.setattr("engine.kernels.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs triton"):
        kernels_for(torch.device("cuda"), compiled=True)
