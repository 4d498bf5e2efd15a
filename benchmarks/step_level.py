"""Whether slots ever idle: rows that join and leave between denoise steps beside static batches, on a real session.

60 requests of 20, 28 and 50 denoise steps in four slots, on a small random model, alone and as 20 chains of three, of
which each step may begin when the one before it is done and then comes first. Static batches take four requests to the
end of the longest, either dropping finished rows or running every row to the longest. Occupancy is the share of all
slots that denoise steps move on, from the first to the last. Time is told by two clocks: seconds of this machine, on
which a step costs what its rows cost; and denoise steps of the batch, which is the time of a device that is not full
and takes four rows as quickly as one. Goals: at least 95 % occupancy; images a second not below either static arm;
chains done in at most 0.8 of the mean time of static batches, in steps, and no later in seconds.

    python -m benchmarks.step_level [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.random_model import SMALL, random_engine
from engine.pipeline import EditRequest, KontextEngine

SLOTS, STEPS, CHAIN = 4, (20, 28, 50), 3
REQUESTS, ROUNDS = 60, 5


@dataclass(slots=True)
class Outcome:
    """Of one arm."""

    moved: int = 0
    """Row steps that were wanted."""
    steps: int = 0
    """Denoise steps of the batch."""
    seconds: float = 0.0
    chains: list[tuple[int, float]] = field(default_factory=list)
    """Steps and seconds after which each chain was done."""

    @property
    def occupancy(self) -> float:
        return self.moved / (self.steps * SLOTS)


def request(steps: int, seed: int) -> EditRequest:
    return EditRequest("a mug", width=64, height=64, steps=steps, seed=seed)


class Work:
    """Chains of requests: those that may be admitted now, those of begun chains first."""

    def __init__(self, chains: Sequence[Sequence[int]]) -> None:
        self.chains = chains
        self.waiting = deque((chain, 0) for chain in range(len(chains)))
        self.left = sum(len(chain) for chain in chains)
        self.outcome = Outcome()
        self._started = time.perf_counter()

    def next(self) -> tuple[tuple[int, int], EditRequest]:
        chain, position = self.waiting.popleft()
        return (chain, position), request(self.chains[chain][position], chain * CHAIN + position)

    def stepped(self, moved: int, finished: Iterable[tuple[int, int]]) -> None:
        """A denoise step has moved so many rows on, and these requests are done."""
        outcome = self.outcome
        outcome.moved += moved
        outcome.steps += 1
        outcome.seconds = time.perf_counter() - self._started
        for chain, position in finished:
            self.left -= 1
            if position + 1 < len(self.chains[chain]):
                self.waiting.appendleft((chain, position + 1))
            else:
                outcome.chains.append((outcome.steps, outcome.seconds))


def step_level(engine: KontextEngine, chains: Sequence[Sequence[int]]) -> Outcome:
    """Rows join and leave between denoise steps, as in the engine's `edit` and in the worker."""
    work = Work(chains)
    with engine.session() as session:
        while work.left:
            while session.free and work.waiting:
                tag, asked = work.next()
                session.admit(asked, tag)
            moved = session.alive
            session.step()
            work.stepped(moved, [tag for tag, _ in session.retire()])
    return work.outcome


def static(engine: KontextEngine, chains: Sequence[Sequence[int]], *, to_the_longest: bool) -> Outcome:
    """Four requests at a time, from their first step to the last of the longest; then all are done."""
    work = Work(chains)
    with engine.session() as session:
        while work.left:
            batch = [work.next() for _ in range(min(SLOTS, len(work.waiting)))]
            longest = max(asked.steps for _, asked in batch)
            for tag, asked in batch:
                # What is sampled beyond a request's own steps costs what any step costs.
                session.admit(request(longest if to_the_longest else asked.steps, asked.seed), tag)
            for taken in range(longest):
                session.step()
                session.retire()
                last = taken == longest - 1
                work.stepped(sum(asked.steps > taken for _, asked in batch), [tag for tag, _ in batch] if last else ())
    return work.outcome


def measure(engine: KontextEngine, rounds: int) -> dict[str, dict[str, float]]:
    """Every arm, turn about; medians."""
    drawn = torch.randint(3, (REQUESTS,), generator=torch.Generator().manual_seed(1)).tolist()
    steps = [STEPS[index] for index in drawn]
    alone = [[each] for each in steps]
    chained = [steps[start : start + CHAIN] for start in range(0, REQUESTS, CHAIN)]
    arms: dict[str, Callable[[Sequence[Sequence[int]]], Outcome]] = {
        "step-level": lambda work: step_level(engine, work),
        "static, finished rows dropped": lambda work: static(engine, work, to_the_longest=False),
        "static, all to the longest": lambda work: static(engine, work, to_the_longest=True),
    }
    runs: dict[str, list[tuple[Outcome, Outcome]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            runs[name].append((arm(alone), arm(chained)))
    return {
        name: {
            "occupancy": found[0][0].occupancy,
            "images_per_second": REQUESTS / statistics.median(single.seconds for single, _ in found),
            "chain_steps": statistics.mean(steps for steps, _ in found[0][1].chains),
            "chain_seconds": statistics.median(
                statistics.mean(seconds for _, seconds in chain.chains) for _, chain in found
            ),
        }
        for name, found in runs.items()
    }


def main() -> int:
    options = command.parser(__doc__, quick="one round instead of five").parse_args()
    engine = random_engine(SMALL)
    engine.max_rows = SLOTS
    engine.edit([request(2, 0)])
    found = measure(engine, 1 if options.quick else ROUNDS)
    table = Table(title="60 requests of 20, 28 and 50 denoise steps in four slots")
    for column in ("batches", "occupancy", "images a second", "a chain, steps", "a chain, seconds"):
        table.add_column(column, justify="left" if column == "batches" else "right")
    for name, each in found.items():
        speed, steps, seconds = each["images_per_second"], each["chain_steps"], each["chain_seconds"]
        table.add_row(name, f"{each['occupancy']:.1%}", f"{speed:.1f}", f"{steps:.0f}", f"{seconds:.2f}")
    Console(width=110).print(table)
    ours, *others = found.values()
    at_least = {
        "occupancy": (ours["occupancy"], 0.95),
        "images a second beside dropping": (ours["images_per_second"] / others[0]["images_per_second"], 1.0),
        "images a second beside the longest": (ours["images_per_second"] / others[1]["images_per_second"], 1.0),
    }
    at_most = {
        "chains in steps": (ours["chain_steps"] / min(other["chain_steps"] for other in others), 0.8),
        "chains in seconds": (ours["chain_seconds"] / min(other["chain_seconds"] for other in others), 1.0),
    }
    missed = [name for name, (value, goal) in at_least.items() if value < goal]
    missed += [name for name, (value, goal) in at_most.items() if value > goal]
    for name, (value, goal) in {**at_least, **at_most}.items():
        bound = "at least" if name in at_least else "at most"
        print(f"{name}: {value:.3f} ({bound} {goal:.2f}){'  MISSED' if name in missed else ''}")
    if options.json:
        options.json.write_text(json.dumps({"arms": found, "goals": {**at_least, **at_most}}, indent=2) + "\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
