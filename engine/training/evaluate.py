"""How good a model's edits of drawn products are: PSNR to the true result by kind of edit, and a sheet to look at.

`python -m engine.training.evaluate MODEL` draws pairs of seeds that no training uses.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from engine.latents import image_to_tensor, tensor_to_image
from engine.likeness import EQUAL, psnr
from engine.pipeline import EditRequest, KontextEngine
from engine.training.instructions import KINDS, Example, random_example
from engine.training.products import render

HELD_OUT_SEED = 20_260_000
CELL, LABEL = 128, 30


@dataclass(frozen=True, slots=True)
class Outcome:
    """One edit beside its true result; figures in dB of PSNR."""

    example: Example
    source: Image.Image | None
    edited: Image.Image
    target: Image.Image
    psnr: float
    ceiling: float
    """Of the target, encoded and decoded: what no edit can pass by much."""
    unedited: float | None
    """Of the source itself, as if nothing had been done; None for text-to-image."""

    @property
    def nearer(self) -> bool | None:
        """Whether the edit is nearer to the target than its source is; None where that says nothing."""
        if self.unedited is None or self.unedited >= EQUAL:  # from text alone, or nothing was to be changed
            return None
        return self.psnr > self.unedited


def held_out(count: int, seed: int = HELD_OUT_SEED) -> list[Example]:
    """`count` pairs of every kind in turn, of fresh seeds."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[Example]] = {kind: [] for kind in KINDS}
    each = -(-count // len(KINDS))
    while min(len(examples) for examples in found.values()) < each:
        example = random_example(rng)
        found[example.kind].append(example)
    return [found[kind][index] for index in range(each) for kind in KINDS][:count]


def evaluate(
    engine: KontextEngine,
    examples: Sequence[Example],
    *,
    steps: int,
    sizes: Sequence[tuple[int, int]] = ((128, 128),),
) -> list[Outcome]:
    """Run every edit with a seed of its own and compare; `sizes` (width, height) are taken in turn."""
    sized = [sizes[index % len(sizes)] for index in range(len(examples))]
    sources = [
        None if example.before is None else render(example.before, *size)
        for example, size in zip(examples, sized, strict=True)
    ]
    requests = [
        EditRequest(example.instruction, image=source, width=size[0], height=size[1], steps=steps, seed=index)
        for index, (example, source, size) in enumerate(zip(examples, sources, sized, strict=True))
    ]
    outcomes = []
    for example, source, size, result in zip(examples, sources, sized, engine.edit(requests), strict=True):
        target = render(example.after, *size)
        outcomes.append(
            Outcome(
                example=example,
                source=source,
                edited=result.image,
                target=target,
                psnr=psnr(result.image, target),
                ceiling=psnr(through_autoencoder(engine, target), target),
                unedited=None if source is None else psnr(source, target),
            )
        )
    return outcomes


@torch.no_grad()
def through_autoencoder(engine: KontextEngine, image: Image.Image) -> Image.Image:
    pixels = image_to_tensor(image)[None].to(engine.device)
    return tensor_to_image(engine.autoencoder.decode(engine.autoencoder.encode(pixels))[0])


def table(outcomes: Sequence[Outcome]) -> str:
    """Medians by kind of edit, as a Markdown table."""
    lines = [
        "| kind | pairs | edit to target | autoencoder alone | source to target | nearer than the source |",
        "|---|---|---|---|---|---|",
    ]
    for kind in (*KINDS, "all"):
        chosen = [outcome for outcome in outcomes if kind in ("all", outcome.example.kind)]
        if not chosen:
            continue
        unedited = [outcome.unedited for outcome in chosen if outcome.unedited is not None and kind != "same"]
        nearer = [outcome.nearer for outcome in chosen if outcome.nearer is not None]
        lines.append(
            f"| {kind} | {len(chosen)} | {_median([o.psnr for o in chosen])} | {_median([o.ceiling for o in chosen])} "
            f"| {_median(unedited)} | {f'{sum(nearer) / len(nearer):.0%}' if nearer else '–'} |"
        )
    return "\n".join(lines)


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} dB" if values else "–"


def sheet(outcomes: Sequence[Outcome], columns: int = 3) -> Image.Image:
    """Source, edit and target side by side, the instruction under them."""
    return compare([((o.source, o.edited, o.target), o.example.instruction) for o in outcomes], columns)


def compare(
    rows: Sequence[tuple[tuple[Image.Image | None, Image.Image | None, Image.Image | None], str]], columns: int = 3
) -> Image.Image:
    """Three pictures side by side for each row, with words under them."""
    width, height = 3 * CELL + 12, CELL + LABEL
    out = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    pen = ImageDraw.Draw(out)
    for index, (pictures, words) in enumerate(rows):
        left, top = index % columns * width, index // columns * height
        for place, picture in enumerate(pictures):
            if picture is not None:
                out.paste(ImageOps.pad(picture, (CELL, CELL), color="white"), (left + place * CELL, top))
        cut = words.rfind(" ", 0, 62) if len(words) > 62 else len(words)
        pen.text((left + 2, top + CELL + 1), f"{words[:cut]}\n{words[cut:].strip()[:62]}", fill="black", font_size=11)
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.training.evaluate", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=56)
    parser.add_argument("--steps", type=int, default=1, help="denoise steps")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="of the pairs")
    parser.add_argument("--sheet", type=Path, help="PNG of source, edit and target")
    given = parser.parse_args(arguments)
    engine = KontextEngine.load(given.model)
    outcomes = evaluate(engine, held_out(given.count, given.seed), steps=given.steps)
    print(table(outcomes))  # noqa: T201
    if given.sheet is not None:
        sheet(outcomes).save(given.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
