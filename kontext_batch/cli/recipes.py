"""`recipes validate|schema|init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.errors import NotAllowed, ObjectNotFound, Problem, RecipeError, SettingsError

app = typer.Typer(name="recipes", help="Write and check recipes.", no_args_is_help=True, rich_markup_mode=None)

STARTER = """\
# yaml-language-server: $schema=./recipe.schema.json     (kontext-batch recipes schema > recipe.schema.json)
version: 1
name: first
owner: you@example.com

inputs:
  item:                          # one value for each photo
    glob: photos/*

matrix:
  scene:
    ocean:  {place: a blue studio sweep}
    sunset: {place: an orange studio sweep}

defaults:
  edit: {model: tiny, steps: 1}
  seed: derive

steps:
  clean:                         # names only `item`: runs once for each photo
    op: edit
    image: ${item.file}
    prompt: Remove the background and place the product on plain white.
  staged:                        # item and scene
    op: edit
    image: ${clean}
    prompt: Change the background to ${scene.place}.

outputs:
  - from: ${staged}
    to: "kontext-out/pictures/${item}_${scene}.${ext}"
"""


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", show_default=False)],
    as_json: common.JsonOption = False,
) -> None:
    """Check recipes and what they import; tables and pictures are looked at by `plan`.

    Example: kontext-batch recipes validate recipes/*/demo.yaml
    """
    problems: list[Problem] = []
    for file in files:
        try:
            _load(file)
        except RecipeError as error:
            problems.extend(error.problems)
    if problems:
        raise RecipeError(problems)
    if as_json:
        output.event("finished", files=[str(file) for file in files], exit=0)
    else:
        output.say(f"{len(files)} {'recipe is' if len(files) == 1 else 'recipes are'} sound")


@app.command()
def schema(brand: Annotated[bool, typer.Option("--brand", help="Of brand files instead.")] = False) -> None:
    """JSON Schema (draft-07) of recipes, for editors.

    Example: kontext-batch recipes schema > recipe.schema.json
    """
    from kontext_batch.recipes.jsonschema import brand_schema, recipe_schema

    output.say_json(brand_schema() if brand else recipe_schema())


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]")] = Path("recipe.yaml"), as_json: common.JsonOption = False
) -> None:
    """Write a small recipe to start from; a file that is there stays.

    Example: kontext-batch recipes init spring.yaml
    """
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(STARTER)
    except FileExistsError as error:
        raise SettingsError(f"{file}: there is a file already") from error
    except OSError as error:
        raise SettingsError(f"{file}: cannot be written ({error.strerror})") from error
    if as_json:
        output.event("finished", file=str(file), exit=0)
        return
    output.say(f"{file}: put pictures into photos/ beside it, then `kontext-batch run {file}`")


def _load(file: Path) -> None:
    """Raises `RecipeError`."""
    from kontext_batch.recipes.loader import load_recipe
    from kontext_batch.services.look import MAX_RECIPE_BYTES
    from kontext_batch.storage.router import open_store
    from kontext_batch.storage.uris import file_uri

    folder = file_uri(file.absolute().parent.resolve())
    store = open_store([folder], [])

    def read(name: str) -> bytes:
        if "://" in name or name.startswith("/"):
            raise NotAllowed(f"{name}: imports of other places are read by `plan`")
        return store.read(file_uri(file.absolute().parent.resolve() / name), max_bytes=MAX_RECIPE_BYTES)

    try:
        load_recipe(read(file.name), file=str(file), read_import=read)
    except ObjectNotFound as error:
        raise RecipeError([Problem(str(file), 0, 0, "", "there is no such file")]) from error
