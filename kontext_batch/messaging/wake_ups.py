"""`ports.WakeUps` by Celery messages."""

from __future__ import annotations

from collections.abc import Mapping

import structlog
from celery import Celery
from kombu import Connection, Producer
from kombu.exceptions import OperationalError

from kontext_batch.messaging.app import BROKER_ERRORS, OPERATE, WAKE
from kontext_batch.planning.plan import OPERATIONS_LANE

log = structlog.get_logger(__name__)

MOST_WAITING = 64
"""Rings of a lane's queue that wait to be taken; more would only be answered later."""
MOST_RINGS = 8
"""For one lane at once. Each worker that finds more than it can take rings one more, so that all are soon awake."""


class CeleryWakeUps:
    """Rings as many workers as have a batch to compute. A broker that does not answer is told of, and no error.

    What is ready is in SQL: the beat rings again, and a worker that is awake finds it anyway.
    """

    def __init__(self, app: Celery, *, batch_rows: int) -> None:
        self._app, self._batch_rows = app, batch_rows
        self._connection: Connection | None = None
        self._producer: Producer | None = None

    def wake(self, lanes: Mapping[str, int]) -> None:
        for lane, steps in lanes.items():
            name = OPERATE if lane == OPERATIONS_LANE else WAKE
            try:
                producer = self._connected()
                room = MOST_WAITING - self._waiting(name)
                for _ in range(min(MOST_RINGS, room, -(-steps // self._batch_rows))):
                    self._app.send_task(name, args=[lane], ignore_result=True, producer=producer)
            except BROKER_ERRORS as error:
                self._disconnect()
                log.warning("workers could not be rung; the beat rings again", lane=lane, error=str(error))
                return

    def _waiting(self, name: str) -> int:
        """Rings that nobody has taken yet. They do not expire: that would be by the clock of whoever takes them."""
        assert self._connection is not None
        routes, usual = self._app.conf.task_routes, self._app.conf.task_default_queue
        queue = routes.get(name, {}).get("queue", usual)
        try:
            channel = self._connection.default_channel
            declared = channel.queue_declare(queue=queue, durable=True, exclusive=False, auto_delete=False)  # type: ignore[attr-defined]
        except self._connection.recoverable_connection_errors as error:  # those of redis are no `OSError`
            raise OperationalError(str(error)) from error
        return int(declared.message_count)

    def close(self) -> None:
        """Give the connection to the broker back."""
        self._disconnect()
        self._app.close()

    def _connected(self) -> Producer:
        """Of a connection of its own: kombu's pools belong to all apps of a process with equal URLs."""
        if self._producer is None:
            self._connection = self._app.connection_for_write()
            self._producer = Producer(self._connection, auto_declare=False)
        return self._producer

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.release()
        self._connection = self._producer = None
