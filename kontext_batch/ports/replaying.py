"""What a replay reads, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from kontext_batch.planning.marking import Ancestry
from kontext_batch.planning.states import StepState
from kontext_batch.ports.records import Artifact, SourceInput


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """What a step made, as the database has it."""

    artifact: Artifact
    collected: datetime | None
    """When its bytes were removed; None while they are there."""


@dataclass(frozen=True, slots=True)
class StoredParent:
    """A step whose picture another step reads."""

    role: str
    position: int
    step_id: int
    key: str
    state: StepState
    outputs: Mapping[str, StoredOutput]
    """By slot; empty while it is not done."""


@dataclass(frozen=True, slots=True)
class StoredStep:
    """A step with everything that it was computed from."""

    id: int
    key: str
    operation: str
    lane: str
    state: StepState
    params: Mapping[str, Any]
    parents: tuple[StoredParent, ...]
    sources: tuple[SourceInput, ...]
    outputs: Mapping[str, StoredOutput]
    """By slot."""
    recipes: tuple[str, ...]
    """URIs of the recipes that wanted it: its photos lie around them."""
    ancestry: Ancestry
    """Of the picture that it makes."""


@dataclass(frozen=True, slots=True)
class PictureDifference:
    """Between two pictures, in pixels from the upper left corner."""

    size: tuple[int, int]
    other: tuple[int, int]
    """Width and height of the second one. Where they differ, nothing else is told."""
    psnr: float | None = None
    """dB over all channels; None when all pixels are equal."""
    box: tuple[int, int, int, int] | None = None
    """x, y, width and height of what differs."""
    worst: tuple[int, int, int] | None = None
    """x and y of the pixel that differs most, and by how many levels of 255."""

    @property
    def equal(self) -> bool:
        return self.size == self.other and self.box is None


class Judge(Protocol):
    """Says how far two results are apart."""

    def pictures(self, first: bytes, second: bytes) -> PictureDifference:
        """Raises `StepError` when one does not decode."""
        ...

    def latents(self, first: bytes, second: bytes) -> float:
        """The largest difference of two files of latents. Raises `StepError` when they cannot be compared."""
        ...
