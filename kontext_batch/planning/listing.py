"""What is handed to the planner from outside: rows, source pictures, models. Values only; nothing here reads anything.

A service plans in four moves:

    tables = wanted_tables(recipe, base)                     # axis -> URI; read them
    rows = read_rows(recipe, {axis: bytes, ...})             # the rows that take part
    wanted = wanted_files(recipe, rows, base)                # patterns and URIs; list and probe them
    listed = join(recipe, rows, wanted, {pattern: found})    # rows with their pictures, skipped rows
    plan = plan_recipe(recipe, listed, models, ...)          # planning.planner
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kontext_batch.planning.plan import ImageInfo, SkippedRow


@dataclass(frozen=True, slots=True)
class FileProblem:
    """A file that is there and cannot be used."""

    uri: str
    reason: str
    """`0 bytes`, `not an image`, ..."""


Found = ImageInfo | FileProblem


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """An entry of the model registry, as far as plans depend on it."""

    name: str
    sha256: str
    """Over the weights."""
    native_area: int
    """Pixels that the model was made for: 1024 * 1024 for Kontext."""
    text_length: int
    """Tokens that the prompt's encoder reads."""
    licence: str = ""
    adapters: bool = True
    """Whether LoRA adapters may be put on it."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A LoRA of the registry."""

    name: str
    sha256: str
    """Over the file."""


@dataclass(frozen=True, slots=True)
class Row:
    """One value of an input axis: a row of a table, or a file of a glob."""

    key: str
    fields: Mapping[str, str]
    """Columns, in the form of their type; of a glob `stem` and `name`."""
    file: str
    """Of the table, or the URI of the file."""
    line: int
    """In the table; 0 for a file of a glob."""
    files: Mapping[str, ImageInfo | tuple[ImageInfo, ...]] = field(default_factory=dict)
    """File name -> picture, or pictures where the recipe has a list; filled by `join`."""


@dataclass(frozen=True, slots=True)
class WantedFile:
    """A place that a plan needs to look at: a pattern of an input, or one fixed file."""

    uri: str
    """Absolute URI; `*` and `?` stay inside a folder, `**` goes through folders, `[*]` is the character itself."""
    axis: str | None
    """Input axis; None for a fixed file (a logo)."""
    row: str | None
    """Key of the row; None for a fixed file and for a glob."""
    name: str
    """The file's name in the recipe: `packshot`; of a fixed file its place in the brand: `logos.mono`."""
    many: bool
    """Whether several files may match."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Everything of the outside world that a plan is made from."""

    rows: Mapping[str, tuple[Row, ...]]
    """Input axis -> its rows with their files, in the order of the table (of the names, for a glob)."""
    logos: Mapping[str, ImageInfo] = field(default_factory=dict)
    """Name in the brand -> picture; those that the recipe uses."""
    skipped: tuple[SkippedRow, ...] = ()


FoundFiles = Mapping[str, Sequence[Found]]
"""`WantedFile.uri` -> what was found there: one for each file that matches; nothing for a missing file."""
