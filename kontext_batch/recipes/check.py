"""Everything that can be wrong in a recipe before its tables are read, told all at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from kontext_batch.errors import Problem
from kontext_batch.recipes.brand import Brand
from kontext_batch.recipes.channels import CHANNEL_AXIS, own_channels
from kontext_batch.recipes.fields import parse_color, parse_frame, parse_size
from kontext_batch.recipes.references import Template, TemplateError, nearest, parse_template
from kontext_batch.recipes.schema import AnyStep, ContactSheetStep, GlobInput, Not, RecipeDocument, TableInput
from kontext_batch.recipes.scope import (
    PICTURES,
    RESERVED,
    Cycle,
    Scope,
    StepScope,
    Target,
    UnknownName,
    Use,
    input_uses,
    picture_uses,
    text_uses,
)
from kontext_batch.recipes.source import Path, Source
from kontext_batch.recipes.written import written_texts

Values = dict[str, dict[str, dict[str, str]]]

_OPAQUE_PREFIX = {"vars": "vars.", "texts": "text."}


def build_scope(
    document: RecipeDocument, brand: Brand, source: Source, *, pruned: Collection[Path] = ()
) -> tuple[Scope, list[Problem]]:
    """The scope of a recipe and every problem with its names, axes and graph.

    `pruned`: parts that are left out of `document` because they are faulty in themselves; what names them is not
    told again.
    """
    check = _Check(document, brand, source, pruned)
    with contextlib.suppress(_EnoughError):
        check.run()
    return check.scope, check.problems


MAX_PROBLEMS = 500
"""More are not looked for: nearest names of thousands of slips take minutes."""


class _EnoughError(Exception):
    """There are as many problems as anybody reads."""


class _Check:
    def __init__(self, document: RecipeDocument, brand: Brand, source: Source, pruned: Collection[Path]) -> None:
        self.document, self.brand, self.source = document, brand, source
        self.problems: list[Problem] = []
        self.running = False
        self.faulty: set[Path] = {path for path in pruned if len(path) == 2}
        loose = any(path in pruned for path in (("inputs",), ("matrix",), ("vars",), ("texts",), ("steps",)))
        self.syntax()
        opaque = {f"{_OPAQUE_PREFIX.get(str(path[0]), '')}{path[1]}" for path in self.faulty}
        self.values, self.included = self.matrix_values()
        own, found = own_channels(self.values.get(CHANNEL_AXIS, {}), brand, source)
        self.problems += found
        self.scope = Scope(
            document,
            brand,
            channels={**brand.channels, **own},
            axes=tuple(dict.fromkeys([*document.inputs, *self.values])),
            values=self.values,
            included=self.included,
            opaque=frozenset(opaque),
            loose=loose,
        )

    def run(self) -> None:
        self.running = True
        self.names()
        self.definitions()
        self.steps()
        self.outputs()
        self.matrix_points()

    def tell(self, path: Path, message: str, *, key: bool = False) -> None:
        self.problems.append(self.source.problem(path, message, key=key))
        if len(self.problems) >= MAX_PROBLEMS and self.running:
            raise _EnoughError

    # ------------------------------------------------------------------------------------------------- templates

    def syntax(self) -> None:
        """Every `${...}` of the document; what holds a faulty one is left out of all other checks."""
        for path, text in written_texts(self.document):
            try:
                parse_template(text)
            except TemplateError as error:
                shown = text[error.offset : error.offset + 40].split("\n")[0]
                self.tell(path, f"{error} (at '{shown}')")
                self.faulty.add(path[:2])

    def use(self, use: Use, allow: Callable[[Target], str | None]) -> bool:
        """Look every name of a template up; `allow` says why a target may not stand there."""
        fine = True
        for name in use.template.names:
            try:
                target = self.scope.resolve(name)
            except UnknownName as error:
                what = "step" if allow in (self.picture_only, _step_only) and "." not in name else error.what
                self.tell(use.path, f"unknown {what} '{error.name}'{nearest(error.name, error.known)}{error.hint}")
                fine = False
                continue
            try:
                self.scope.axes_of_name(name)
            except UnknownName:
                fine = False  # told where it is written
                continue
            except Cycle as error:
                if use.path[0] in ("vars", "texts", "matrix") or name.endswith(".prompt"):
                    self.tell(use.path, str(error))
                fine = False
                continue
            if target.kind != "opaque" and (message := allow(target)):
                self.tell(use.path, f"'{name}' {message}")
                fine = False
        return fine

    # ----------------------------------------------------------------------------------------------- definitions

    def names(self) -> None:
        document = self.document
        taken: dict[str, str] = {}
        for section, names in (
            ("inputs", document.inputs),
            ("matrix", document.matrix.axes),
            ("steps", document.steps),
        ):
            for name in names:
                if name in RESERVED or name in ("exclude", "include"):
                    self.tell((section, name), f"'{name}' is a word of the language; choose another name", key=True)
                elif name in taken:
                    self.tell((section, name), f"'{name}' is a name in {taken[name]} already", key=True)
                taken.setdefault(name, section)

    def matrix_values(self) -> tuple[Values, dict[str, frozenset[str]]]:
        """Axis -> value -> fields, with the values that `include` brings."""
        values: Values = {}
        for axis, written in self.document.matrix.axes.items():
            if isinstance(written, Mapping):
                values[axis] = {value: dict(fields) for value, fields in written.items()}
            else:
                values[axis] = {value: {} for value in written}
        included: dict[str, set[str]] = {axis: set() for axis in values}
        for index, point in enumerate(self.document.matrix.include):
            for axis in values:
                if axis not in point:
                    continue
                value = point[axis]
                fields = {key.partition(".")[2]: text for key, text in point.items() if key.startswith(f"{axis}.")}
                if value not in values[axis]:
                    values[axis][value] = fields
                    included[axis].add(value)
                    continue
                known = values[axis][value]
                for name, text in fields.items():
                    if known.get(name, None) != text:
                        path: Path = ("matrix", "include", index, f"{axis}.{name}")
                        self.tell(path, f"'{value}' has its fields already; include overwrites nothing")
        return values, {axis: frozenset(names) for axis, names in included.items()}

    def definitions(self) -> None:
        """Variables, texts, files and fields."""
        document = self.document
        for name, text in document.vars.items():
            if ("vars", name) not in self.faulty:
                self.use(Use(parse_template(text), ("vars", name)), _text_only)
        for name, column in document.texts.items():
            if ("texts", name) in self.faulty:
                continue
            declared = document.inputs.get(column.table)
            if not isinstance(declared, TableInput) and column.table not in self.scope.opaque and not self.scope.loose:
                what = "is no table" if declared else f"is no input{nearest(column.table, document.inputs)}"
                self.tell(("texts", name, "table"), f"'{column.table}' {what}")
            self.use(Use(parse_template(column.column), ("texts", name, "column")), _text_only)
        for axis, declared in document.inputs.items():
            if ("inputs", axis) in self.faulty:
                continue
            for _, use in input_uses(axis, declared):
                own = {axis} if isinstance(declared, TableInput) else set()
                if self.use(use, _text_only) and (foreign := self.scope.axes_of(use.template) - own):
                    which = f"columns of '{axis}'" if own else "no axis"
                    self.tell(use.path, f"files may name {which}, not {_list(foreign)}")
        for axis in document.matrix.axes:
            if ("matrix", axis) in self.faulty:
                continue
            for value, fields in self.values[axis].items():
                if axis == CHANNEL_AXIS and not fields:
                    self.channel_name(value, self.value_path(axis, value))
                if value in self.included[axis]:
                    continue  # looked at with the points
                for name, text in fields.items():
                    self.use(Use(parse_template(text), ("matrix", axis, value, name)), _text_only)

    def value_path(self, axis: str, value: str) -> Path:
        written = self.document.matrix.axes[axis]
        if value in self.included[axis]:
            index = next(i for i, point in enumerate(self.document.matrix.include) if point.get(axis) == value)
            return ("matrix", "include", index, axis)
        return (
            ("matrix", axis, list(written).index(value))
            if not isinstance(written, Mapping)
            else ("matrix", axis, value)
        )

    def channel_name(self, name: str, path: Path) -> None:
        known = self.scope.channels
        if name not in known and not self.brand.opaque:
            hint = "" if self.document.import_ else " (the recipe imports no brand file)"
            self.tell(path, f"unknown channel '{name}'{nearest(name, known)}{hint}")

    # ----------------------------------------------------------------------------------------------------- steps

    def steps(self) -> None:
        graph: dict[str, tuple[str, ...]] = {}
        sound = {name: step for name, step in self.document.steps.items() if ("steps", name) not in self.faulty}
        for name, step in sound.items():
            parents: dict[str, None] = {}
            for _, use in picture_uses(name, step):
                if use.template.whole is None:
                    self.tell(use.path, "a picture is one reference, as in ${clean} or ${item.packshot}")
                    continue
                if use.template.whole.filters:
                    self.tell(use.path, "filters make texts; a picture has none")
                self.use(use, self.picture_only)
                for target in self.targets(use):
                    if target.kind == "step" and target.owner in sound:
                        parents[target.owner] = None
            graph[name] = tuple(parents)
        for name in self.sorted(graph):
            self.scope.steps = {**self.scope.steps, name: self.step(name, sound[name], graph[name])}

    def picture_only(self, target: Target) -> str | None:
        if target.kind == "axis":
            # The value of a glob is a file.
            is_file = isinstance(self.document.inputs.get(target.owner), GlobInput)
            return None if is_file else "is a value; name one of its files"
        return None if target.kind in PICTURES else "is a text; here a picture is wanted"

    def targets(self, use: Use) -> Iterator[Target]:
        for name in use.template.names:
            try:
                yield self.scope.resolve(name)
            except UnknownName:
                continue

    def sorted(self, graph: Mapping[str, tuple[str, ...]]) -> list[str]:
        """Parents before children, else as written; the steps of a cycle are told and come last, without parents."""
        done: dict[str, None] = {}
        while len(done) < len(graph):
            ready = [name for name in graph if name not in done and all(parent in done for parent in graph[name])]
            if not ready:
                cycle = _cycle(graph, done)
                self.tell(
                    ("steps", cycle[0]), f"steps that read each other: {' <- '.join([*cycle, cycle[0]])}", key=True
                )
                ready = [name for name in graph if name not in done]
            done.update(dict.fromkeys(ready))
        return list(done)

    def step(self, name: str, step: AnyStep, parents: tuple[str, ...]) -> StepScope:
        scope = self.scope
        at: Path = ("steps", name)
        own: set[str] = set()
        cells: set[str] = set()
        for _, use in picture_uses(name, step):
            cells |= self.axes(use)
        for field_name, use in text_uses(name, step, self.document):
            if not self.use(use, _label_only if field_name == "label" else _text_only):
                continue
            (cells if field_name == "label" else own).update(self.axes(use))
            self.literal(field_name, use)
        for key in step.if_:
            own |= self.condition(key, step, (*at, "if", key))
        fans = {parent for parent in parents if self.fans_out(parent)}
        fans |= {fan for parent in parents if parent in scope.steps for fan in scope.steps[parent].fans}
        ordered = tuple(each for each in scope.steps if each in fans)
        if isinstance(step, ContactSheetStep):
            axes = self.on(step.on, at)
            for use_axis in sorted(own - axes):
                self.tell((*at, "on"), f"the sheet's own fields name '{use_axis}', which is not in `on`")
            for axis in sorted(axes - cells - own):
                self.tell((*at, "on"), f"none of the pictures follows '{axis}'")
            return StepScope(name, scope.in_order(axes), parents, ())
        axes = own | cells
        inferred = scope.in_order(axes)
        if step.on is not None and self.on(step.on, at) != axes and not scope.opaque and not scope.loose:
            said = ", ".join(step.on) or "nothing"
            self.tell((*at, "on"), f"the step follows {_list(inferred) or 'no axis'}, not {said}")
        return StepScope(name, inferred, parents, ordered)

    def axes(self, use: Use) -> set[str]:
        found: set[str] = set()
        for name in use.template.names:
            try:
                found |= self.scope.axes_of_name(name)
            except (UnknownName, Cycle):
                continue  # told already
        return found

    def fans_out(self, step: str) -> bool:
        made = self.document.steps[step]
        return getattr(made, "candidates", 1) > 1 and getattr(made, "pick", "first") == "all"

    def on(self, axes: Iterable[str], at: Path) -> set[str]:
        found = set()
        for index, axis in enumerate(axes):
            if axis in self.scope.axes:
                found.add(axis)
            elif axis not in self.scope.opaque and not self.scope.loose:
                self.tell((*at, "on", index), f"unknown axis '{axis}'{nearest(axis, self.scope.axes)}")
        return found

    def literal(self, field_name: str, use: Use) -> None:
        """Fields of a fixed form, where the author wrote the value itself."""
        template = use.template
        if any(not isinstance(part, str) for part in template.parts):
            return
        if field_name == "channel":
            self.channel_name(template.text, use.path)
        parse = _LITERALS.get(field_name)
        if parse is not None:
            try:
                parse(template.text)
            except ValueError as error:
                self.tell(use.path, str(error))

    def condition(self, key: str, step: AnyStep, path: Path) -> frozenset[str]:
        wanted = step.if_[key]
        self.known_values(key, wanted.not_ if isinstance(wanted, Not) else wanted, path)
        return self.key_axes(key, path)

    def key_axes(self, key: str, path: Path) -> frozenset[str]:
        """Axes of `locale` or `item.category` as a key of `if`, `exclude` or `include`."""
        if key.partition(".")[0] not in self.scope.axes:
            if key.partition(".")[0] not in self.scope.opaque and not self.scope.loose:
                first = key.partition(".")[0]
                self.tell(path, f"unknown axis '{first}'{nearest(first, self.scope.axes)}", key=True)
            return frozenset()
        use = Use(Template((), key), path)
        try:
            axes = self.scope.axes_of_name(key)
        except UnknownName as error:
            self.tell(use.path, f"unknown {error.what} '{error.name}'{nearest(error.name, error.known)}", key=True)
            return frozenset()
        except Cycle:
            return frozenset()
        if self.scope.resolve(key).kind == "file":
            self.tell(path, f"'{key}' is a picture, which has no value to compare", key=True)
        return axes

    def known_values(self, key: str, wanted: Iterable[str], path: Path) -> None:
        """Values of a matrix axis are all known; a value that is none of them is a slip."""
        if key in self.values and ("matrix", key) not in self.faulty:
            for value in wanted:
                if value not in self.values[key]:
                    self.tell(path, f"'{key}' has no value '{value}'{nearest(value, self.values[key])}")

    # --------------------------------------------------------------------------------------------------- outputs

    def outputs(self) -> None:
        for index, output in enumerate(self.document.outputs):
            if ("outputs", index) in self.faulty:
                continue
            at: Path = ("outputs", index)
            made = Use(parse_template(output.from_), (*at, "from"))
            if made.template.whole is None or made.template.whole.filters:
                self.tell(made.path, "what is delivered is one reference to a step, as in ${finish}")
            else:
                self.use(made, _step_only)
            to = Use(parse_template(output.to), (*at, "to"))
            self.use(to, _path_only)
            for target in self.targets(made):
                if target.kind != "step" or target.owner not in self.scope.steps:
                    continue
                fans = self.scope.steps[target.owner].fans or self.fans_out(target.owner)
                if fans and "candidate" not in to.template.names:
                    self.tell(
                        to.path, f"every candidate of '{target.owner}' is delivered: the path needs ${{candidate}}"
                    )

    # ---------------------------------------------------------------------------------------------------- points

    def matrix_points(self) -> None:
        matrix = self.document.matrix
        for index, rule in enumerate(matrix.exclude):
            for key, wanted in rule.items():
                path: Path = ("matrix", "exclude", index, key)
                self.key_axes(key, path)
                self.known_values(key, wanted, path)
        for index, point in enumerate(matrix.include):
            at: Path = ("matrix", "include", index)
            named: set[str] = set()
            for key, text in point.items():
                axis, _, name = key.partition(".")
                named.add(axis)
                self.key_axes(key, (*at, key))
                if name and axis in self.values:
                    if axis not in point:
                        self.tell(
                            (*at, key), f"'{key}' without '{axis}': say which value the field belongs to", key=True
                        )
                    self.use(Use(parse_template(text), (*at, key)), _text_only)
                elif "${" in text:
                    self.tell((*at, key), "a point is made of plain values")
            lacking = [axis for axis in self.scope.axes if axis not in named]
            if lacking and not self.scope.opaque and not self.scope.loose:
                self.tell(at, f"a point has a value on every axis; this one lacks {_list(lacking)}")


_LITERALS: Mapping[str, Callable[[str], object]] = {
    "frame": parse_frame,
    "background": parse_color,
    "size": lambda text: text if text == "source" else parse_size(text),
}


def _text_only(target: Target) -> str | None:
    if target.kind in PICTURES:
        return "is a picture; here a text is wanted"
    if target.kind == "ext":
        return "exists in the paths of outputs only"
    if target.kind == "candidate":
        return "exists in the paths of outputs and the labels of contact sheets only"
    return None


def _label_only(target: Target) -> str | None:
    return None if target.kind == "candidate" else _text_only(target)


def _path_only(target: Target) -> str | None:
    return "is a picture; a path is made of texts" if target.kind in PICTURES else None


def _step_only(target: Target) -> str | None:
    return None if target.kind == "step" else "is no step; only what a step made is delivered"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names if isinstance(names, tuple) else sorted(names))


def _cycle(graph: Mapping[str, tuple[str, ...]], done: Collection[str]) -> list[str]:
    """One cycle among the steps that are not done."""
    at = next(name for name in graph if name not in done)
    path: list[str] = []
    while at not in path:
        path.append(at)
        at = next(parent for parent in graph[at] if parent not in done)
    return path[path.index(at) :]
