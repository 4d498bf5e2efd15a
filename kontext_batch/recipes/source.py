"""YAML as an author means it: plain data with the place of every value, or problems with file, line and column.

YAML 1.2's core scalars and no others: `true` and `false` are the only booleans, `16:9`, `on`, `no`, `1:30`, `08`,
`0x1f` and dates are text, `1e-3` is a number. Numbers remember how they were written, so that a sku `1.10` or `007`
stays what it is wherever text is wanted. Repeated keys, merge keys and tags are problems. Size, depth and number of
nodes are limited before anything is built, aliases counted as often as they are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from kontext_batch.errors import Problem

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000
MAX_DEPTH = 32

Path = tuple[str | int, ...]
"""Keys and list positions from the root of a document: `("steps", "staged", "prompt")`."""

# The C parser when PyYAML has it: 10 times faster, same events and marks.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?\.[0-9]+([eE][-+]?[0-9]+)?")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})


class WrittenInt(int):
    """A whole number that remembers how it was written."""

    text: str

    def __new__(cls, text: str) -> WrittenInt:
        self = super().__new__(cls, text)
        self.text = text
        return self


class WrittenFloat(float):
    """A number that remembers how it was written."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        self = super().__new__(cls, text)
        self.text = text
        return self


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file; both 1-based."""

    line: int
    column: int


@dataclass(slots=True)
class Source:
    """One YAML file: its data and where each value stands."""

    file: str
    data: Any
    values: Mapping[Path, Mark]
    """Where a value begins."""
    keys: Mapping[Path, Mark]
    """Where the key of a value begins; list items have none."""
    lost: frozenset[Path] = frozenset()
    """Paths of empty values followed by `#...`: a colour that YAML took for a comment."""

    def mark(self, path: Sequence[str | int], *, key: bool = False) -> Mark:
        """The place of a value (or of its key); of the nearest thing around it when there is no such value.

        A value that begins below its key is looked for at the key.
        """
        at = tuple(path)
        while True:
            if key and at in self.keys:
                return self.keys[at]
            if at in self.values:
                mark = self.values[at]
                return mark if at not in self.keys or self.keys[at].line == mark.line else self.keys[at]
            if not at:
                return Mark(1, 1)
            at = at[:-1]

    def problem(self, path: Sequence[str | int], message: str, *, key: bool = False) -> Problem:
        """A `Problem` at that place."""
        mark = self.mark(path, key=key)
        return Problem(self.file, mark.line, mark.column, dotted(path), message)


def dotted(path: Sequence[str | int]) -> str:
    """`steps.staged.references[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _Stop(Exception):
    """The document cannot be read on from here."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(slots=True)
class _Open:
    """A list or mapping that is still being filled."""

    value: list[Any] | dict[str, Any]
    path: Path
    anchor: str | None
    nodes_before: int
    key: str | None = None
    """Mapping: the key that waits for its value."""
    shadowed: bool = False
    """Mapping: the key was there before; its value is read and dropped."""


@dataclass(slots=True)
class _Reader:
    file: str
    lines: Sequence[str]
    values: dict[Path, Mark] = field(default_factory=dict)
    keys: dict[Path, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    lost: set[Path] = field(default_factory=set)
    anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)
    nodes: int = 0
    stack: list[_Open] = field(default_factory=list)
    root: Any = None
    documents: int = 0

    def read(self, events: Iterator[Any]) -> Any:
        for event in events:
            mark = Mark(event.start_mark.line + 1, event.start_mark.column + 1)
            if isinstance(event, yaml.DocumentStartEvent):
                self.documents += 1
                if self.documents > 1:
                    self.stop(mark, (), "a recipe is one YAML document; remove what follows '---'")
            elif isinstance(event, yaml.AliasEvent):
                self.alias(event, mark)
            elif isinstance(event, yaml.ScalarEvent):
                self.scalar(event, mark)
            elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
                self.open(event, mark)
            elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
                self.close()
        return self.root

    def stop(self, mark: Mark, path: Path, message: str) -> None:
        raise _Stop(Problem(self.file, mark.line, mark.column, dotted(path), message))

    def count(self, mark: Mark, path: Path, nodes: int = 1) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            self.stop(mark, path, f"more than {MAX_NODES} values (aliases counted as often as used); split the recipe")

    def place(self) -> Path:
        """Path of the value that comes next."""
        if not self.stack:
            return ()
        top = self.stack[-1]
        if isinstance(top.value, list):
            return (*top.path, len(top.value))
        return (*top.path, top.key) if top.key is not None else top.path

    def put(self, value: Any) -> None:
        if not self.stack:
            self.root = value
            return
        top = self.stack[-1]
        if isinstance(top.value, list):
            top.value.append(value)
            return
        assert top.key is not None
        if not top.shadowed:
            top.value[top.key] = value
        top.key, top.shadowed = None, False

    def wants_key(self) -> bool:
        return bool(self.stack) and isinstance(self.stack[-1].value, dict) and self.stack[-1].key is None

    def tag(self, event: Any, mark: Mark, path: Path) -> None:
        if event.tag not in (None, "!"):
            self.problems.append(
                Problem(self.file, mark.line, mark.column, dotted(path), f"tags ({event.tag}) are not part of recipes")
            )

    def scalar(self, event: Any, mark: Mark) -> None:
        path = self.place()
        self.count(mark, path)
        if self.wants_key():
            self.key(event.value, mark, plain=event.implicit[0])
            if event.anchor is not None:
                self.anchors[event.anchor] = (event.value, 1)
            return
        self.tag(event, mark, path)
        plain = event.implicit[0]
        value = resolve(event.value) if plain else event.value
        if plain and event.value == "" and self.is_comment(event.start_mark):
            self.lost.add(path)
        self.note(path, mark)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, 1)
        self.put(value)

    def is_comment(self, mark: Any) -> bool:
        """Whether an empty value is followed by `#` on its line."""
        line = self.lines[mark.line] if mark.line < len(self.lines) else ""
        rest = line[mark.column :].lstrip()
        return rest.startswith("#") and len(rest) > 1 and not rest[1].isspace()

    def note(self, path: Path, mark: Mark) -> None:
        self.values.setdefault(path, mark)

    def key(self, text: str, mark: Mark, *, plain: bool) -> None:
        top = self.stack[-1]
        assert isinstance(top.value, dict)
        path = (*top.path, text)
        top.key = text
        if text == "<<" and plain:
            top.shadowed = True
            self.problems.append(
                Problem(
                    self.file, mark.line, mark.column, dotted(path), "merge keys are not part of recipes; use defaults"
                )
            )
        elif text in top.value:
            top.shadowed = True
            first = self.keys[path]
            self.problems.append(
                Problem(
                    self.file, mark.line, mark.column, dotted(path), f"this key is already there, in line {first.line}"
                )
            )
        else:
            self.keys.setdefault(path, mark)

    def open(self, event: Any, mark: Mark) -> None:
        path = self.place()
        if self.wants_key():
            self.stop(mark, path, "a key must be a word, not a list or a mapping; quote texts that begin with { or [")
        self.count(mark, path)
        self.tag(event, mark, path)
        if len(self.stack) >= MAX_DEPTH:
            self.stop(mark, path[:3], f"more than {MAX_DEPTH} levels deep")
        self.note(path, mark)
        value: list[Any] | dict[str, Any] = [] if isinstance(event, yaml.SequenceStartEvent) else {}
        self.stack.append(_Open(value, path, event.anchor, self.nodes))

    def close(self) -> None:
        top = self.stack.pop()
        if top.anchor is not None:
            self.anchors[top.anchor] = (top.value, self.nodes - top.nodes_before + 1)
        self.put(top.value)

    def alias(self, event: Any, mark: Mark) -> None:
        path = self.place()
        if event.anchor not in self.anchors:
            self.stop(mark, path, f"unknown anchor '{event.anchor}' (an anchor stands before its aliases)")
        value, nodes = self.anchors[event.anchor]
        self.count(mark, path, nodes)
        if self.wants_key():
            if not isinstance(value, str):
                self.stop(mark, path, "a key must be a word, not an alias")
            self.key(value, mark, plain=False)
            return
        if len(self.stack) + _depth(value) > MAX_DEPTH:
            self.stop(mark, path[:3], f"more than {MAX_DEPTH} levels deep")
        self.note(path, mark)
        # Problems inside of an alias point at where it is used; its values are shared, never changed.
        self.put(value)


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


def resolve(text: str) -> Any:
    """An unquoted scalar as YAML 1.2's core schema has it, save that what has leading zeros or a base is text."""
    if text in _NULL:
        return None
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if len(text) <= 40:
        if _INT.fullmatch(text):
            return WrittenInt(text)
        if _FLOAT.fullmatch(text):
            value = WrittenFloat(text)
            return value if abs(value) != float("inf") else text
    return text


def read_yaml(text: bytes | str, *, file: str) -> tuple[Source, list[Problem]]:
    """Read one YAML document whose root is a mapping.

    Problems that leave the rest readable (repeated keys, tags) come beside the data; when the text is not YAML, or
    larger than allowed, the data is an empty mapping and the problems say why.
    """
    empty = Source(file, {}, {}, {})
    if len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return empty, [Problem(file, 0, 0, "", f"larger than {MAX_BYTES // 1024} KiB; split the recipe")]
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            return empty, [Problem(file, line, 0, "", f"not UTF-8 text (byte 0x{error.object[error.start]:02x})")]
    text = text.removeprefix("\ufeff")
    lines = text.splitlines()
    reader = _Reader(file, lines)
    try:
        data = reader.read(yaml.parse(text, Loader=_Parser))
    except _Stop as stop:
        return empty, [*reader.problems, stop.problem]
    except yaml.MarkedYAMLError as error:
        return empty, [*reader.problems, _syntax(file, lines, error)]
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        return empty, [*reader.problems, Problem(file, 0, 0, "", f"not YAML: {reason}")]
    source = Source(file, data, reader.values, reader.keys, frozenset(reader.lost))
    if not isinstance(data, dict):
        what = "empty" if data is None else "not a mapping of keys to values"
        return Source(file, {}, {}, {}), [*reader.problems, Problem(file, 1, 1, "", f"the file is {what}")]
    return source, reader.problems


def _syntax(file: str, lines: Sequence[str], error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (0, 0)
    message = f"not YAML: {error.problem or error.context}"
    start = error.context_mark.line + 1 if error.context_mark is not None else line
    suspects = [number for number in range(start, line + 1) if number <= len(lines)]
    for number in suspects:
        if re.search(r"[:\[{,]\s+#\w", lines[number - 1]):
            line, column = number, lines[number - 1].index("#") + 1
            message += "; text after an unquoted '#' is a comment: quote the value ('#ff0000')"
            break
    else:
        suspect = lines[suspects[-1] - 1] if suspects else ""
        if "\t" in suspect:
            message += "; indent with spaces, not tabs"
        elif re.search(r"[{,\[].*(?<![\"'])\$\{", suspect):
            message += '; quote "${...}" inside of {} and []'
        elif re.search(r":\s[^'\"#]*:\s", suspect):
            message += "; quote a text that holds ': '"
    return Problem(file, line, column, "", message)
