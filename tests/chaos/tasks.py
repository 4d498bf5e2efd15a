"""The tasks of a worker, with the toy engine in the model's place. Imported by a worker's child."""

from __future__ import annotations

from kontext_batch import editor
from kontext_batch.workers import process
from kontext_batch.workers.tasks import operate, wake
from tests.chaos.engine import ToyEngine, move_clock

__all__ = ["operate", "wake"]

editor.EngineEditor = ToyEngine  # type: ignore[assignment,misc]
process.FULL_SECONDS = 2.0  # there is no time to wait for a minute
move_clock()
