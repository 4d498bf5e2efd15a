"""How good the shipped model's edits are, against true targets of fresh seeds. Goals: see `GOALS`.

Every kind of edit at the sizes of the model's list, half of them square; wordings that training never shows are
reported apart and not judged. PSNR in dB, medians:

- edit: to the true target; AE: the target through the autoencoder alone, which no edit can pass by much;
- kept: over the pixels that the true edit leaves alone; far: over those of them that are more than 4 pixels away from
  whatever it changes, so that the two together tell wobbling outlines from a picture that is redrawn;
- nearer: share of the edits that are nearer to the target than the input is;
- colour: share of the edits of a colour or background whose changed region has a mean colour within dE2000 of 8.

    python -m benchmarks.edit_quality [MODEL] [--steps N] [--quick] [--json FILE] [--sheet FILE]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from skimage.color import deltaE_ciede2000, rgb2lab

from benchmarks import command
from engine.geometry import sizes
from engine.likeness import EQUAL, decibels
from engine.pipeline import KontextEngine
from engine.training.evaluate import HELD_OUT_SEED, Outcome, evaluate, held_out, sheet
from engine.training.instructions import KINDS, Example, unseen_example

GOALS = {
    "autoencoder_db": 33.0,
    "edit_db": 27.0,
    "nearer_share": 0.95,
    "same_db": 30.0,
    "kept_db": 29.0,
    "colour_share": 0.9,
}
COLOUR_TOLERANCE = 8.0
"""dE2000 between the mean colours of the changed region."""
COLOURED = ("colour", "background", "cut-out")
"""Kinds whose changed region has one colour to speak of."""
FAR = 4
"""Pixels."""
LEAST_REGION = 0.02
"""Share of the picture below which a region says nothing."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One outcome with the figures of its regions; None where it has no such region."""

    outcome: Outcome
    kept_db: float | None
    far_db: float | None
    colour_error: float | None

    @classmethod
    def of(cls, outcome: Outcome) -> Measured:
        if outcome.source is None:
            return cls(outcome, None, None, None)
        source, target, edited = (
            np.asarray(picture, np.float64) for picture in (outcome.source, outcome.target, outcome.edited)
        )
        changed = np.abs(source - target).max(axis=-1) > 2
        near = np.asarray(Image.fromarray(changed).convert("L").filter(ImageFilter.MaxFilter(2 * FAR + 1))) > 0
        kept, far = (
            decibels((edited - target)[~region]) if (~region).mean() >= LEAST_REGION else None
            for region in (changed, near)
        )
        colour = None
        if outcome.example.kind in COLOURED and changed.mean() >= LEAST_REGION:
            colour = float(deltaE_ciede2000(_mean_lab(edited[changed]), _mean_lab(target[changed])))
        return cls(outcome, kept, far, colour)


def _mean_lab(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean CIE Lab of (count, 3) sRGB bytes."""
    lab: NDArray[np.float64] = rgb2lab(pixels[None] / 255)[0].mean(axis=0)
    return lab


def figures(measured: Sequence[Measured]) -> dict[str, float | None]:
    """Medians and shares over some outcomes; None where none of them says anything."""
    nearer = [each.outcome.nearer for each in measured if each.outcome.nearer is not None]
    colour = [each.colour_error <= COLOUR_TOLERANCE for each in measured if each.colour_error is not None]
    unedited = [
        o.unedited for o in (each.outcome for each in measured) if o.unedited is not None and o.unedited < EQUAL
    ]
    return {
        "edit_db": statistics.median(each.outcome.psnr for each in measured),
        "autoencoder_db": statistics.median(each.outcome.ceiling for each in measured),
        "source_db": _median(unedited),
        "kept_db": _median([each.kept_db for each in measured]),
        "far_db": _median([each.far_db for each in measured]),
        "nearer_share": sum(nearer) / len(nearer) if nearer else None,
        "colour_share": sum(colour) / len(colour) if colour else None,
    }


def _median(values: Sequence[float | None]) -> float | None:
    """Of those that say something."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def unseen(count: int, seed: int = HELD_OUT_SEED) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [unseen_example(rng) for _ in range(count)]


def table(groups: dict[str, Sequence[Measured]]) -> str:
    lines = [f"{'':16}{'pairs':>6}{'edit':>8}{'AE':>8}{'source':>8}{'kept':>8}{'far':>8}{'nearer':>8}{'colour':>8}"]
    for name, measured in groups.items():
        found = figures(measured)
        cells = [_cell(found[key]) for key in ("edit_db", "autoencoder_db", "source_db", "kept_db", "far_db")]
        cells += [_cell(found[key], percent=True) for key in ("nearer_share", "colour_share")]
        lines.append(f"{name:16}{len(measured):6}" + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)


def _cell(value: float | None, *, percent: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:.0%}" if percent else f"{value:.1f}"


def main() -> int:
    """Measure, print, compare with the goals; 1 when one is missed."""
    parser = command.parser(__doc__, quick="48 pairs instead of 304", model=True)
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="PNG of source, edit and target of 48 pairs")
    options = parser.parse_args()
    count, other = (48, 16) if options.quick else (304, 96)
    steps: int = options.steps
    model = KontextEngine.load(options.model)
    area = sorted(sizes(model.config.native_area), key=lambda size: size[0] != size[1])
    # Square and another in turn, and one more square: an odd count, so that every kind meets every size.
    turns = [*(size for other_size in area[1:] for size in (area[0], other_size)), area[0]]
    seen = [Measured.of(each) for each in evaluate(model, held_out(count), steps=steps, sizes=turns)]
    new = [Measured.of(each) for each in evaluate(model, unseen(other), steps=steps, sizes=turns)]
    groups: dict[str, Sequence[Measured]] = {
        kind: [each for each in seen if each.outcome.example.kind == kind] for kind in KINDS
    }
    groups |= {
        "all": seen,
        "  square": [each for each in seen if each.outcome.target.width == each.outcome.target.height],
        "  other sizes": [each for each in seen if each.outcome.target.width != each.outcome.target.height],
        "unseen wordings": new,
    }
    print(table(groups))
    edits = [each for each in seen if each.outcome.example.kind not in ("same", "text-to-image")]
    found = figures(edits)
    result = {name: found[name] for name in GOALS if name != "same_db"}
    result["autoencoder_db"] = figures(seen)["autoencoder_db"]
    result["same_db"] = figures(groups["same"])["edit_db"]
    missed = [name for name, goal in GOALS.items() if (result[name] or 0.0) < goal]
    print(f"\n{'':16}{'measured':>10}{'goal':>8}")
    for name, goal in GOALS.items():
        print(f"{name:16}{result[name] or 0.0:10.2f}{goal:8g} {'MISSED' if name in missed else ''}".rstrip())
    if options.json is not None:
        data = {"result": result, "goals": GOALS, "missed": missed, "steps": steps}
        data["groups"] = {name.strip(): figures(measured) for name, measured in groups.items()}
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    if options.sheet is not None:
        sheet([each.outcome for each in seen[:48]]).save(options.sheet)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
