"""What a training shows while it runs: sheets of edits, and a plot of its metrics."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from engine.geometry import TOKEN_SIDE
from engine.latents import Latents
from engine.pipeline import EditRequest, KontextEngine
from engine.training.data import EncodedPairs
from engine.training.evaluate import compare

PREVIEWED, PREVIEW_STEPS = 12, 8


def preview(engine: KontextEngine, parts: Sequence[EncodedPairs], path: Path) -> None:
    """A sheet of source, edit and target of the first training pairs, always the same ones with the same noise."""
    part = parts[0]
    rows, columns = part.grid
    size = TOKEN_SIDE * columns, TOKEN_SIDE * rows
    chosen = range(min(PREVIEWED, len(part.prompts)))
    requests = [
        EditRequest(
            part.prompts[index],
            image=Latents(part.before[index], *size) if part.has_before[index] else None,
            width=size[0],
            height=size[1],
            steps=PREVIEW_STEPS,
            seed=index,
        )
        for index in chosen
    ]

    sheet = compare(
        [
            (
                (
                    None if request.image is None else engine.decode(Latents(part.before[index], *size)),
                    made.image,
                    engine.decode(Latents(part.after[index], *size)),
                ),
                part.prompts[index],
            )
            for index, request, made in zip(chosen, requests, engine.edit(requests), strict=True)
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def plot(folder: Path, say: Callable[[str], None]) -> None:
    """Draw every figure of `metrics.csv` over the steps into `metrics.png`; needs matplotlib, else it says so."""
    table = folder / "metrics.csv"
    if not table.is_file():
        return
    if find_spec("matplotlib") is None:
        say("no plot of the metrics: matplotlib is not installed (pip install 'kontext-batch[training]')")
        return
    from matplotlib.figure import Figure

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    names = [name for name in rows[0] if name not in ("step", "seconds_per_step")]
    figure = Figure(figsize=(8, 3 * len(names)), layout="constrained")
    for name, axes in zip(names, figure.subplots(len(names), 1, squeeze=False)[:, 0], strict=True):
        axes.plot([int(row["step"]) for row in rows], [float(row[name]) for row in rows])
        axes.set(xlabel="step", ylabel=name, yscale="log" if name == "loss" else "linear")
        axes.grid(alpha=0.3)
    figure.savefig(folder / "metrics.png", dpi=100)
    say(f"wrote {folder / 'metrics.png'}")
