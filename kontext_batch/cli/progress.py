"""How a run is going: a bar on a terminal, plain lines elsewhere, events under `--json`."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from kontext_batch.cli import output
from kontext_batch.errors import KontextBatchError
from kontext_batch.planning.states import LIVE
from kontext_batch.ports import RunSummary

EVERY_SECONDS = 5.0
"""Pause between two plain lines."""
LOOK_SECONDS = 2.0
"""Pause between two looks of a bar at the run while a batch is in flight."""

Look = Callable[[], RunSummary]
"""Reads how the run stands: while a batch is in flight here, another process may finish steps of the run."""


def looked(look: Look | None) -> RunSummary | None:
    """How the run stands, if that can be read: a batch does not fail for the sake of a line on the screen."""
    if look is None:
        return None
    try:
        return look()
    except KontextBatchError:
        return None


def finished_steps(summary: RunSummary) -> int:
    """Steps in a final state."""
    return sum(count for state, count in summary.steps.items() if state not in LIVE)


def _counts(summary: RunSummary) -> tuple[int, int]:
    """(steps in a final state, all steps)."""
    return finished_steps(summary), sum(summary.steps.values())


class Pace:
    """Steps a second since the start, and seconds left at that rate; what was there at the start does not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._first: int | None = None

    def read(self, done: int, total: int) -> tuple[float | None, float | None]:
        """(steps a second, seconds left); None while unknown."""
        if self._first is None:
            self._first = done
        seconds = self._clock() - self._started
        if done <= self._first or seconds <= 0:
            return None, None
        rate = (done - self._first) / seconds
        return rate, (total - done) / rate


class Progress(Protocol):
    """Told by the worker how the run is going."""

    def on_step(self, done: int, total: int) -> None:
        """Denoise steps of the batch in flight."""
        ...

    def on_progress(self, summary: RunSummary) -> None:
        """Something was committed."""
        ...

    def __enter__(self) -> Progress: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LineProgress:
    """Plain lines, or events, at most one every few seconds, and the last count when the run has ended."""

    def __init__(
        self,
        *,
        json: bool,
        look: Look | None = None,
        every: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._json, self._look, self._every, self._clock = json, look, every, clock
        self._pace = Pace(clock)
        self._last = clock() - every
        self._summary: RunSummary | None = None
        self._denoise = (0, 0)
        self._written = (0, 0)

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is held."""

    def on_step(self, done: int, total: int) -> None:
        self._denoise = (done, total)
        if self._due():
            self._summary = looked(self._look) or self._summary
            self._write()

    def on_progress(self, summary: RunSummary) -> None:
        self._summary, self._denoise = summary, (0, 0)
        if summary.finished is None:
            wanted = self._due()
        else:
            wanted = self._written != _counts(summary)
        if wanted:
            self._write()

    def _due(self) -> bool:
        now = self._clock()
        if now - self._last < self._every:
            return False
        self._last = now
        return True

    def _write(self) -> None:
        done = total = 0
        if self._summary is not None:
            done, total = _counts(self._summary)
        self._written = (done, total)
        rate, left = self._pace.read(done, total)
        step, steps = self._denoise
        if self._json:
            values: dict[str, Any] = {"steps_done": done, "steps": total, "per_second": rate, "seconds_left": left}
            output.event("progress", **values, denoise_step=step, denoise_steps=steps)
            return
        parts = [f"{done}/{total} steps"] if total else ["working"]
        if steps:
            parts.append(f"denoise step {step}/{steps} of the batch")
        if rate is not None and left is not None:
            parts.append(f"{rate * 60:.1f} steps a minute" + (f", {duration(left)} left" if done < total else ""))
        output.tell(", ".join(parts))


class BarProgress:
    """A bar of rich, on standard error."""

    def __init__(self, look: Look | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("steps", total=None, told="")
        self._pace = Pace()
        self._told = ""
        self._look = look
        self._looked = time.monotonic()

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def on_step(self, done: int, total: int) -> None:
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            summary = looked(self._look)
            if summary is not None:
                self.on_progress(summary)
            self._looked = time.monotonic()  # after a look that failed, too
        self._bar.update(self._task, told=f"{self._told}  denoise {done}/{total}")

    def on_progress(self, summary: RunSummary) -> None:
        self._looked = time.monotonic()
        done, total = _counts(summary)
        rate, left = self._pace.read(done, total)
        self._told = "" if rate is None or left is None else f"{rate * 60:.1f}/min, {duration(left)} left"
        self._bar.update(self._task, completed=done, total=total, told=self._told)


def duration(seconds: float) -> str:
    """`1 h 5 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
