"""What computes, looks, judges and rings: the engine, the picture operations and their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class LoadedPicture:
    """Bytes of a picture that a step reads, fetched and checked against its hash."""

    role: str
    position: int
    data: bytes
    latents: bytes | None = None
    """What to take instead of the picture, where latents are handed on."""


@dataclass(frozen=True, slots=True)
class EditJob:
    """One edit or generation, with its pictures in memory."""

    params: Mapping[str, Any]
    pictures: tuple[LoadedPicture, ...]


@dataclass(frozen=True, slots=True)
class MadePicture:
    """A finished picture in memory."""

    data: bytes
    """Encoded file."""
    media_type: str
    width: int
    height: int
    timings: Mapping[str, float] = field(default_factory=dict)
    latents: bytes | None = None
    """Packed final latents as safetensors, of what a model sampled."""


OnStep = Callable[[int, int], None]
"""Called after each denoise step with the steps done and the steps of the batch, over all its images."""


class Editor(Protocol):
    """The engine as the services see it. One call is one batch of one lane."""

    def edit(self, jobs: Sequence[EditJob], *, on_step: OnStep | None = None) -> Sequence[MadePicture | Exception]:
        """One result for each job, in order: the picture, or the error that this job met.

        A `StepError` is the job's own fault. What stops the whole batch is raised. `on_step(done, total)` is called
        after each denoise step.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """Device, library versions; goes into the lineage."""
        ...


class Operations(Protocol):
    """The Pillow operations as the services see them."""

    def run(self, operation: str, params: Mapping[str, Any], pictures: Sequence[LoadedPicture]) -> MadePicture:
        """Raises `StepError` when a picture does not decode or the result cannot meet its limits."""
        ...


Probe = Callable[[bytes], tuple[str, int, int]]
"""Format (Pillow's name), width and height after EXIF orientation of a picture file, from its header alone.

Raises `StepError` whose message can stand as `InputRecord.problem`.
"""


class ContentFilter(Protocol):
    """Says whether an image may be delivered; needed by models whose licence asks for it."""

    def allows(self, data: bytes) -> bool: ...


class Post(Protocol):
    """Sends events to the webhooks of the settings, signed."""

    def post(self, webhook: str, event_id: str, body: bytes) -> None:
        """Returns when the receiver has taken it.

        Raises `InfrastructureError` when it has not, for now, and `ObjectNotFound` when it wants nothing any more.
        """
        ...


class WakeUps(Protocol):
    """Rings the workers. A lost, doubled or late ring is harmless: nothing ready, nothing done."""

    def wake(self, lanes: Mapping[str, int]) -> None:
        """`lanes`: lane -> number of steps that became ready."""
        ...

    def close(self) -> None:
        """Give the connections back; a later ring opens them anew."""
        ...
