"""What computes, looks, judges and rings: the engine, the picture operations and their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from kontext_batch.errors import StepError


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
"""Called after each denoise step with the steps done and the steps to do of the images that are in, all together."""


Prepared = Any
"""What an editor makes of a job before it is sampled, its pictures decoded and fitted; nobody else looks inside."""


class SampledPicture(Protocol):
    """A picture that has left a session and is no file yet."""

    def encode(self, *, xmp: bytes | None = None) -> MadePicture:
        """Make the files, the picture's with `xmp` in it; in any thread."""
        ...


class EditSession(Protocol):
    """Images of one lane that are sampled together; others join and leave between denoise steps.

    It belongs to one thread. An `InfrastructureError` of any call concerns all that are in (`OutOfMemory`: they are too
    many), and ends the session.
    """

    @property
    def free(self) -> int:
        """How many may be admitted now."""
        ...

    def admit(self, ticket: int, prepared: Prepared) -> None:
        """Take part from the next step on. Raises `StepError`, and then it is not in."""
        ...

    def step(self) -> None:
        """Move all that are in one denoise step on."""
        ...

    def retire(self) -> Sequence[tuple[int, SampledPicture | StepError]]:
        """Let those that are finished leave: each ticket with its picture or with what is wrong with it."""
        ...


class Editor(Protocol):
    """The engine as the services see it, in the stages of an edit: `prepare`, a session, `SampledPicture.encode`."""

    def prepare(self, job: EditJob) -> Prepared:
        """Decode and fit the pictures of a job; in any thread. Raises `StepError`."""
        ...

    def session(self, params: Mapping[str, Any]) -> AbstractContextManager[EditSession]:
        """A session of the lane that a step with these params is of; one at a time.

        Entering it loads what the lane needs. Raises `StepError` or `InfrastructureError`, which concern every step of
        the lane.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """Device, library versions; goes into the lineage."""
        ...


class Operations(Protocol):
    """The Pillow operations as the services see them."""

    def run(
        self,
        operation: str,
        params: Mapping[str, Any],
        pictures: Sequence[LoadedPicture],
        *,
        xmp: bytes | None = None,
    ) -> MadePicture:
        """`xmp`: written into the file.

        Raises `StepError` when a picture does not decode or the result cannot meet its limits.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """As `Editor.describe`."""
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
