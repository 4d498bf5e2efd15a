"""From a recipe to a plan with reasons, and from a plan to a run. Nothing is paid for here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from kontext_batch.errors import NotAllowed, PlanRefused, Problem, RecipeError
from kontext_batch.planning import uris
from kontext_batch.planning.explain import Explained, explain
from kontext_batch.planning.inputs import wanted_tables
from kontext_batch.planning.limits import budget_reasons, changed_inputs, changed_models, forgotten_inputs, sources
from kontext_batch.planning.listing import AdapterInfo, Listed, ModelInfo
from kontext_batch.planning.params import SAMPLING
from kontext_batch.planning.plan import InstanceId, Plan
from kontext_batch.planning.planner import plan_recipe
from kontext_batch.planning.slices import only_of, part_of
from kontext_batch.planning.states import LIVE, StepState
from kontext_batch.ports import Act, NewRun, Repository, StoredInstance, WakeUps
from kontext_batch.recipes.loader import Recipe
from kontext_batch.services.guard import delivery_faults
from kontext_batch.services.look import Looker, base_of


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a recipe that is asked for."""

    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Axis, or `axis.column`, -> values."""
    limit: int | None = None
    """The first so many outputs."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan, what becomes of each of its instances, and what stands against it."""

    plan: Plan
    explained: tuple[Explained, ...]
    refusals: tuple[str, ...]
    source: str
    """URI of the recipe, or of the plan file."""
    text: str
    selection: Selection
    has_schedule: bool
    """Whether the recipe says when it runs by itself."""


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans recipes against a workspace."""

    looker: Looker
    repository: Repository
    models: Mapping[str, ModelInfo]
    adapters: Mapping[str, AdapterInfo]
    filtered_models: frozenset[str]
    """Models whose licence requires a content filter."""
    unlike: Mapping[tuple[str, str], str]
    """("model" or "adapter", name) of those whose files are not the ones that were registered -> their path."""
    has_filter: bool
    writable: tuple[str, ...]
    """Prefixes that recipes may deliver to."""
    kept_prefixes: tuple[str, ...]
    """Beginnings of URIs that belong to the workspace: nothing is delivered there."""
    count_tokens: Callable[[str, str], int]
    numeric_mode: str
    default_seconds: float | None
    max_instances: int

    def from_recipe(
        self,
        uri: str,
        *,
        shown: str,
        selection: Selection | None = None,
        takes: Mapping[InstanceId, int] | None = None,
        within: Set[InstanceId] | None = None,
        data: bytes | None = None,
        check: Callable[[Recipe], Sequence[Problem]] | None = None,
    ) -> Prepared:
        """Plan the recipe at `uri`. Raises `RecipeError` and `PlanRefused` (too many instances).

        `within`: the instances of an earlier run; nothing is planned that it did not have. `data`: the recipe's bytes,
        where they were read already. `check`: what else is wrong with a recipe, before anything that it names is read.
        """
        chosen = selection or Selection()
        recipe, text = self.looker.recipe(uri, shown=shown, data=data)
        if check is not None and (problems := check(recipe)):
            raise RecipeError(problems)
        base = base_of(uri)
        previous = self.repository.latest_instances(recipe.name)
        listed = self.looker.listed(recipe, base)
        plan = plan_recipe(
            recipe,
            listed,
            self.models,
            base=base,
            adapters=self.adapters,
            allowed_outputs=self.writable,
            count_tokens=self.count_tokens,
            lane_seconds=self.repository.lane_seconds(),
            default_seconds=self.default_seconds,
            takes={**earlier_takes(previous), **(takes or {})},
            only=chosen.only if within is None else only_of(within, chosen.only, recipe, listed),
            limit=chosen.limit,
            numeric_mode=self.numeric_mode,
            max_instances=self.max_instances,
        )
        if within is not None:
            plan = part_of(plan, within)
        return self._prepared(plan, previous, uri, text, chosen, recipe, made_from(recipe, listed, uri))

    def from_plan(self, plan: Plan, uri: str) -> Prepared:
        """Take a stored plan as it is; an input or a model that has changed since stands against it.

        A plan may read and write what lies beside it, as a recipe may: a folder that it named itself would be no limit,
        for anybody can write a plan. Raises `NotAllowed` when its pictures lie elsewhere.
        """
        previous = self.repository.latest_instances(plan.recipe)
        try:
            current = self.looker.current(sources(plan))
        except NotAllowed as error:
            raise NotAllowed(
                f"{error}; keep a stored plan beside its recipe, or name the recipe's folder in read_prefixes and "
                "write_prefixes of the settings"
            ) from error
        gone = self.repository.forgotten(each.sha256 for each in sources(plan).values())
        forgotten = forgotten_inputs(plan, {sha256: stone.reason for sha256, stone in gone.items()})
        changes = (*forgotten, *changed_inputs(plan, current), *changed_models(plan, self.models))
        prepared = self._prepared(plan, previous, uri, "", Selection(), None, {uri})
        return dataclasses.replace(prepared, refusals=(*changes, *prepared.refusals))

    def _prepared(
        self,
        plan: Plan,
        previous: Mapping[InstanceId, StoredInstance],
        source: str,
        text: str,
        selection: Selection,
        recipe: Recipe | None,
        protected: Set[str],
    ) -> Prepared:
        states = self.repository.step_states([step.key for step in plan.steps])
        done = frozenset(key for key, state in states.items() if state is StepState.DONE)
        live = frozenset(key for key, state in states.items() if state in LIVE)
        explained = explain(plan, previous, done=done, live=live, recipe=recipe)
        faults = delivery_faults(
            plan,
            self.looker.store,
            writable=self.writable,
            protected=protected,
            kept_prefixes=self.kept_prefixes,
        )
        refusals = (*faults, *budget_reasons(plan, done=done), *self._unfiltered(plan), *self._changed(plan, done))
        has_schedule = recipe is not None and recipe.schedule is not None
        return Prepared(plan, explained, refusals, source, text, selection, has_schedule)

    def _changed(self, plan: Plan, done: Set[str]) -> Iterator[str]:
        """Weights that are not those of the keys: other pictures would be kept, and explained, as theirs."""
        running = [step.params for step in plan.steps if step.operation in SAMPLING and step.key not in done]
        used = {("model", str(params["model"])) for params in running}
        used |= {("adapter", str(each["name"])) for params in running for each in params["adapters"]}
        for kind, name in sorted(used & self.unlike.keys()):
            path = self.unlike[kind, name]
            yield (
                f"the files of {kind} '{name}' are not those that were registered; "
                f"`kontext-batch {kind}s add {name} {path}` takes them as they are"
            )

    def _unfiltered(self, plan: Plan) -> tuple[str, ...]:
        if self.has_filter:
            return ()
        used = {str(step.params["model"]) for step in plan.steps if step.operation in SAMPLING}
        return tuple(
            f"the licence of model '{name}' requires a content filter before delivery and none is configured; "
            "set content_filter in the settings"
            for name in sorted(used & self.filtered_models)
        )


def made_from(recipe: Recipe, listed: Listed, uri: str) -> frozenset[str]:
    """URIs of everything that a recipe is read from: itself, its imports, tables and pictures."""
    base = base_of(uri)
    pictures = {
        image.uri
        for rows in listed.rows.values()
        for row in rows
        for found in row.files.values()
        for image in (found if isinstance(found, tuple) else (found,))
    }
    imports = {uris.literal(uris.expand([(name, False)], base, pattern=False)) for name in recipe.document.import_}
    logos = {image.uri for image in listed.logos.values()}
    return frozenset({uri, *imports, *pictures, *logos, *wanted_tables(recipe, base).values()})


def earlier_takes(previous: Mapping[InstanceId, StoredInstance]) -> dict[InstanceId, int]:
    """Takes that were asked for before stand until another is."""
    return {instance: stored.take for instance, stored in previous.items() if stored.take > 0}


def submit(
    repository: Repository,
    wake_ups: WakeUps,
    prepared: Prepared,
    *,
    trigger: str,
    priority: int = 0,
    fire: tuple[int, int] | None = None,
    drop: tuple[int, int] | None = None,
    by: Act | None = None,
) -> int:
    """Store the run and ring the workers; returns the run's id. Raises `PlanRefused` with everything against it.

    `fire`, `drop`, `by`: as of `Repository.create_run`.
    """
    if prepared.refusals:
        raise PlanRefused(prepared.refusals)
    plan = prepared.plan
    run = NewRun(
        recipe=plan.recipe,
        recipe_sha256=plan.recipe_sha256,
        recipe_text=prepared.text,
        source=prepared.source,
        owner=plan.owner,
        trigger=trigger,
        priority=priority,
        selection={"only": {k: list(v) for k, v in prepared.selection.only.items()}, "limit": prepared.selection.limit},
        budget=dict(plan.budget),
    )
    run_id = repository.create_run(run, plan, fire=fire, drop=drop, by=by)
    lanes: dict[str, int] = {}
    for step in plan.steps:
        lanes[step.lane] = lanes.get(step.lane, 0) + 1
    wake_ups.wake(lanes)
    return run_id
