"""A toy engine with set timings in place of the model: what is tried here is everything around it.

What a step's prompt says happens: "poison" kills the process, "cursed" raises what nobody foresaw, "huge" runs out of
memory in a batch of more than two.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from kontext_batch.errors import OutOfMemory
from kontext_batch.hashing import canonical_json, sha256_hex
from kontext_batch.operations.pictures import encode_png
from kontext_batch.ports import EditJob, MadePicture
from tests.stepping import StandIn

ROW_SECONDS_VARIABLE = "KONTEXT_TOY_ROW_SECONDS"
CLOCK_VARIABLE = "KONTEXT_TOY_CLOCK_OFFSET"


@dataclass
class ToyEngine(StandIn):
    """Stands in for `editor.EngineEditor`. The same step gives the same picture, as with a seed."""

    def stepping(self, jobs: Sequence[EditJob]) -> None:
        prompts = [str(job.params["prompt"]) for job in jobs]
        if any("poison" in prompt for prompt in prompts):
            os.kill(os.getpid(), signal.SIGKILL)
        if any("cursed" in prompt for prompt in prompts):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if len(jobs) > 2 and any("huge" in prompt for prompt in prompts):
            raise OutOfMemory(f"the toy device ran out of memory with {len(jobs)} images")
        row_seconds = float(os.environ.get(ROW_SECONDS_VARIABLE, "0.01"))
        time.sleep(sum(row_seconds / int(job.params["steps"]) for job in jobs))

    def make(self, job: EditJob) -> MadePicture:
        said = canonical_json(dict(job.params)).encode()
        colour = bytes.fromhex(sha256_hex(said + b"".join(each.data for each in job.pictures)))
        size = (int(job.params["target"]["width"]), int(job.params["target"]["height"]))
        image = Image.new("RGB", size, (colour[0], colour[1], colour[2]))
        return MadePicture(encode_png(image), "image/png", *size, latents=colour)

    def describe(self) -> Mapping[str, Any]:
        return {"device": self.device, "libraries": {"toy": "1"}}


def move_clock() -> None:
    """Let this process's clock be wrong by so many seconds."""
    offset = float(os.environ.get(CLOCK_VARIABLE, "0"))
    if offset:
        right = time.time
        time.time = lambda: right() + offset
