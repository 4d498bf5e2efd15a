"""What the command lines of all benchmarks share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from kontext_batch.registry import shipped_folder

STEPS = 1
"""Denoise steps of the shipped model, as in recipes/demo."""


def parser(description: str | None, *, quick: str, model: bool = False) -> argparse.ArgumentParser:
    """`--quick` and `--json FILE`; with `model` also the folder of the model that is measured, and denoise steps."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model:
        found.add_argument(
            "model", type=Path, nargs="?", default=shipped_folder(), help="model folder; left out, the shipped one"
        )
        found.add_argument(
            "--steps", type=int, default=STEPS, metavar="N", help="denoise steps; %(default)s, as the demo"
        )
    found.add_argument("--quick", action="store_true", help=quick)
    found.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    return found


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
