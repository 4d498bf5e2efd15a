"""What the beat tells of all processes together, from one look into the database.

Every beat tells the same: with several of them take the maximum, not the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class Fleet(Collector):
    """The last look; nothing before the first. A scrape sees one look whole."""

    def __init__(self) -> None:
        self._shown: tuple[Metric, ...] = ()

    def show(
        self,
        *,
        steps: Mapping[tuple[str, str], int],
        queue_age: Mapping[str, float],
        runs: Mapping[str, int],
        pending_deliveries: int,
        workers: int,
        longest_silence: float,
        sends: Mapping[tuple[str, str], int],
        looked_at: float,
        took: float,
    ) -> None:
        """`looked_at`: seconds since the epoch; the others as `ports.Standing` has them."""
        self._shown = (
            _gauge("kontext_batch_live_steps", "Blocked, ready and leased steps.", ["lane", "state"], steps),
            _gauge(
                "kontext_batch_queue_age_seconds",
                "Seconds since the oldest ready step of a lane might have been claimed.",
                ["lane"],
                {(lane,): age for lane, age in queue_age.items()},
            ),
            _gauge(
                "kontext_batch_open_runs", "Runs that are not finished.", ["state"], {(s,): n for s, n in runs.items()}
            ),
            _gauge("kontext_batch_pending_deliveries", "Finished images on their way.", [], {(): pending_deliveries}),
            _gauge("kontext_batch_workers", "Workers that have not said goodbye.", [], {(): workers}),
            _gauge(
                "kontext_batch_worker_silence_seconds",
                "Since the oldest last heartbeat of them.",
                [],
                {(): longest_silence},
            ),
            _gauge("kontext_batch_events", "Events waiting for a webhook, or given up.", ["webhook", "state"], sends),
            _gauge("kontext_batch_looked_timestamp_seconds", "When the beat last looked.", [], {(): looked_at}),
            _gauge("kontext_batch_look_seconds", "How long that took.", [], {(): took}),
        )

    def collect(self) -> Iterable[Metric]:
        return self._shown


def _gauge(name: str, documentation: str, labels: list[str], values: Mapping[Any, float]) -> Metric:
    """`values`: one value for each tuple of label values."""
    gauge = GaugeMetricFamily(name, documentation, labels=labels)
    for key, value in values.items():
        gauge.add_metric(list(key), value)
    return gauge


FLEET = Fleet()
REGISTRY.register(FLEET)
