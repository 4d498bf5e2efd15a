"""A training loop that can be killed at any moment and goes on as if nothing had happened.

Everything random in step n comes from a generator made of (seed, n), so a resumed run draws what the first would have
drawn; parameters, their average and the optimiser's moments are in the checkpoint. Only safetensors and JSON.
"""

from __future__ import annotations

import csv
import errno
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import numpy as np
import pydantic.dataclasses
import torch
from pydantic import ConfigDict, Field, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import ConfigError, TrainingError
from engine.training.attention import cpu_attention
from engine.training.muon import Muon

Loss = tuple[Tensor, Mapping[str, float]]

MUON_STATE = "momentum_buffer"
"""What Muon keeps of each matrix."""


NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LoopConfig:
    """What every training has."""

    steps: Count
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """Peak of the learning rate: reached after `warmup` steps, then a cosine down to 0."""
    warmup: Count = 100
    weight_decay: NotNegative = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged parameters, which are what is evaluated and shipped."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    save_every: PositiveInt = 100
    """Steps between checkpoints."""
    log_every: PositiveInt = 25
    bf16: bool = False
    """Compute in bfloat16 where it is safe (autocast, and Muon); parameters stay fp32."""
    accumulate: PositiveInt = 1
    """Batches of a step: their gradients are averaged, at the memory of one."""
    muon: bool = False
    """Muon instead of AdamW for the weights of hidden layers."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The generators of one batch. They are the CPU's whatever the device, so that a seed means the same everywhere."""

    step: int
    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int, part: int = 0) -> Moment:
        generator = np.random.default_rng((seed, step, part))
        return cls(step, generator, torch.Generator().manual_seed(int(generator.integers(2**63))))


class Loop:
    """AdamW, or Muon beside it, with warm-up, cosine, clipping and an average of the parameters.

    `hidden` tells by name which weights are of hidden layers; kernels of convolutions count as matrices of one row for
    each output channel.
    """

    def __init__(
        self,
        module: nn.Module,
        config: LoopConfig,
        folder: Path,
        hidden: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.module, self.config, self.folder = module, config, folder
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.matrices = {
            name: nn.Parameter(p.detach().view(p.shape[0], -1))
            for name, p in self.parameters.items()
            if config.muon and p.ndim > 1 and hidden(name)
        }
        """Views of the weights that Muon steps."""
        others = [p for name, p in self.parameters.items() if name not in self.matrices]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [
                    {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
                    {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
                ],
                lr=config.lr,
                betas=(0.9, 0.99),
            )
        ]
        if self.matrices:
            dtype = torch.bfloat16 if config.bf16 else torch.float32
            self.optimisers.append(Muon(self.matrices.values(), config.lr, config.weight_decay, dtype))
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def resume(self) -> bool:
        """Go on from the folder's checkpoint, when there is one. Raises `ConfigError` when it is another training's."""
        if self.checkpoint.is_file():
            self._read_checkpoint()
        self._forget_metrics_after(self.step)
        return self.step > 0

    def _read_checkpoint(self) -> None:
        try:
            self._take_checkpoint()
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{self.checkpoint} cannot be read ({error}); remove it to begin anew, or give this training another "
                "folder"
            ) from error

    def _take_checkpoint(self) -> None:
        with safe_open(self.checkpoint, framework="pt") as file:
            names = {kind: set[str]() for kind in ("model", "ema", MUON_STATE)}
            for key in file.keys():  # noqa: SIM118, a safetensors file is no mapping
                kind, _, name = key.partition(".")
                names.setdefault(kind, set()).add(name)
            self.step = int(file.metadata()["step"])
            shapes = {name: file.get_slice(f"model.{name}").get_shape() for name in names["model"]}
            if shapes != {name: list(p.shape) for name, p in self.parameters.items()} or (
                self.step and names[MUON_STATE] != set(self.matrices)
            ):
                raise ConfigError(
                    f"{self.checkpoint} is of a training with other parameters, or with the other `muon`; "
                    "give this one another folder"
                )
            for name, parameter in self.parameters.items():
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"model.{name}"))
                    self.average[name].copy_(file.get_tensor(f"ema.{name}"))
            for kind in set(names) - {"model", "ema"}:
                for name in names[kind]:
                    optimiser, parameter = self._stepped(name)
                    value = file.get_tensor(f"{kind}.{name}").clone()
                    # AdamW keeps its count of steps on the CPU.
                    optimiser.state[parameter][kind] = value if value.ndim == 0 else value.to(parameter.device)

    def _forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that a killed run logged and this one makes again, and what it left half written.

        A file that is no metrics of ours is put aside as `metrics.damaged.csv`.
        """
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return
        try:
            first, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if int(line.partition(",")[0]) <= step]
            columns = first.count(",")
            sound = first.startswith("step,seconds_per_step,") and all(line.count(",") == columns for line in whole)
        except ValueError:
            sound = False
        if not sound:
            path.replace(path.with_name("metrics.damaged.csv"))
            return
        if not kept:
            path.unlink()
            return
        part = path.with_suffix(".part")
        part.write_text(first + "".join(kept))
        os.replace(part, path)

    def _stepped(self, name: str) -> tuple[torch.optim.Optimizer, nn.Parameter]:
        """The optimiser of a parameter, and the parameter as that optimiser knows it."""
        if name in self.matrices:
            return self.optimisers[1], self.matrices[name]
        return self.optimisers[0], self.parameters[name]

    def save(self) -> None:
        """Replace the checkpoint in one move: a kill leaves the old one or the new one."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = parameter.detach().contiguous()
            tensors[f"ema.{name}"] = self.average[name].contiguous()
            optimiser, stepped = self._stepped(name)
            for key, value in optimiser.state[stepped].items():
                tensors[f"{key}.{name}"] = value.contiguous()
        part = self.checkpoint.with_suffix(".part")
        try:
            save_file(tensors, part, metadata={"step": str(self.step)})
        except SafetensorError as error:
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, f"no space is left for {self.checkpoint}") from error
            raise
        os.replace(part, self.checkpoint)

    def learning_rate(self, step: int) -> float:
        """At a step, 0-based."""
        config = self.config
        if step < config.warmup:
            return config.lr * (step + 1) / config.warmup
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def run(
        self,
        loss_of: Callable[[Moment], Loss],
        *,
        say: Callable[[str], None],
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        """Train to the configured number of steps. `loss_of` computes one batch's loss and figures to log.

        SIGINT and SIGTERM save a checkpoint after the step that is being made, then raise `KeyboardInterrupt`. Raises
        `TrainingError` when a gradient is not finite.
        """
        with stopped_by_signals() as stopping:
            self._run(loss_of, say, on_step, stopping)

    def _run(
        self,
        loss_of: Callable[[Moment], Loss],
        say: Callable[[str], None],
        on_step: Callable[[int], None] | None,
        stopping: threading.Event,
    ) -> None:
        config = self.config
        self.module.train()
        first, spent = self.step, 0.0
        shown: dict[str, list[float]] = {}
        while self.step < config.steps:
            started = time.perf_counter()
            for optimiser in self.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = self.learning_rate(self.step)
            for parameter in self.parameters.values():
                parameter.grad = None
            for part in range(config.accumulate):
                with self._computing():
                    loss, figures = loss_of(Moment.of(config.seed, self.step, part))
                (loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
                for name, value in {"loss": loss.item(), **figures}.items():
                    shown.setdefault(name, []).append(value)
            norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), config.clip)
            if not torch.isfinite(norm):
                raise TrainingError(f"the gradient of step {self.step} is not finite; lower the learning rate")
            for name, matrix in self.matrices.items():
                grad = self.parameters[name].grad
                assert grad is not None
                matrix.grad = grad.reshape(matrix.shape)
            for optimiser in self.optimisers:
                optimiser.step()
            self.step += 1
            decay = min(config.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    self.average[name].lerp_(parameter, 1 - decay)
            spent += time.perf_counter() - started
            if self.step % config.log_every == 0 or self.step == config.steps:
                self._log(shown, spent / (self.step - first), say)
                shown.clear()
            stops = stopping.is_set()
            if self.step % config.save_every == 0 or self.step == config.steps or stops:
                self.save()
            if stops and self.step < config.steps:
                say(f"stopped after step {self.step}; the same command goes on from there")
                raise KeyboardInterrupt
            if on_step is not None:
                on_step(self.step)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Precision and attention of the forward pass."""
        device = next(iter(self.parameters.values())).device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.bf16):
            if device != "cpu":
                yield
                return
            with cpu_attention():
                yield

    def use_average(self) -> None:
        """Put the averaged parameters into the module."""
        self._put(self.average)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module as it would be shipped now: averaged parameters, evaluation mode."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.use_average()
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()
            self._put(kept)

    def _log(self, shown: Mapping[str, list[float]], each: float, say: Callable[[str], None]) -> None:
        """`each`: seconds of a step."""
        figures = {name: sum(values) / len(values) for name, values in shown.items()}
        left = each * (self.config.steps - self.step)
        text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        say(f"step {self.step}/{self.config.steps}  {text}  {each:.2f} s/step  {left / 60:.0f} min left")
        path = self.folder / "metrics.csv"
        new = not path.is_file()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "seconds_per_step", *figures])
            writer.writerow([self.step, round(each, 4), *(round(value, 6) for value in figures.values())])


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """SIGINT or SIGTERM sets the event; a second one raises `KeyboardInterrupt` at once."""
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
