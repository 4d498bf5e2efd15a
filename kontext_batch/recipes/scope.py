"""Names and axes of a recipe: what each `${...}` stands for, which axes each step has, and what reads what.

A step's axes are those that it names, in any field and through vars and texts, and those of the steps that it reads
(RECIPES.md 2.2). Everything here is decided from the recipe and its brand files alone; columns of tables are looked up
when the rows are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from kontext_batch.recipes.brand import Brand
from kontext_batch.recipes.channels import CHANNEL_AXIS, CHANNEL_FIELDS
from kontext_batch.recipes.references import FILTERS, Template, parse_template
from kontext_batch.recipes.schema import (
    AnyStep,
    Channel,
    ContactSheetStep,
    EditStep,
    FinishStep,
    GlobInput,
    RecipeDocument,
    TableInput,
)
from kontext_batch.recipes.source import Path

RESERVED = frozenset({"brand", "vars", "text", "ext", "candidate", "source", "keep", *FILTERS})
"""Words of the language; no axis and no step may be called so."""

MAX_NESTING = 20
"""Names that are made of names; deeper ones are a slip or a trap."""
GLOB_FIELDS = ("file", "stem", "name")

Kind = Literal["axis", "field", "file", "brand", "logo", "var", "text", "step", "prompt", "ext", "candidate", "opaque"]
PICTURES: frozenset[str] = frozenset({"step", "file", "logo", "opaque"})


@dataclass(frozen=True, slots=True)
class Target:
    """What a name stands for."""

    kind: Kind
    owner: str = ""
    """The axis, variable, text or step; for a logo its name."""
    field: str = ""
    """Of an axis: the column, file or field."""
    value: str = ""
    """Of a brand constant."""


@dataclass(frozen=True, slots=True)
class Use:
    """A template and where it is written."""

    template: Template
    path: Path


@dataclass(frozen=True, slots=True)
class StepScope:
    """What is known of a step before anything is listed."""

    name: str
    axes: tuple[str, ...]
    """In the order of the recipe."""
    parents: tuple[str, ...]
    """Steps whose pictures it may read."""
    fans: tuple[str, ...]
    """Steps with `pick: all` whose candidates it is made for, one by one."""


@dataclass(slots=True)
class Scope:
    """The names of one recipe. Built by `build_scope`; not changed afterwards."""

    document: RecipeDocument
    brand: Brand
    axes: tuple[str, ...] = ()
    """Input axes, then matrix axes, in the order of the recipe."""
    values: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    """Matrix axis -> value -> its fields, with what `include` adds at the end."""
    included: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Matrix axis -> values that only `include` has."""
    channels: Mapping[str, Channel] = field(default_factory=dict)
    """Those of the brand files and the recipe's own."""
    steps: Mapping[str, StepScope] = field(default_factory=dict)
    """In an order in which parents come before children."""
    opaque: frozenset[str] = frozenset()
    """Names whose definition is faulty: they are known, and nothing else is."""
    loose: bool = False
    """A whole section could not be read: unknown names are not told."""
    _axes_of: dict[str, frozenset[str]] = field(default_factory=dict)
    _nesting: dict[str, int] = field(default_factory=dict)
    """Name -> how many names deep its value is made."""
    _open: list[int] = field(default_factory=list)
    """Of each name that is being looked at: the deepest nesting found below it so far."""

    # ------------------------------------------------------------------------------------------------------ names

    def resolve(self, name: str) -> Target:
        """What `name` stands for. Raises `UnknownName`."""
        first, _, rest = name.partition(".")
        if first in self.opaque or name in self.opaque:
            return Target("opaque")
        if first == "brand":
            return self._brand(rest)
        if first == "vars":
            return self._member(rest, "var", self.document.vars, "variable")
        if first == "text":
            return self._member(rest, "text", self.document.texts, "text")
        if first in ("ext", "candidate") and not rest:
            return Target("ext" if first == "ext" else "candidate")
        if first in self.document.inputs:
            return self._input(first, rest)
        if first in self.values:
            return self._variant(first, rest)
        if first in self.document.steps:
            return self._step(first, rest)
        if self.loose:
            return Target("opaque")
        known = [*self.axes, *self.document.steps, "brand", "vars", "text"]
        raise UnknownName("name" if not self.axes else "axis", first, known)

    def _member(self, rest: str, kind: Literal["var", "text"], known: Mapping[str, object], what: str) -> Target:
        if rest in known:
            return Target(kind, rest)
        if self.loose:
            return Target("opaque")
        raise UnknownName(what, rest, known)

    def _brand(self, rest: str) -> Target:
        section, _, tail = rest.partition(".")
        if section not in ("colors", "logos", "channels"):
            raise UnknownName("part of the brand", section, ("colors", "logos", "channels"))
        if section == "colors" and tail in self.brand.colors:
            return Target("brand", section, value=self.brand.colors[tail])
        if section == "logos" and tail in self.brand.logos:
            return Target("logo", tail, value=self.brand.logos[tail])
        channel, _, attribute = tail.partition(".")
        if section == "channels" and channel in self.brand.channels:
            if attribute not in CHANNEL_FIELDS:
                raise UnknownName("field of a channel", attribute, CHANNEL_FIELDS)
            return Target("brand", section, value=channel_field(self.brand.channels[channel], attribute))
        if self.brand.opaque:
            return Target("opaque")
        known: Iterable[str] = getattr(self.brand, section)
        hint = "" if self.document.import_ else " (the recipe imports no brand file)"
        raise UnknownName(f"{section[:-1]} of the brand", tail, known, hint)

    def _input(self, axis: str, rest: str) -> Target:
        declared = self.document.inputs[axis]
        if isinstance(declared, GlobInput):
            if not rest or rest == "file":
                return Target("file" if rest else "axis", axis, rest)
            if rest in GLOB_FIELDS:
                return Target("field", axis, rest)
            raise UnknownName(f"field of '{axis}'", rest, GLOB_FIELDS)
        if not rest:
            return Target("axis", axis)
        return Target("file" if rest in declared.files else "field", axis, rest)

    def _variant(self, axis: str, rest: str) -> Target:
        if not rest:
            return Target("axis", axis)
        known = {name for fields in self.values[axis].values() for name in fields}
        if axis == CHANNEL_AXIS:
            known |= set(CHANNEL_FIELDS)
        if rest not in known:
            raise UnknownName(f"field of '{axis}'", rest, known)
        return Target("field", axis, rest)

    def _step(self, step: str, rest: str) -> Target:
        if not rest:
            return Target("step", step)
        if rest == "prompt" and hasattr(self.document.steps[step], "prompt"):
            return Target("prompt", step)
        raise UnknownName(f"part of step '{step}'", rest, ("prompt",))

    # ------------------------------------------------------------------------------------------------------- axes

    def axes_of(self, template: Template) -> frozenset[str]:
        """The axes that the value of a text depends on."""
        found: set[str] = set()
        for name in template.names:
            found |= self.axes_of_name(name)
        return frozenset(found)

    def axes_of_name(self, name: str) -> frozenset[str]:
        """The same for one name. Raises `UnknownName`, `Cycle`."""
        target = self.resolve(name)
        if target.kind == "step":  # not kept: steps get their axes one after the other
            return self._find_axes(target)
        if name not in self._axes_of:
            if len(self._open) >= MAX_NESTING:
                raise Cycle(f"'{name}' is nested more than {MAX_NESTING} deep")
            self._axes_of[name] = _PENDING
            self._open.append(0)
            try:
                self._axes_of[name] = self._find_axes(target)
                self._nesting[name] = self._open[-1] + 1
            except Exception:
                del self._axes_of[name]
                raise
            finally:
                self._open.pop()
        found = self._axes_of[name]
        if found is _PENDING:
            raise Cycle(f"'{name}' is made of itself")
        if self._nesting[name] + len(self._open) > MAX_NESTING:
            raise Cycle(f"'{name}' is nested more than {MAX_NESTING} deep")
        if self._open:
            self._open[-1] = max(self._open[-1], self._nesting[name])
        return found

    def _find_axes(self, target: Target) -> frozenset[str]:
        document = self.document
        if target.kind in ("axis", "file"):
            return frozenset({target.owner})
        if target.kind == "field":
            found = {target.owner}
            for fields in self.values.get(target.owner, {}).values():
                if target.field in fields:
                    found |= self.axes_of(parse_template(fields[target.field]))
            return frozenset(found)
        if target.kind == "var":
            return self.axes_of(parse_template(document.vars[target.owner]))
        if target.kind == "text":
            text = document.texts[target.owner]
            return self.axes_of(parse_template(text.column)) | {text.table}
        if target.kind == "prompt":
            step = document.steps[target.owner]
            assert not isinstance(step, (FinishStep, ContactSheetStep))
            return self.axes_of(parse_template(step.prompt))
        if target.kind == "step" and target.owner in self.steps:
            return frozenset(self.steps[target.owner].axes)
        return frozenset()

    def in_order(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Axes in the order of the recipe."""
        wanted = set(axes)
        return tuple(axis for axis in self.axes if axis in wanted)


_PENDING: frozenset[str] = frozenset({"\0pending"})


class UnknownName(Exception):
    """A name that nothing has; `known` is what it might have been."""

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = "") -> None:
        super().__init__(name)
        self.what, self.name, self.known, self.hint = what, name, tuple(known), hint


class Cycle(Exception):
    """A name whose value depends on itself, or on others too many levels deep; the message says which."""


def channel_field(channel: Channel, name: str) -> str:
    """A field of a channel as text; empty when the channel does not say it."""
    value = getattr(channel, name)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def picture_uses(name: str, step: AnyStep) -> Iterator[tuple[str, Use]]:
    """(role, template) of every picture that a step reads. Roles are those of `StepInput`."""
    at: Path = ("steps", name)
    if isinstance(step, EditStep):
        yield "image", Use(parse_template(step.image), (*at, "image"))
        for index, text in enumerate(step.references):
            yield "reference", Use(parse_template(text), (*at, "references", index))
    elif isinstance(step, FinishStep):
        yield "image", Use(parse_template(step.image), (*at, "image"))
        for index, overlay in enumerate(step.overlay):
            yield "logo", Use(parse_template(overlay.logo), (*at, "overlay", index, "logo"))
    elif isinstance(step, ContactSheetStep):
        for index, text in enumerate(step.images):
            yield "cell", Use(parse_template(text), (*at, "images", index))


def text_uses(name: str, step: AnyStep, document: RecipeDocument) -> Iterator[tuple[str, Use]]:
    """(field, template) of every text of a step, with those that it takes from the defaults."""
    at: Path = ("steps", name)
    for field_name in ("prompt", "negative_prompt", "frame", "background", "channel", "size", "label"):
        written = getattr(step, field_name, None)
        if written is not None:
            path: Path = (*at, field_name) if field_name in step.model_fields_set else at
            yield field_name, Use(parse_template(written), path)
            continue
        default = getattr(getattr(document.defaults, step.op, None), field_name, None)
        if default is not None:
            yield field_name, Use(parse_template(default), ("defaults", step.op, field_name))


def input_uses(axis: str, declared: TableInput | GlobInput) -> Iterator[tuple[str, Use]]:
    """(file name, pattern) of every file of an input."""
    if isinstance(declared, GlobInput):
        yield "file", Use(parse_template(declared.glob), ("inputs", axis, "glob"))
        return
    for name, patterns in declared.files.items():
        if isinstance(patterns, str):
            yield name, Use(parse_template(patterns), ("inputs", axis, "files", name))
        else:
            for index, pattern in enumerate(patterns):
                yield name, Use(parse_template(pattern), ("inputs", axis, "files", name, index))
