"""What SQLite and PostgreSQL say differently: times, lists as parameters, bulk inserts.

The clock is the database's: `now()` and `now_plus()` are evaluated in the statement, never in Python.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.type_api import TypeEngine

from kontext_batch.hashing import canonical_json
from kontext_batch.observability.masking import mask
from kontext_batch.planning.plan import Axes
from kontext_batch.planning.states import StepState

# ---------------------------------------------------------------------------------------------------------- types


class UtcTime(sa.types.TypeDecorator[datetime]):
    """A moment. `timestamptz` on PostgreSQL; on SQLite text, `2026-11-24 10:09:43.123`, which sorts as time does."""

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(sa.DateTime(timezone=True))
        return dialect.type_descriptor(sa.Text())

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if isinstance(value, datetime):
            return value.astimezone(UTC)
        return datetime.fromisoformat(value).replace(tzinfo=UTC)


class AxesText(sa.types.TypeDecorator[Axes]):
    """Axis names and keys in the order of the recipe, as canonical JSON text: comparable in SQL."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Axes | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else axes_text(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Axes | None:
        return None if value is None else tuple((name, key) for name, key in json.loads(value))


def axes_text(axes: Axes) -> str:
    """How `AxesText` stores `axes`."""
    return canonical_json([list(pair) for pair in axes])


class ListOf(sa.types.TypeDecorator[list[Any]]):
    """A list as one parameter: an array on PostgreSQL, JSON on SQLite. For `among`, not for columns."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, item: str) -> None:
        super().__init__()
        self.item = item

    def load_dialect_impl(self, dialect: sa.Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            item = sa.BigInteger() if self.item == "bigint" else sa.Text()
            return dialect.type_descriptor(postgresql.ARRAY(item))
        return dialect.type_descriptor(sa.Text())

    def process_bind_param(self, value: list[Any] | None, dialect: sa.Dialect) -> Any:
        return value if value is None or dialect.name == "postgresql" else json.dumps(value)


# ---------------------------------------------------------------------------------------------------- expressions


class now(FunctionElement[datetime]):
    """The moment of the statement, by the database's clock."""

    type = UtcTime()
    inherit_cache = True


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **kw: Any) -> str:
    return "clock_timestamp()"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **kw: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f', 'now')"


class _NowPlus(FunctionElement[datetime]):
    type = UtcTime()
    inherit_cache = True


def now_plus(seconds: float) -> _NowPlus:
    """The database's clock, `seconds` from now."""
    return _NowPlus(sa.bindparam(None, float(seconds), type_=sa.Float(53), unique=True))


@compiles(_NowPlus, "postgresql")
def _now_plus_postgresql(element: _NowPlus, compiler: Any, **kw: Any) -> str:
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)}))"


@compiles(_NowPlus, "sqlite")
def _now_plus_sqlite(element: _NowPlus, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', {seconds}))"


class seconds_between(FunctionElement[float]):
    """Seconds from the first moment to the second."""

    type = sa.Float()
    inherit_cache = True


@compiles(seconds_between, "postgresql")
def _seconds_postgresql(element: seconds_between, compiler: Any, **kw: Any) -> str:
    start, end = (compiler.process(each, **kw) for each in element.clauses)
    return f"extract(epoch FROM {end} - {start})::float"


@compiles(seconds_between, "sqlite")
def _seconds_sqlite(element: seconds_between, compiler: Any, **kw: Any) -> str:
    start, end = (compiler.process(each, **kw) for each in element.clauses)
    return f"((julianday({end}) - julianday({start})) * 86400.0)"


class _Among(FunctionElement[Any]):
    # Not Boolean: SQLAlchemy would append `= 1` on SQLite, which keeps indices from use.
    type = sa.types.NullType()
    inherit_cache = True


def among(column: sa.ColumnElement[Any], values: Iterable[Any]) -> _Among:
    """`column IN values`, for lists of any length in one parameter and one statement text."""
    return _Among(column, sa.bindparam(None, list(values), type_=_list_of(column), unique=True))


def among_later(column: sa.ColumnElement[Any], name: str) -> _Among:
    """`among`, of a statement that is made once: the values come as the parameter `name`, a list."""
    return _Among(column, sa.bindparam(name, type_=_list_of(column)))


def _list_of(column: sa.ColumnElement[Any]) -> ListOf:
    return ListOf("bigint" if isinstance(column.type, sa.Integer) else "text")


@compiles(_Among, "postgresql")
def _among_postgresql(element: _Among, compiler: Any, **kw: Any) -> str:
    column, values = (compiler.process(each, **kw) for each in element.clauses)
    return f"{column} = ANY ({values})"


@compiles(_Among, "sqlite")
def _among_sqlite(element: _Among, compiler: Any, **kw: Any) -> str:
    column, values = (compiler.process(each, **kw) for each in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({values}))"


def pair_in(
    first: sa.ColumnElement[int], second: sa.ColumnElement[int], pairs: Sequence[tuple[int, int]]
) -> sa.ColumnElement[bool]:
    """`(first, second) IN pairs`, found by an index on `first`: SQLite uses none for pairs alone."""
    return sa.and_(among(first, sorted({pair[0] for pair in pairs})), sa.tuple_(first, second).in_(list(pairs)))


def exists(*conditions: sa.ColumnElement[bool], outer: sa.FromClause | Sequence[sa.FromClause] = ()) -> sa.Exists:
    """Some row meets the conditions; `outer`: tables of the enclosing statement that they speak of.

    `SELECT 1` where SQLAlchemy says `SELECT *`: SQLite takes a narrow index only when it holds all that is asked for.
    """
    outer = [outer] if isinstance(outer, sa.FromClause) else outer
    return sa.select(sa.literal_column("1")).where(*conditions).correlate(*outer).exists()


def ordered_by_equal(column: sa.ColumnElement[Any], value: Any) -> sa.ColumnElement[bool]:
    """`column = value` in two halves, for a statement that goes on with ORDER BY `column` and a LIMIT.

    From an order PostgreSQL drops a column that is equal to something. It may then take another index that has the
    rest of the order, and reads past all that is not wanted; so it goes by the one that has these rows together.
    """
    return sa.and_(column >= value, column <= value)


def in_state(column: sa.ColumnElement[Any], *states: StepState) -> sa.ColumnElement[bool]:
    """`column` is one of `states`, written out in the statement: a parameter would keep partial indices from use."""
    if len(states) == 1:
        return column == sa.literal_column(f"'{states[0].value}'")
    return column.in_([sa.literal_column(f"'{state.value}'") for state in sorted(states)])


def by_indices(conn: sa.Connection) -> None:
    """Until the transaction ends, let PostgreSQL find rows by indices, as SQLite mostly does.

    For questions about few rows among very many: it takes each hash to have many rows, and would read whole tables.
    """
    if conn.dialect.name == "postgresql":
        ways = ("enable_hashjoin", "enable_mergejoin", "enable_seqscan", "enable_memoize", "jit")
        chosen = dict.fromkeys(ways, "off")
        chosen["max_parallel_workers_per_gather"] = "0"  # a worker takes longer to start
        conn.execute(sa.select(*(sa.func.set_config(name, value, sa.true()) for name, value in chosen.items())))


# ---------------------------------------------------------------------------------------------------------- bulk


def rows_of(
    conn: sa.Connection, name: str, columns: Mapping[str, TypeEngine[Any]], rows: Sequence[Mapping[str, Any]]
) -> sa.FromClause:
    """`rows` to select from, in one parameter and one statement text, however many they are."""
    given = sa.bindparam(None, [dict(row) for row in rows], type_=sa.JSON(), unique=True)
    if conn.dialect.name == "postgresql":
        listed = [sa.column(column, kind) for column, kind in columns.items()]
        return sa.func.json_to_recordset(given).table_valued(*listed).render_derived(name=name, with_types=True)
    each = sa.func.json_each(given).table_valued("value", name=f"{name}_json")
    picked = [
        sa.func.json_extract(each.c.value, sa.literal_column(f"'$.{column}'"), type_=kind).label(column)
        for column, kind in columns.items()
    ]
    return sa.select(*picked).subquery(name)


DialectInsert = postgresql.Insert | sqlite.Insert


def dialect_insert(conn: sa.Connection, table: sa.Table) -> DialectInsert:
    """An insert that knows ON CONFLICT, which is no part of SQLAlchemy's common one."""
    return (postgresql.insert if conn.dialect.name == "postgresql" else sqlite.insert)(table)


def insert_rows(
    conn: sa.Connection,
    table: sa.Table,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    into: sa.Insert | None = None,
    **values: sa.ColumnElement[Any],
) -> sa.Insert:
    """An insert of `rows`, and of `values` in each, that can be one of several in `execute_all`.

    `into`: an insert of the dialect, for its ON CONFLICT.
    """
    given = rows_of(conn, f"new_{table.name}", {column: table.c[column].type for column in columns}, rows)
    picked = sa.select(*(given.c[column] for column in columns), *values.values())
    if into is not None:  # SQLite would read its ON as that of a join
        picked = picked.where(sa.true())
    insert = sa.insert(table) if into is None else into
    return insert.from_select([*columns, *values], picked, include_defaults=False)


def execute_all(conn: sa.Connection, statements: Sequence[sa.Insert | sa.Update]) -> None:
    """Statements none of which reads what another writes: one round trip on PostgreSQL, in no order."""
    if conn.dialect.name != "postgresql":
        for each in statements:
            conn.execute(each)
        return
    if not statements:
        return
    *others, last = statements
    parts = [each.cte(f"part_{number}") for number, each in enumerate(others)]
    conn.execute(last.add_cte(*parts))


def bulk_insert(conn: sa.Connection, table: sa.Table, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Insert many rows fast: COPY on PostgreSQL, `executemany` of bare tuples on SQLite.

    The values are those of the driver: JSON as text.
    """
    names = ", ".join(columns)
    if conn.dialect.name == "postgresql":
        driver: Any = conn.connection.driver_connection
        with driver.cursor() as cursor, cursor.copy(f"COPY {table.name} ({names}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        return
    listed = rows if isinstance(rows, list) else list(rows)
    if listed:
        marks = ", ".join("?" * len(columns))
        conn.exec_driver_sql(f"INSERT INTO {table.name} ({names}) VALUES ({marks})", listed)


def stored_text(text: str) -> str:
    """`text` as both databases can hold it: no NUL, no lone surrogate, bounded; and without credentials."""
    return mask(text[:20_000]).encode("utf-8", "replace").decode("utf-8").replace("\0", "�")[:10_000]
