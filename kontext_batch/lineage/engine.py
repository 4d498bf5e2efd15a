"""Connections and transactions.

SQLite: write-ahead log, so that readers and the one writer do not wait for each other; a writing transaction takes its
lock at the start (`BEGIN IMMEDIATE`), so that it cannot fail half-way. PostgreSQL: READ COMMITTED, with one advisory
lock around what changes the graph of steps (see `lock_graph`).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy import event, exc

from kontext_batch.errors import (
    InfrastructureError,
    KontextBatchError,
    SettingsError,
    StorageFull,
    StorageReadOnly,
)
from kontext_batch.hashing import canonical_json

BUSY_SECONDS = 30
"""How long a writer of SQLite waits for the others."""
TRIES = 5
"""How often a transaction that PostgreSQL broke off for another's sake is run."""
_WRITES = "kontext_batch_writes"
_GRAPH_LOCK = 0x6B6F6E74  # "kont"
_FULL, _READ_ONLY, _DEADLOCK, _NOT_SERIALIZABLE = "53100", "25006", "40P01", "40001"
_NOT_ALLOWED = "42501"

P = ParamSpec("P")
T = TypeVar("T")


def open_database(url: str) -> sa.Engine:
    """An engine for `sqlite:///file` or `postgresql://...`; connects lazily. Raises `SettingsError`."""
    try:
        parsed = sa.make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() == "postgresql":
            # No prepared statements: their plans are kept from when the tables were small, and a step costs more and
            # more. It also lets any pooler stand between.
            return sa.create_engine(parsed, json_serializer=canonical_json, connect_args={"prepare_threshold": None})
        if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
            engine = sa.create_engine(
                parsed,
                json_serializer=canonical_json,
                connect_args={"timeout": BUSY_SECONDS, "factory": _SqliteConnection},
            )
            event.listen(engine, "begin", _begin_sqlite)
            return engine
    except (exc.ArgumentError, exc.NoSuchModuleError) as error:
        raise SettingsError(f"the database URL is not usable: {error}") from error
    except ValueError:
        raise SettingsError("the database URL is not usable: its port is no number") from None
    except ModuleNotFoundError as error:
        raise SettingsError(f"PostgreSQL needs psycopg: pip install 'kontext-batch[postgres]' ({error})") from error
    raise SettingsError(f"database URL '{parsed.render_as_string()}': sqlite:///FILE or postgresql://... is expected")


def close_database(engine: sa.Engine) -> None:
    """Close its connections; the engine is of no more use."""
    if event.contains(engine, "begin", _begin_sqlite):
        # Left to the garbage collector, SQLAlchemy may mistake a later engine at the same address for this one.
        event.remove(engine, "begin", _begin_sqlite)
    engine.dispose()


class _SqliteConnection(sqlite3.Connection):
    """A connection as this program wants it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        self.isolation_level = None  # transactions are begun by `_begin_sqlite`, not by the driver
        for attempt in range(100):
            try:
                self.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                # Another process is switching this very file; SQLite does not wait for that by itself.
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or attempt == 99:
                    raise
                time.sleep(0.05)
        self.execute("PRAGMA synchronous = FULL")
        self.execute("PRAGMA foreign_keys = ON")
        self.execute("PRAGMA cache_size = -65536")  # 64 MiB


def _begin_sqlite(conn: sa.Connection) -> None:
    conn.exec_driver_sql("BEGIN IMMEDIATE" if conn.get_execution_options().get(_WRITES) else "BEGIN")


class Transactions:
    """Runs functions of a connection, each in a transaction of its own; returns when it is committed."""

    def __init__(self, engine: sa.Engine) -> None:
        self._reading = engine
        self._writing = engine.execution_options(**{_WRITES: True})

    def read(self, work: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Of a consistent view on SQLite, statement by statement on PostgreSQL."""
        return _transact(self._reading, work, *args, **kwargs)

    def write(self, work: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work` is run again when PostgreSQL breaks it off: what it does beside SQL must bear to be done twice."""
        return _transact(self._writing, work, *args, **kwargs)

    def dispose(self) -> None:
        """Close the idle connections."""
        close_database(self._reading)


def _transact(
    engine: sa.Engine, work: Callable[Concatenate[sa.Connection, P], T], *args: P.args, **kwargs: P.kwargs
) -> T:
    for attempt in range(TRIES):
        worked = False
        try:
            with engine.begin() as conn:
                result = work(conn, *args, **kwargs)
                worked = True
            return result
        except exc.DBAPIError as error:
            if attempt < TRIES - 1 and _sqlstate(error) in (_DEADLOCK, _NOT_SERIALIZABLE):
                continue
            if attempt == 0 and error.connection_invalidated and not worked:
                continue  # it broke while nobody used it; the pool has thrown away the others of its age too
            translated = translate(error)
            if translated is None:
                raise
            raise translated from error
    raise AssertionError("unreachable")


def begin_writing(engine: sa.Engine) -> Any:
    """A writing transaction as a context manager, for migrations."""
    return engine.execution_options(**{_WRITES: True}).begin()


def lock_graph(conn: sa.Connection, *, alone: bool) -> None:
    """Order what changes the graph of steps on PostgreSQL; SQLite has one writer anyway.

    Commits and upload intents share the lock. Who adds edges, asks for steps anew, cancels, reconciles or deletes
    objects holds it alone: else a parent could be committed while a child that counts it as undone is being written,
    or an object deleted while another step announces the same one.
    """
    if conn.dialect.name == "postgresql":
        lock = "pg_advisory_xact_lock" if alone else "pg_advisory_xact_lock_shared"
        conn.exec_driver_sql(f"SELECT {lock}({_GRAPH_LOCK})")


def graph_locked(dialect: str) -> list[sa.ColumnElement[bool]]:
    """`lock_graph(alone=False)` as a condition of a transaction's first statement, for one round trip less.

    PostgreSQL evaluates it before it reads a row, but after it has chosen what the statement may see: only rows that
    the statement locks are sure to be the newest. Those of later statements are.
    """
    if dialect != "postgresql":
        return []
    locked = sa.literal_column(f"(SELECT pg_advisory_xact_lock_shared({_GRAPH_LOCK})::text)", sa.Text)
    return [locked.is_not(None)]


def _sqlstate(error: exc.DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def translate(error: exc.DBAPIError) -> KontextBatchError | None:
    """Whose fault a database's error is; None: ours, it stays as it is."""
    said = str(error.orig)
    if isinstance(error.orig, sqlite3.Error):
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return StorageFull(f"no space is left for the database ({said})")
        if code == sqlite3.SQLITE_READONLY:
            return StorageReadOnly(f"the database may not be written to ({said})")
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return SettingsError(f"the database file is damaged, or no SQLite database ({said})")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return InfrastructureError(
                f"another process has been writing in the same workspace for more than {BUSY_SECONDS} s ({said}); "
                "nothing is lost: when it is done or stopped, the same command goes on"
            )
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            return InfrastructureError(f"the database did not do its part: {said}")
        return None
    state = _sqlstate(error)
    if state == _FULL:
        return StorageFull(f"no space is left for the database ({said})")
    if state == _READ_ONLY:
        return StorageReadOnly(f"the database may not be written to ({said})")
    if state == _NOT_ALLOWED:
        return SettingsError(
            f"the user of database_url may not do this ({said}); tables are made and changed by "
            "`kontext-batch db upgrade`, as the user who owns them"
        )
    if isinstance(error, exc.OperationalError | exc.InterfaceError) or error.connection_invalidated:
        return InfrastructureError(f"the database did not do its part: {said}")
    return None
