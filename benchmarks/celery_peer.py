"""The same DAG in Celery's own words: a chain into a group of chains, joined by a chord, results in Redis.

A worker is `python -m benchmarks.celery_peer`; the broker is named by `KONTEXT_BENCH_BROKER`.
"""

from __future__ import annotations

import os
import time
from functools import lru_cache
from typing import Any

from celery import Celery, chain, chord, group

from benchmarks.noop import BATCH_ROWS, SCENES, STEPS_OF_AN_ITEM

BROKER_VARIABLE = "KONTEXT_BENCH_BROKER"
QUEUE = "kontext-bench-peer"


@lru_cache
def make_app(url: str) -> Celery:
    """Prefetch and acknowledgement as Celery has them by default, which is its fastest."""
    app = Celery("peer", broker=url, backend=url)
    app.conf.update(
        task_default_queue=QUEUE,
        result_expires=600,
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
        worker_prefetch_multiplier=BATCH_ROWS,
    )

    @app.task(name="peer.step")
    def step(parent: str, said: str) -> str:
        return f"{ROOT_URI}/{said}.png"

    @app.task(name="peer.collect")
    def collect(found: list[str]) -> int:
        return len(found)

    return app


ROOT_URI = "s3://studio-assets/kontext/objects"


def item(app: Celery, number: int) -> Any:
    """The nine steps of one photo, and the chord that waits for them."""
    step, collect = app.tasks["peer.step"], app.tasks["peer.collect"]
    scenes = [chain(step.s(f"{number}/{scene}/staged"), step.s(f"{number}/{scene}/finish")) for scene in range(SCENES)]
    return chain(step.s("photo", f"{number}/clean"), chord(group(scenes), collect.s()))


def measure(url: str, steps: int) -> float:
    """Milliseconds a step, from the first message to the last result; the workers run already."""
    app = make_app(url)
    items = -(-steps // STEPS_OF_AN_ITEM)
    started = time.perf_counter()
    results = [item(app, number).apply_async() for number in range(items)]
    for result in results:
        assert result.get(timeout=300) == SCENES
    seconds = time.perf_counter() - started
    results.clear()
    return 1000 * seconds / (items * STEPS_OF_AN_ITEM)


if __name__ == "__main__":
    make_app(os.environ[BROKER_VARIABLE]).worker_main(
        ["worker", "--pool=prefork", "--concurrency=4", "--loglevel=WARNING", "--without-mingle", "--without-gossip"]
    )
