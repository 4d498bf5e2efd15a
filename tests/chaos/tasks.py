"""The tasks of a worker, with the toy engine in the model's place. Imported by a worker's child."""

from __future__ import annotations

from functools import partial

from kontext_batch import editor
from kontext_batch.bootstrap import application
from kontext_batch.services.work import Worker
from kontext_batch.workers.tasks import operate, wake
from tests.chaos.engine import ToyEngine, move_clock

__all__ = ["operate", "wake"]

editor.EngineEditor = ToyEngine  # type: ignore[assignment,misc]
application.Worker = partial(Worker, full_seconds=2.0)  # type: ignore[attr-defined,assignment]  # nobody has a minute here
move_clock()
