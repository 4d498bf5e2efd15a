"""The planner: recipe + what was listed -> Plan. Pure; reads nothing, decides no budget, knows no state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kontext_batch.planning.listing import AdapterInfo, Listed, ModelInfo
from kontext_batch.planning.plan import Axes, Plan
from kontext_batch.recipes.loader import Recipe

MAX_INSTANCES = 1_000_000


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
    takes: Mapping[tuple[str, Axes, int], int] | None = None,
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
    with one name, upscales, ...), `PlanRefused` for more than `max_instances` points or instances, with the count.
    """
    raise NotImplementedError
