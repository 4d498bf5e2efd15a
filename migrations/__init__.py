"""The database's migrations (Alembic), run by `kontext_batch.lineage.migrate`."""
