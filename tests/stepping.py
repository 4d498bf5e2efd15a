"""An editor that samples nothing: what tests and benchmarks try with it is everything around the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kontext_batch.errors import StepError
from kontext_batch.ports import EditJob, MadePicture


@dataclass
class SteppingEditor:
    """`ports.Editor` whose sessions count denoise steps; what a picture looks like is told by who inherits it."""

    max_rows: int = 8

    def prepare(self, job: EditJob) -> EditJob:
        return job

    @contextmanager
    def session(self, params: Mapping[str, Any]) -> Iterator[CountingSession]:
        yield CountingSession(self)

    def admitted(self, job: EditJob) -> int:
        """After how many denoise steps it is to leave."""
        return int(job.params["steps"])

    def stepping(self, jobs: Sequence[EditJob]) -> None:
        """These are in while a denoise step is taken."""

    def make(self, job: EditJob) -> MadePicture:
        """What left the session; raises `StepError`."""
        raise NotImplementedError

    def encode(self, picture: MadePicture) -> MadePicture:
        """It, as files."""
        return picture

    def describe(self) -> Mapping[str, Any]:
        return {"device": "cpu", "libraries": {"toy": "1"}}


@dataclass
class StandIn(SteppingEditor):
    """Made as `editor.EngineEditor` is, in whose place a worker gets it."""

    models: Mapping[str, Path] = field(default_factory=dict)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    device: str = "cpu"
    max_pixels: int = 0
    batch_invariant: bool = True
    cuda_graphs: bool = False


@dataclass
class CountingSession:
    """`ports.EditSession` of it."""

    editor: SteppingEditor
    jobs: dict[int, EditJob] = field(default_factory=dict)
    to_go: dict[int, int] = field(default_factory=dict)

    @property
    def free(self) -> int:
        return self.editor.max_rows - len(self.jobs)

    def admit(self, ticket: int, prepared: EditJob) -> None:
        assert self.free > 0
        self.to_go[ticket] = self.editor.admitted(prepared)
        self.jobs[ticket] = prepared

    def step(self) -> None:
        assert self.jobs
        self.editor.stepping(list(self.jobs.values()))
        for ticket in self.to_go:
            self.to_go[ticket] -= 1

    def retire(self) -> list[tuple[int, Made | StepError]]:
        over = [ticket for ticket, steps in self.to_go.items() if steps == 0]
        for ticket in over:
            del self.to_go[ticket]
        return [(ticket, self._made(self.jobs.pop(ticket))) for ticket in over]

    def _made(self, job: EditJob) -> Made | StepError:
        try:
            return Made(self.editor, self.editor.make(job))
        except StepError as error:
            return error


@dataclass(frozen=True)
class Made:
    """`ports.SampledPicture` of it."""

    editor: SteppingEditor
    picture: MadePicture

    def encode(self, *, xmp: bytes | None = None) -> MadePicture:
        return self.editor.encode(self.picture)
