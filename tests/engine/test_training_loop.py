"""A training that is stopped, or killed, goes on as if nothing had happened."""

from __future__ import annotations

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from engine.errors import ConfigError, TrainingError
from engine.training.loop import Loop, LoopConfig, Loss, Moment

CONFIG = LoopConfig(steps=12, lr=1e-2, warmup=3, save_every=4, log_every=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Stop(Exception):
    """Stands for a kill in the middle of a step."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 2))


def train(folder: Path, *, config: LoopConfig = CONFIG, stop: int | None = None) -> tuple[nn.Module, list[float]]:
    """Train to the end, or be stopped before step `stop`; returns the losses of the steps that ran."""
    module, losses = model(), []

    def loss_of(moment: Moment) -> Loss:
        if moment.step == stop:
            raise Stop
        x = torch.randn(16, 6, generator=moment.torch) + float(moment.numpy.normal())
        loss = F.mse_loss(module(x), x[:, :2].sin())
        losses.append(loss.item())
        return loss, {}

    loop = Loop(module, config, folder, hidden=lambda name: name == "2.weight")
    loop.resume()
    loop.run(loss_of, say=lambda _: None)
    return module, losses


@pytest.mark.parametrize("stop", [5, 8, 11])
@pytest.mark.parametrize("muon", [False, True])
def test_a_stopped_run_has_the_loss_curve_of_one_that_ran_through(tmp_path: Path, stop: int, muon: bool) -> None:
    config = replace(CONFIG, muon=muon)
    _, whole = train(tmp_path / "whole", config=config)
    with pytest.raises(Stop):
        train(tmp_path / "cut", config=config, stop=stop)
    _, rest = train(tmp_path / "cut", config=config)
    saved = stop - stop % CONFIG.save_every
    assert rest == whole[saved:]
    first, second = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_muon_steps_the_hidden_matrices_alone(tmp_path: Path) -> None:
    """The first layer's matrix, which is not hidden, goes where AdamW brings it in the first step."""
    adam, muon = (
        train(tmp_path / str(muon), config=replace(CONFIG, steps=1, warmup=0, muon=muon))[0] for muon in (False, True)
    )
    assert torch.equal(adam.get_parameter("0.weight"), muon.get_parameter("0.weight"))
    assert not torch.equal(adam.get_parameter("2.weight"), muon.get_parameter("2.weight"))
    state = load_file(tmp_path / "True" / "checkpoint.safetensors")
    assert {name.partition(".")[0] for name in state if name.endswith(".2.weight")} == {
        "model",
        "ema",
        "momentum_buffer",
    }


def test_accumulated_batches_have_the_gradient_of_both_joined(tmp_path: Path) -> None:
    """Read where the optimiser would: AdamW's step itself does not depend on the size of a gradient."""
    halves = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    module = model()
    calls: list[int] = []

    def loss_of(_: Moment) -> Loss:
        calls.append(len(calls))
        return module(halves[calls[-1]]).square().mean(), {}

    Loop(module, replace(CONFIG, steps=1, accumulate=2, clip=1e9), tmp_path).run(loss_of, say=lambda _: None)
    assert calls == [0, 1]
    joined = model()
    joined(halves.flatten(0, 1)).square().mean().backward()
    for ours, theirs in zip(module.parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-5)


def test_batches_of_a_step_are_drawn_apart() -> None:
    draws = {float(Moment.of(0, step, part).torch.initial_seed()) for step in range(3) for part in range(3)}
    assert len(draws) == 9


def test_the_average_is_in_place_only_while_it_is_asked_for(tmp_path: Path) -> None:
    module = model()
    loop = Loop(module, CONFIG, tmp_path)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    for value in loop.average.values():
        value.fill_(3.0)
    module.train()
    with loop.averaged():
        assert all((parameter == 3).all() for parameter in module.parameters())
        assert [module.training] == [False]
    assert module.training
    assert all(torch.equal(start[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("stop", [3, 11])
@pytest.mark.parametrize("left", ["", "11,0.0", "half"])
def test_metrics_have_one_line_for_each_step_after_a_stop(tmp_path: Path, stop: int, left: str) -> None:
    """Stopped before the first checkpoint at 4, or at 11 with one at 8; and killed in the middle of a line."""
    with pytest.raises(Stop):
        train(tmp_path, stop=stop)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(left)
    train(tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 13))


def test_an_empty_file_of_metrics_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").touch()
    train(tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 12


@pytest.mark.parametrize("muon", [False, True])
def test_a_checkpoint_of_the_other_optimiser_is_refused(tmp_path: Path, muon: bool) -> None:
    with pytest.raises(Stop):
        train(tmp_path, config=replace(CONFIG, muon=muon), stop=8)
    with pytest.raises(ConfigError, match="another folder"):
        train(tmp_path, config=replace(CONFIG, muon=not muon))


def test_what_resumes_without_its_optimiser_would_not_have_that_curve(tmp_path: Path) -> None:
    """The comparison above can fail: the moments matter at this size."""
    with pytest.raises(Stop):
        train(tmp_path / "cut", stop=8)
    _, right = train(tmp_path / "cut")
    with pytest.raises(Stop):
        train(tmp_path / "bare", stop=8)
    module, losses = model(), []
    loop = Loop(module, CONFIG, tmp_path / "bare")
    loop.resume()
    loop.optimisers[0].state.clear()

    def loss_of(moment: Moment) -> Loss:
        x = torch.randn(16, 6, generator=moment.torch) + float(moment.numpy.normal())
        loss = F.mse_loss(module(x), x[:, :2].sin())
        losses.append(loss.item())
        return loss, {}

    loop.run(loss_of, say=lambda _: None)
    assert losses[0] == right[0]
    assert losses[1:] != right[1:]


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    """kill -9 at whatever moment; the checkpoint is an old one or a new one, and never half of one."""
    script = """
import sys, time, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.engine.test_training_loop import CONFIG, Loop, model
module = model()
loop = Loop(module, CONFIG, Path(sys.argv[1]))
loop.resume()
def loss_of(moment):
    time.sleep(0.05)
    return module(torch.randn(16, 6, generator=moment.torch)).square().mean(), {}
loop.run(loss_of, say=lambda _: None)
"""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), root])
    checkpoint, deadline = tmp_path / "checkpoint.safetensors", time.monotonic() + 60
    while not checkpoint.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.is_file()
    loop = Loop(model(), CONFIG, tmp_path)
    assert loop.resume()
    assert loop.step in (4, 8, 12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_that_is_being_made(tmp_path: Path, number: signal.Signals) -> None:
    module, told = model(), list[str]()

    def loss_of(moment: Moment) -> Loss:
        if moment.step == 5:
            os.kill(os.getpid(), number)
        return F.mse_loss(module(torch.ones(1, 6)), torch.zeros(1, 2)), {}

    before = signal.getsignal(number)
    loop = Loop(module, CONFIG, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        loop.run(loss_of, say=told.append)
    assert "stopped after step 6" in told[-1]
    assert signal.getsignal(number) == before
    again = Loop(model(), CONFIG, tmp_path)
    assert again.resume()
    assert again.step == 6


@pytest.mark.parametrize("damage", [b"", b"no checkpoint", "half"], ids=["empty", "text", "cut off"])
def test_a_damaged_checkpoint_is_told_and_kept(tmp_path: Path, damage: bytes | str) -> None:
    train(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:200] if isinstance(damage, str) else damage)
    kept = path.read_bytes()
    with pytest.raises(ConfigError, match="cannot be read"):
        Loop(model(), CONFIG, tmp_path).resume()
    assert path.read_bytes() == kept


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    other = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 2))
    with pytest.raises(ConfigError, match="other parameters"):
        Loop(other, CONFIG, tmp_path).resume()


@pytest.mark.parametrize(
    "text",
    ["step;loss\n1;2\n", "step,seconds_per_step,loss\nx,1,2\n", "step,seconds_per_step,loss\n1,2\n", "\xff\xfe"],
)
def test_foreign_metrics_are_put_aside(tmp_path: Path, text: str) -> None:
    train(tmp_path)
    (tmp_path / "metrics.csv").write_bytes(text.encode("latin-1"))
    loop = Loop(model(), replace(CONFIG, steps=13), tmp_path)
    assert loop.resume()
    assert (tmp_path / "metrics.damaged.csv").read_bytes() == text.encode("latin-1")
    assert not (tmp_path / "metrics.csv").exists()


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("engine.training.loop.save_file", full)
    with pytest.raises(OSError, match="no space is left") as told:
        train(tmp_path)
    assert told.value.errno == errno.ENOSPC


def test_the_checkpoint_is_safetensors_and_the_metrics_a_table(tmp_path: Path) -> None:
    train(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "metrics.csv"]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))


def test_the_rate_warms_up_and_falls_to_nothing(tmp_path: Path) -> None:
    loop = Loop(model(), CONFIG, tmp_path)
    rates = [loop.learning_rate(step) for step in range(CONFIG.steps + 1)]
    assert rates[:3] == pytest.approx([CONFIG.lr / 3, CONFIG.lr * 2 / 3, CONFIG.lr])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_the_average_follows_the_parameters(tmp_path: Path) -> None:
    module, _ = train(tmp_path)
    saved = load_file(tmp_path / "checkpoint.safetensors")
    for name, parameter in module.named_parameters():
        assert torch.equal(saved[f"model.{name}"], parameter)
        assert not torch.equal(saved[f"ema.{name}"], parameter)


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    module = model()
    loop = Loop(module, CONFIG, tmp_path)
    with pytest.raises(TrainingError, match="step 0"):
        loop.run(lambda _: (module(torch.ones(1, 6)).sum() * float("nan"), {}), say=lambda _: None)
