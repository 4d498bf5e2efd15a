"""Fixtures of the contract tests."""

from tests.contract.database import (
    database_url,
    empty_database_url,
    empty_postgres_url,
    engine,
    postgres_server,
    postgres_template,
    postgres_url,
    repository,
    sqlite_template,
    sqlite_url,
    two_workers,
)

__all__ = [
    "database_url",
    "empty_database_url",
    "empty_postgres_url",
    "engine",
    "postgres_server",
    "postgres_template",
    "postgres_url",
    "repository",
    "sqlite_template",
    "sqlite_url",
    "two_workers",
]
