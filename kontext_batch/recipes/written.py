"""Every text of a recipe that may hold references, and what they name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kontext_batch.recipes.references import parse_template
from kontext_batch.recipes.schema import AnyStep, GlobInput, RecipeDocument, TableInput
from kontext_batch.recipes.source import Path


def written_texts(document: RecipeDocument) -> Iterator[tuple[Path, str]]:
    """(path, text) of every text that may hold references."""
    for name, text in document.vars.items():
        yield ("vars", name), text
    for name, column in document.texts.items():
        yield ("texts", name, "column"), column.column
    for axis, declared in document.inputs.items():
        if isinstance(declared, GlobInput):
            yield ("inputs", axis, "glob"), declared.glob
            continue
        for name, patterns in declared.files.items():
            for index, pattern in enumerate([patterns] if isinstance(patterns, str) else patterns):
                at: Path = ("inputs", axis, "files", name)
                yield (at if isinstance(patterns, str) else (*at, index)), pattern
    for axis, values in document.matrix.axes.items():
        if isinstance(values, Mapping):
            for value, fields in values.items():
                for name, text in fields.items():
                    yield ("matrix", axis, value, name), text
    for index, point in enumerate(document.matrix.include):
        for name, text in point.items():
            yield ("matrix", "include", index, name), text
    for name, step in document.steps.items():
        yield from _step_texts(name, step)
    for index, output in enumerate(document.outputs):
        yield ("outputs", index, "from"), output.from_
        yield ("outputs", index, "to"), output.to
    for op in ("edit", "generate", "finish"):
        for name in ("negative_prompt", "background"):
            default = getattr(getattr(document.defaults, op), name, None)
            if default is not None:
                yield ("defaults", op, name), default


def _step_texts(name: str, step: AnyStep) -> Iterator[tuple[Path, str]]:
    at: Path = ("steps", name)
    for key in ("image", "prompt", "negative_prompt", "frame", "background", "channel", "size", "label"):
        written = getattr(step, key, None)
        if isinstance(written, str):
            yield (*at, key), written
    for key in ("references", "images"):
        for index, text in enumerate(getattr(step, key, ())):
            yield (*at, key, index), text
    for index, overlay in enumerate(getattr(step, "overlay", ())):
        yield (*at, "overlay", index, "logo"), overlay.logo


def columns_named(document: RecipeDocument, axis: str) -> list[tuple[str, Path]]:
    """(column, where) of every column of an input's table that the recipe names, each once."""
    declared = document.inputs[axis]
    assert isinstance(declared, TableInput)
    found: dict[str, Path] = {}
    for path, text in written_texts(document):
        for name in parse_template(text).names:
            _note(name, axis, path, found)
    for step, each in document.steps.items():
        for key in each.if_:
            _note(key, axis, ("steps", step, "if", key), found)
    for index, rule in enumerate(document.matrix.exclude):
        for key in rule:
            _note(key, axis, ("matrix", "exclude", index, key), found)
    for index, point in enumerate(document.matrix.include):
        for key in point:
            _note(key, axis, ("matrix", "include", index, key), found)
    return [(column, path) for column, path in found.items() if column not in declared.files]


def _note(name: str, axis: str, path: Path, found: dict[str, Path]) -> None:
    first, _, column = name.partition(".")
    if first == axis and column:
        found.setdefault(column, path)


def logos_named(document: RecipeDocument) -> list[str]:
    """Names of the brand's logos that the recipe uses."""
    names = (name for _, text in written_texts(document) for name in parse_template(text).names)
    return list(dict.fromkeys(name.split(".", 2)[2] for name in names if name.startswith("brand.logos.")))
