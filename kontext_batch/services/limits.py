"""What stops a run that nobody watches: a budget of GPU time that is used up, and too many failures.

Such a run is paused, not failed or cancelled: what is done is kept, what is being computed is finished, everything
else waits for a person, who reads the reason, mends the cause and lets the run go on.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from kontext_batch.errors import PlanRefused
from kontext_batch.ports import Act, Repository, RunFigures

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the settings; the budget is the run's own."""

    failures: int | None = None
    """Most failed and quarantined steps of a run; None: any number."""
    share: float | None = None
    """Most of them as a part of the run's steps, 0 to 1."""


def enforce(repository: Repository, limits: Limits) -> list[tuple[int, str]]:
    """Pause each running run that is over a limit; returns (run, reason).

    Cheap enough for every few seconds: it asks for counters and for what has failed, never for a run's steps.
    """
    paused = []
    for figures in repository.run_figures():
        reason = over(figures, limits)
        if reason is not None and repository.pause_run(figures.id, reason=reason):
            log.warning("run paused", run=figures.id, reason=reason)
            paused.append((figures.id, reason))
    return paused


def over(figures: RunFigures, limits: Limits) -> str | None:
    """Why the run may not go on; None when it may."""
    return _over_budget(figures) or _over_failures(figures, limits)


def resume(repository: Repository, run_id: int, *, gpu_minutes: float | None = None, by: Act | None = None) -> bool:
    """Let a paused run go on, with another budget where one is given; says whether it was paused.

    Raises `PlanRefused` for a run whose budget is used up: it would be paused again at once.
    """
    (figures,) = repository.run_figures(run_id)
    minutes = figures.gpu_minutes if gpu_minutes is None else gpu_minutes
    if minutes is not None and _used_up(figures.gpu_seconds, minutes):
        used = figures.gpu_seconds / 60
        raise PlanRefused(
            [
                f"run {run_id} has used {used:.2f} GPU minutes, its budget is {minutes:g}; "
                f"`kontext-batch runs resume {run_id} --budget MINUTES` gives it more"
            ]
        )
    return repository.resume_run(run_id, gpu_minutes=gpu_minutes, by=by)


def _used_up(seconds: float, minutes: float) -> bool:
    """A run that has used nothing is left alone: what it may begin was judged when it was planned."""
    return seconds > 0 and seconds >= minutes * 60


def _over_budget(figures: RunFigures) -> str | None:
    minutes = figures.gpu_minutes
    if minutes is None or not _used_up(figures.gpu_seconds, minutes):
        return None
    return (
        f"the budget of {minutes:g} GPU minutes is used up ({figures.gpu_seconds / 60:.2f} were measured); "
        f"`kontext-batch runs resume {figures.id} --budget MINUTES` gives it more"
    )


def _over_failures(figures: RunFigures, limits: Limits) -> str | None:
    failed, said = figures.failed, f"{figures.failed} steps of {figures.size} have failed"
    if limits.failures is not None and failed > limits.failures:
        limit = f"{limits.failures}"
    elif limits.share is not None and failed > limits.share * figures.size:
        limit = f"{limits.share:.3g} of them"
    else:
        return None
    return (
        f"{said}, the limit is {limit}: see `kontext-batch explain run:{figures.id}`, mend the cause, then "
        f"`runs retry {figures.id} --failed` or `runs resume {figures.id}`"
    )
