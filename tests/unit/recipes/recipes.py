"""Small recipes for tests: a sound one, changed by replacing text."""

from __future__ import annotations

from collections.abc import Mapping

from kontext_batch.errors import ObjectNotFound, RecipeError
from kontext_batch.recipes.loader import Recipe, load_recipe

BRAND = """\
kind: brand
colors: {red: "#E4002B"}
logos: {mono: s3://brand/mono.png}
channels:
  square: {size: 2000x2000, format: jpeg, max_bytes: 2MB}
  hero: {size: 1920x1080, fit: crop}
"""

RECIPE = """\
version: 1
name: small
import: [brand.yaml]
inputs:
  item:
    table: items.csv
    key: sku
    files: {photo: "photos/${item.sku}.*"}
texts:
  name: {table: item, column: "name_${locale}"}
vars:
  keep: Keep its shape.
matrix:
  scene:
    terrace: {place: a terrace}
    studio: {place: "a studio in ${brand.colors.red}"}
  locale: [en, de]
  channel: [square, hero]
defaults:
  edit: {model: kontext-dev}
steps:
  clean:
    op: edit
    image: ${item.photo}
    prompt: Remove the background. ${vars.keep}
  staged:
    op: edit
    image: ${clean}
    frame: ${channel.size}
    prompt: Put it on ${scene.place}.
  finish:
    op: finish
    image: ${staged}
    channel: ${channel}
outputs:
  - from: ${finish}
    to: "out/${item}_${scene}_${channel}.${ext}"
"""


def changed(*changes: tuple[str, str], text: str = RECIPE) -> str:
    """The sound recipe with texts replaced; each must be there."""
    for old, new in changes:
        assert old in text, f"{old!r} is not in the recipe"
        text = text.replace(old, new)
    return text


def load(text: str = RECIPE, *, files: Mapping[str, str] | None = None) -> Recipe:
    """Load with `brand.yaml` and `files` to import."""
    known = {"brand.yaml": BRAND, **(files or {})}

    def read_import(name: str) -> bytes:
        if name not in known:
            raise ObjectNotFound(name)
        return known[name].encode()

    return load_recipe(text, file="small.yaml", read_import=read_import)


def problems(text: str, *, files: Mapping[str, str] | None = None) -> list[str]:
    """What is told of a faulty recipe; nothing for a sound one."""
    try:
        load(text, files=files)
    except RecipeError as error:
        return [str(problem) for problem in error.problems]
    return []
