"""A worker as `kontext-batch workers start` makes it, with the toy engine: `python -m tests.chaos.worker`."""

from __future__ import annotations

import sys

from kontext_batch.observability import set_up_logging
from kontext_batch.settings import load_settings
from kontext_batch.workers.process import Duties
from kontext_batch.workers.start import serve_rings

if __name__ == "__main__":
    set_up_logging()
    duties = Duties(workspace="kontext-out", device="cpu", edits=True, operations=True)
    sys.exit(serve_rings(load_settings(), duties, tasks="tests.chaos.tasks"))
