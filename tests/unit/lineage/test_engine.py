"""Connections: what SQLite is told, and whose fault its errors are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from kontext_batch.errors import InfrastructureError, SettingsError, StorageReadOnly
from kontext_batch.lineage import engine as module
from kontext_batch.lineage.engine import Transactions, close_database, open_database
from kontext_batch.lineage.sql import stored_text


def pragma(conn: sa.Connection, name: str) -> object:
    return conn.exec_driver_sql(f"PRAGMA {name}").scalar()


def test_sqlite_keeps_a_log_checks_keys_and_waits_for_others(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/a.sqlite")
    with engine.begin() as conn:
        assert pragma(conn, "journal_mode") == "wal"
        assert pragma(conn, "foreign_keys") == 1
        assert pragma(conn, "synchronous") == 2
        assert pragma(conn, "busy_timeout") == 30_000
    close_database(engine)


def test_a_reader_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    transactions = Transactions(open_database(f"sqlite:///{tmp_path}/a.sqlite"))
    transactions.write(lambda conn: conn.exec_driver_sql("CREATE TABLE x (a)"))
    inside, leave = threading.Event(), threading.Event()

    def write(conn: sa.Connection) -> None:
        conn.exec_driver_sql("INSERT INTO x VALUES (1)")
        inside.set()
        leave.wait(10)

    thread = threading.Thread(target=transactions.write, args=(write,))
    thread.start()
    assert inside.wait(10)
    count = transactions.read(lambda conn: conn.exec_driver_sql("SELECT count(*) FROM x").scalar())
    leave.set()
    thread.join()
    assert count == 0
    transactions.dispose()


def test_nothing_is_kept_of_work_that_raises(tmp_path: Path) -> None:
    transactions = Transactions(open_database(f"sqlite:///{tmp_path}/a.sqlite"))

    def work(conn: sa.Connection) -> None:
        conn.exec_driver_sql("CREATE TABLE x (a)")
        raise ValueError

    with pytest.raises(ValueError):
        transactions.write(work)
    assert not transactions.read(lambda conn: sa.inspect(conn).has_table("x"))
    transactions.dispose()


@pytest.mark.parametrize("url", ["nonsense", "mysql://x/y", "sqlite://", "sqlite:///:memory:", "oracle+nothing://x"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(SettingsError):
        open_database(url)


def test_a_password_is_not_told() -> None:
    with pytest.raises(SettingsError) as caught:
        open_database("mysql+pymysql://user:secret@host/db")
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_a_setting_at_fault(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").write_bytes(b"not a database at all, but long enough to be looked at" * 10)
    transactions = Transactions(open_database(f"sqlite:///{tmp_path}/a.sqlite"))
    with pytest.raises(SettingsError, match="no SQLite database"):
        transactions.read(lambda conn: conn.exec_driver_sql("SELECT 1 FROM sqlite_master").scalar())
    transactions.dispose()


def test_a_folder_that_is_not_there_is_infrastructure(tmp_path: Path) -> None:
    transactions = Transactions(open_database(f"sqlite:///{tmp_path}/no/a.sqlite"))
    with pytest.raises(InfrastructureError):
        transactions.read(lambda conn: conn.exec_driver_sql("SELECT 1").scalar())
    transactions.dispose()


def test_a_database_that_may_not_be_written_to_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    transactions = Transactions(open_database(f"sqlite:///{path}"))
    transactions.write(lambda conn: conn.exec_driver_sql("CREATE TABLE x (a)"))

    def write(conn: sa.Connection) -> None:
        conn.exec_driver_sql("PRAGMA query_only = ON")
        try:
            conn.exec_driver_sql("INSERT INTO x VALUES (1)")
        finally:
            conn.exec_driver_sql("PRAGMA query_only = OFF")

    with pytest.raises(StorageReadOnly):
        transactions.write(write)
    transactions.dispose()


def test_a_busy_database_is_infrastructure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.05)
    transactions = Transactions(open_database(f"sqlite:///{tmp_path}/a.sqlite"))

    def write(conn: sa.Connection) -> None:
        transactions.write(lambda other: other.exec_driver_sql("CREATE TABLE x (a)"))

    with pytest.raises(InfrastructureError, match="locked"):
        transactions.write(write)
    transactions.dispose()


def test_our_own_mistakes_stay_what_they_are(tmp_path: Path) -> None:
    transactions = Transactions(open_database(f"sqlite:///{tmp_path}/a.sqlite"))
    with pytest.raises(sa.exc.OperationalError, match="no such table"):
        transactions.read(lambda conn: conn.exec_driver_sql("SELECT * FROM absent").scalar())
    transactions.dispose()


def test_stored_text_holds_what_both_databases_can_hold() -> None:
    assert stored_text("a\0b\udcffc") == "a�b?c"
    assert len(stored_text("x" * 20_000)) == 10_000
