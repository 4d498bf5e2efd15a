"""The Celery app. A message is only a wake-up: all state is in SQL, so nothing here has to survive.

That is why messages are acknowledged early, carry a lane's name and no more, and have no results: what a dead
worker held comes back by its lease, and a lost ring is rung again by the beat (DESIGN.md section 3).
"""

from __future__ import annotations

from typing import Any

from amqp.exceptions import AMQPError
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError

from kontext_batch.errors import InfrastructureError, SettingsError

WAKE, OPERATE = "kontext_batch.wake", "kontext_batch.operate"
"""Names of the two tasks: a lane of a model has work; Pillow operations have."""
BROKER_ERRORS = (OperationalError, AMQPError, OSError)
"""What a broker that is not there, or refuses, ends a call with."""
START_SECONDS = 60.0
"""How long a worker's child may take to start."""


def edits_queue(prefix: str) -> str:
    return f"{prefix}.edits"


def operations_queue(prefix: str) -> str:
    return f"{prefix}.operations"


def make_app(
    broker_url: str, *, queue_prefix: str, tasks: str | None = None, task_seconds: float | None = None
) -> Celery:
    """`tasks`: module of the tasks, for a worker. `task_seconds`: a child that works longer on a ring is replaced."""
    app = Celery("kontext-batch", broker=broker_url, set_as_current=tasks is not None)
    app.conf.update(
        include=[] if tasks is None else [tasks],
        task_queues=[Queue(edits_queue(queue_prefix)), Queue(operations_queue(queue_prefix))],
        task_default_queue=edits_queue(queue_prefix),
        task_routes={OPERATE: {"queue": operations_queue(queue_prefix)}},
        task_create_missing_queues=False,
        # Nothing but JSON is ever decoded.
        accept_content=["json"],
        task_serializer="json",
        event_serializer="json",
        result_backend=None,
        task_ignore_result=True,
        task_acks_late=False,
        task_time_limit=task_seconds,
        # Once more after a connection that a restart broke, and no longer: the beat rings again.
        task_publish_retry=True,
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0.0, "interval_max": 0.0},
        worker_prefetch_multiplier=1,
        worker_concurrency=1,
        worker_pool="prefork",
        worker_pool_start_method="spawn",  # CUDA does not survive a fork
        worker_proc_alive_timeout=START_SECONDS,
        # Concerns tasks with late acknowledgement alone, which ours are not; unset, Celery warns of it at each loss.
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_redirect_stdouts=False,
        worker_hijack_root_logger=False,
        worker_send_task_events=True,  # Flower
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=2.0,
        broker_transport_options=_transport_options(broker_url),
        broker_pool_limit=2,
    )
    return app


def check_broker(broker_url: str) -> str:
    """Connect once; returns the URL without its password. Raises `InfrastructureError`, `SettingsError`."""
    app = make_app(broker_url, queue_prefix="kontext")
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=3, reraise_as_library_errors=True)
            return str(connection.as_uri())
    except BROKER_ERRORS as error:
        raise InfrastructureError(f"the broker does not answer, or refuses ({error})") from error
    except (ImportError, KeyError, ValueError) as error:
        raise SettingsError(f"broker_url is not usable ({error}); redis://... or amqp://... is expected") from error
    finally:
        app.close()


def _transport_options(broker_url: str) -> dict[str, Any]:
    """Without time limits a client of Redis waits for ever on a host that is gone."""
    if broker_url.startswith(("redis", "valkey")):
        return {"socket_timeout": 5.0, "socket_connect_timeout": 2.0, "health_check_interval": 25}
    if broker_url.startswith("amqp"):
        return {"confirm_publish": True}
    return {}
