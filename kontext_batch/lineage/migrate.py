"""Bring a database to the schema of this version.

Alembic is imported only when there is something to do: at the newest revision `upgrade` costs one query.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from kontext_batch.errors import SettingsError
from kontext_batch.lineage.engine import Transactions, open_database
from kontext_batch.lineage.tables import REVISION

_UPGRADE_LOCK = 0x6B6F6E75


def current(url: str) -> str | None:
    """The revision that the database is at; None for one without our tables."""
    transactions = Transactions(open_database(url))
    try:
        return transactions.read(_revision)
    finally:
        transactions.dispose()


def check(url: str) -> None:
    """Raises `SettingsError`, with what to do, when the database is not at this version's revision."""
    found = current(url)
    if found != REVISION:
        raise SettingsError(f"the database is at revision {found or 'none'}, not {REVISION}: {_advice(found)}")


def upgrade(url: str, revision: str = "head") -> None:
    """Create or upgrade the tables, in one transaction; of several processes one does it and the others wait.

    Raises `SettingsError` for a database of a newer version.
    """
    engine = open_database(url)
    transactions = Transactions(engine)
    try:
        if revision == "head" and transactions.read(_revision) == REVISION:
            return
        transactions.write(_migrate, revision, up=True)
    finally:
        transactions.dispose()


def downgrade(url: str, revision: str) -> None:
    """Take migrations back, down to `revision`; `base` removes every table."""
    transactions = Transactions(open_database(url))
    try:
        transactions.write(_migrate, revision, up=False)
    finally:
        transactions.dispose()


def _revision(conn: sa.Connection) -> str | None:
    if not sa.inspect(conn).has_table("alembic_version"):
        return None
    found: str | None = conn.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return found


def _migrate(conn: sa.Connection, revision: str, *, up: bool) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    if conn.dialect.name == "postgresql":
        conn.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK})")
    config = Config()
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = conn
    found = _revision(conn)
    if found is not None and found not in {
        each.revision for each in ScriptDirectory.from_config(config).walk_revisions()
    }:
        raise SettingsError(f"the database is at revision {found}, which this version does not know: {_advice(found)}")
    (command.upgrade if up else command.downgrade)(config, revision)


def _advice(found: str | None) -> str:
    known = found is None or found < REVISION
    return "run `kontext-batch db upgrade`" if known else "it was made by a newer kontext-batch; upgrade that"


def _scripts() -> Path:
    import migrations

    return Path(migrations.__path__[0])
