"""Read every stored artifact and compare it with its hash, at a set bandwidth; a pass that was broken off goes on.

A pass begins and ends with a note in the audit; what it has read has the time of that in its row. So the next call
knows whether a pass is unfinished, since when it runs, and what of it is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from kontext_batch.errors import InfrastructureError, NotAllowed, ObjectNotFound, StepError
from kontext_batch.hashing import sha256_hex
from kontext_batch.ports import Act, Artifact, DamagedArtifact, ObjectStore, Repository

SUBJECT = "verification"
"""Of the notes in the audit."""
PAGE = 500
"""Artifacts that are asked for at once."""
NOTED, NOTE_SECONDS = 64, 1.0
"""What was read is written down when it is so many, or so long ago; a killed pass reads at most that again."""
SILENCES = 3
"""So many reads after one another that a store does not answer are the store's fault, not the objects'."""

MISSING, CHANGED, UNREADABLE = "missing", "changed", "unreadable"
"""How a problem begins."""


@dataclass(slots=True)
class Pace:
    """Waits so that no more than `rate` bytes a second are read, on average; time that was lost is not made up for."""

    rate: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _due: float = field(init=False)

    def __post_init__(self) -> None:
        self._due = self.clock()

    def read(self, size: int) -> None:
        """So many bytes were read since the last call."""
        now = self.clock()
        self._due += size / self.rate
        if self._due > now:
            self.sleep(self._due - now)
        else:
            self._due = now


@dataclass(slots=True)
class Verifier:
    """Reads, one object in memory at a time."""

    repository: Repository
    store: ObjectStore
    pace: Pace
    on_read: Callable[[Artifact], None] = lambda artifact: None
    clock: Callable[[], float] = time.monotonic
    _found: list[tuple[str, str | None]] = field(default_factory=list)
    """(sha256, problem) of what was read and is not yet written down."""
    _silent: list[tuple[str, str]] = field(default_factory=list)
    """Of the last reads, those that the store did not answer."""

    def run(self, since: datetime) -> None:
        """Read what the pass that began at `since` has not read. Raises when the store does not answer at all."""
        after, noted = "", self.clock()
        try:
            while page := self.repository.unread_artifacts(since=since, after=after, limit=PAGE):
                for artifact in page:
                    self._look_at(artifact)
                    self.on_read(artifact)
                    if len(self._found) >= NOTED or self.clock() - noted >= NOTE_SECONDS:
                        self._note()
                        noted = self.clock()
                after = page[-1].sha256
            self._found += self._silent
        finally:
            self._note()

    def _note(self) -> None:
        found, self._found = self._found, []
        self.repository.note_read_artifacts(found)

    def _look_at(self, artifact: Artifact) -> None:
        try:
            problem = self._problem(artifact)
            if problem is not None:  # an object that is collected, or made again, right now is none
                if not self.repository.is_kept(artifact.sha256):
                    return
                problem = self._problem(artifact)
        except InfrastructureError as error:
            self._silent.append((artifact.sha256, f"{UNREADABLE}: {error}"))
            if len(self._silent) >= SILENCES:
                raise
            return
        self._found += [*self._silent, (artifact.sha256, problem)]
        self._silent = []

    def _problem(self, artifact: Artifact) -> str | None:
        try:
            data = self.store.read(artifact.uri, max_bytes=artifact.bytes)
        except ObjectNotFound:
            return f"{MISSING}: nothing lies at its place"
        except StepError:
            return f"{CHANGED}: it has more than its {artifact.bytes} bytes"
        except NotAllowed as error:
            return f"{UNREADABLE}: {error}"
        self.pace.read(len(data))
        if sha256_hex(data) == artifact.sha256:
            return None
        if len(data) != artifact.bytes:
            return f"{CHANGED}: it has {len(data)} bytes instead of {artifact.bytes}"
        return f"{CHANGED}: its sha256 is another one"


def begin(repository: Repository, by: Act, *, again: bool = False) -> tuple[datetime, bool]:
    """When the pass began that is to be done, and whether it goes on: an unfinished one, unless `again`."""
    last = repository.audit(subject=SUBJECT, limit=1)
    if last and not again and not last[0].details.get("finished"):
        return last[0].at, True
    repository.note(replace(by, details={"finished": False}), SUBJECT)
    return repository.audit(subject=SUBJECT, limit=1)[0].at, False


def finish(repository: Repository, by: Act) -> Sequence[DamagedArtifact]:
    """End the pass; returns every artifact that is known to be damaged."""
    found = repository.damaged_artifacts()
    repository.note(replace(by, details={"finished": True, "problems": len(found)}), SUBJECT)
    return found


def repair(repository: Repository, store: ObjectStore, damaged: Sequence[DamagedArtifact]) -> int:
    """Forget what is missing or changed, so that the next run that needs it makes it again; returns how many."""
    lost = [each.artifact.sha256 for each in damaged if not each.problem.startswith(UNREADABLE)]
    for sha256 in lost:
        repository.lost_artifact(sha256, store.delete)
    return len(lost)
