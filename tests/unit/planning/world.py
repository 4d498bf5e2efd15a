"""A small outside world for plans: tables, files and models as dictionaries, and plans in a form to read.

made = plan("steps: ...", table="sku\\nA\\n", files={"photos/A.jpg": (3000, 2000)})
assert tree(made) == '''
    clean A <- photos/A.jpg
    finish A en <- clean A
'''
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Mapping
from typing import Any

from kontext_batch.errors import ObjectNotFound, PlanRefused, RecipeError
from kontext_batch.planning import uris
from kontext_batch.planning.inputs import join, read_rows, wanted_files
from kontext_batch.planning.listing import AdapterInfo, FileProblem, Found, Listed, ModelInfo
from kontext_batch.planning.plan import ImageInfo, Instance, Plan, PlannedStep
from kontext_batch.planning.planner import plan_recipe
from kontext_batch.recipes.loader import Recipe, load_recipe

BASE = "s3://shop/recipes/"

MODELS = {
    "kontext": ModelInfo("kontext", "a" * 64, 1024 * 1024, 512),
    "tiny": ModelInfo("tiny", "b" * 64, 128 * 128, 64, adapters=False),
}
ADAPTERS = {"look": AdapterInfo("look", "c" * 64), "style": AdapterInfo("style", "d" * 64)}

BRAND = """
kind: brand
colors: {red: "#E4002B"}
logos: {mono: logos/mono.png}
channels:
  square: {size: 1000x1000, format: jpeg, quality: 80, background: "#EEEEEE", max_bytes: 2MB, max_upscale: 2.0}
  hero: {size: 1600x900, fit: crop, format: avif}
"""

HEAD = """
version: 1
name: test
import: [brand.yaml]
"""

Size = tuple[int, int]
Files = Mapping[str, Size | str]
"""Path below the recipe's folder -> size, or why it is unusable."""


def image(path: str, size: Size = (3000, 2000), *, content: str | None = None) -> ImageInfo:
    """A picture whose bytes follow from `content`, else from its path."""
    uri = path if "://" in path else BASE + path
    digest = hashlib.sha256((content or uri).encode()).hexdigest()
    return ImageInfo(uri, digest[:8], digest, 1000, *size, "JPEG")


def recipe_of(body: str, *, brand: str = BRAND) -> Recipe:
    """Load a recipe; `version`, `name` and the brand's import are put before it when it has no version."""
    text = textwrap.dedent(body)
    text = text if "version:" in text else HEAD + text

    def read_import(name: str) -> bytes:
        if name != "brand.yaml":
            raise ObjectNotFound(name)
        return brand.encode()

    return load_recipe(text, file="r.yaml", read_import=read_import)


def list_inputs(recipe: Recipe, *, table: str = "", files: Files | None = None, **tables: str) -> Listed:
    """What services hand in: `table` is the table of `item`; the logo is always there."""
    data = {axis: text.encode() for axis, text in ({"item": table} | tables).items() if axis in recipe.document.inputs}
    rows = read_rows(recipe, {axis: text for axis, text in data.items() if text})
    wanted = wanted_files(recipe, rows, BASE)
    found: dict[str, Found] = {}
    for path, size in ({"logos/mono.png": (400, 100)} | dict(files or {})).items():
        uri = BASE + path
        found[uri] = FileProblem(uri, size) if isinstance(size, str) else image(path, size)
    assigned = uris.assign([each.uri for each in wanted], found)
    return join(recipe, rows, wanted, {pattern: [found[uri] for uri in names] for pattern, names in assigned.items()})


def plan(
    body: str,
    *,
    table: str = "",
    files: Files | None = None,
    brand: str = BRAND,
    tables: Mapping[str, str] | None = None,
    **options: Any,
) -> Plan:
    """A plan of a recipe in this world."""
    recipe = recipe_of(body, brand=brand)
    listed = list_inputs(recipe, table=table, files=files, **(tables or {}))
    return plan_recipe(recipe, listed, MODELS, **({"base": BASE, "adapters": ADAPTERS} | options))


def refused(body: str, **options: Any) -> list[str]:
    """What is told instead of a plan."""
    try:
        plan(body, **options)
    except RecipeError as error:
        return [str(problem) for problem in error.problems]
    except PlanRefused as error:
        return list(error.reasons)
    return []


def label(instance: Instance, *, candidates: bool = False) -> str:
    """`staged A terrace`, with `#2` where a step has several candidates."""
    number = f" #{instance.candidate}" if candidates else ""
    return " ".join([instance.node, *(key for _, key in instance.axes)]) + number


def tree(plan: Plan) -> str:
    """Every instance with what it reads, then every delivery; one line each."""
    steps = {step.key: step for step in plan.steps}
    several = {instance.node for instance in plan.instances if instance.candidate > 1}
    names: dict[str, str] = {}
    for instance in plan.instances:
        names.setdefault(instance.key, label(instance, candidates=instance.node in several))
    lines = []
    for instance in plan.instances:
        inputs = [
            short(each.source.uri) if each.source is not None else names[str(each.parent)]
            for each in steps[instance.key].inputs
        ]
        shown = label(instance, candidates=instance.node in several)
        lines.append(f"{shown} <- {', '.join(inputs)}" if inputs else shown)
    lines += [f"{short(each.path)} <= {names[each.key]}" for each in plan.deliveries]
    return "\n".join(lines)


def text(golden: str) -> str:
    """A golden plan as it is written in a test."""
    return textwrap.dedent(golden).strip()


def short(uri: str) -> str:
    """Without the recipe's folder."""
    return uri.removeprefix(BASE)


def step_of(plan: Plan, name: str) -> PlannedStep:
    """The step behind the instance that `label` calls so (its first candidate)."""
    keys = {label(instance): instance.key for instance in reversed(plan.instances)}
    return next(step for step in plan.steps if step.key == keys[name])


def params_of(plan: Plan, name: str) -> Mapping[str, Any]:
    """Its parameters."""
    return step_of(plan, name).params
