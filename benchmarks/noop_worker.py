"""A worker as `kontext-batch workers start` makes it, that computes nothing: `python -m benchmarks.noop_worker`.

Its child imports this module for the tasks, and with them what stands in for model, pictures and store.
"""

from __future__ import annotations

import sys

from benchmarks import noop
from kontext_batch import bootstrap, editor
from kontext_batch.observability import set_up_logging
from kontext_batch.settings import load_settings
from kontext_batch.workers.process import Duties
from kontext_batch.workers.start import serve_rings
from kontext_batch.workers.tasks import operate, wake

__all__ = ["operate", "wake"]

vars(editor).update(EngineEditor=noop.NoEngine)
vars(bootstrap).update(
    PillowOperations=noop.NoOperations,
    ObjectKeys=lambda _root: noop.URIS,
    open_store=lambda *_places, **_endpoint: noop.CarryingStore(),
    with_shipped=lambda registry, _file: registry,
)

if __name__ == "__main__":
    set_up_logging()
    duties = Duties(workspace="kontext-out", device="cpu", edits=True, operations=True)
    sys.exit(serve_rings(load_settings(), duties, tasks="benchmarks.noop_worker"))
