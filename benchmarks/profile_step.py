"""Where a denoise step goes on this CPU, and what each of its optimisations is worth: taken out one at a time.

The middle model (71 M), one row of 640 tokens (128 text, 256 target, 256 context). Each way without one
optimisation runs turn about with the engine as it is; its figure is the median of the ratios. Goals: none of them may
cost more than it gains (2 % are allowed for noise). --compile tells besides what kernels of torch.compile would bring,
with one row and with four; no goal hangs on it.

    python -m benchmarks.profile_step [--quick] [--compile] [--json FILE]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import command
from benchmarks.packing import GRIDS, STEPS, conditioned, places, run
from benchmarks.random_model import MIDDLE, random_transformer
from engine import attention, linear
from engine.kernels import kernels_for
from engine.packed import Place, velocities
from engine.sampling import schedule
from engine.transformer import FlowTransformer

ROUNDS, QUICK_ROUNDS = 15, 4
ALLOWED = 0.98
GROUPS = {
    "linears": ("mkldnn::_linear_pointwise", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::mm", "aten::_softmax"),
    "norms and modulation": ("aten::native_layer_norm",),
    "norm and rotation of q and k": ("aten::linalg_vector_norm", "aten::mul_", "aten::rsqrt_", "aten::square_"),
    "gates": ("aten::addcmul_",),
    "copies": ("aten::cat", "aten::copy_"),
}
Arm = Callable[[], object]


def shares(work: Arm, rounds: int) -> dict[str, float]:
    """Milliseconds of a call by what it spends them on."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(rounds):
            work()
    spent = {event.key: event.self_cpu_time_total / 1000 / rounds for event in seen.key_averages()}
    found = {group: sum(spent.pop(name, 0.0) for name in names) for group, names in GROUPS.items()}
    return {**found, "all else": sum(spent.values())}


def gain(plain: Arm, without: Arm, rounds: int) -> float:
    """Seconds without an optimisation over seconds with it: the median, turn about."""
    plain()
    without()
    ratios = []
    for _ in range(rounds):
        one, other = command.timed(plain), command.timed(without)
        ratios.append(other / one)
    return statistics.median(ratios)


@contextmanager
def gelu_apart() -> Iterator[None]:
    """GELU after the linear, in a kernel of its own."""
    onednn = linear.onednn

    def plain(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool) -> Tensor:
        out = onednn(x, weight, bias, gelu=False)
        return torch.nn.functional.gelu(out, approximate="tanh") if gelu else out

    with patch.object(linear, "onednn", plain):
        yield


def patched(work: Arm, *patches: Any) -> Arm:
    def within() -> object:
        for each in patches:
            each.__enter__()
        try:
            return work()
        finally:
            for each in reversed(patches):
                each.__exit__(None, None, None)

    return within


def conditioned_each_step(flow: FlowTransformer, rows: Sequence[Place]) -> Arm:
    """Modulations, text and context computed for this step alone, at each step."""

    def step() -> object:
        for _ in rows:
            conditioned(flow, GRIDS[0], schedule(STEPS, 256)[:2], seed=0)
        return run(flow, rows)

    return step


def ablations(flow: FlowTransformer) -> dict[str, Callable[[int], float]]:
    """What is taken out -> seconds without it over seconds with it, from so many rounds."""
    one = places(flow, 1)

    def alone() -> object:
        return run(flow, one)

    found: dict[str, Callable[[int], float]] = {
        "oneDNN for the linears (torch's own choice instead)": lambda rounds: gain(
            alone, patched(alone, patch.object(linear, "_has_onednn", lambda x: False)), rounds
        ),
        "GELU inside the linear": lambda rounds: gain(alone, lambda: _within(gelu_apart, alone), rounds),
        "modulation, text and context once, not each step": lambda rounds: gain(
            alone, conditioned_each_step(flow, one), rounds
        ),
    }
    if flow.img_in.weight.dtype == torch.bfloat16:
        found["attention in blocks (torch's flash instead)"] = lambda rounds: gain(
            alone, patched(alone, patch.object(attention, "choose_kernel", lambda device, dtype: "flash")), rounds
        )
    return found


def compiling(flow: FlowTransformer, rounds: int) -> dict[str, float]:
    """Seconds of a step over seconds with compiled kernels, with so many rows."""
    kernels = kernels_for(flow.img_in.weight.device, compiled=True)

    def ratio(rows: Sequence[Place]) -> float:
        return gain(lambda: velocities(flow, rows, kernels=kernels), lambda: run(flow, rows), rounds)

    return {f"{count} rows": ratio(places(flow, count)) for count in (1, 4)}


def _within(context: Callable[[], Any], work: Arm) -> object:
    with context():
        return work()


def main() -> int:
    parser = command.parser(__doc__, quick="four rounds instead of fifteen")
    parser.add_argument("--compile", action="store_true", help="also with the kernels of torch.compile")
    options = parser.parse_args()
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    console, found, missed = Console(width=110), {}, []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        flow = random_transformer(MIDDLE.flow).to(dtype)
        row = places(flow, 1)
        run(flow, row)
        spent = shares(lambda row=row, flow=flow: run(flow, row), rounds)  # type: ignore[misc]
        total = sum(spent.values())
        table = Table(title=f"a step of one row in {name}: {total:.0f} ms; {torch.get_num_threads()} threads")
        for column in ("on", "ms", "share"):
            table.add_column(column, justify="left" if column == "on" else "right")
        for group, milliseconds in spent.items():
            table.add_row(group, f"{milliseconds:.1f}", f"{milliseconds / total:.1%}")
        console.print(table)
        gains = {what: measure(rounds) for what, measure in ablations(flow).items()}
        table = Table(title=f"{name}: time without it, over time with it")
        table.add_column("optimisation")
        table.add_column("ratio", justify="right")
        for what, ratio in gains.items():
            table.add_row(what, f"{ratio:.3f}")
        console.print(table)
        found[name] = {"milliseconds": spent, "gains": gains}
        if options.compile:
            found[name]["compiled"] = compiling(flow, rounds)
            print(f"{name}: time over time with compiled kernels: {found[name]['compiled']}")
        missed += [f"{name}: {what} ({ratio:.3f})" for what, ratio in gains.items() if ratio < ALLOWED]
    print("costs more than it gains: " + "; ".join(missed) if missed else "all goals met")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
