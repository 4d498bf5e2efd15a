"""Tables: CSV in the forms that offices write, and the first sheet of an XLSX file.

CSV: UTF-8 with or without BOM, UTF-16 with BOM, Windows-1252 when it is not UTF-8; comma, semicolon or tab. Rows are
read one by one. Cells are text with the space around them removed; `columns` types are checked by `typed`.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from openpyxl import load_workbook

from kontext_batch.errors import Problem, RecipeError
from kontext_batch.recipes.fields import parse_color
from kontext_batch.recipes.references import nearest

MAX_BYTES = 64 * 2**20
MAX_ROWS = 200_000
MAX_COLUMNS = 1_000
MAX_CELL = 32_767
"""Characters; Excel's own limit."""
MAX_UNPACKED = 512 * 2**20
"""Bytes of an XLSX file's parts together: a zip bomb is larger."""
DELIMITERS = ",;\t"


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row as it was written."""

    line: int
    """1-based: of the file (CSV), of the sheet (XLSX)."""
    cells: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose header has been read; iterating reads the rows, once."""

    file: str
    columns: tuple[str, ...]
    rows: Iterator[TableRow]


def read_table(data: bytes, *, file: str) -> Table:
    """The table in `data`; XLSX when it begins like a zip archive, else CSV.

    Raises `RecipeError` for what is no table, here or while rows are read.
    """
    if len(data) > MAX_BYTES:
        raise _error(file, 0, f"larger than {MAX_BYTES // 2**20} MiB")
    rows = _xlsx_rows(data, file) if data[:4] == b"PK\x03\x04" else _csv_rows(data, file)
    line, header = next(((line, cells) for line, cells in rows if any(cells)), (0, None))
    if header is None:
        raise _error(file, 0, "the table is empty; the first row names the columns")
    while header and not header[-1]:
        header.pop()
    problems = [
        Problem(file, line, 0, "", f"column '{name}' is there twice" if name else f"column {index + 1} has no name")
        for index, name in enumerate(header)
        if not name or name in header[:index]
    ]
    if problems:
        raise RecipeError(problems)
    return Table(file, tuple(header), _records(rows, tuple(header), file))


def _records(rows: Iterator[tuple[int, list[str]]], columns: tuple[str, ...], file: str) -> Iterator[TableRow]:
    for number, (line, cells) in enumerate(rows, 1):
        if number > MAX_ROWS:
            raise _error(file, line, f"more than {MAX_ROWS} rows")
        if not any(cells):
            continue
        if len(cells) > len(columns) and any(cells[len(columns) :]):
            surplus = next(cell for cell in cells[len(columns) :] if cell)
            raise _error(
                file, line, f"more cells than the header has columns ('{surplus[:40]}'); quote cells with commas"
            )
        cells += [""] * (len(columns) - len(cells))
        yield TableRow(line, dict(zip(columns, cells, strict=False)))


def _csv_rows(data: bytes, file: str) -> Iterator[tuple[int, list[str]]]:
    text = _decode(data, file)
    # DictReader is avoided: it hides where a row begins, and problems name lines.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    line = 1
    try:
        for cells in reader:
            if len(cells) > MAX_COLUMNS:
                raise _error(file, line, f"more than {MAX_COLUMNS} columns")
            yield line, [_clean(cell, file, line) for cell in cells]
            line = reader.line_num + 1
    except csv.Error as error:
        raise _error(file, line, f"not readable as CSV: {error}") from error


def _decode(data: bytes, file: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    else:
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        # German Excel saves CSV in the code page of Windows; every byte of it but five has a meaning.
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise _error(file, line, "neither UTF-8 nor Windows text; save it as 'CSV UTF-8'") from error
    if "\0" in text:
        raise _error(file, text[: text.index("\0")].count("\n") + 1, "not a table: it holds NUL characters")
    return text


def _delimiter(text: str) -> str:
    """The delimiter that the header row has most of, outside of quotes."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    header = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=lambda char: (header.count(char), -DELIMITERS.index(char)))


def _xlsx_rows(data: bytes, file: str) -> Iterator[tuple[int, list[str]]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(part.file_size for part in archive.infolist()) > MAX_UNPACKED:
                raise _error(file, 0, f"unpacks to more than {MAX_UNPACKED // 2**20} MiB")
        book = load_workbook(io.BytesIO(data), read_only=True, data_only=True, keep_links=False)
    except RecipeError:
        raise
    except Exception as error:  # openpyxl lets errors of zipfile, XML and its own through
        raise _error(file, 0, f"not readable as XLSX: {error}") from error
    try:
        sheet = book.worksheets[0] if book.worksheets else None
        if sheet is None:
            return
        for line, cells in enumerate(sheet.iter_rows(values_only=True, max_col=MAX_COLUMNS), 1):
            yield line, [_clean(_cell(value), file, line) for value in cells]
    except RecipeError:
        raise
    except Exception as error:
        raise _error(file, 0, f"not readable as XLSX: {error}") from error
    finally:
        book.close()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # Excel keeps numbers as floats; 15 digits are what it shows.
        return f"{value:.15g}"
    return str(value)


def _clean(cell: str, file: str, line: int) -> str:
    if len(cell) > MAX_CELL:
        raise _error(file, line, f"a cell of more than {MAX_CELL} characters")
    return cell.strip()


def _error(file: str, line: int, message: str) -> RecipeError:
    return RecipeError([Problem(file, line, 0, "", message)])


def typed(value: str, kind: str) -> str:
    """A cell in the one form of its type; empty cells stay empty.

    `hex` is `#E4002B`, `decimal` has a point (`129,95` and `1.299,95` are read), `int` has no leading zeros. Raises
    `ValueError` that says what is expected.
    """
    if not value or kind == "text":
        return value
    if kind == "hex":
        return parse_color(value)
    if kind == "int":
        if not re.fullmatch(r"[-+]?[0-9]{1,18}", value):
            raise ValueError(f"'{value[:60]}' is no whole number")
        return str(int(value))
    return _decimal(value)


def _decimal(value: str) -> str:
    text = value.replace("\u00a0", "").replace("\u202f", "").replace(" ", "").replace("'", "")
    if "," in text and "." in text:
        # Both: the later one is the decimal sign, the other separates thousands.
        thousands = "." if text.rindex(",") > text.rindex(".") else ","
        text = text.replace(thousands, "")
    elif text.count(",") > 1 or text.count(".") > 1:
        text = text.replace(",", "").replace(".", "")
    text = text.replace(",", ".")
    try:
        if not re.fullmatch(r"[-+]?[0-9]{0,18}(\.[0-9]{0,18})?", text):
            raise InvalidOperation
        return f"{Decimal(text):f}"
    except InvalidOperation:
        raise ValueError(f"'{value[:60]}' is no number; write 129.95 or 129,95") from None


def unknown_column(name: str, columns: tuple[str, ...]) -> str:
    """The message for a column that the table lacks."""
    return f"the table has no column '{name}'{nearest(name, columns)} (it has {', '.join(columns[:12])})"
