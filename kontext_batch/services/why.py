"""Why a step was computed, or was not, and what befell it: the answers of `explain`, most telling first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice

from kontext_batch.planning.explain import Computed, differences, own_differences, written_at
from kontext_batch.planning.render import axes_text
from kontext_batch.planning.states import RunState, StepState
from kontext_batch.ports import (
    TAKEN_DOWN,
    AttemptRow,
    Repository,
    RunSummary,
    StepRow,
    StepUse,
    StoredInstance,
    StoredStep,
)
from kontext_batch.recipes.source import Source, read_yaml

AT = "%Y-%m-%d %H:%M:%S"
TOLD = 5
"""Runs or parents that are named before it says that there are more."""
LOOKED_AT = 100
"""Steps above one that are asked what changed in them: a contact sheet may have thousands."""


@dataclass(slots=True)
class Explainer:
    """Answers for many steps of a few runs."""

    repository: Repository
    _recipes: dict[int, Source] = field(default_factory=dict)
    _runs: dict[int, RunSummary] = field(default_factory=dict)

    def why(self, row: StepRow) -> Sequence[str]:
        """What is to be said of a step."""
        uses = self.repository.step_uses(row.id)
        step = self.repository.stored_steps([row.id])[row.id]
        attempts = self.repository.attempts(row.id)
        return [
            *self._why_computed(step, uses[0]),
            *_befallen(attempts),
            *self._standing(step, row, uses),
            *_found(uses, attempts),
            *self._replaced(step, uses[-1]),
        ]

    def _why_computed(self, step: StoredStep, use: StepUse) -> Iterator[str]:
        before = self.repository.nearest_instance(use, later=False)
        if before is None:
            yield f"never run before run {use.run_id} ({use.file}:{use.line})"
            return
        run_id, _, stored = before
        for reason in self._differences(stored, _computed(step), use, step):
            yield f"since run {run_id}: {reason}"
        begun = list(islice(self._begun_above(step, stored, use.run_id, run_id, set()), TOLD + 1))
        yield from begun[:TOLD]
        if len(begun) > TOLD:
            yield "and others of the steps above it"
        yield from self._rejected(use.run_id, "the picture of before")

    def _begun_above(
        self, step: StoredStep, before: StoredInstance, run_id: int, before_id: int, seen: set[int]
    ) -> Iterator[str]:
        """Of the steps above that are others than in the run before, those in which something changed of itself."""
        known = {(role, position): identity for role, position, _, identity in before.inputs}
        for each in step.parents:
            if known.get((each.role, each.position), each.key) == each.key or each.step_id in seen:
                continue
            if len(seen) == LOOKED_AT:
                return
            seen.add(each.step_id)
            use = next((use for use in self.repository.step_uses(each.step_id) if use.run_id == run_id), None)
            if use is None:
                continue
            named = f"step {each.step_id} {use.node} {axes_text(use.axes)}".strip()
            found = self.repository.nearest_instance(replace(use, run_id=before_id + 1), later=False)
            if found is None:
                yield f"{named}: never run before run {run_id} ({use.file}:{use.line})"
                continue
            _, _, stored = found
            parent = self.repository.stored_steps([each.step_id])[each.step_id]
            reasons = own_differences(stored, _computed(parent), place=self._place(use, parent.operation))
            if reasons:
                yield f"{named}: {'; '.join(reasons)}"
            yield from self._begun_above(parent, stored, run_id, before_id, seen)

    def _replaced(self, step: StoredStep, use: StepUse) -> Iterator[str]:
        after = self.repository.nearest_instance(use, later=True)
        if after is None:
            return
        run_id, newer_id, stored = after
        newer = self.repository.stored_steps([newer_id])[newer_id]
        for reason in self._differences(_computed(step), stored, replace(use, run_id=run_id), newer):
            yield f"replaced in run {run_id} by step {newer_id}: {reason}"
        yield from self._rejected(run_id, "it")

    def _differences(
        self, old: StoredInstance | Computed, new: StoredInstance | Computed, use: StepUse, step: StoredStep
    ) -> Sequence[str]:
        parents = self.repository.steps_by_id(each.step_id for each in step.parents)
        return differences(
            old, new, place=self._place(use, new.operation), nodes={each.key: each.node for each in parents}
        )

    def _place(self, use: StepUse, operation: str) -> Callable[[str], str]:
        if use.run_id not in self._recipes:
            text = self.repository.recipe_text(use.run_id)
            self._recipes[use.run_id] = read_yaml(text, file=use.file)[0]
        source = self._recipes[use.run_id]
        return lambda name: written_at(source, use.node, operation, name) or f"{use.file}:{use.line}"

    def _rejected(self, run_id: int, what: str) -> Iterator[str]:
        for act in self.repository.audit(subject=f"run:{run_id}"):
            if act.action == "runs retry --take":
                yield f"{what} was rejected: {act.who} asked for another with `{act.action}`"

    # ------------------------------------------------------------------------------------------------- how it stands

    def _standing(self, step: StoredStep, row: StepRow, uses: Sequence[StepUse]) -> Iterator[str]:
        match step.state:
            case StepState.SKIPPED:
                yield from self._skipped(step)
            case StepState.BLOCKED:
                undone = [each.step_id for each in step.parents if each.state is not StepState.DONE]
                yield f"it waits for {self._named(undone)}"
            case StepState.READY:
                paused = [each.run_id for each in uses if self._run(each.run_id).state is RunState.PAUSED]
                held = f": run {paused[-1]} is paused" if paused else ": no worker has claimed it yet"
                yield f"it is ready and waits{held}"
            case StepState.LEASED:
                yield "a worker has it in hand"
            case StepState.QUARANTINED:
                yield f"quarantined: {row.losses} workers were lost with it; `runs retry RUN --failed` tries it again"
            case StepState.CANCELLED:
                if _is_taken_down(row.error):
                    yield f"cancelled: {row.error}"
                    return
                run = self._run(uses[-1].run_id)
                yield f"cancelled: no open run wants it; run {run.id} is {run.state}" + (
                    f" ({run.reason})" if run.reason else ""
                )
            case StepState.DONE:
                image = step.outputs.get("image")
                if image is not None and image.collected is not None:
                    yield self._gone(image.artifact.sha256, image.collected)

    def _gone(self, sha256: str, at: datetime) -> str:
        stone = self.repository.forgotten([sha256]).get(sha256)
        if stone is None:
            return f"its picture was collected at {at:{AT}}; a run that needs it makes it again"
        return f"its picture was taken down at {stone.at:{AT}} by {stone.who}: {stone.reason}; nothing makes it again"

    def _run(self, run_id: int) -> RunSummary:
        if run_id not in self._runs:
            self._runs[run_id] = self.repository.run(run_id)
        return self._runs[run_id]

    def _skipped(self, step: StoredStep) -> Iterator[str]:
        """The steps above that are the cause, not those that were skipped with it."""
        above = {parent for _, parent, _ in self.repository.ancestors(step.id)}
        causes = (StepState.FAILED, StepState.QUARANTINED, StepState.CANCELLED)
        for each in self.repository.steps_by_id(above):
            if each.state in causes:
                error = f": {each.error}" if each.error else ""
                yield f"skipped because step {each.id} {_name(each)} {each.state}{error}"

    def _named(self, ids: Sequence[int]) -> str:
        rows = self.repository.steps_by_id(set(ids))
        named = [f"step {each.id} {_name(each)} ({each.state})" for each in rows[:TOLD]]
        return ", ".join(named) + (f" and {len(rows) - TOLD} more" if len(rows) > TOLD else "")


def _name(row: StepRow) -> str:
    return f"{row.node} {axes_text(row.axes)}".strip()


def _computed(step: StoredStep) -> Computed:
    sources = [(each.role, each.position, each.uri, each.sha256) for each in step.sources]
    parents = [(each.role, each.position, "", each.key) for each in step.parents]
    return Computed(step.operation, step.params, (*sources, *parents))


def _is_taken_down(error: str | None) -> bool:
    return error is not None and error.startswith(TAKEN_DOWN)


def _befallen(attempts: Sequence[AttemptRow]) -> Iterator[str]:
    """Why it was begun more than once."""
    before: AttemptRow | None = None
    for each in attempts:
        if before is not None and each.asked > before.asked:
            collected = before.outcome == "ok"
            cause = "its picture was collected or lost" if collected else f"it had ended as {before.outcome}"
            yield f"asked for again: {cause}"
        before = each
        ended = each.ended or each.started
        by = f"worker {each.worker_id}, attempt {each.number}, {ended:{AT}}"
        match each.outcome:
            case "lost":
                yield f"lease lost ({by}): {each.error}"
            case "retry":
                yield f"put back ({by}): {each.error}"
            case "released":
                yield f"given back unused ({by})"
            case "fenced":
                dropped = each.error if _is_taken_down(each.error) else "another worker held it by then"
                yield f"a late result was dropped ({by}): {dropped}"


def _found(uses: Sequence[StepUse], attempts: Sequence[AttemptRow]) -> Iterator[str]:
    cached = [each.run_id for each in uses if each.cached]
    done = next((each for each in reversed(attempts) if each.outcome == "ok"), None)
    if not cached or done is None:
        return
    named = ", ".join(map(str, cached[-TOLD:]))
    more = f" and {len(cached) - TOLD} older ones" if len(cached) > TOLD else ""
    runs = f"run{'s' if len(cached) > 1 else ''} {named}{more}"
    yield f"found, not computed, by {runs}: made for run {uses[0].run_id} by worker {done.worker_id}, {done.ended:{AT}}"
