"""The points of the matrix: every combination of axis values that survives `exclude`, and those of `include`."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

from kontext_batch.errors import PlanRefused, Problem
from kontext_batch.planning.listing import Listed
from kontext_batch.planning.values import AtPoint, Lookup, Point, Texts, Value, input_value
from kontext_batch.recipes.channels import CHANNEL_AXIS
from kontext_batch.recipes.loader import Recipe
from kontext_batch.recipes.references import nearest
from kontext_batch.recipes.schema import Channel
from kontext_batch.recipes.scope import UnknownName
from kontext_batch.recipes.source import Path
from kontext_batch.recipes.tables import unknown_column

FullPoint = tuple[Value, ...]
Test = Callable[[FullPoint], bool]


def axis_values(recipe: Recipe, listed: Listed) -> Mapping[str, Mapping[str, Value]]:
    """Axis -> key -> value, in the order of tables and recipe; what only `include` has comes last."""
    scope = recipe.scope
    found: dict[str, Mapping[str, Value]] = {}
    for axis in scope.axes:
        if axis in recipe.document.inputs:
            found[axis] = {row.key: input_value(axis, row) for row in listed.rows.get(axis, ())}
            continue
        values: dict[str, Value] = {}
        for key, fields in scope.values[axis].items():
            channel: Channel | None = scope.channels.get(key) if axis == CHANNEL_AXIS else None
            values[key] = Value(axis, key, fields, channel=channel)
        found[axis] = values
    return found


class Points:
    """Enumerates the points of a recipe. `problems` is filled by `all`."""

    def __init__(self, recipe: Recipe, listed: Listed, texts: Texts) -> None:
        self.recipe, self.listed, self.texts = recipe, listed, texts
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.values = axis_values(recipe, listed)

    def all(self, *, only: Mapping[str, Sequence[str]], most: int) -> list[FullPoint]:
        """The surviving points, the first axis changing slowest. Raises `PlanRefused` for more than `most`."""
        included = self.recipe.scope.included
        plain = [
            [value for key, value in values.items() if key not in included.get(axis, ())]
            for axis, values in self.values.items()
        ]
        count = math.prod(len(values) for values in plain)
        if count > most:
            shape = " x ".join(f"{len(values)} {axis}" for axis, values in zip(self.values, plain, strict=True))
            raise PlanRefused([f"the matrix has {count:,} points ({shape}); at most {most:,} are planned"])
        excluded = [(index, self._rule(rule, index)) for index, rule in enumerate(self.recipe.document.matrix.exclude)]
        points = [
            point for point in itertools.product(*plain) if not any(test(point) for _, test in excluded)
        ]  # fmt: skip
        points += self._include(set(points), excluded, plain)
        tests = self._only(only)
        return [point for point in points if all(test(point) for test in tests)] if tests else points

    # -------------------------------------------------------------------------------------------------- exclude

    def _rule(self, rule: Mapping[str, tuple[str, ...]], index: int) -> Test:
        tests = [self.matches(key, wanted, ("matrix", "exclude", index, key)) for key, wanted in rule.items()]
        return lambda point: all(test(point) for test in tests)

    def matches(self, key: str, wanted: Sequence[str], path: Path) -> Test:
        """Whether a point has one of these values at `locale` or `item.category`.

        What follows one axis only is decided once for each of its values.
        """
        scope = self.recipe.scope
        lookup = self._safe(self.texts.key_lookup(key, path))
        axes = scope.in_order(scope.axes_of_name(key))
        allowed = frozenset(wanted)
        if len(axes) != 1:
            return lambda point: lookup(point) in allowed
        position = scope.axes.index(axes[0])
        known: dict[Value, bool] = {}

        def test(point: FullPoint) -> bool:
            value = point[position]
            if value not in known:
                known[value] = lookup(point) in allowed
            return known[value]

        return test

    def _safe(self, lookup: Lookup) -> Lookup:
        """What has no value (told once) is equal to nothing."""

        def safe(point: Point) -> str | None:
            try:
                return lookup(point)
            except AtPoint as error:
                if error.problem not in self.problems:
                    self.problems.append(error.problem)
                return None

        return safe

    # -------------------------------------------------------------------------------------------------- include

    def _include(
        self, existing: set[FullPoint], excluded: Sequence[tuple[int, Test]], plain: Sequence[Sequence[Value]]
    ) -> Iterator[FullPoint]:
        for index, rule in enumerate(self.recipe.document.matrix.include):
            path: Path = ("matrix", "include", index)
            chosen = [self._chosen(axis, rule, path) for axis in self.recipe.scope.axes]
            if any(value is None for value in chosen):
                continue
            point = tuple(value for value in chosen if value is not None)
            shown = ", ".join(f"{value.axis} {value.key}" for value in point)
            clash = next((number for number, test in excluded if test(point)), None)
            if point in existing:
                self._tell(path, f"the point is there already ({shown})")
            elif clash is not None:
                line = self.recipe.source.mark(("matrix", "exclude", clash)).line
                self._tell(path, f"the point is taken away by exclude in line {line} ({shown})")
            else:
                existing.add(point)
                yield point

    def _chosen(self, axis: str, rule: Mapping[str, str], path: Path) -> Value | None:
        """The one value of an axis that an `include` names; None when there is none (told or noted)."""
        values = self.values[axis]
        if axis not in self.recipe.document.inputs:
            return values[rule[axis]]
        wanted = {key: text for key, text in rule.items() if key.partition(".")[0] == axis}
        found = [
            value
            for value in values.values()
            if all((value.key if key == axis else value.fields.get(key.partition(".")[2])) == text
                   for key, text in wanted.items())
        ]  # fmt: skip
        if len(found) == 1:
            return found[0]
        said = ", ".join(f"{key}: {text}" for key, text in wanted.items())
        if found:
            self._tell(path, f"{len(found)} rows of '{axis}' have {said}; a point is one row")
        elif any(row.axis == axis and row.row in wanted.values() for row in self.listed.skipped):
            self.notes.append(f"matrix.include[{path[-1]}]: its row of '{axis}' is skipped ({said})")
        else:
            self._tell(
                path, f"no row of '{axis}' that takes part has {said}{nearest(next(iter(wanted.values())), values)}"
            )
        return None

    # ----------------------------------------------------------------------------------------------------- only

    def _only(self, only: Mapping[str, Sequence[str]]) -> list[Test]:
        tests: list[Test] = []
        scope = self.recipe.scope
        for key, wanted in only.items():
            axis = key.partition(".")[0]
            if axis not in scope.axes:
                self._selection(key, f"unknown axis '{axis}'{nearest(axis, scope.axes)}")
                continue
            columns = next((tuple(value.fields) for value in self.values[axis].values() if value.row is not None), ())
            column = key.partition(".")[2]
            if columns and column and column not in columns:
                self._selection(key, unknown_column(column, columns))
                continue
            try:
                tests.append(self.matches(key, wanted, ("matrix",)))
            except UnknownName as error:
                self._selection(key, f"unknown {error.what} '{error.name}'{nearest(error.name, error.known)}")
                continue
            for value in wanted:
                if key == axis and value not in self.values[axis]:
                    self._selection(key, f"'{axis}' has no value '{value}'{nearest(value, self.values[axis])}")
        return tests

    def _selection(self, key: str, message: str) -> None:
        problem = Problem("--only", 0, 0, key, message)
        if problem not in self.problems:
            self.problems.append(problem)

    def _tell(self, path: Path, message: str) -> None:
        self.problems.append(self.recipe.problem(path, message))


Projection = Callable[[FullPoint], Point]


def projection(positions: Sequence[int]) -> Projection:
    """The values of a point at some positions; taken often, so in C where it can be."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    if positions:
        position = positions[0]
        return lambda point: (point[position],)
    return lambda point: ()
