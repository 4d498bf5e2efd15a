"""The tick of schedules: times that have come become runs, and runs whose night is over are stopped.

Any number of processes may tick at once, or die over it: the repository lets each time have one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from kontext_batch.errors import InfrastructureError, KontextBatchError, LeaseLost, PlanRefused, SettingsError
from kontext_batch.planning.schedules import ClaimedFire, Overlap, stop_moment
from kontext_batch.ports import Repository, WakeUps
from kontext_batch.services.prepare import Planner, submit

log = structlog.get_logger(__name__)

CLAIM_SECONDS = 600.0
"""How long planning one recipe may take before another process tries: a hundred thousand inputs are listed in it."""


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Starts and stops the runs of schedules."""

    repository: Repository
    wake_ups: WakeUps
    planner: Callable[[str], Planner]
    """URI of a recipe -> a planner that may read and write where that recipe may."""

    def tick(self) -> list[int]:
        """Returns the runs that were started."""
        self._stop()
        started = [self._fire(fire) for fire in self.repository.claim_fires(seconds=CLAIM_SECONDS)]
        return [run_id for run_id in started if run_id is not None]

    def _stop(self) -> None:
        for run in self.repository.scheduled_runs():
            if run.stop_at is not None and stop_moment(run.stop_at, run.tz, run.started) <= run.now:
                reason = f"its schedule stops it at {run.stop_at} ({run.tz})"
                cancelled = self.repository.cancel_run(run.run_id, drain=True, reason=reason)
                log.info("run stopped by its schedule", run=run.run_id, stop_at=run.stop_at, cancelled=cancelled)

    def _fire(self, fire: ClaimedFire) -> int | None:
        schedule = fire.schedule
        still_open = [run.run_id for run in self.repository.scheduled_runs() if run.schedule_id == schedule.id]
        if still_open and schedule.overlap is Overlap.SKIP:
            self._settle(fire, "skipped", f"run {still_open[0]} of a time before is still open")
            return None
        try:
            ready = self.planner(schedule.recipe).from_recipe(schedule.recipe, shown=schedule.recipe)
            if ready.refusals:
                raise PlanRefused(ready.refusals)
        except (InfrastructureError, SettingsError) as error:  # not the recipe's fault, and mended by somebody
            log.warning("schedule could not be planned; tried again later", schedule=schedule.name, error=str(error))
            return None
        except KontextBatchError as error:
            self._settle(fire, "refused", str(error))
            return None
        if schedule.only_changed and all(each.status == "cached" for each in ready.explained):
            self._settle(fire, "skipped", "nothing has changed since the last run")
            return None
        if schedule.overlap is Overlap.CANCEL:
            for run_id in still_open:
                self.repository.cancel_run(run_id, reason=f"schedule '{schedule.name}' has started the next one")
        try:
            run_id = submit(
                self.repository,
                self.wake_ups,
                ready,
                trigger="schedule",
                priority=schedule.priority,
                fire=(fire.id, fire.token),
            )
        except LeaseLost:
            log.warning("another process has taken over", schedule=schedule.name, at=fire.at.isoformat())
            return None
        log.info("schedule fired", schedule=schedule.name, at=fire.at.isoformat(), run=run_id)
        return run_id

    def _settle(self, fire: ClaimedFire, state: str, reason: str) -> None:
        self.repository.settle_fire(fire.id, fire.token, state, reason)
        log.warning("schedule started nothing", schedule=fire.schedule.name, state=state, reason=reason)
