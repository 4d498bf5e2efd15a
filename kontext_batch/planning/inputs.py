"""From tables and found files to the rows that a plan is made of. Pure: services read, list and probe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from kontext_batch.errors import Problem, RecipeError
from kontext_batch.planning import uris
from kontext_batch.planning.listing import FileProblem, Found, FoundFiles, Listed, Row, WantedFile
from kontext_batch.planning.plan import ImageInfo, SkippedRow
from kontext_batch.planning.values import AtPoint, Point, Texts, input_value
from kontext_batch.recipes.loader import Recipe
from kontext_batch.recipes.schema import GlobInput, TableInput
from kontext_batch.recipes.scope import input_uses
from kontext_batch.recipes.source import Path
from kontext_batch.recipes.tables import TableRow, read_table, typed, unknown_column
from kontext_batch.recipes.written import columns_named, logos_named

T = TypeVar("T")


def wanted_tables(recipe: Recipe, base: str, *, allowed: Sequence[str] | None = None) -> Mapping[str, str]:
    """Input axis -> URI of its table.

    `base`: URI of the folder that the recipe lies in, ending in `/`. `allowed`: prefixes that the recipe may read;
    None allows all. Raises `RecipeError`.
    """
    tables: dict[str, str] = {}
    problems: list[Problem] = []
    for axis, declared in recipe.document.inputs.items():
        if isinstance(declared, TableInput):
            path: Path = ("inputs", axis, "table")
            uri = _place(recipe, [(declared.table, False)], base, allowed, path, problems, pattern=False)
            if uri is not None:
                tables[axis] = uris.literal(uri)
    return _or_raise(tables, problems)


def read_rows(recipe: Recipe, tables: Mapping[str, bytes]) -> Mapping[str, tuple[Row, ...]]:
    """Input axis -> the rows that take part (`where`), in the order of the table, without files.

    `tables`: axis -> bytes of its table; an axis left out has none yet (its problem was told by whoever read it).
    Raises `RecipeError` with every cell that is not of its column's type, missing columns, repeated keys.
    """
    rows: dict[str, tuple[Row, ...]] = {}
    problems: list[Problem] = []
    for axis, declared in recipe.document.inputs.items():
        if isinstance(declared, TableInput) and axis in tables:
            try:
                rows[axis] = tuple(_rows(recipe, axis, declared, tables[axis], problems))
            except RecipeError as error:
                problems += error.problems
    return _or_raise(rows, problems)


def _rows(recipe: Recipe, axis: str, declared: TableInput, data: bytes, problems: list[Problem]) -> Iterator[Row]:
    table = read_table(data, file=declared.table)
    at: Path = ("inputs", axis)
    named: list[tuple[str, Path]] = [(declared.key, (*at, "key"))]
    named += [(column, (*at, "where", column)) for column in declared.where]
    named += [(column, (*at, "columns", column)) for column in declared.columns]
    named += columns_named(recipe.document, axis)
    missing = [(column, path) for column, path in named if column not in table.columns]
    if missing:
        problems += [recipe.problem(path, unknown_column(column, table.columns)) for column, path in missing]
        return
    seen: dict[str, int] = {}
    for row in table.rows:
        if not _takes_part(row, declared):
            continue
        key = row.cells[declared.key]
        if not key or len(key) > 200 or not key.isprintable():
            what = f"no key of a row ({key[:40]!r})" if key else "empty"
            problems.append(Problem(table.file, row.line, 0, "", f"column '{declared.key}' is {what}"))
            continue
        if key in seen:
            message = f"{declared.key} '{key}' is in line {seen[key]} already"
            problems.append(Problem(table.file, row.line, 0, "", message))
            continue
        seen[key] = row.line
        yield Row(key, _fields(row, key, declared, table.file, problems), table.file, row.line)


def _takes_part(row: TableRow, declared: TableInput) -> bool:
    for column, wanted in declared.where.items():
        cell = row.cells[column]
        if cell in wanted:
            continue
        try:
            if typed(cell, declared.columns.get(column, "text")) not in wanted:
                return False
        except ValueError:
            return False
    return True


def _fields(row: TableRow, key: str, declared: TableInput, file: str, problems: list[Problem]) -> Mapping[str, str]:
    fields = dict(row.cells)
    for column, kind in declared.columns.items():
        try:
            fields[column] = typed(fields[column], kind)
        except ValueError as error:
            problems.append(Problem(file, row.line, 0, "", f"row '{key}', column '{column}': {error}"))
    return fields


def wanted_files(
    recipe: Recipe,
    rows: Mapping[str, tuple[Row, ...]],
    base: str,
    *,
    allowed: Sequence[str] | None = None,
) -> tuple[WantedFile, ...]:
    """Every pattern and file that has to be listed and probed before the plan can be made.

    `folders` and `assign` of `planning.uris` say what to list and which file belongs to which pattern. Raises
    `RecipeError` for places outside of `allowed` and for values that make no name of a file.
    """
    texts = Texts(recipe)
    wanted: list[WantedFile] = []
    problems: list[Problem] = []
    for axis, declared in recipe.document.inputs.items():
        uses = list(input_uses(axis, declared))
        if isinstance(declared, GlobInput):
            text = texts.compile(declared.glob, uses[0][1].path)
            pieces = text.pieces(_only(recipe, None, 0))
            uri = _place(recipe, pieces, base, allowed, text.path, problems, pattern=True)
            if uri is not None:
                wanted.append(WantedFile(uri, axis, None, "file", True))
            continue
        position = recipe.scope.axes.index(axis)
        compiled = [(name, texts.compile(use.template.text, use.path)) for name, use in uses]
        for row in rows.get(axis, ()):
            point = _only(recipe, row, position)
            for name, text in compiled:
                try:
                    pieces = text.pieces(point)
                except AtPoint as error:
                    problems.append(error.problem)
                    continue
                where = f"row '{row.key}' ({row.file}:{row.line}): "
                uri = _place(recipe, pieces, base, allowed, text.path, problems, pattern=True, where=where)
                if uri is not None:
                    many = not isinstance(declared.files[name], str)
                    wanted.append(WantedFile(uri, axis, row.key, name, many))
    for logo in logos_named(recipe.document):
        if logo not in recipe.brand.logos:
            continue
        file, line, column = recipe.brand.origins[f"logos.{logo}"]
        try:
            uri = uris.expand([(recipe.brand.logos[logo], False)], base, pattern=False)
            _check_allowed(uri, allowed)
        except ValueError as error:
            problems.append(Problem(file, line, column, f"logos.{logo}", str(error)))
            continue
        wanted.append(WantedFile(uris.literal(uri), None, None, f"logos.{logo}", False))
    return _or_raise(tuple(wanted), problems)


def join(
    recipe: Recipe, rows: Mapping[str, tuple[Row, ...]], wanted: Iterable[WantedFile], found: FoundFiles
) -> Listed:
    """Rows with their pictures. Rows whose file is missing or unusable are skipped or told, as `on_missing` says.

    `found`: `WantedFile.uri` -> what matches it, in any order. Raises `RecipeError`: a missing file where the recipe
    says `fail`, several files where it wants one, a missing logo, two files of a glob with one name.
    """
    made = _Join(recipe, rows, found)
    for each in wanted:
        made.take(each)
    return _or_raise(made.listed(), made.problems)


class _Join:
    def __init__(self, recipe: Recipe, rows: Mapping[str, tuple[Row, ...]], found: FoundFiles) -> None:
        self.recipe, self.rows, self.found = recipe, rows, found
        self.problems: list[Problem] = []
        self.skipped: dict[tuple[str, str], SkippedRow] = {}
        self.logos: dict[str, ImageInfo] = {}
        self.files: dict[tuple[str, str], dict[str, ImageInfo | tuple[ImageInfo, ...]]] = {}
        self.globs: dict[str, tuple[Row, ...]] = {}
        self.by_key = {axis: {row.key: row for row in listed} for axis, listed in rows.items()}

    def take(self, wanted: WantedFile) -> None:
        found = sorted(self.found.get(wanted.uri, ()), key=lambda each: each.uri)
        if wanted.axis is None:
            self.logo(wanted, found)
        elif wanted.row is None:
            self.glob(wanted.axis, wanted.uri, found)
        else:
            self.file(wanted, self.by_key[wanted.axis][wanted.row], found)

    def logo(self, wanted: WantedFile, found: Sequence[Found]) -> None:
        file, line, column = self.recipe.brand.origins[wanted.name]
        only = found[0] if found else None
        if isinstance(only, ImageInfo):
            self.logos[wanted.name.partition(".")[2]] = only
            return
        reason = f"{wanted.uri} is not there" if only is None else f"{only.uri}: {only.reason}"
        self.problems.append(Problem(file, line, column, wanted.name, reason))

    def glob(self, axis: str, pattern: str, found: Sequence[Found]) -> None:
        rows: dict[str, Row] = {}
        for each in found:
            name = uris.file_name(each.uri)
            stem = name.rpartition(".")[0] or name
            if not stem.isprintable():  # it goes to a terminal, as the key of a row
                stem = stem.encode("unicode_escape").decode()
            if isinstance(each, FileProblem):
                self.unusable(axis, stem, each.uri, 0, each.reason, ("inputs", axis, "glob"))
                continue
            if stem in rows:
                message = f"two files are called '{stem}': {rows[stem].file} and {each.uri}"
                self.tell(("inputs", axis, "glob"), message)
                continue
            rows[stem] = Row(stem, {"stem": stem, "name": name}, each.uri, 0, {"file": each})
        if not found:
            self.tell(("inputs", axis, "glob"), f"no file matches {pattern}")
        self.globs[axis] = tuple(rows.values())

    def file(self, wanted: WantedFile, row: Row, found: Sequence[Found]) -> None:
        assert wanted.axis is not None
        path: Path = ("inputs", wanted.axis, "files", wanted.name)
        bad = next((each for each in found if isinstance(each, FileProblem)), None)
        good = tuple(each for each in found if isinstance(each, ImageInfo))
        if len(found) > 1 and not wanted.many:
            names = ", ".join(each.uri for each in found[:3]) + (", ..." if len(found) > 3 else "")
            self.tell(
                path, f"row '{row.key}' ({row.file}:{row.line}): several files match: {names}; write a list to take all"
            )
        elif not found:
            reason = f"{wanted.name} is missing ({uris.literal(wanted.uri)})"
            self.unusable(wanted.axis, row.key, row.file, row.line, reason, path)
        elif bad is not None:
            reason = f"{wanted.name} is unusable ({bad.uri}: {bad.reason})"
            self.unusable(wanted.axis, row.key, row.file, row.line, reason, path)
        else:
            files = self.files.setdefault((wanted.axis, row.key), {})
            before = files.get(wanted.name, ())
            files[wanted.name] = (*(before if isinstance(before, tuple) else ()), *good) if wanted.many else good[0]

    def unusable(self, axis: str, row: str, file: str, line: int, reason: str, path: Path) -> None:
        if self.recipe.document.inputs[axis].on_missing == "skip":
            self.skipped.setdefault((axis, row), SkippedRow(axis, row, reason, file, line))
            return
        place = f"{file}:{line}" if line else file
        self.tell(path, f"row '{row}' ({place}): {reason}; mend it, or write on_missing: skip")

    def tell(self, path: Path, message: str) -> None:
        self.problems.append(self.recipe.problem(path, message))

    def listed(self) -> Listed:
        rows: dict[str, tuple[Row, ...]] = {}
        for axis in self.recipe.document.inputs:
            if axis in self.globs:
                rows[axis] = self.globs[axis]
                continue
            rows[axis] = tuple(
                Row(row.key, row.fields, row.file, row.line, self.files.get((axis, row.key), {}))
                for row in self.rows.get(axis, ())
                if (axis, row.key) not in self.skipped
            )
        return Listed(rows, self.logos, tuple(self.skipped.values()))


def _only(recipe: Recipe, row: Row | None, position: int) -> Point:
    """A point with a value on one axis only."""
    axis = recipe.scope.axes[position] if row is not None else ""
    return tuple(
        input_value(axis, row) if row is not None and index == position else None
        for index in range(len(recipe.scope.axes))
    )


def _place(
    recipe: Recipe,
    pieces: Sequence[uris.Piece],
    base: str,
    allowed: Sequence[str] | None,
    path: Path,
    problems: list[Problem],
    *,
    pattern: bool,
    where: str = "",
) -> str | None:
    try:
        uri = uris.expand(pieces, base, pattern=pattern)
        _check_allowed(uri, allowed)
    except ValueError as error:
        problems.append(recipe.problem(path, f"{where}{error}"))
        return None
    return uri


def _check_allowed(uri: str, allowed: Sequence[str] | None) -> None:
    if not uris.allowed(uris.literal_prefix(uri), allowed):
        places = ", ".join(allowed or ()) or "nothing"
        more = "the setting read_prefixes (KONTEXT_BATCH_READ_PREFIXES), or `read` of an inbox, allows more"
        raise ValueError(f"{uri} lies outside of what this recipe may read ({places}); {more}")


def _or_raise(value: T, problems: Sequence[Problem]) -> T:
    if problems:
        raise RecipeError(problems)
    return value
