"""Alembic's entry. The connection, inside a transaction, comes from `kontext_batch.lineage.migrate`.

A developer writes a new revision with

    alembic -c migrations/alembic.ini -x url=sqlite:////tmp/at-head.sqlite revision --autogenerate -m "..."
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from kontext_batch.lineage.engine import Transactions, open_database
from kontext_batch.lineage.tables import metadata


def migrate(connection: sa.Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        transactional_ddl=True,  # of SQLite too, whose transactions `engine` begins itself
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    transactions = Transactions(open_database(context.get_x_argument(as_dictionary=True)["url"]))
    transactions.write(migrate)
    transactions.dispose()
