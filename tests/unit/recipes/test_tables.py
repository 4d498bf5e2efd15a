"""Tables in the forms that offices write (RECIPES.md 2.14)."""

from __future__ import annotations

import io
import itertools
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openpyxl import Workbook

from kontext_batch.errors import RecipeError
from kontext_batch.recipes import tables
from kontext_batch.recipes.tables import read_table, typed


def rows(data: bytes) -> list[dict[str, str]]:
    return [dict(row.cells) for row in read_table(data, file="t.csv").rows]


def problem(data: bytes) -> str:
    with pytest.raises(RecipeError) as error:
        rows(data)
    return str(error.value)


def xlsx(*lines: list[object]) -> bytes:
    book = Workbook()
    sheet = book.active
    assert sheet is not None
    for line in lines:
        sheet.append(line)
    book.create_sheet("Second").append(["not", "read"])
    data = io.BytesIO()
    book.save(data)
    return data.getvalue()


EXPECTED = [{"sku": "A-1", "name": "Läufer", "price": "1,5"}, {"sku": "007", "name": "", "price": "2"}]


@pytest.mark.parametrize(
    "data",
    [
        'sku,name,price\nA-1,Läufer,"1,5"\n007,,2\n'.encode(),
        "\ufeffsku;name;price\r\nA-1;Läufer;1,5\r\n007;;2\r\n".encode(),
        "sku\tname\tprice\nA-1\tLäufer\t1,5\n007\t\t2\n".encode(),
        "sku;name;price\nA-1;Läufer;1,5\n007;;2".encode("cp1252"),
        "sku;name;price\nA-1;Läufer;1,5\n007;;2\n".encode("utf-16"),
        '\n\n"sku"; name;price ;\n A-1 ;Läufer;"1,5"\n;;\n007;;2'.encode(),
    ],
    ids=["comma", "bom-semicolon-crlf", "tab", "windows", "utf-16", "blank-lines-and-spaces"],
)
def test_csv_in_every_dress_is_the_same_table(data: bytes) -> None:
    assert rows(data) == EXPECTED


def test_the_first_sheet_of_xlsx() -> None:
    data = xlsx(["sku", "name", "price"], ["A-1", "Läufer", 1.5], [7, None, 2], [None, None, None])
    assert rows(data) == [
        {"sku": "A-1", "name": "Läufer", "price": "1.5"},
        {"sku": "7", "name": "", "price": "2"},
    ]


def test_excels_binary_fractions_are_read_as_shown() -> None:
    assert rows(xlsx(["p"], [0.1 + 0.2], [True], [1e20]))[0] == {"p": "0.3"}


def test_rows_know_their_lines_also_after_cells_of_several_lines() -> None:
    table = read_table(b'sku,text\nA,"one\ntwo"\n\nB,x\n', file="t.csv")
    assert [(row.line, row.cells["sku"]) for row in table.rows] == [(2, "A"), (5, "B")]


def test_rows_are_read_lazily() -> None:
    data = b"sku\n" + b"".join(b"A-%d\n" % i for i in range(1000)) + b'B,"unclosed'
    table = read_table(data, file="t.csv")
    assert [row.cells["sku"] for row in itertools.islice(table.rows, 2)] == ["A-0", "A-1"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "t.csv: the table is empty"),
        (b"\n\n", "t.csv: the table is empty"),
        (b"sku,sku\n", "t.csv:1: column 'sku' is there twice"),
        (b"sku,,x\n", "t.csv:1: column 2 has no name"),
        (b"sku\nA,B\n", "t.csv:2: more cells than the header has columns ('B')"),
        (b'sku\n"A\n', "not readable as CSV"),
        (b"sku\nA\x00\n", "t.csv:2: not a table: it holds NUL"),
        (b"PK\x03\x04rest", "not readable as XLSX"),
        (b"sku\n\x81\x8d\n", "t.csv:2: neither UTF-8 nor Windows text"),
    ],
)
def test_what_is_no_table_is_told(data: bytes, said: str) -> None:
    assert said in problem(data)


def test_a_zip_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", b" " * 2_000_000)
    monkeypatch.setattr(tables, "MAX_UNPACKED", 1_000_000)
    assert "unpacks to more than" in problem(data.getvalue())


def test_a_zip_that_is_no_workbook_is_told() -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert "not readable as XLSX" in problem(data.getvalue())


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROWS", 2)
    assert "t.csv:4: more than 2 rows" in problem(b"a\n1\n2\n3\n")
    monkeypatch.setattr(tables, "MAX_BYTES", 5)
    assert "larger than" in problem(b"a\n1\n2\n3\n")


@pytest.mark.parametrize(
    ("kind", "cell", "value"),
    [
        ("hex", "e4002b", "#E4002B"),
        ("hex", "#e4002b", "#E4002B"),
        ("decimal", "129,95", "129.95"),
        ("decimal", "129.95", "129.95"),
        ("decimal", "1.299,95", "1299.95"),
        ("decimal", "1,299.95", "1299.95"),
        ("decimal", "1.299.000", "1299000"),
        ("decimal", "1 299,50", "1299.50"),
        ("decimal", "-5", "-5"),
        ("int", "007", "7"),
        ("int", "-3", "-3"),
        ("text", "007", "007"),
        ("hex", "", ""),
        ("int", "", ""),
    ],
)
def test_typed_cells_have_one_form(kind: str, cell: str, value: str) -> None:
    assert typed(cell, kind) == value


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        ("hex", "red"),
        ("hex", "#fff"),
        ("decimal", "a"),
        ("decimal", "1e5"),
        ("decimal", "."),
        ("int", "1.5"),
        ("int", "x"),
    ],
)
def test_cells_of_another_type_are_refused(kind: str, cell: str) -> None:
    with pytest.raises(ValueError, match=f"'{cell}'"):
        typed(cell, kind)


CELL = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=10).map(str.strip)


@given(st.lists(st.tuples(CELL.filter(bool), CELL), min_size=1, max_size=8), st.sampled_from([",", ";", "\t"]))
def test_csv_round_trip(cells: list[tuple[str, str]], delimiter: str) -> None:
    import csv

    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["first", "second"])
    writer.writerows(cells)
    assert rows(text.getvalue().encode()) == [{"first": a, "second": b} for a, b in cells]
