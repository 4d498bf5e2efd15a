"""CUDA graphs of forward passes: where launching the kernels takes longer than their work, all are launched as one.

A graph repeats the very kernels on the very memory that it was captured with. So it belongs to one set of rows that
goes on unchanged: what differs from step to step, latents and the modulation of a row's time, is copied into tensors
of the graph's own, and the forward pass itself knows nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batching import Forward
from engine.packed import Condition, Place

MOST_WORK = 1e11
"""Operations of a block, above which launches cost nothing. Its 13 kernels are launched in 65 us, in which an H100 does
4e10 at best, and less in small products (docs/profile.md). Of Kontext-dev 430 tokens: fewer than one row has."""
LEAST_STEPS = 6
"""Of the rows' schedules that must be left: a capture costs about three passes."""

Work = Callable[[], Sequence[Tensor]]
Capture = Callable[[Work, torch.device], tuple[Sequence[Tensor], Callable[[], None]]]
"""From work on tensors that stay where they are: its results, and what computes them anew in the same place."""


def capture(work: Work, device: torch.device) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """By a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # kernels are built and libraries take their workspaces, neither of which can be captured
        # Other threads may go on using the device: nothing of theirs is captured.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = work()
    return results, graph.replay


class _Graph:
    """The forward pass of some places, at any time of their schedules."""

    def __init__(self, forward: Forward, places: Sequence[Place], capture: Capture) -> None:
        # A schedule of one step, which is whichever was copied in last.
        self._places = [Place(place.x.clone(), _at(place.condition, place.step), 0) for place in places]
        self._results, self._replay = capture(lambda: forward(self._places), places[0].x.device)

    def __call__(self, places: Sequence[Place]) -> list[Tensor]:
        torch._foreach_copy_([place.x for place in self._places], [place.x for place in places])
        torch._foreach_copy_(_modulations(self._places), _modulations(places))  # apart: one launch is of one dtype
        self._replay()
        return [each.clone() for each in self._results]  # the next step overwrites them


def _at(condition: Condition, step: int) -> Condition:
    """The condition with the modulation of one step alone."""
    modulation = tuple(each[step : step + 1].clone() for each in condition.modulation)
    return Condition(condition.text, condition.context, condition.rotation, modulation)


def _work(place: Place) -> int:
    """Operations of a block: linears and attention."""
    tokens, size = place.tokens, place.condition.text.shape[-1]
    return 4 * tokens * size * (6 * size + tokens)


def _modulations(places: Sequence[Place]) -> list[Tensor]:
    """Of the time that each place is at."""
    return [part[place.step] for place in places for part in place.condition.modulation]


@dataclass(slots=True)
class Graphs:
    """A forward pass that captures a graph when the same rows come for the second time in succession, and drops it when
    others come. Large passes, and rows that keep their context, go without.
    """

    forward: Forward
    capture: Capture = capture
    most_work: float = MOST_WORK
    _last: list[Condition] = field(default_factory=list)
    """Whose pass was the last one."""
    _graph: _Graph | None = None

    def __call__(self, places: Sequence[Place]) -> Sequence[Tensor]:
        conditions = [place.condition for place in places]
        if conditions != self._last:
            self._last, self._graph = conditions, None
        elif self._graph is None and self._pays(places):
            self._graph = _Graph(self.forward, places, self.capture)
        return self.forward(places) if self._graph is None else self._graph(places)

    def _pays(self, places: Sequence[Place]) -> bool:
        left = min(place.condition.modulation[0].shape[0] - place.step for place in places)
        small = sum(map(_work, places)) <= self.most_work
        return small and left >= LEAST_STEPS and all(place.memory is None for place in places)
