"""The steps of a recipe, compiled for planning: which pictures each reads where, and where it exists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kontext_batch.planning.listing import Listed
from kontext_batch.planning.plan import ImageInfo, Origin
from kontext_batch.planning.points import FullPoint, Projection, Test, projection
from kontext_batch.planning.values import Point, Text, Texts
from kontext_batch.recipes.loader import Recipe
from kontext_batch.recipes.references import Template
from kontext_batch.recipes.schema import AnyStep, ContactSheetStep, Not
from kontext_batch.recipes.scope import picture_uses, text_uses
from kontext_batch.recipes.source import Path


@dataclass(frozen=True, slots=True)
class FromStep:
    """A picture that an earlier step made."""

    step: str


@dataclass(frozen=True, slots=True)
class FromFile:
    """A file of an input's row."""

    position: int
    """Of the axis in a point."""
    name: str


Alternative = FromStep | FromFile | ImageInfo
Chosen = FromStep | tuple[ImageInfo, ...]


@dataclass(frozen=True, slots=True)
class PictureUse:
    """One picture (or list of pictures) of a step: the first alternative that exists counts."""

    role: str
    alternatives: tuple[Alternative, ...]
    path: Path


@dataclass(slots=True, eq=False)
class Node:
    """A step, compiled."""

    name: str
    step: AnyStep
    axes: tuple[int, ...]
    """Positions of its axes in a point."""
    project: Projection
    """The values of a point on these axes."""
    pictures: tuple[PictureUse, ...]
    texts: Mapping[str, Text]
    conditions: tuple[Test, ...]
    origin: Origin
    candidates: int
    picks_all: bool
    always: bool
    """Exists at every point."""
    ancestors: tuple[Node, ...]
    """Those that do not exist everywhere, parents first; none for a contact sheet, whose cells lie elsewhere."""
    known: dict[Point, bool] = field(default_factory=dict)

    @property
    def is_sheet(self) -> bool:
        return isinstance(self.step, ContactSheetStep)


class Nodes(Mapping[str, Node]):
    """All steps of a recipe, parents before children, and where each exists."""

    def __init__(self, recipe: Recipe, listed: Listed, texts: Texts) -> None:
        self.recipe, self.listed, self.texts = recipe, listed, texts
        self.groups: dict[str, dict[Point, list[FullPoint]]] = {}
        self._nodes: dict[str, Node] = {}
        for name in recipe.scope.steps:
            self._nodes[name] = self._compile(name)

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def _compile(self, name: str) -> Node:
        recipe = self.recipe
        step = recipe.document.steps[name]
        mark = recipe.source.mark(("steps", name), key=True)
        axes = self.positions(recipe.scope.steps[name].axes)
        pictures = tuple(
            PictureUse(role, self.alternatives(use.template), use.path) for role, use in picture_uses(name, step)
        )
        texts = {
            key: self.texts.compile(use.template.text, use.path) for key, use in text_uses(name, step, recipe.document)
        }
        conditions = tuple(self._condition(name, key, step) for key in step.if_)
        always = not conditions and all(
            any(not isinstance(each, FromStep) or self._nodes[each.step].always for each in use.alternatives)
            for use in pictures
        )
        return Node(
            name=name,
            step=step,
            axes=axes,
            project=projection(axes),
            pictures=pictures,
            texts=texts,
            conditions=conditions,
            origin=Origin(recipe.file, mark.line, mark.column),
            candidates=getattr(step, "candidates", 1),
            picks_all=getattr(step, "pick", "first") == "all",
            always=always,
            ancestors=() if always or isinstance(step, ContactSheetStep) else self._ancestors(pictures),
        )

    def _ancestors(self, pictures: tuple[PictureUse, ...]) -> tuple[Node, ...]:
        found: set[str] = set()
        for use in pictures:
            for each in use.alternatives:
                if isinstance(each, FromStep) and not self._nodes[each.step].always:
                    found |= {each.step, *(ancestor.name for ancestor in self._nodes[each.step].ancestors)}
        return tuple(node for node in self._nodes.values() if node.name in found)

    def positions(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        """Where these axes stand in a point."""
        return tuple(self.recipe.scope.axes.index(axis) for axis in axes)

    def alternatives(self, template: Template) -> tuple[Alternative, ...]:
        """What the names of a picture's reference stand for."""
        scope = self.recipe.scope
        found: list[Alternative] = []
        for name in template.names:
            target = scope.resolve(name)
            if target.kind == "step":
                found.append(FromStep(target.owner))
            elif target.kind in ("file", "axis"):  # an axis: of a glob, whose values are files
                found.append(FromFile(scope.axes.index(target.owner), target.field or "file"))
            else:
                found.append(self.listed.logos[target.owner])
        return tuple(found)

    def _condition(self, name: str, key: str, step: AnyStep) -> Test:
        wanted = step.if_[key]
        lookup = self.texts.key_lookup(key, ("steps", name, "if", key))
        if isinstance(wanted, Not):
            unwanted = frozenset(wanted.not_)
            return lambda point: lookup(point) not in unwanted
        values = frozenset(wanted)
        return lambda point: lookup(point) in values

    def exists(self, node: Node, point: FullPoint) -> bool:
        """Whether a step has an instance at a point: its `if` holds and every picture that it reads exists."""
        if node.always:
            return True
        key = node.project(point)
        known = node.known.get(key)
        if known is None:
            # Ancestors first, so that a long chain is a loop and not a recursion.
            for ancestor in node.ancestors:
                if ancestor.project(point) not in ancestor.known:
                    self.exists(ancestor, point)
            known = all(test(point) for test in node.conditions) and (
                any(self.chosen(use, each) for use in node.pictures for each in self.cells(node, point))
                if node.is_sheet
                else all(self.chosen(use, point) for use in node.pictures)
            )
            node.known[key] = known
        return known

    def chosen(self, use: PictureUse, point: FullPoint) -> Chosen | None:
        """The first alternative that exists at a point."""
        for each in use.alternatives:
            if isinstance(each, FromStep):
                if self.exists(self._nodes[each.step], point):
                    return each
            elif isinstance(each, FromFile):
                files = point[each.position].files.get(each.name)
                if files:
                    return files if isinstance(files, tuple) else (files,)
            else:
                return (each,)
        return None

    def cells(self, node: Node, point: FullPoint) -> list[FullPoint]:
        """The points that a contact sheet shows: all that agree with it on the sheet's own axes."""
        return self.groups[node.name][node.project(point)]

    def group(self, points: list[FullPoint]) -> None:
        """Make `cells` of these points."""
        for node in self._nodes.values():
            if node.is_sheet:
                groups = self.groups[node.name] = {}
                for point in points:
                    groups.setdefault(node.project(point), []).append(point)
