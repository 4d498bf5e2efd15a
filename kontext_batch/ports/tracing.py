"""Where pictures come from and what was made from them: the values, and what the services ask of the database."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from kontext_batch.planning.plan import Axes
from kontext_batch.planning.states import StepState
from kontext_batch.ports.records import Artifact, AttemptRow, StepRow


class SubjectKind(StrEnum):
    """What people ask about."""

    STEP = "step"
    PHOTO = "photo"
    WEIGHTS = "weights"
    RECIPE = "recipe"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is asked about."""

    kind: SubjectKind
    name: str
    """For people: `photo file:///in/mug.png`."""
    sha256s: tuple[str, ...] = ()
    """Of a photo (each content that lay under its URI), of weights, or of a recipe revision."""
    step_ids: tuple[int, ...] = ()
    """Of steps: those whose picture is meant."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that steps were computed with."""

    sha256: str
    kind: str
    """`model` or `adapter`."""
    names: tuple[str, ...]
    """In the registry, now or when they were used."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The newest run that wanted a step, and the place in its recipe."""

    run_id: int
    created: datetime
    """When that run was asked for."""
    recipe: str
    recipe_sha256: str
    """The revision: over the recipe file and its imports."""
    source: str
    """URI of the recipe."""
    owner: str
    trigger: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class StepRead:
    """A picture that a step read."""

    role: str
    position: int
    step_id: int | None
    """The step that made it; None for a photo that was not made here."""
    uri: str | None
    """Of a photo: where the author kept it; of a picture: where it was put, None when it is not there yet."""
    sha256: str | None


@dataclass(frozen=True, slots=True)
class BatchMate:
    """A step that was in a batch during some of the same denoise steps."""

    step_id: int
    key: str
    joined: int
    left: int
    place: int | None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A batch that a step was part of."""

    id: int
    worker_id: str
    device: str
    model_sha256: str | None
    numeric_mode: str
    libraries: Mapping[str, str]
    committed: datetime
    joined: int
    """Denoise steps of the batch: the step took part in those numbered `joined + 1` to `left`."""
    left: int
    place: int | None
    """How many had joined before it; None where that was not recorded."""
    mates: tuple[BatchMate, ...]


@dataclass(frozen=True, slots=True)
class StepDelivery:
    """A place that a picture was delivered to, or is to be."""

    step_id: int
    run_id: int
    path: str
    """As the recipe wants it."""
    state: str
    delivered_path: str | None
    version: int | None
    sha256: str | None
    """Of the picture that was delivered."""
    file_sha256: str | None
    """Of the file, where it is more than the picture: marked or signed."""
    delivered: datetime | None
    withdrawn: datetime | None


@dataclass(frozen=True, slots=True)
class TracedStep:
    """A step with all that made its picture what it is."""

    step: StepRow
    origin: Origin
    made: datetime | None
    """When its picture was made first."""
    collected: datetime | None
    """When the bytes of its picture were removed."""
    reads: tuple[StepRead, ...]
    batches: tuple[StepBatch, ...]
    """Oldest first."""
    attempts: tuple[AttemptRow, ...]
    deliveries: tuple[StepDelivery, ...]


@dataclass(frozen=True, slots=True)
class MadeStep:
    """A step that was computed from what is asked about."""

    id: int
    node: str
    axes: Axes
    candidate: int
    operation: str
    state: StepState
    run_id: int
    """The newest run that wanted it; of a recipe's answer the run that is told."""
    artifact: Artifact | None
    parents: tuple[int, ...]
    """Steps that it reads, whether they are told too or not."""
    deliveries: tuple[StepDelivery, ...]


Place = tuple[int, int]
"""Where a page ends: (step that reads the subject, step below it), or (run, place in its plan)."""


@dataclass(frozen=True, slots=True)
class MadePage:
    """A part of what was made, parents first within what one step led to."""

    steps: tuple[MadeStep, ...]
    after: Place | None
    """Where the next page begins; None when this is the last."""


class Tracing(Protocol):
    """Questions about lineage. Every method is one transaction."""

    def known_by_hash(self, prefix: str) -> Sequence[Subject]:
        """Pictures, delivered files, photos, weights and recipes whose sha256 begins with these hex digits.

        A photo that was made here is told as the step that made it.
        """
        ...

    def known_by_place(self, uri: str) -> Sequence[Subject]:
        """What lies or lay at exactly this URI: a delivered file, a photo, an artifact."""
        ...

    def weights(self) -> Sequence[Weights]:
        """All that steps were computed with."""
        ...

    def above(self, step_ids: Iterable[int]) -> Sequence[tuple[int, int]]:
        """(child, parent) for all that these steps come from; a photo that was made here leads on to its step."""
        ...

    def traced(self, step_ids: Iterable[int]) -> Sequence[TracedStep]:
        """These steps, in order of their ids."""
        ...

    def made_from(self, subject: Subject, *, after: Place | None = None, limit: int = 200) -> MadePage:
        """At most `limit` of the steps that come from it, each once, with what was delivered of them.

        Of a recipe: what its runs wanted, run by run, with what each of them delivered.
        """
        ...

    def made_directly(self, subject: Subject) -> int:
        """How many steps read the photo, were computed with the weights, or were wanted by runs of the recipe."""
        ...
