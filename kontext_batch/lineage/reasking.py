"""Which steps of a plan must run, and how many parents each of them waits for. Pure; submit and retry decide by it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kontext_batch.planning.states import LIVE, StepState


@dataclass(frozen=True, slots=True)
class Known:
    """A step that the database has already."""

    id: int
    state: StepState
    kept: bool
    """It is done and the bytes of all its outputs are still there."""


def to_run(
    parents: Sequence[Sequence[int]],
    known: Sequence[Known | None],
    *,
    asked: Collection[int],
    pictures: Collection[int],
) -> list[bool]:
    """For each step (by its index, parents before children): will it run from now on?

    `parents`: indices of each step's parents. `known`: None for a step that is new. `asked`: unsuccessful steps that
    are wanted anew. `pictures`: steps whose picture is needed (a delivery waits for it).

    A step runs when it is new, live already, unsuccessful and asked for or read by a step that runs; or when it is
    done, its picture was collected, and a step that runs or a delivery needs it. A collected picture that nobody needs
    stays collected.
    """
    runs = [False] * len(parents)
    read = [False] * len(parents)
    for index in range(len(parents) - 1, -1, -1):
        step = known[index]
        if step is None or step.state in LIVE:
            runs[index] = True
        elif step.state is StepState.DONE:
            runs[index] = not step.kept and (read[index] or index in pictures)
        else:
            runs[index] = read[index] or index in asked
        if runs[index]:
            for parent in parents[index]:
                read[parent] = True
    return runs


def deps_left(parents: Sequence[int], runs: Sequence[bool]) -> int:
    """How many distinct parents a step that runs has to wait for. Whoever reads one parent twice waits for it once."""
    return len({parent for parent in parents if runs[parent]})
