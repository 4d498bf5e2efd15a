"""A plan is a value: what will be computed, from what, under which key, and what goes where.

It can be printed, stored as JSON, compared in a test and handed to `services.submit`. Nothing here decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Axes = tuple[tuple[str, str], ...]
"""Axis name and value key, in the order of the recipe: `(("item", "RX-100"), ("scene", "terrace"))`."""
InstanceId = tuple[str, Axes, int]
"""Node, axes and candidate."""

OPERATIONS_LANE = "operations"
"""The lane of every Pillow operation; edits have one lane for each model, adapters and numeric mode."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """A source picture as it was listed: what the planner may know without decoding it."""

    uri: str
    etag: str
    """Changes whenever the bytes change; for a folder made of size and modification time."""
    sha256: str
    bytes: int
    width: int
    """Pixels, after EXIF orientation."""
    height: int
    format: str
    """Pillow's name: `JPEG`, `PNG`, `WEBP`, `AVIF`, ..."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The place in a recipe that something comes from."""

    file: str
    line: int
    column: int


@dataclass(frozen=True, slots=True)
class StepInput:
    """One picture that a step reads: a source picture or the output of an earlier step."""

    role: str
    """`image` (the canvas), `reference`, `logo` (an overlay) or `cell` (of a contact sheet)."""
    position: int
    """0-based among the inputs of that role."""
    source: ImageInfo | None
    parent: str | None
    """The step key of the parent; exactly one of `source` and `parent` is set."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One computation. Two instances with one key are one PlannedStep."""

    key: str
    operation: str
    """`edit`, `generate`, `finish`, `contact_sheet`, ..."""
    params: Mapping[str, Any]
    """Everything but the pictures that the operation needs, resolved, as JSON."""
    inputs: tuple[StepInput, ...]
    lane: str
    origin: Origin
    gpu_seconds: float
    """Estimate from past timings; 0 for Pillow operations."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One appearance of a step in the recipe's DAG: node, axis values and candidate, computed under `key`."""

    node: str
    axes: Axes
    candidate: int
    key: str

    @property
    def id(self) -> InstanceId:
        return self.node, self.axes, self.candidate


@dataclass(frozen=True, slots=True)
class PlannedDelivery:
    """Where one finished image goes."""

    path: str
    """Full URI, expanded."""
    key: str
    """Of the step whose output is delivered."""
    if_exists: str
    """`version`, `skip`, `fail` or `replace`."""
    instance: Instance
    origin: Origin


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row of an input that takes no part, and why; never silent."""

    axis: str
    row: str
    reason: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The DAG of one run: steps in topological order (parents first), each key once."""

    recipe: str
    """Name of the recipe."""
    recipe_sha256: str
    """Over the recipe file and its imports: the recipe's revision."""
    owner: str
    steps: tuple[PlannedStep, ...]
    instances: tuple[Instance, ...]
    deliveries: tuple[PlannedDelivery, ...]
    skipped: tuple[SkippedRow, ...] = ()
    notes: tuple[str, ...] = ()
    """What an author should see before paying: sizes chosen, near-limit upscales, long prompts."""
    budget: Mapping[str, float] = field(default_factory=dict)
    """`gpu_minutes`, `outputs`; empty when the recipe sets none."""
