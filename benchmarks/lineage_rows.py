"""A database of many pictures, as `benchmarks.lineage` asks about: written as rows, since nothing is computed.

Photos are edited in chains of three (edit, edit, finish with a logo) and the finished picture is delivered. A recipe
has several runs, a run several photos; edits are computed in batches of sixteen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from kontext_batch.hashing import canonical_json, sha256_hex
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.engine import begin_writing
from kontext_batch.lineage.sql import axes_text, bulk_insert

CHAINS, LENGTH = 167, 3
"""Chains of a photo, and steps of each: 501 pictures."""
PHOTOS_OF_A_RUN, RUNS_OF_A_REVISION = 4, 10
MODELS, ADAPTERS, LOGOS, BATCH = 20, 50, 10, 16
ROOT = "s3://studio-assets/kontext/objects"
AT_ONCE = 50_000
MIXER = 0x9E3779B1
"""Odd, so that numbers below 2**32 keep apart: hashes that follow one another lie far apart, as real ones do."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How much there is."""

    photos: int

    @property
    def chains(self) -> int:
        return self.photos * CHAINS

    @property
    def pictures(self) -> int:
        return self.chains * LENGTH

    @property
    def runs(self) -> int:
        return -(-self.photos // PHOTOS_OF_A_RUN)

    @property
    def revisions(self) -> int:
        return -(-self.runs // RUNS_OF_A_REVISION)


def hashed(kind: int, number: int) -> str:
    """A sha256 that no bytes have."""
    return f"{(number * MIXER + kind * 0x01000193) % 2**32:08x}{kind:08x}{number:048x}"


def picture(number: int) -> str:
    """Of step `number`, from 1 on."""
    return hashed(1, number)


def signed(number: int) -> str:
    return hashed(2, number)


def photo(number: int) -> str:
    return hashed(3, number)


def photo_uri(number: int) -> str:
    return f"s3://studio-raw/2026/spring/{number // 100:03}/{number:06}_front.jpg"


def path_of(chain: int) -> str:
    return f"s3://studio-out/spring/{chain // CHAINS:06}/{chain:07}_front_shop_de.jpg"


@cache
def weights(kind: str, number: int) -> str:
    return sha256_hex(f"{kind} {number}".encode())


@cache
def revision(number: int) -> str:
    return sha256_hex(f"revision {number}".encode())


@cache
def logo(number: int) -> str:
    return sha256_hex(f"logo {number}".encode())


def fill(engine: sa.Engine, shape: Shape) -> None:
    """Insert it all, in the order of the tables' keys, without looking at foreign keys."""
    for first in range(0, shape.chains, AT_ONCE):
        with begin_writing(engine) as conn:
            if engine.dialect.name == "postgresql":
                conn.exec_driver_sql("SET LOCAL session_replication_role = replica")
            if first == 0:
                _few(conn, shape)
            for table, columns, rows in _many(range(first, min(first + AT_ONCE, shape.chains))):
                bulk_insert(conn, table, columns, rows)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        # PostgreSQL does it by itself a while after so many rows came.
        conn.exec_driver_sql("VACUUM ANALYZE" if engine.dialect.name == "postgresql" else "ANALYZE")


def _few(conn: sa.Connection, shape: Shape) -> None:
    moment = _moment(conn)
    worker = ("w1", "gpu1", 1, 1.0, "cuda:0", "{}", moment, moment, False)
    columns: Sequence[str] = (
        "id",
        "host",
        "pid",
        "process_started",
        "device",
        "engine",
        "registered",
        "heartbeat",
        "drain",
    )
    bulk_insert(conn, t.workers, columns, [worker])
    bulk_insert(
        conn,
        t.models,
        ("sha256", "name", "layout", "licence"),
        [(weights("model", number), f"model-{number}", "diffusers", "x") for number in range(MODELS)],
    )
    columns = ("uri", "etag", "sha256", "bytes", "width", "height", "format", "seen")
    rows = [(photo_uri(n), "1", photo(n), 4_000_000, 3000, 2000, "JPEG", moment) for n in range(shape.photos)]
    bulk_insert(conn, t.inputs, columns, rows)
    columns = ("id", "recipe", "recipe_sha256", "recipe_text", "source", "owner", "trigger", "priority", "selection",
               "budget", "state", "created", "finished", "size")  # fmt: skip
    rows_of_runs = [
        (number + 1, f"spring-{number // RUNS_OF_A_REVISION}", revision(number // RUNS_OF_A_REVISION), "text",
         f"s3://studio-assets/recipes/spring-{number // RUNS_OF_A_REVISION}.yaml", "studio", "cli", 0, "{}", "{}",
         "done", moment, moment, PHOTOS_OF_A_RUN * CHAINS * LENGTH)
        for number in range(shape.runs)
    ]  # fmt: skip
    bulk_insert(conn, t.runs, columns, rows_of_runs)
    columns = ("id", "worker_id", "lane", "device", "model_sha256", "numeric_mode", "libraries", "committed")
    libraries = canonical_json({"torch": "2.9.0", "kontext-batch": "1.0.0"})
    batches = -(-shape.chains * 2 // BATCH)
    rows_of_batches = (
        (number + 1, "w1", _lane(number), "cuda:0", weights("model", number % MODELS), "bfloat16", libraries, moment)
        for number in range(batches)
    )
    bulk_insert(conn, t.batches, columns, rows_of_batches)


def _moment(conn: sa.Connection) -> Any:
    query = "clock_timestamp()" if conn.dialect.name == "postgresql" else "strftime('%Y-%m-%d %H:%M:%f', 'now')"
    return conn.exec_driver_sql(f"SELECT {query}").scalar_one()


@cache
def _lane(number: int) -> str:
    return f"edit/model-{number % MODELS}/{weights('model', number % MODELS)[:12]}/-/bfloat16"


def _many(chains: range) -> Iterator[tuple[sa.Table, Sequence[str], Iterator[tuple[Any, ...]]]]:
    """Rows of each table that has some of each chain."""
    moment = "2026-11-26 10:00:00.000"
    steps = range(chains.start * LENGTH + 1, chains.stop * LENGTH + 1)

    def chain_of(step: int) -> int:
        return (step - 1) // LENGTH

    def place(step: int) -> int:
        return (step - 1) % LENGTH

    def finishes(step: int) -> bool:
        return place(step) == LENGTH - 1

    def model(step: int) -> int:
        return chain_of(step) % MODELS

    def run(chain: int) -> int:
        return chain // (CHAINS * PHOTOS_OF_A_RUN) + 1

    def ordinal(step: int) -> int:
        return (step - 1) % (CHAINS * PHOTOS_OF_A_RUN * LENGTH)

    def operation(step: int) -> str:
        return "finish" if finishes(step) else "edit"

    def params(step: int) -> str:
        if finishes(step):
            return canonical_json({"format": "jpeg", "quality": 90, "size": {"height": 1000, "width": 1000}})
        adapter = step % ADAPTERS
        return canonical_json(
            {
                "model": f"model-{model(step)}",
                "model_sha256": weights("model", model(step)),
                "adapters": [{"name": f"look-{adapter}", "scale": 0.8, "sha256": weights("adapter", adapter)}],
                "prompt": f"Place product {chain_of(step)} on an oak table in soft morning light. Keep its label.",
                "seed": step,
                "steps": 28,
                "guidance": 2.5,
            }
        )

    def materials(step: int) -> list[tuple[str, int, str]]:
        used = [(weights("model", model(step)), step, "model")]
        return [*used, (weights("adapter", step % ADAPTERS), step, "adapter")]

    edits = [step for step in steps if not finishes(step)]
    yield (
        t.steps,
        ("id", "key", "operation", "lane", "state", "deps_left", "asked", "attempts", "losses", "lease_token"),
        ((s, f"b2:{s * MIXER % 2**64:040x}", operation(s), "operations" if finishes(s) else _lane(model(s)),
          "done", 0, 1, 1, 0, 1) for s in steps),
    )  # fmt: skip
    yield t.step_params, ("step_id", "params"), ((step, params(step)) for step in steps)
    yield (
        t.step_sources,
        ("step_id", "role", "position", "uri", "sha256"),
        (
            (s, "image", 0, photo_uri(chain_of(s) // CHAINS), photo(chain_of(s) // CHAINS))
            if place(s) == 0
            else (s, "logo", 0, f"s3://studio-assets/logos/{s % LOGOS}.png", logo(chain_of(s) % LOGOS))
            for s in steps
            if place(s) == 0 or finishes(s)
        ),
    )
    yield (
        t.step_materials,
        ("sha256", "step_id", "kind"),
        (row for step in edits for row in materials(step)),
    )
    yield (
        t.edges,
        ("child", "parent", "role", "position"),
        ((step, step - 1, "image", 0) for step in steps if place(step)),
    )
    yield (
        t.run_steps,
        ("run_id", "ordinal", "step_id", "node", "axes", "candidate", "take", "file", "line", "first", "cached"),
        ((run(chain_of(s)), ordinal(s), s, ("clean", "staged", "shop")[place(s)],
          axes_text((("item", f"p{chain_of(s) // CHAINS:06}"), ("scene", f"s{chain_of(s) % CHAINS:03}"))),
          1, 0, "spring.yaml", 20 + place(s), True, False) for s in steps),
    )  # fmt: skip
    yield (
        t.artifacts,
        ("sha256", "uri", "media_type", "bytes", "width", "height", "created"),
        ((picture(s), f"{ROOT}/{picture(s)[:2]}/{picture(s)}.png", "image/png", 1_500_000, 1024, 1024, moment)
         for s in steps),
    )  # fmt: skip
    yield t.step_outputs, ("step_id", "slot", "sha256"), ((step, "image", picture(step)) for step in steps)
    yield (
        t.batch_members,
        ("batch_id", "step_id", "joined", '"left"', "place"),
        ((index // BATCH + 1, step, 0, 28, index % BATCH)
         for index, step in enumerate(edits, start=chains.start * 2)),
    )  # fmt: skip
    yield (
        t.attempts,
        ("step_id", "token", "asked", "number", "worker_id", "started", "ended", "outcome", "timings"),
        ((step, 1, 1, 1, "w1", moment, moment, "ok", '{"sample":4.2}') for step in steps),
    )
    yield (
        t.deliveries,
        ("run_id", "ordinal", "step_id", "path", "if_exists", "state", "sha256", "delivered_path", "version",
         "delivered", "file_sha256"),
        ((run(c), ordinal(c * LENGTH + LENGTH), c * LENGTH + LENGTH, path_of(c), "version", "delivered",
          picture(c * LENGTH + LENGTH), path_of(c), 1, moment, signed(c * LENGTH + LENGTH)) for c in chains),
    )  # fmt: skip
