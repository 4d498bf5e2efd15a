"""How fast weights are loaded, beside a plain sequential read of the same files, and what the first edit costs.

A random transformer of about 1 GB is written in the diffusers layout, with text encoders and autoencoder of the shipped
model, into a temporary folder: on the disk that TMPDIR names. Reads and loads take turns, from the disk (the page cache
lets go of the files before) and from memory (it has them).

    read   every byte, in order, into one small buffer
    kept   every byte, in order, into memory that is fresh, as loading onto the CPU needs it
    load   engine.weights.load_transformer
    ratio  of load to kept; where weights go to a GPU, of load to read

Judged is the ratio from the disk, the median over the turns; only Linux can let go of files, and elsewhere nothing is
judged. A rate of `kept` far below that of `read` says that memory, not the disk, is what loading waits for.

    python -m benchmarks.load_weights [--quick] [--json FILE]
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from benchmarks import command
from engine.config import FlowConfig
from engine.pipeline import EditRequest, KontextEngine, choose_device
from engine.transformer import FlowTransformer
from engine.weights import find_model, load_transformer, safetensors_files, save_component
from kontext_batch.registry import shipped_folder

SIZE, QUICK_SIZE = 10**9, 2 * 10**8
TURNS = 7
HEADS = 24
GOALS = {"disk_ratio": 0.85, "first_edit_seconds": 5.0}
CHUNK = 1 << 24


def flow_of(size: int, dtype: torch.dtype, shipped: FlowConfig) -> FlowConfig:
    """A transformer of about `size` bytes that takes the shipped model's texts and latents."""
    hidden = HEADS * shipped.head_dim
    blocks = size // (
        (36 + 15) * hidden**2 * dtype.itemsize
    )  # 36 and 15 hidden sizes squared in the two kinds of block
    return dataclasses.replace(
        shipped, hidden_size=hidden, num_heads=HEADS, depth_double=max(1, blocks), depth_single=max(1, blocks)
    )


def write_model(folder: Path, size: int, dtype: torch.dtype) -> None:
    """A random model in the diffusers layout."""
    shutil.copytree(shipped_folder(), folder, ignore=shutil.ignore_patterns("transformer"))
    flow = flow_of(size, dtype, find_model(shipped_folder()).config.flow)
    torch.manual_seed(0)
    save_component(FlowTransformer(flow).to(dtype), folder / "transformer")


def read(files: Sequence[Path], *, keep: bool) -> None:
    """Every byte, in order, into one buffer that is used again, or into memory of its own."""
    kept = []
    for file in files:
        size = file.stat().st_size
        kept.append(torch.empty(size if keep else CHUNK, dtype=torch.uint8))
        into: memoryview = kept[-1].numpy().data
        with file.open("rb", buffering=0) as handle:
            done = 0
            while done < size:
                start = done if keep else 0
                done += handle.readinto(into[start : start + CHUNK])


def forget(files: Sequence[Path]) -> None:
    """Let the page cache go of the files."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rates(folder: Path, *, turns: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """GB a second of each way, from the disk and from memory, and the ratios."""
    model = find_model(folder)
    files = safetensors_files(model.transformer)
    size = sum(file.stat().st_size for file in files) / 1e9

    def load() -> None:
        load_transformer(model, device=device, dtype=dtype)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    ways: dict[str, Callable[[], None]] = {"read": lambda: read(files, keep=False)}
    if device.type == "cpu":
        ways["kept"] = lambda: read(files, keep=True)
    yardstick = list(ways)[-1]
    ways["load"] = load
    found = {"gb": size}
    for place in ("disk", "memory") if hasattr(os, "posix_fadvise") else ("memory",):
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(turns):
            for name, work in ways.items():
                if place == "disk":
                    forget(files)
                taken[name].append(seconds(work))
        found |= {f"{place}_{name}_gb_s": size / median(each) for name, each in taken.items()}
        pairs = zip(taken[yardstick], taken["load"], strict=True)
        found[f"{place}_ratio"] = median(plain / loaded for plain, loaded in pairs)
    return found


def edits(folder: Path) -> dict[str, float]:
    """Seconds that the first edit of a loaded model takes longer than the second."""
    found: dict[str, float] = {}
    engines: list[KontextEngine] = []
    found["engine_load_seconds"] = seconds(lambda: engines.append(KontextEngine.load(folder)))
    for name, colour in (("first", "red"), ("second", "blue")):
        side = 128
        photo = Image.new("RGB", (side, side), colour)
        request = EditRequest(f"make it {colour}", image=photo, width=side, height=side, steps=2)
        found[f"{name}_edit_total_seconds"] = seconds(lambda asked=request: engines[0].edit([asked]))  # type: ignore[misc]
    found["first_edit_seconds"] = found["first_edit_total_seconds"] - found["second_edit_total_seconds"]
    return found


def missed_goals(result: dict[str, float]) -> list[str]:
    """Names of the goals that the figures miss; what could not be measured is not judged."""
    missed = []
    if result.get("disk_ratio", GOALS["disk_ratio"]) < GOALS["disk_ratio"]:
        missed.append("disk_ratio")
    if result["first_edit_seconds"] >= GOALS["first_edit_seconds"]:
        missed.append("first_edit_seconds")
    return missed


def main() -> int:
    """Measure, print, compare with the goals; 1 when one is missed."""
    options = command.parser(__doc__, quick="200 MB instead of 1 GB").parse_args()
    device = choose_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_model(folder, QUICK_SIZE if options.quick else SIZE, dtype)
        result = rates(folder, turns=TURNS, device=device, dtype=dtype) | edits(folder)
    missed = missed_goals(result)
    shown = {"disk_ratio": f">= {GOALS['disk_ratio']:g}", "first_edit_seconds": f"< {GOALS['first_edit_seconds']:g}"}
    print(f"{'':26} {'measured':>10} {'goal':>10}")
    for figure, value in result.items():
        verdict = "MISSED" if figure in missed else ""
        print(f"{figure:26} {value:10.2f} {shown.get(figure, ''):>10} {verdict}".rstrip())
    if options.json is not None:
        data = {"result": result, "goals": GOALS, "missed": missed, "device": str(device)}
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
