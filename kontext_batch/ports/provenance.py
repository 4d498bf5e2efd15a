"""What delivered files are told about, and who signs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from kontext_batch.planning.marking import Ancestry
from kontext_batch.planning.plan import Axes
from kontext_batch.ports.records import SourceInput


@dataclass(frozen=True, slots=True)
class ParentPicture:
    """A picture that a step read, made by an earlier step."""

    role: str
    position: int
    key: str
    sha256: str | None
    """None when that step is being made anew."""


@dataclass(frozen=True, slots=True)
class MadeStep:
    """A step as it was computed."""

    key: str
    operation: str
    params: Mapping[str, Any]
    sha256: str | None
    """Of its picture; None when it is being made anew."""
    parents: tuple[ParentPicture, ...]
    sources: tuple[SourceInput, ...]
    started: datetime | None
    ended: datetime | None
    device: str | None
    """None, as the next two, where the batch is not known."""
    numeric_mode: str | None
    libraries: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DeliveredPicture:
    """Everything that made one delivery."""

    run_id: int
    recipe: str
    recipe_sha256: str
    """The recipe's revision."""
    file: str
    line: int
    """Where the recipe describes the step."""
    node: str
    axes: Axes
    candidate: int
    take: int
    ancestry: Ancestry
    steps: tuple[MadeStep, ...]
    """The step that made it, then those above it, the latest first; above a contact sheet's cells nothing."""
    licences: Mapping[str, str]
    """sha256 of a model's weights -> its licence; of those that the database knows."""


@dataclass(frozen=True, slots=True)
class Parent:
    """What a signed picture was made from."""

    asset: str
    """`sha256:...` of a photo, else the asset id."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a signature is given for."""

    asset: str
    sha256: str
    """Of the picture before it was signed."""
    digital_source_type: str | None
    parent: Parent | None
    """None: made from words alone, or from several pictures none of which is the canvas."""
    prompts: tuple[str, ...] = ()
    """Those that are to be in the file."""


class Signer(Protocol):
    """Puts a signed manifest into picture files; the last that is done to them."""

    def sign(self, data: bytes, media_type: str, claim: Claim) -> bytes:
        """The picture with its manifest, never the same bytes twice.

        Raises `StepError` for a picture that cannot be signed, `SettingsError` for a signer that cannot be used,
        `InfrastructureError` when a time stamp cannot be had now.
        """
        ...

    def signed_from(self, data: bytes, media_type: str) -> str | None:
        """sha256 of the picture that was signed to become these bytes; None when nobody has, or they were changed."""
        ...
