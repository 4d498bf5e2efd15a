"""Graphs of forward passes, without a GPU: a stand-in records torch's operations and repeats them where they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.graphs import LEAST_STEPS, Graphs, Work
from engine.linear import Linear
from engine.packed import Place, condition, velocities
from engine.pipeline import KontextEngine
from engine.reuse import ContextMemory
from engine.sampling import schedule
from engine.session import Session
from engine.transformer import FlowTransformer
from tests.engine.test_batching import mixed
from tests.engine.test_packed import SMALL, cases, model

STEPS = 12
CPU = torch.device("cpu")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations as a CUDA graph has them: no Python, no other memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class Captures:
    """Stands for `engine.graphs.capture`."""

    def __init__(self) -> None:
        self.made = self.replayed = 0

    def __call__(self, work: Work, device: torch.device) -> tuple[Sequence[Tensor], Callable[[], None]]:
        assert device == CPU
        self.made += 1
        with Recorder() as recorder:
            results = work()

        def replay() -> None:
            self.replayed += 1
            recorder.replay()

        return results, replay


def places(flow: FlowTransformer, count: int = 2) -> list[Place]:
    """Rows of unequal sizes, each at another time of a schedule of twelve steps."""
    times = schedule(STEPS, 24)
    return [
        Place(
            case.x,
            condition(flow, text=case.text, context=case.context, ids=case.ids, times=times, guidance=2.5),
            index,
        )
        for index, case in enumerate(cases()[:count])
    ]


def later(rows: Sequence[Place], *, by: int = 1, seed: int = 0) -> list[Place]:
    generator = torch.Generator().manual_seed(seed)
    return [replace(row, x=torch.randn(row.x.shape, generator=generator), step=row.step + by) for row in rows]


@pytest.fixture
def captures() -> Captures:
    return Captures()


@pytest.mark.parametrize("apart", [False, True])
def test_a_set_of_rows_that_goes_on_is_replayed_bit_for_bit(captures: Captures, apart: bool) -> None:
    flow = model()

    def forward(chosen: Sequence[Place]) -> list[Tensor]:
        return velocities(flow, chosen, apart=apart)

    graphs, rows = Graphs(forward, captures), places(flow)
    kept = []
    for step in range(6):
        found, wanted = graphs(rows), forward(rows)
        kept.append((found, wanted))
        assert (captures.made, captures.replayed) == ((0, 0) if step == 0 else (1, step))
        rows = later(rows, seed=step)
    for found, wanted in kept:  # nor does a later step change an earlier one's results
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_replay_runs_no_linear_of_the_model(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = model()
    graphs, rows = Graphs(lambda chosen: velocities(flow, chosen), captures), places(flow)
    graphs(rows)
    graphs(rows)
    monkeypatch.setattr(Linear, "rows", None)
    graphs(later(rows))


def test_other_rows_end_a_graph(captures: Captures) -> None:
    flow = model()
    graphs, (first, second, third) = Graphs(lambda chosen: velocities(flow, chosen), captures), places(flow, 3)
    for made, rows in (
        (0, [first, second]),
        (1, [first, second]),
        (1, [first]),  # one has left
        (2, [first]),
        (2, [first, third]),  # one has joined
        (2, [third, first]),
        (2, [first, third]),
        (3, [first, third]),
        (3, [first, second]),  # and nothing is left of the first graph
    ):
        wanted = velocities(flow, rows)
        assert all(torch.equal(a, b) for a, b in zip(graphs(rows), wanted, strict=True))
        assert captures.made == made


def test_no_graph_where_it_would_not_pay(captures: Captures) -> None:
    flow = model()
    rows = places(flow)

    def made(most_work: int, chosen: Sequence[Place]) -> int:
        graphs, before = Graphs(lambda chosen: velocities(flow, chosen), captures, most_work), captures.made
        graphs(chosen)
        graphs(chosen)
        return captures.made - before

    size = SMALL.hidden_size
    work = sum(24 * row.tokens * size**2 + 4 * row.tokens**2 * size for row in rows)
    assert made(work, rows) == 1
    assert made(work - 1, rows) == 0
    left = STEPS - rows[1].step
    assert made(work, later(rows, by=left - LEAST_STEPS)) == 1
    assert made(work, later(rows, by=left - LEAST_STEPS + 1)) == 0
    assert made(work, [rows[0], replace(rows[1], memory=ContextMemory(2))]) == 0


def test_a_session_takes_them_on_cuda_alone(engine: KontextEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [replace(each, steps=9) for each in mixed()[:3]]
    wanted = engine.edit(requests)
    monkeypatch.setattr(engine, "cuda_graphs", True)
    assert not isinstance(Session[int](engine)._batch.forward, Graphs)
    captures = Captures()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "device", torch.device("cuda"))
        session: Session[int] = Session(engine)
    forward = session._batch.forward
    assert isinstance(forward, Graphs)
    forward.capture = captures
    monkeypatch.setattr(engine, "session", lambda: session)
    for found, result in zip(engine.edit(requests), wanted, strict=True):
        assert torch.equal(found.latents, result.latents)
    assert captures.replayed == 8
