"""Where finished pictures go: paths expanded, collisions found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kontext_batch.errors import Problem
from kontext_batch.planning import uris
from kontext_batch.planning.making import Made, Making, readable
from kontext_batch.planning.nodes import FromStep, Nodes
from kontext_batch.planning.plan import Origin, PlannedDelivery
from kontext_batch.planning.points import FullPoint, projection
from kontext_batch.planning.values import AtPoint, Point, Text, Value
from kontext_batch.recipes.loader import Recipe
from kontext_batch.recipes.references import parse_template
from kontext_batch.recipes.schema import EXTENSIONS
from kontext_batch.recipes.source import Path

SHOWN_COLLISIONS = 3


@dataclass(frozen=True, slots=True)
class Want:
    """One picture (or its candidates) that an output delivers."""

    output: int
    step: str
    point: FullPoint


class Delivering:
    """Collects deliveries; `problems` and `notes` as they are found."""

    def __init__(self, recipe: Recipe, nodes: Nodes, base: str, allowed: Sequence[str] | None) -> None:
        self.recipe, self.nodes, self.base, self.allowed = recipe, nodes, base, allowed
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.deliveries: list[PlannedDelivery] = []
        self._taken: dict[str, PlannedDelivery] = {}
        self._collisions: dict[int, int] = {}

    def wants(self, points: Sequence[FullPoint], limit: int | None) -> list[Want]:
        """What the outputs deliver, in the order of outputs and points; the first `limit` of them."""
        found: list[Want] = []
        for index, output in enumerate(self.recipe.document.outputs):
            absent = 0
            scope = self.recipe.scope
            made, path = parse_template(output.from_), parse_template(output.to)
            axes = self.nodes.positions(scope.in_order(scope.axes_of(made) | scope.axes_of(path)))
            alternatives = [each for each in self.nodes.alternatives(made) if isinstance(each, FromStep)]
            project = projection(axes)
            firsts: dict[Point, FullPoint] = {}
            for point in points:
                firsts.setdefault(project(point), point)
            for point in firsts.values():
                step = next((each.step for each in alternatives if self.nodes.exists(self.nodes[each.step], point)), "")
                if step:
                    found.append(Want(index, step, point))
                else:
                    absent += 1
            if absent:
                self.notes.append(f"outputs[{index}]: {output.from_} does not exist at {absent} points")
        return found if limit is None else found[:limit]

    def deliver(self, wants: Sequence[Want], making: Making) -> None:
        """Expand the path of each want whose picture could be made."""
        sources = {
            uris.one_file(each.source.uri)
            for step in making.steps.values()
            for each in step.inputs
            if each.source is not None
        }
        texts = [
            self.nodes.texts.compile(output.to, ("outputs", index, "to"))
            for index, output in enumerate(self.recipe.document.outputs)
        ]
        marks = [self.recipe.source.mark(("outputs", index)) for index in range(len(texts))]
        origins = [Origin(self.recipe.file, mark.line, mark.column) for mark in marks]
        for want in wants:
            node = self.nodes[want.step]
            made = making.made[want.step].get(node.project(want.point))
            if made is None:
                continue
            for one in readable(node, made):
                self._deliver(want, one, texts[want.output], origins[want.output], sources)
        for index, count in self._collisions.items():
            if count > SHOWN_COLLISIONS:
                rest = count - SHOWN_COLLISIONS
                more = f"and {rest} more output{'s' if rest > 1 else ''} whose name is taken"
                self._tell(("outputs", index, "to"), more)

    def _deliver(self, want: Want, made: Made, text: Text, origin: Origin, sources: set[str]) -> None:
        extra = (
            Value("ext", EXTENSIONS[made.format], {}),
            Value("candidate", str(made.instance.candidate), {}),
        )
        try:
            place = uris.expand(text.pieces((*want.point, *extra)), self.base, pattern=False, slashes=False)
        except AtPoint as error:
            self.problems.append(error.problem)
            return
        except ValueError as error:
            self._tell(text.path, f"{error}{_shown(want.point)}")
            return
        path = uris.literal(place) if place.startswith("s3:") else place
        file = uris.one_file(path)
        if path.endswith("/"):
            self._tell(text.path, f"{path} is a folder; a file's name is wanted")
        elif not uris.allowed(path, self.allowed):
            places = ", ".join(self.allowed or ()) or "nothing"
            more = "the setting write_prefixes (KONTEXT_BATCH_WRITE_PREFIXES), or `write` of an inbox, allows more"
            self._tell(text.path, f"{path} lies outside of what this recipe may write ({places}); {more}")
        elif file in sources:
            self._tell(text.path, f"{path} is an input of this recipe: it would be overwritten")
        elif file in self._taken:
            self._collide(want, path, made, self._taken[file])
        else:
            output = self.recipe.document.outputs[want.output]
            delivery = PlannedDelivery(path, made.key, output.if_exists, made.instance, origin)
            self._taken[file] = delivery
            self.deliveries.append(delivery)

    def _collide(self, want: Want, path: str, made: Made, taken: PlannedDelivery) -> None:
        count = self._collisions[want.output] = self._collisions.get(want.output, 0) + 1
        if count > SHOWN_COLLISIONS:
            return
        first, second = taken.instance, made.instance
        apart = [axis for axis, key in second.axes if dict(first.axes).get(axis) != key]
        lacking = [axis for axis in apart if f"${{{axis}" not in self.recipe.document.outputs[want.output].to]
        hint = f"; the path lacks {', '.join(f'${{{axis}}}' for axis in lacking)}" if lacking else ""
        which = " and ".join(" ".join(key for _, key in each.axes) for each in (first, second))
        if path == taken.path:
            message = f"two outputs have one name, {path} ({which}){hint}"
        else:
            message = (
                f"two outputs have names that differ only in case, {taken.path} and {path} ({which}), which macOS and "
                f"Windows keep as one file{hint or '; rename one'}"
            )
        self._tell(("outputs", want.output, "to"), message)

    def _tell(self, path: Path, message: str) -> None:
        self.problems.append(self.recipe.problem(path, message))


def _shown(point: FullPoint) -> str:
    return f" (at {', '.join(f'{value.axis} {value.key}' for value in point)})"
