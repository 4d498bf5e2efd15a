"""Migrations make the tables that the code declares, once, from any number of processes."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import migrations
from kontext_batch.errors import SettingsError
from kontext_batch.lineage import migrate
from kontext_batch.lineage.engine import begin_writing, close_database, open_database
from kontext_batch.lineage.tables import REVISION, metadata

SCRIPTS = Path(migrations.__path__[0])


def test_the_declared_revision_is_the_newest() -> None:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_current_head() == REVISION


def test_upgrading_an_empty_database_makes_exactly_the_declared_tables(empty_database_url: str) -> None:
    migrate.upgrade(empty_database_url)
    engine = open_database(empty_database_url)
    with engine.begin() as conn:
        assert compare_metadata(MigrationContext.configure(conn), metadata) == []
        made = sa.inspect(conn)
        for table in metadata.sorted_tables:
            checks = {each["name"] for each in made.get_check_constraints(table.name)}
            assert checks == {each.name for each in table.constraints if isinstance(each, sa.CheckConstraint)}
            indices = {each["name"]: bool(each["unique"]) for each in made.get_indexes(table.name)}
            declared = {str(each.name): bool(each.unique) for each in table.indexes}
            assert declared.items() <= indices.items()
    close_database(engine)


def test_migrated_and_declared_sqlite_tables_are_the_same_text(tmp_path: Path) -> None:
    """What `compare_metadata` does not look at: partial indices, WITHOUT ROWID, orders."""

    def schema(url: str) -> set[str]:
        engine = open_database(url)
        with engine.begin() as conn:
            rows = conn.exec_driver_sql("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").scalars().all()
        close_database(engine)
        lines = {" ".join(row.split()) for row in rows if "alembic_version" not in row}
        return {"".join(sorted(line.replace("(", ",").replace(")", ",").split(","))) for line in lines}

    migrate.upgrade(f"sqlite:///{tmp_path}/migrated.sqlite")
    engine = open_database(f"sqlite:///{tmp_path}/declared.sqlite")
    with begin_writing(engine) as conn:
        metadata.create_all(conn)
    close_database(engine)
    assert schema(f"sqlite:///{tmp_path}/migrated.sqlite") == schema(f"sqlite:///{tmp_path}/declared.sqlite")


def test_downgrading_removes_everything(empty_database_url: str) -> None:
    migrate.upgrade(empty_database_url)
    migrate.downgrade(empty_database_url, "base")
    engine = open_database(empty_database_url)
    with engine.begin() as conn:
        assert sa.inspect(conn).get_table_names() == ["alembic_version"]
    close_database(engine)
    migrate.upgrade(empty_database_url)
    migrate.check(empty_database_url)


def test_steps_of_an_older_database_get_their_account(empty_database_url: str) -> None:
    migrate.upgrade(empty_database_url, "0001")
    engine = open_database(empty_database_url)
    moment = "2026-11-24 10:00:00.000"
    with begin_writing(engine) as conn:
        for run_id, priority, state in ((1, 5, "done"), (2, 1, "running"), (3, 2, "running")):
            conn.exec_driver_sql(
                "INSERT INTO runs (id, recipe, recipe_sha256, recipe_text, source, owner, trigger, priority, selection,"
                f" budget, state, created) VALUES ({run_id}, 'r', '', '', '', '', 'cli', {priority}, '{{}}', '{{}}',"
                f" '{state}', '{moment}')"
            )
        for step_id, priority in ((1, 2), (2, 5), (3, 0)):
            conn.exec_driver_sql(
                "INSERT INTO steps (id, key, operation, lane, state, deps_left, priority, asked, attempts, losses,"
                f" lease_token) VALUES ({step_id}, 'k{step_id}', 'edit', 'l', 'ready', 0, {priority}, 1, 0, 0, 0)"
            )
        for run_id, ordinal, step_id in ((1, 0, 1), (2, 0, 1), (3, 0, 1), (1, 1, 2)):
            conn.exec_driver_sql(
                "INSERT INTO run_steps (run_id, ordinal, step_id, node, axes, candidate, take, file, line, first,"
                f" cached) VALUES ({run_id}, {ordinal}, {step_id}, 'n', '[]', 1, 0, 'f', 1, true, false)"
            )
    migrate.upgrade(empty_database_url)
    with engine.begin() as conn:
        rows = conn.exec_driver_sql("SELECT id, run_id FROM steps").all()
    assert {row[0]: row[1] for row in rows} == {1: 3, 2: 1, 3: None}
    migrate.downgrade(empty_database_url, "0001")
    with engine.begin() as conn:
        rows = conn.exec_driver_sql("SELECT id, priority FROM steps").all()
    assert {row[0]: row[1] for row in rows} == {1: 2, 2: 5, 3: 0}
    close_database(engine)


def test_steps_of_an_older_database_get_their_materials(empty_database_url: str) -> None:
    migrate.upgrade(empty_database_url, "0008")
    engine = open_database(empty_database_url)
    with begin_writing(engine) as conn:
        for step_id, params in (
            (1, '{"model_sha256": "m", "adapters": [{"name": "a", "sha256": "x"}, {"name": "b", "sha256": "y"}]}'),
            (2, '{"format": "png"}'),
        ):
            conn.exec_driver_sql(
                "INSERT INTO steps (id, key, operation, lane, state, deps_left, asked, attempts, losses, lease_token)"
                f" VALUES ({step_id}, 'k{step_id}', 'edit', 'l', 'done', 0, 1, 0, 0, 0)"
            )
            conn.exec_driver_sql(f"INSERT INTO step_params (step_id, params) VALUES ({step_id}, '{params}')")
    migrate.upgrade(empty_database_url)
    with engine.begin() as conn:
        rows = conn.exec_driver_sql("SELECT sha256, step_id, kind FROM step_materials ORDER BY sha256").all()
    assert [tuple(row) for row in rows] == [("m", 1, "model"), ("x", 1, "adapter"), ("y", 1, "adapter")]
    close_database(engine)


def test_check_says_what_to_do(empty_database_url: str) -> None:
    assert migrate.current(empty_database_url) is None
    with pytest.raises(SettingsError, match="db upgrade"):
        migrate.check(empty_database_url)
    migrate.upgrade(empty_database_url)
    assert migrate.current(empty_database_url) == REVISION
    migrate.check(empty_database_url)
    migrate.upgrade(empty_database_url)


def test_a_database_of_a_newer_version_is_refused(empty_database_url: str) -> None:
    migrate.upgrade(empty_database_url)
    engine = open_database(empty_database_url)
    with begin_writing(engine) as conn:
        conn.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    close_database(engine)
    for refuse in (migrate.check, migrate.upgrade):
        with pytest.raises(SettingsError, match="newer kontext-batch"):
            refuse(empty_database_url)


def test_a_migration_that_breaks_leaves_the_database_as_it_was(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic.ddl.impl import DefaultImpl

    def broken(self: DefaultImpl, table: sa.Table, **kw: object) -> None:
        if table.name == "uploads":
            raise RuntimeError("broken off")
        original(self, table, **kw)

    original = DefaultImpl.create_table
    with monkeypatch.context() as patched:
        patched.setattr(DefaultImpl, "create_table", broken)
        with pytest.raises(RuntimeError):
            migrate.upgrade(empty_database_url)
    engine = open_database(empty_database_url)
    with engine.begin() as conn:
        assert sa.inspect(conn).get_table_names() == []
    close_database(engine)
    migrate.upgrade(empty_database_url)


def test_processes_that_upgrade_one_database_at_once_do_it_once(empty_database_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=migrate.upgrade, args=(empty_database_url,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    migrate.check(empty_database_url)


def test_upgrading_at_the_newest_revision_does_not_load_alembic(sqlite_url: str) -> None:
    code = (
        "import sys; from kontext_batch.lineage.migrate import upgrade;"
        f"upgrade({sqlite_url!r}); assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
