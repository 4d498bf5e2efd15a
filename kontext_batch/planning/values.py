"""Texts of a recipe at one point of the matrix: what every `${...}` becomes.

A point is a tuple with one `Value` for each axis of the recipe, in `Scope.axes` order; axes that a text does not follow
may be None. What a name stands for is looked up once, when a text is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kontext_batch.errors import Problem
from kontext_batch.planning.listing import Row
from kontext_batch.planning.plan import ImageInfo
from kontext_batch.planning.uris import Piece
from kontext_batch.recipes.channels import CHANNEL_FIELDS
from kontext_batch.recipes.loader import Recipe
from kontext_batch.recipes.references import Reference, Template, parse_template
from kontext_batch.recipes.schema import Channel
from kontext_batch.recipes.scope import Target, channel_field
from kontext_batch.recipes.source import Path
from kontext_batch.recipes.tables import unknown_column


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One value of an axis."""

    axis: str
    key: str
    fields: Mapping[str, str]
    """Of an input: columns, which are data. Of a matrix axis: texts with references."""
    files: Mapping[str, ImageInfo | tuple[ImageInfo, ...]] = field(default_factory=dict)
    row: Row | None = None
    """Of an input."""
    channel: Channel | None = None
    """On the axis `channel`: what the name means."""


MAX_TEXT = 20_000
"""Characters of an expanded text: texts made of texts double at every level."""

Point = tuple[Value | None, ...]
Lookup = Callable[[Point], str | None]
"""The text at a point; None when there is none (an absent field, an empty text)."""


class AtPoint(Exception):
    """A text has no value at a point; carries the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class Text:
    """A compiled template."""

    __slots__ = ("axes", "memo", "parts", "path", "plain", "recipe")

    def __init__(self, recipe: Recipe, template: Template, path: Path, texts: Texts) -> None:
        self.recipe, self.path = recipe, path
        self.plain = template.text if not template.references else None
        self.parts = tuple(
            part if isinstance(part, str) else (part, *texts.lookups(part, path)) for part in template.parts
        )
        if self.plain is not None:
            self.plain = "".join(part for part in template.parts if isinstance(part, str))
        scope = recipe.scope
        positions = {axis: index for index, axis in enumerate(scope.axes)}
        self.axes = tuple(positions[axis] for axis in scope.in_order(scope.axes_of(template)))
        if "candidate" in template.names:  # in a label: the point has one more value, at its end
            self.axes = (*self.axes, -1)
        self.memo: dict[tuple[Value | None, ...], str] = {}

    def __call__(self, point: Point) -> str:
        """The text at `point`. Raises `AtPoint`."""
        if self.plain is not None:
            return self.plain
        key = tuple([point[axis] for axis in self.axes])
        known = self.memo.get(key)
        if known is None:
            known = "".join([text for text, _ in self.pieces(point)])
            if len(known) > MAX_TEXT:
                raise AtPoint(self.recipe.problem(self.path, f"a text of more than {MAX_TEXT} characters"))
            self.memo[key] = known
        return known

    def pieces(self, point: Point) -> list[Piece]:
        """The text in pieces that are the author's own or data."""
        return [(part, False) if isinstance(part, str) else self._value(part, point) for part in self.parts]

    def _value(self, part: tuple[Reference, tuple[Lookup, ...], bool], point: Point) -> Piece:
        reference, lookups, data = part
        picky = len(lookups) > 1 or reference.default is not None
        for lookup in lookups:
            text = lookup(point)
            if text is not None and (text or not picky):
                return reference.apply(text), data
        if reference.default is not None:
            return reference.apply(reference.default), False
        raise AtPoint(self._nothing(reference, point))

    def _nothing(self, reference: Reference, point: Point) -> Problem:
        """Why there is nothing at this point, at the place that has to be mended."""
        recipe = self.recipe
        target = recipe.scope.resolve(reference.names[-1])
        axes = recipe.scope.axes_of_name(reference.names[-1])
        at = ", ".join(f"{value.axis} '{value.key}'" for value in point if value is not None and value.axis in axes)
        if target.kind == "text":
            table = recipe.document.texts[target.owner].table
            row = next(value.row for value in point if value is not None and value.axis == table)
            assert row is not None
            message = f"no text '{target.owner}' for {at}"
            return Problem(row.file, row.line, 0, f"texts.{target.owner}", message)
        return recipe.problem(self.path, f"'{reference.text}' has no value for {at}")


class Texts:
    """Compiles the templates of one recipe, each once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._texts: dict[tuple[str, Path], Text] = {}
        self._lookups: dict[str, Lookup] = {}
        self._positions = {axis: index for index, axis in enumerate(recipe.scope.axes)}

    def compile(self, text: str, path: Path) -> Text:
        """`path`: where the text is written, for problems."""
        known = self._texts.get((text, path))
        if known is None:
            known = self._texts[text, path] = Text(self.recipe, parse_template(text), path, self)
        return known

    def lookups(self, reference: Reference, path: Path) -> tuple[tuple[Lookup, ...], bool]:
        """How each name of a reference is found, and whether what is found is data (not the author's own words)."""
        targets = [self.recipe.scope.resolve(name) for name in reference.names]
        found = tuple(self._lookup(name, target, path) for name, target in zip(reference.names, targets, strict=True))
        return found, any(target.kind not in ("var", "brand") for target in targets)

    def key_lookup(self, key: str, path: Path) -> Lookup:
        """The value behind a key of `if`, `exclude` or `include`."""
        return self._lookup(key, self.recipe.scope.resolve(key), path)

    def _lookup(self, name: str, target: Target, path: Path) -> Lookup:
        if name not in self._lookups:
            self._lookups[name] = self._make(target, path)
        return self._lookups[name]

    def _make(self, target: Target, path: Path) -> Lookup:
        document = self.recipe.document
        if target.kind == "axis":
            return _key(self._positions[target.owner])
        if target.kind == "field":
            return self._field(target, path)
        if target.kind == "brand":
            return lambda _point: target.value
        if target.kind == "var":
            return self.compile(document.vars[target.owner], ("vars", target.owner))
        if target.kind == "prompt":
            return self.compile(getattr(document.steps[target.owner], "prompt"), ("steps", target.owner, "prompt"))  # noqa: B009
        if target.kind == "text":
            return self._translation(target.owner)
        # `ext` and `candidate`: a path is expanded at a point with both at its end, a label with the latter.
        return _key(-2 if target.kind == "ext" else -1)

    def _field(self, target: Target, path: Path) -> Lookup:
        position, name = self._positions[target.owner], target.field
        if target.owner in self.recipe.document.inputs:
            return self._column(position, name, path)
        channel_field_name = name if name in CHANNEL_FIELDS else None
        compiled: dict[str, Text] = {}

        def variant(point: Point) -> str | None:
            value = point[position]
            assert value is not None
            text = compiled.get(value.key)
            if text is not None:
                return text(point)
            if name in value.fields:
                where: Path = ("matrix", value.axis, value.key, name)
                text = compiled[value.key] = self.compile(value.fields[name], where)
                return text(point)
            if channel_field_name and value.channel is not None:
                return channel_field(value.channel, channel_field_name)
            return None

        return variant

    def _column(self, position: int, name: str, path: Path) -> Lookup:
        def column(point: Point) -> str | None:
            value = point[position]
            assert value is not None
            try:
                return value.fields[name]
            except KeyError:
                raise AtPoint(self.recipe.problem(path, unknown_column(name, tuple(value.fields)))) from None

        return column

    def _translation(self, name: str) -> Lookup:
        declared = self.recipe.document.texts[name]
        position = self._positions[declared.table]
        path: Path = ("texts", name, "column")
        column = self.compile(declared.column, path)

        def translation(point: Point) -> str | None:
            value = point[position]
            assert value is not None
            wanted = column(point)
            if wanted not in value.fields:
                raise AtPoint(self.recipe.problem(path, unknown_column(wanted, tuple(value.fields))))
            return value.fields[wanted] or None

        return translation


def _key(position: int) -> Lookup:
    def key(point: Point) -> str | None:
        value = point[position]
        assert value is not None
        return value.key

    return key


def input_value(axis: str, row: Row) -> Value:
    """The axis value of a row."""
    return Value(axis, row.key, row.fields, row.files, row)
