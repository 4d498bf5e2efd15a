"""Makes the needed instances of each step: pictures, sizes, parameters, key. Parents come before children."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kontext_batch.errors import Problem
from kontext_batch.planning.frames import Shape, source_shape
from kontext_batch.planning.listing import AdapterInfo, ModelInfo
from kontext_batch.planning.nodes import FromStep, Node, Nodes
from kontext_batch.planning.params import SAMPLING, lane_of, step_key
from kontext_batch.planning.plan import Axes, ImageInfo, Instance, InstanceId, PlannedStep, StepInput
from kontext_batch.planning.points import FullPoint
from kontext_batch.planning.values import AtPoint, Point
from kontext_batch.recipes.loader import Recipe
from kontext_batch.recipes.source import Path

MAX_CELLS = 1_000
"""Pictures on one contact sheet."""

# The values below are made once or more for each of 100,000 instances. They are not frozen, because setting a field of
# a frozen one costs five times as much; nothing changes them.


@dataclass(frozen=True, slots=True)
class World:
    """What a plan depends on besides recipe and listing."""

    models: Mapping[str, ModelInfo]
    adapters: Mapping[str, AdapterInfo]
    numeric_mode: str
    count_tokens: Callable[[str, str], int] | None
    lane_seconds: Mapping[str, float]
    default_seconds: float | None
    takes: Mapping[InstanceId, int]


@dataclass(slots=True, eq=False)
class Made:
    """One finished instance, as its readers see it."""

    key: str
    shape: Shape | None
    """None where the planner does not know the size (a contact sheet)."""
    format: str
    weights: str | None
    """Hash of the model that sampled it, whose latents can be handed on; None where no model did."""
    instance: Instance


@dataclass(slots=True, eq=False)
class MadeSet:
    """All candidates of a step at one point."""

    fans: tuple[tuple[str, int], ...]
    """(step with `pick: all`, its candidates) for which this step is made one by one."""
    own: int
    """Its own candidates."""
    made: tuple[Made, ...]
    """The own candidate changes fastest."""

    def at(self, combo: Mapping[str, int], own: int) -> Made:
        """The one made for these candidates (1-based) of the fans."""
        index = 0
        for step, count in self.fans:
            index = index * count + combo[step] - 1
        return self.made[index * self.own + own - 1]


@dataclass(slots=True, eq=False)
class Picture:
    """A picture that an instance reads, found."""

    role: str
    source: ImageInfo | None
    made: Made | None
    path: Path
    point: FullPoint
    """Where it was looked up: that of the instance, or of the cell of a contact sheet."""

    @property
    def shape(self) -> Shape | None:
        if self.source is not None:
            return source_shape(self.source)
        assert self.made is not None
        return self.made.shape


@dataclass(slots=True, eq=False)
class Found:
    """What a picture use stands for at a point, all candidates together."""

    role: str
    path: Path
    point: FullPoint
    source: ImageInfo | None
    parent: Node | None
    made: MadeSet | None


@dataclass(slots=True)
class Job:
    """One instance that is being made."""

    node: Node
    point: FullPoint
    axes: Axes
    candidate: int
    pictures: tuple[Picture, ...]


@dataclass(slots=True, eq=False)
class Result:
    """What an operation's planner says of one job."""

    params: Mapping[str, Any]
    shape: Shape | None
    format: str


class Fault(Exception):
    """An instance cannot be made: the author's fault at `path`."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path, self.message = path, message


Planner = Callable[[Job], Result]


@dataclass(slots=True)
class Tally:
    """Notes that are counted, not repeated."""

    counts: Counter[str] = field(default_factory=Counter)

    def __call__(self, note: str) -> None:
        self.counts[note] += 1

    def notes(self) -> Iterator[str]:
        for note, count in self.counts.items():
            yield f"{note} ({count} times)" if count > 1 else note


class Making:
    """Collects steps and instances; `problems` are all that stand against them."""

    def __init__(self, recipe: Recipe, nodes: Nodes, world: World) -> None:
        self.recipe, self.nodes, self.world = recipe, nodes, world
        self.problems: list[Problem] = []
        self.steps: dict[str, PlannedStep] = {}
        self.instances: list[Instance] = []
        self.made: dict[str, dict[Point, MadeSet]] = {name: {} for name in nodes}
        self.tally = Tally()
        self.untimed: Counter[str] = Counter()

    def notes(self) -> list[str]:
        """What an author should see before paying."""
        untimed = [
            f"nothing was timed with {_model_of(lane)} yet: {count} images are not in the estimate; "
            "run a slice first (--limit)"
            for lane, count in self.untimed.items()
        ]
        return [*self.tally.notes(), *untimed]

    def make(self, node: Node, needed: Mapping[Point, FullPoint], planner: Planner) -> None:
        """All candidates of a step at all points where it is needed."""
        axis_names = [self.recipe.scope.axes[position] for position in node.axes]
        made = self.made[node.name]
        for key, point in needed.items():
            axes: Axes = tuple([(name, value.key) for name, value in zip(axis_names, key, strict=True) if value])
            try:
                found = self._make_all(node, planner, point, axes)
            except AtPoint as error:
                self.problems.append(error.problem)
            except Fault as fault:
                self.tell(fault.path, f"{fault.message}{_at(axes)}")
            else:
                if found is not None:
                    made[key] = found

    def tell(self, path: Path, message: str) -> None:
        problem = self.recipe.problem(path, message)
        if problem not in self.problems[-50:]:
            self.problems.append(problem)

    def _make_all(self, node: Node, planner: Planner, point: FullPoint, axes: Axes) -> MadeSet | None:
        sets = self._sets(node, point)
        if sets is None:
            return None
        fans = () if node.is_sheet else self._fans(sets)
        made: list[Made] = []
        number = 0
        for combo in itertools.product(*[range(1, count + 1) for _, count in fans]):
            chosen = dict(zip([step for step, _ in fans], combo, strict=True))
            pictures = self._pictures(sets, chosen, everything=node.is_sheet)
            for _ in range(node.candidates):
                number += 1
                made.append(self._make_one(Job(node, point, axes, number, pictures), planner))
        return MadeSet(fans, node.candidates, tuple(made))

    def _make_one(self, job: Job, planner: Planner) -> Made:
        node = job.node
        result = planner(job)
        operation = node.step.op
        inputs = _inputs(job.pictures)
        key = step_key(operation, result.params, inputs)
        instance = Instance(node.name, job.axes, job.candidate, key)
        self.instances.append(instance)
        if key not in self.steps:
            lane = lane_of(operation, result.params)
            seconds = self._seconds(lane) if operation in SAMPLING else 0.0
            self.steps[key] = PlannedStep(key, operation, result.params, inputs, lane, node.origin, seconds)
        weights = result.params["model_sha256"] if operation in SAMPLING else None
        return Made(key, result.shape, result.format, weights, instance)

    def _seconds(self, lane: str) -> float:
        seconds = self.world.lane_seconds.get(lane, self.world.default_seconds)
        if seconds is None:
            self.untimed[lane] += 1
            return 0.0
        return seconds

    def _sets(self, node: Node, point: FullPoint) -> list[Found] | None:
        """Every picture of an instance, in order; None when a parent could not be made (it has been told)."""
        found: list[Found] = []
        seen: set[tuple[object, ...]] = set()

        def again(*picture: object) -> bool:
            """Whether it is on the sheet already: a sheet shows each picture once."""
            if not node.is_sheet:
                return False
            if picture in seen:
                return True
            seen.add(picture)
            return False

        for each in self.nodes.cells(node, point) if node.is_sheet else (point,):
            for use in node.pictures:
                chosen = self.nodes.chosen(use, each)
                if chosen is None:
                    continue
                if isinstance(chosen, FromStep):
                    parent = self.nodes[chosen.step]
                    key = parent.project(each)
                    if again(chosen.step, key):
                        continue
                    made = self.made[chosen.step].get(key)
                    if made is None:
                        return None
                    found.append(Found(use.role, use.path, each, None, parent, made))
                    continue
                if len(chosen) > 1 and use.role in ("image", "logo"):
                    raise Fault(use.path, f"{len(chosen)} pictures are listed here; one is wanted")
                found += [
                    Found(use.role, use.path, each, picture, None, None)
                    for picture in chosen
                    if not again(picture.uri, use.path)
                ]
        return found

    def _fans(self, sets: Sequence[Found]) -> tuple[tuple[str, int], ...]:
        fans: dict[str, int] = {}
        for each in sets:
            if each.parent is not None and each.made is not None:
                fans.update(each.made.fans)
                if each.parent.picks_all and each.parent.candidates > 1:
                    fans[each.parent.name] = each.parent.candidates
        return tuple((name, fans[name]) for name in self.nodes if name in fans) if fans else ()

    @staticmethod
    def _pictures(sets: Sequence[Found], combo: Mapping[str, int], *, everything: bool) -> tuple[Picture, ...]:
        """`everything`: all candidates that readers get, not those of one combination."""
        pictures: list[Picture] = []
        for each in sets:
            if each.parent is None or each.made is None:
                pictures.append(Picture(each.role, each.source, None, each.path, each.point))
                continue
            chosen = (
                readable(each.parent, each.made)
                if everything
                else (each.made.at(combo, combo.get(each.parent.name, 1)),)
            )
            pictures += [Picture(each.role, None, one, each.path, each.point) for one in chosen]
        if everything and len(pictures) > MAX_CELLS:
            raise Fault(sets[0].path, f"{len(pictures)} pictures on one sheet; at most {MAX_CELLS}")
        return tuple(pictures)


def _model_of(lane: str) -> str:
    """What people call a lane: its model, and that there are adapters on it."""
    _, model, _, adapters, _ = lane.split("/", 4)
    return f"model '{model}'" + ("" if adapters == "-" else " and these adapters")


def readable(node: Node, made: MadeSet) -> tuple[Made, ...]:
    """The candidates that readers of a step get: all, or the first for each combination of fans."""
    if node.picks_all:
        return made.made
    return made.made[:: made.own]


def _inputs(pictures: Sequence[Picture]) -> tuple[StepInput, ...]:
    positions: dict[str, int] = {}
    inputs: list[StepInput] = []
    for picture in pictures:
        position = positions.get(picture.role, 0)
        positions[picture.role] = position + 1
        parent = picture.made.key if picture.made is not None else None
        inputs.append(StepInput(picture.role, position, picture.source, parent))
    return tuple(inputs)


def _at(axes: Axes) -> str:
    return f" (at {', '.join(f'{axis} {key}' for axis, key in axes)})" if axes else ""
