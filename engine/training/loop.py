"""A training loop that can be killed at any moment and goes on as if nothing had happened.

Everything random in step n comes from a generator made of (seed, n), so a resumed run draws what the first would have
drawn; parameters, their average and the optimiser's moments are in the checkpoint. Only safetensors and JSON.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.errors import ConfigError
from engine.training.muon import Muon

Loss = tuple[Tensor, Mapping[str, float]]

CPU_ATTENTION = SDPBackend.MATH
"""Its backward pass takes a third of the fused kernel's time at a few hundred tokens."""

MUON_STATE = "momentum_buffer"
"""What Muon keeps of each matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """What every training has."""

    steps: int
    lr: float = 1e-3
    """Peak of the learning rate: reached after `warmup` steps, then a cosine down to 0."""
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.999
    """Decay of the averaged parameters, which are what is evaluated and shipped."""
    seed: int = 0
    save_every: int = 100
    """Steps between checkpoints."""
    log_every: int = 25
    bf16: bool = False
    """Compute in bfloat16 where it is safe (autocast, and Muon); parameters stay fp32."""
    accumulate: int = 1
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
        with safe_open(self.checkpoint, framework="pt") as file:
            names = {kind: set[str]() for kind in ("model", "ema", MUON_STATE)}
            for key in file.keys():  # noqa: SIM118, a safetensors file is no mapping
                kind, _, name = key.partition(".")
                names.setdefault(kind, set()).add(name)
            self.step = int(file.metadata()["step"])
            if names["model"] != set(self.parameters) or (self.step and names[MUON_STATE] != set(self.matrices)):
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
        """Drop the lines of steps that a killed run logged and this one makes again, and what it left half written."""
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return
        first, *lines = path.read_text().splitlines(keepends=True) or [""]
        kept = [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) <= step]
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
        save_file(tensors, part, metadata={"step": str(self.step)})
        os.replace(part, self.checkpoint)
        (self.folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

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
        """Train to the configured number of steps. `loss_of` computes one batch's loss and figures to log."""
        config = self.config
        self.module.train()
        started, first = time.perf_counter(), self.step
        shown: dict[str, list[float]] = {}
        while self.step < config.steps:
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
                raise FloatingPointError(f"the gradient of step {self.step} is not finite; lower the learning rate")
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
            if self.step % config.log_every == 0 or self.step == config.steps:
                self._log(shown, started, first, say)
                shown.clear()
            if self.step % config.save_every == 0 or self.step == config.steps:
                self.save()
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
            with sdpa_kernel(CPU_ATTENTION):
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

    def _log(self, shown: Mapping[str, list[float]], started: float, first: int, say: Callable[[str], None]) -> None:
        figures = {name: sum(values) / len(values) for name, values in shown.items()}
        each = (time.perf_counter() - started) / (self.step - first)
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
