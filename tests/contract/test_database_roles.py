"""The two users of `deploy/postgresql-roles.sql`: one migrates, the other does everything else and changes no table."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from kontext_batch.bootstrap import open_application
from kontext_batch.cli import main
from kontext_batch.errors import SettingsError
from kontext_batch.lineage import migrate
from kontext_batch.lineage.engine import open_database
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.states import RunState
from kontext_batch.services.maintain import reconcile
from kontext_batch.services.retention import Policy, collect_garbage
from kontext_batch.services.schedules import Scheduler
from kontext_batch.settings import Settings
from tests.contract import plans
from tests.unit.cli.conftest import studio

__all__ = ["studio"]

FILE = Path(__file__).parents[2] / "deploy" / "postgresql-roles.sql"
NUMBERS = itertools.count()
PASSWORD = "open-sesame-of-the-database"


@dataclass(frozen=True)
class Roles:
    """URLs of one database, for three users."""

    superuser: str
    owner: str
    worker: str


def as_superuser(url: str, *statements: str) -> None:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as conn:
            for statement in statements:
                conn.exec_driver_sql(statement.replace("%", "%%"))
    finally:
        engine.dispose()


@pytest.fixture
def roles(empty_postgres_url: str) -> Iterator[Roles]:
    """A database without tables, prepared by the file. Users are the server's, so each test has its own."""
    url = sa.make_url(empty_postgres_url)
    number = f"{os.getpid()}_{next(NUMBERS)}"
    names = {who: f"kontext_{who}_{number}" for who in ("owner", "worker")}
    text = FILE.read_text().replace("kontext_owner", names["owner"]).replace("kontext_worker", names["worker"])
    as_superuser(empty_postgres_url, text, text)  # it may be run again
    as_superuser(empty_postgres_url, *(f"ALTER ROLE {each} PASSWORD '{PASSWORD}'" for each in names.values()))
    users = {
        who: url.set(username=name, password=PASSWORD).render_as_string(hide_password=False)
        for who, name in names.items()
    }
    yield Roles(empty_postgres_url, users["owner"], users["worker"])
    as_superuser(empty_postgres_url, *(f"DROP OWNED BY {each} CASCADE" for each in names.values()))
    as_superuser(empty_postgres_url, *(f"DROP ROLE {each}" for each in names.values()))


def test_the_worker_may_change_rows_and_no_table(roles: Roles) -> None:
    migrate.upgrade(roles.owner)
    text = FILE.read_text()
    for who, url in (("owner", roles.owner), ("worker", roles.worker)):
        text = text.replace(f"kontext_{who}", str(sa.make_url(url).username))
    as_superuser(roles.superuser, text)

    migrate.check(roles.worker)
    migrate.upgrade(roles.worker)
    engine = open_database(roles.worker)
    refused = (
        "CREATE TABLE mine (id int)",
        "CREATE TEMPORARY TABLE mine (id int)",
        "ALTER TABLE steps ADD COLUMN mine int",
        "DROP TABLE steps",
        "TRUNCATE runs CASCADE",
        "CREATE INDEX mine ON steps (id)",
        "CREATE SCHEMA mine",
        "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE ROLE mine",
        "UPDATE alembic_version SET version_num = '0001'",
    )
    for statement in refused:
        with engine.connect() as conn, pytest.raises(sa.exc.ProgrammingError, match=r"permission denied|must be owner"):
            conn.exec_driver_sql(statement)
    engine.dispose()


@pytest.mark.parametrize("at", [None, "0001"], ids=["no tables", "older tables"])
def test_tables_that_are_not_this_versions_are_told_with_what_to_do(
    roles: Roles, tmp_path: Path, at: str | None
) -> None:
    if at is not None:
        migrate.upgrade(roles.owner, at)
    for may_migrate in (False, True):
        settings = Settings(database_url=roles.worker, models_file=tmp_path / "models.json")
        with pytest.raises(SettingsError, match="kontext-batch db upgrade"):
            open_application(settings, workspace=tmp_path, may_migrate=may_migrate)


def test_a_worker_submits_claims_commits_and_cares_for_a_database_that_is_not_its_own(
    roles: Roles, tmp_path: Path
) -> None:
    migrate.upgrade(roles.owner)
    application = open_application(
        Settings(database_url=roles.worker, models_file=tmp_path / "models.json"), workspace=tmp_path, may_migrate=False
    )
    repository = application.repository
    assert isinstance(repository, SqlRepository)
    run_id = plans.submit(repository, plans.make_plan({"a": [], "b": ["a"]}))
    repository.register_worker(plans.worker())
    assert plans.finish(repository) == 2
    reconcile(repository)
    assert list(repository.finish_runs()) == [(run_id, RunState.DONE)]
    assert list(Scheduler(repository, application.wake_ups, lambda uri: application.planner()).tick()) == []
    collect_garbage(repository, application.store, Policy(keep_bytes=0), dry_run=True)
    application.close()


COMMANDS = """\
plan sizes.yaml
submit sizes.yaml
runs pause 1
runs resume 1
runs prioritize 1 5
runs cancel 1
run sizes.yaml
status
runs list
runs show 2
runs retry 2 --failed
steps show made
steps logs made
steps link made
explain run:2
reproduce 1
verify --rate 1GB
lineage made
report 1
schedules add sizes.yaml --name nightly
schedules list
schedules preview nightly
schedules run-now nightly
schedules fires nightly
schedules pause nightly
schedules resume nightly
schedules remove nightly --yes
gc --keep-bytes 0 --yes
doctor
db check
db upgrade
db verify --objects
models list
"""


def test_every_command_works_as_the_worker(
    roles: Roles, studio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate.upgrade(roles.owner)
    monkeypatch.setenv("KONTEXT_BATCH_DATABASE_URL", roles.worker)
    with (studio / "sizes.yaml").open("a") as file:
        file.write("schedule: {cron: '0 22 * * *'}\n")
    for line in COMMANDS.splitlines():
        capsys.readouterr()
        code = main.main([*line.split(), "--workspace", "kontext-out"] if line != "models list" else line.split())
        told = capsys.readouterr()
        if (line, code) == ("doctor", 1):  # the settings of the test name no shared store
            continue
        assert code == 0, (line, told.out, told.err)
