"""How long and how large a plan of 100,000 steps is. Goals: under 10 s of CPU time, under 500 MB at the peak.

The recipe is a chain of four steps (edit, edit, edit with `if`, finish with an overlay) over rows x scenes x locales x
channels. CPU time of the process is what is judged, since other work may run on the machine; wall time is shown too.
Peak memory is that of the process, imports included.

    python -m benchmarks.planner [--quick] [--json FILE]
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from benchmarks import command
from kontext_batch.planning import uris
from kontext_batch.planning.inputs import join, read_rows, wanted_files
from kontext_batch.planning.listing import ModelInfo
from kontext_batch.planning.plan import ImageInfo
from kontext_batch.planning.planner import plan_recipe
from kontext_batch.planning.render import plan_as_data, plan_from_data
from kontext_batch.recipes.loader import load_recipe

T = TypeVar("T")

STEPS = 100_000
GOALS = {"plan_seconds": 10.0, "peak_mb": 500.0}
BASE = "s3://bench/recipes/"

RECIPE = """
version: 1
name: bench
import: [brand.yaml]
inputs:
  item: {table: items.csv, key: sku, files: {photo: "s3://raw/${item.sku}_front.*"}, columns: {price: decimal}}
texts:
  name: {table: item, column: "name_${locale}"}
vars: {keep: "Keep the shape and the label of ${item.name_en} as they are."}
matrix:
  scene: {terrace: {place: a terrace}, studio: {place: a studio}, street: {place: a street}, beach: {place: a beach}}
  locale: [en, de, ja]
  channel: [square, hero]
  exclude: [{item.kind: bag, scene: street}]
defaults: {edit: {model: kontext-dev}}
steps:
  clean: {op: edit, image: "${item.photo}", prompt: "Remove the background. ${vars.keep}"}
  staged: {op: edit, image: "${clean}", frame: "${channel.size}", prompt: "Put it on ${scene.place}. ${vars.keep}"}
  titled: {op: edit, image: "${staged}", if: {locale: {not: en}}, prompt: "Write '${text.name}'."}
  finish: {op: finish, image: "${titled | staged}", channel: "${channel}", overlay: [{logo: "${brand.logos.mono}"}]}
outputs:
  - {from: "${finish}", to: "s3://out/${item.sku}/${scene}_${locale}_${channel}.${ext}"}
"""
BRAND = b"""
kind: brand
logos: {mono: s3://brand/mono.png}
channels:
  square: {size: 2000x2000, format: jpeg}
  hero: {size: 1920x1080, fit: crop, format: webp}
"""


def image(uri: str) -> ImageInfo:
    """A source picture that nobody has to draw."""
    digest = hashlib.sha256(uri.encode()).hexdigest()
    return ImageInfo(uri, digest[:8], digest, 1_000_000, 3000, 2000, "JPEG")


def table(rows: int) -> bytes:
    """A catalogue."""
    lines = ["sku,kind,price,name_en,name_de,name_ja"]
    kinds = ("shoe", "bag", "hat")
    lines += [f"A-{i:05},{kinds[i % 3]},{i / 100:.2f},Runner {i},Läufer {i},ランナー {i}" for i in range(rows)]
    return "\n".join(lines).encode()


def rss_mb() -> float:
    """Peak memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Clock:
    """CPU and wall seconds of each part."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        self.cpu[name], self.wall[name] = time.process_time() - cpu, time.perf_counter() - wall
        return result


def measure(steps: int) -> dict[str, float]:
    """Plan at least `steps` steps from loading on; seconds of each part and the peak memory."""
    clock = Clock()
    rows = -(-steps // 45)  # a row makes 1 clean, 8 staged, 16 titled and 24 finished (bags a fourth less)
    recipe = clock("load", lambda: load_recipe(RECIPE, file="bench.yaml", read_import=lambda _name: BRAND))
    listed_rows = clock("rows", lambda: read_rows(recipe, {"item": table(rows)}))
    wanted = clock("wanted", lambda: wanted_files(recipe, listed_rows, BASE))
    names = [f"s3://raw/A-{i:05}_front.jpg" for i in range(rows)] + ["s3://brand/mono.png"]
    assigned = clock("assign", lambda: uris.assign([each.uri for each in wanted], names))
    found = {pattern: [image(uri) for uri in each] for pattern, each in assigned.items()}
    listed = clock("join", lambda: join(recipe, listed_rows, wanted, found))
    models = {"kontext-dev": ModelInfo("kontext-dev", "a" * 64, 1024 * 1024, 512)}
    plan = clock("plan", lambda: plan_recipe(recipe, listed, models, base=BASE, default_seconds=5.0))
    result = {
        "steps": float(len(plan.steps)),
        "deliveries": float(len(plan.deliveries)),
        **{f"{name}_cpu_seconds": seconds for name, seconds in clock.cpu.items()},
        "plan_wall_seconds": clock.wall["plan"],
        "plan_seconds": sum(clock.cpu.values()),
        "peak_mb": rss_mb(),
    }
    data = clock("json", lambda: json.dumps(plan_as_data(plan)))
    clock("read", lambda: plan_from_data(json.loads(data), file="plan.json"))
    result |= {"json_mb": len(data) / 1e6, "json_cpu_seconds": clock.cpu["json"], "read_cpu_seconds": clock.cpu["read"]}
    return result


def main() -> int:
    """Measure, print, compare with the goals; 1 when one is missed."""
    parser = command.parser(__doc__, quick="20,000 steps, goals in proportion")
    options = parser.parse_args()
    steps = STEPS // 5 if options.quick else STEPS
    result = measure(steps)
    # Memory does not go down with the number of steps as time does: the interpreter is in it.
    goals = {"plan_seconds": GOALS["plan_seconds"] * steps / STEPS, "peak_mb": GOALS["peak_mb"]}
    missed = [name for name, goal in goals.items() if result[name] > goal]
    print(f"{'':24} {'measured':>12} {'goal':>10}")
    for name, value in result.items():
        goal = f"< {goals[name]:g}" if name in goals else ""
        print(f"{name:24} {value:12,.2f} {goal:>10} {'MISSED' if name in missed else ''}".rstrip())
    if options.json is not None:
        options.json.write_text(json.dumps({"result": result, "goals": goals, "missed": missed}, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
