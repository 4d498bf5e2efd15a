"""The planner: recipe + what was listed -> Plan. Pure; reads nothing, decides no budget, knows no state.

    points   every surviving combination of axis values                                             (points.py)
    needs    drawn back from the outputs: which steps at which points                               (here)
    makes    each needed instance, parents first: its pictures, sizes, parameters, key              (making.py)
    delivers where the results go                                                                   (delivering.py)

What it can refuse: see `plan_recipe`. Cycles and unknown names were told when the recipe was loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kontext_batch.errors import PlanRefused, Problem, RecipeError
from kontext_batch.planning.delivering import Delivering, Want
from kontext_batch.planning.listing import AdapterInfo, Listed, ModelInfo
from kontext_batch.planning.making import Making, World
from kontext_batch.planning.nodes import FromStep, Node, Nodes
from kontext_batch.planning.operations import planner_for
from kontext_batch.planning.plan import InstanceId, Plan
from kontext_batch.planning.points import FullPoint, Points
from kontext_batch.planning.values import AtPoint, Point, Texts
from kontext_batch.recipes.loader import Recipe

MAX_INSTANCES = 1_000_000
MAX_PROBLEMS = 500


def plan_recipe(
    recipe: Recipe,
    listed: Listed,
    models: Mapping[str, ModelInfo],
    *,
    base: str,
    adapters: Mapping[str, AdapterInfo] | None = None,
    allowed_outputs: Sequence[str] | None = None,
    count_tokens: Callable[[str, str], int] | None = None,
    lane_seconds: Mapping[str, float] | None = None,
    default_seconds: float | None = None,
    takes: Mapping[InstanceId, int] | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
    limit: int | None = None,
    numeric_mode: str = "float32",
    max_instances: int = MAX_INSTANCES,
) -> Plan:
    """Every step that the recipe's outputs need, with keys, and where the results go.

    `base`: URI of the folder that the recipe lies in, ending in `/`. `allowed_outputs`: prefixes that the recipe may
    write; None allows all. `count_tokens(model, prompt)`: tokens of a prompt as the model's encoder counts them.
    `lane_seconds`: lane -> seconds for one image, from past timings; `default_seconds` for lanes without. `takes`:
    (node, axes, candidate) -> take of instances that are deliberate new tries, of this run or an earlier one; all
    others have take 0. `only`: axis or `axis.column` -> values; `limit`: the first so many outputs.

    Raises `RecipeError` with every problem that shows only with the rows at hand (missing translations, two outputs
    with one name, upscales, unknown models, ...), `PlanRefused` for more than `max_instances` points or instances,
    with the count.
    """
    texts = Texts(recipe)
    enumerated = Points(recipe, listed, texts)
    points = enumerated.all(only=only or {}, most=max_instances)
    _raise(enumerated.problems)
    world = World(
        models,
        adapters or {},
        numeric_mode,
        count_tokens,
        lane_seconds or {},
        default_seconds,
        takes or {},
    )
    nodes = Nodes(recipe, listed, texts)
    nodes.group(points)
    making = Making(recipe, nodes, world)
    delivering = Delivering(recipe, nodes, base, allowed_outputs)
    try:
        wants = delivering.wants(points, limit)
        needs = _needs(nodes, wants, {point: number for number, point in enumerate(points)})
    except AtPoint as error:  # an `if` that has no value somewhere
        raise RecipeError([*making.problems, error.problem]) from None
    count = sum(len(needed) * nodes[name].candidates for name, needed in needs.items())
    if count > max_instances:
        raise PlanRefused([f"the recipe makes {count:,} step instances; at most {max_instances:,} are planned"])
    for name, needed in needs.items():
        planner = planner_for(making, nodes[name]) if needed else None
        if planner is not None:
            making.make(nodes[name], needed, planner)
    delivering.deliver(wants, making)
    _raise([*making.problems, *delivering.problems])
    notes = [*enumerated.notes, *_notes(recipe, listed, needs), *delivering.notes, *making.notes()]
    budget = recipe.budget.model_dump(exclude_none=True)
    return Plan(
        recipe=recipe.name,
        recipe_sha256=recipe.sha256,
        owner=recipe.owner,
        steps=tuple(making.steps.values()),
        instances=tuple(making.instances),
        deliveries=tuple(delivering.deliveries),
        skipped=listed.skipped,
        notes=tuple(notes),
        budget={name: float(value) for name, value in budget.items()},
    )


def _needs(nodes: Nodes, wants: Sequence[Want], order: Mapping[FullPoint, int]) -> Mapping[str, dict[Point, FullPoint]]:
    """Step -> its instances that an output needs, each with a point that it is at.

    Parents before children, instances in the order of the points.
    """
    needs: dict[str, dict[Point, FullPoint]] = {name: {} for name in nodes}
    for want in wants:
        _need(nodes[want.step], want.point, needs)
    for name in reversed(list(nodes)):
        node = nodes[name]
        for point in list(needs[name].values()):
            for each in nodes.cells(node, point) if node.is_sheet else (point,):
                for use in node.pictures:
                    chosen = nodes.chosen(use, each)
                    if isinstance(chosen, FromStep):
                        _need(nodes[chosen.step], each, needs)
    return {name: dict(sorted(needed.items(), key=lambda item: order[item[1]])) for name, needed in needs.items()}


def _need(node: Node, point: FullPoint, needs: dict[str, dict[Point, FullPoint]]) -> None:
    needs[node.name].setdefault(node.project(point), point)


def _notes(recipe: Recipe, listed: Listed, needs: Mapping[str, Mapping[Point, FullPoint]]) -> list[str]:
    notes = [
        f"input '{axis}' has no row that takes part" for axis in recipe.document.inputs if not listed.rows.get(axis)
    ]
    if not notes:
        notes += [f"step '{name}': no output needs it, it is not run" for name, needed in needs.items() if not needed]
    return notes


def _raise(problems: Sequence[Problem]) -> None:
    if not problems:
        return
    told = list(dict.fromkeys(problems))
    if len(told) > MAX_PROBLEMS:
        rest = Problem("~", 0, 0, "", f"and {len(told) - MAX_PROBLEMS} more problems")
        told = [*told[:MAX_PROBLEMS], rest]
    raise RecipeError(told)
