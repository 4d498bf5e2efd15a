"""The engine beside diffusers on a CPU: the same random model of a middle size (71 M), the same requests, one run.

Steps are timed alone and in fours, turn about; the mixed job (4 canvases of different aspect, 8 prompts, 10, 14 and 25
steps) is one call of ours and, as diffusers' users must run it, one call of theirs for each request. Peak memory is
that of a process of its own that runs a part of the job. Goals, as ratios of seconds: fp32 at least 1.10 for a step
alone and 1.25 over the mixed job; bfloat16 at least 1.10 for a step alone, and twice as quick as our own fp32; memory
not above theirs. bfloat16 is judged only on a CPU that multiplies it (AVX512-BF16 or AMX), and beside our own fp32 only
where the bare matrix products of the model are at least 2.5 times as quick in it: what is around them gains less.

    python -m benchmarks.engine_cpu [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.peer import load_peer, run_peer
from benchmarks.random_model import MIDDLE, TEXT_LENGTH, random_folder
from engine.linear import linear
from engine.pipeline import EditRequest, KontextEngine

SIZES = ((256, 256), (320, 192), (192, 320), (288, 224))
STEPS = (10, 14, 25)
JOB, QUICK_JOB, MEMORY_JOB = 32, 8, 2
ROUNDS, STEPS_TIMED = 10, 2
SHARE = 8
"""`--quick` takes this part of the mixed job's denoise steps."""
GOALS = {
    "fp32 step alone": 1.10,
    "fp32 mixed job": 1.25,
    "bf16 step alone": 1.10,
    "bf16 beside our own fp32": 2.0,
    "peak memory": 1.0,
}
PRODUCTS_NEEDED = 2.5
TOKENS = 640
"""Of a row: text, target and context."""
Timings = dict[str, list[float]]


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)


def requests(count: int) -> list[EditRequest]:
    """The mixed job, or its beginning: every canvas with every prompt."""
    canvases = [picture(size, seed) for seed, size in enumerate(SIZES)]
    found = []
    for number in range(count):
        canvas = canvases[(number + number // 8) % 4]
        found.append(
            EditRequest(
                f"make the product number {number % max(1, count // 4)} and put it on a table",
                image=canvas,
                width=canvas.width,
                height=canvas.height,
                steps=STEPS[number % 3],
                seed=number,
            )
        )
    return found


def our_steps(engine: KontextEngine, rows: int, count: int) -> list[float]:
    """Seconds of each of so many denoise steps, by row."""
    (request,) = requests(1)
    found = []
    with engine.session() as session:
        for row in range(rows):
            session.admit(replace(request, seed=row, steps=count + 1), row)
        for _ in range(count):
            started = time.perf_counter()
            session.step()
            found.append((time.perf_counter() - started) / rows)
    return found


def peer_steps(pipeline: Any, rows: int, count: int) -> list[float]:
    """The same of diffusers, between the ends of its steps."""
    (request,) = requests(1)
    ends: list[float] = []
    run_peer(
        pipeline,
        replace(request, steps=count + 1),
        text_length=TEXT_LENGTH,
        rows=rows,
        on_step=lambda: ends.append(time.perf_counter()),
    )
    return [(after - before) / rows for before, after in pairwise(ends)]


def measure_steps(folder: Path, rounds: int, steps: int, rows: Mapping[str, int]) -> Timings:
    """Both at both precisions, with so many rows at once, turn about."""
    arms: dict[str, Callable[[], list[float]]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        engine = KontextEngine.load(folder, device="cpu", dtype=dtype, text_length=TEXT_LENGTH)
        pipeline = load_peer(folder, dtype)
        for label, count in rows.items():
            arms[f"ours {name} {label}"] = partial(our_steps, engine, count, steps)
            arms[f"diffusers {name} {label}"] = partial(peer_steps, pipeline, count, steps)
    found: Timings = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            found[name] += arm()
    return found


def measure_job(folder: Path, job: Sequence[EditRequest]) -> tuple[float, float]:
    """Seconds of the mixed job, ours and theirs; halves turn about."""
    engine = KontextEngine.load(folder, device="cpu", dtype=torch.float32, text_length=TEXT_LENGTH)
    pipeline = load_peer(folder, torch.float32)

    def theirs(part: Sequence[EditRequest]) -> None:
        for request in part:
            run_peer(pipeline, request, text_length=TEXT_LENGTH)

    first, second = job[: len(job) // 2], job[len(job) // 2 :]
    ours = command.timed(lambda: engine.edit(first))
    peer = command.timed(lambda: theirs(first)) + command.timed(lambda: theirs(second))
    return ours + command.timed(lambda: engine.edit(second)), peer


def peak_memory(folder: Path, whose: str, dtype: torch.dtype) -> int:
    """Bytes of this process at most, which has loaded the model and made some of the job."""
    job = [replace(request, steps=2) for request in requests(MEMORY_JOB)]
    if whose == "ours":
        KontextEngine.load(folder, device="cpu", dtype=dtype, text_length=TEXT_LENGTH).edit(job)
    else:
        pipeline = load_peer(folder, dtype)
        for request in job:
            run_peer(pipeline, request, text_length=TEXT_LENGTH)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(folder: Path) -> dict[str, int]:
    """Of both, each in a process of its own; nothing is timed, so that they run at once."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as one, ProcessPoolExecutor(1, mp_context=spawn) as other:
        pools = {"ours": one, "diffusers": other}
        running = {whose: pool.submit(peak_memory, folder, whose, torch.float32) for whose, pool in pools.items()}
        return {whose: future.result() for whose, future in running.items()}


@torch.no_grad()
def products_ratio() -> float:
    """How much quicker the bare matrix products of a single block are in bfloat16 than in fp32."""
    size = MIDDLE.flow.hidden_size
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        factors = [
            tuple(torch.randn(shape).to(dtype) for shape in ((TOKENS, inner), (outer, inner), (outer,)))
            for inner, outer in ((size, 3 * size), (size, 4 * size), (5 * size, size))
        ]
        work = partial(_multiply, factors)
        work()
        seconds[dtype] = min(command.timed(work) for _ in range(20))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _multiply(factors: Sequence[tuple[torch.Tensor, ...]]) -> None:
    for x, weight, bias in factors:
        linear(x, weight, bias)


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def main() -> int:
    options = command.parser(__doc__, quick="one step of each, eight requests with an eighth of the steps").parse_args()
    console = Console(width=110)
    with random_folder() as folder:
        memory = measure_memory(folder)
        rows = {"alone": 1} if options.quick else {"alone": 1, "in fours": 4}
        steps = measure_steps(folder, *((1, 2) if options.quick else (ROUNDS, STEPS_TIMED)), rows)
        if options.quick:
            asked = [replace(each, steps=each.steps // SHARE) for each in requests(QUICK_JOB)]
        else:
            asked = requests(JOB)
        job = measure_job(folder, asked)
    seconds = {name: statistics.median(found) for name, found in steps.items()}
    table = Table(title=f"seconds, medians; {torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in ("what", "ours", "diffusers", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    ratios: dict[str, float] = {}
    for name in ("fp32", "bf16"):
        for label in rows:
            ours, theirs = seconds[f"ours {name} {label}"], seconds[f"diffusers {name} {label}"]
            ratios[f"{name} step {label}"] = theirs / ours
            table.add_row(f"{name} step {label}, by image", f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}")
    ratios["fp32 mixed job"] = job[1] / job[0]
    table.add_row("fp32 mixed job", f"{job[0]:.1f}", f"{job[1]:.1f}", f"{job[1] / job[0]:.2f}")
    ratios["bf16 beside our own fp32"] = seconds["ours fp32 alone"] / seconds["ours bf16 alone"]
    table.add_row(
        "fp32 and bf16, ours, a step alone",
        f"{seconds['ours bf16 alone']:.3f}",
        f"{seconds['ours fp32 alone']:.3f}",
        f"{ratios['bf16 beside our own fp32']:.2f}",
    )
    ratios["peak memory"] = memory["diffusers"] / memory["ours"]
    megabytes = [f"{memory[whose] / 2**20:.0f} MiB" for whose in ("ours", "diffusers")]
    table.add_row("peak memory, fp32", *megabytes, f"{ratios['peak memory']:.2f}")
    console.print(table)
    goals = dict(GOALS)
    products = ratios["bare products"] = products_ratio()
    print(f"bare matrix products of a block: {products:.2f} times as quick in bfloat16")
    if not multiplies_bfloat16():
        print("not judged: bfloat16, which this CPU does not multiply")
        goals = {name: goal for name, goal in goals.items() if not name.startswith("bf16")}
    elif products < PRODUCTS_NEEDED:
        print("not judged: bfloat16 beside our own fp32, which this CPU's products do not allow")
        del goals["bf16 beside our own fp32"]
    missed = [
        f"{name}: {ratios[name]:.2f} instead of {goal:.2f}" for name, goal in goals.items() if ratios[name] < goal
    ]
    print("goals missed: " + "; ".join(missed) if missed else "all goals met")
    if options.json:
        numbers = {
            "products": products,
            "seconds": seconds,
            "job": job,
            "memory": memory,
            "ratios": ratios,
            "goals": goals,
        }
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
