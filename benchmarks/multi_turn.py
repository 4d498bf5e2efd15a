"""How much six edits in a row lose, with pixels between the turns and with latents handed on.

Chains of random edits with known true results; each turn edits what the turn before made. PSNR in dB to the truth,
medians over the chains. Pixels: decoded, rounded to bytes and encoded again. Goals: at the last turn, latents stay
above 18 dB, and are no worse than pixels (median over the chains of their difference).

    python -m benchmarks.multi_turn [MODEL] [--steps N] [--quick] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import command
from engine.latents import Latents
from engine.likeness import psnr
from engine.pipeline import EditRequest, KontextEngine
from engine.training.evaluate import HELD_OUT_SEED, through_autoencoder
from engine.training.instructions import CHANGES, COMBINED
from engine.training.products import Scene, random_scene, render

TURNS = 6
GOALS = {"latents_db": 18.0, "gain_db": 0.0}


@dataclass(frozen=True, slots=True)
class Chain:
    """What is asked for in each turn, and what it should look like."""

    start: Scene
    turns: tuple[tuple[str, Scene], ...]


def draw_chains(count: int, seed: int = HELD_OUT_SEED + 1) -> list[Chain]:
    rng = np.random.default_rng(seed)
    chains = []
    for _ in range(count):
        scene = start = random_scene(rng)
        turns = []
        for _ in range(TURNS):
            scene, words = CHANGES[str(rng.choice(COMBINED))](rng, scene)
            turns.append((words, scene))
        chains.append(Chain(start, tuple(turns)))
    return chains


def run(model: KontextEngine, chains: Sequence[Chain], *, steps: int, latents: bool) -> list[list[float]]:
    """PSNR to the truth by turn, then by chain."""
    canvases: list[Image.Image | Latents] = [render(chain.start) for chain in chains]
    found = []
    for turn in range(TURNS):
        results = model.edit(
            [
                EditRequest(chain.turns[turn][0], image=canvas, steps=steps, seed=1000 * turn + index)
                for index, (chain, canvas) in enumerate(zip(chains, canvases, strict=True))
            ]
        )
        canvases = [result.handed_on() if latents else result.image for result in results]
        targets = [render(chain.turns[turn][1]) for chain in chains]
        found.append([psnr(result.image, target) for result, target in zip(results, targets, strict=True)])
    return found


def plot(path: Path, lines: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        axes.plot(range(1, TURNS + 1), values, marker="o", label=name)
    axes.set(xlabel="turn", ylabel="PSNR to the true result, dB (median)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, print, compare with the goals; 1 when one is missed."""
    parser = command.parser(__doc__, quick="16 chains instead of 96", model=True)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of PSNR by turn")
    options = parser.parse_args()
    count, steps = (16 if options.quick else 96), options.steps
    model = KontextEngine.load(options.model)
    chains = draw_chains(count)
    by_chain = {name: run(model, chains, steps=steps, latents=name == "latents") for name in ("pixels", "latents")}
    lines = {name: [statistics.median(turn) for turn in found] for name, found in by_chain.items()}
    lines["autoencoder alone"] = [
        statistics.median(
            psnr(through_autoencoder(model, target), target)
            for target in (render(chain.turns[turn][1]) for chain in chains)
        )
        for turn in range(TURNS)
    ]
    gains = [a - b for a, b in zip(by_chain["latents"][-1], by_chain["pixels"][-1], strict=True)]
    better = sum(gain > 0 for gain in gains)
    print(f"{'turn':18}" + "".join(f"{turn + 1:8}" for turn in range(TURNS)))
    for name, values in lines.items():
        print(f"{name:18}" + "".join(f"{value:8.2f}" for value in values))
    print(f"\nlatents nearer to the truth at turn {TURNS}: {better} of {count} chains")
    result = {"latents_db": lines["latents"][-1], "gain_db": statistics.median(gains)}
    missed = [name for name, goal in GOALS.items() if result[name] < goal]
    for name, goal in GOALS.items():
        print(f"{name:18}{result[name]:8.2f}  goal {goal:g} {'MISSED' if name in missed else ''}".rstrip())
    if options.json is not None:
        data = {"result": result, "goals": GOALS, "missed": missed, "by_turn": lines, "chains": count, "steps": steps}
        data["latents_better"] = better
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    if options.plot is not None:
        plot(options.plot, lines)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
