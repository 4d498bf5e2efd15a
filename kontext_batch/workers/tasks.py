"""What a message makes a worker do. Whatever the lane it names, the database says what is next."""

from __future__ import annotations

from celery import shared_task

from kontext_batch.messaging.app import OPERATE, WAKE
from kontext_batch.workers.process import this_process


@shared_task(name=WAKE)
def wake(lane: str) -> None:
    """Work on what is ready, of `lane` or of another that this worker serves."""
    this_process().turn()


@shared_task(name=OPERATE)
def operate(lane: str) -> None:
    """Likewise, on steps of Pillow and on deliveries."""
    this_process().turn()
