"""What the services ask of the database about runs that leave it in an archive, and that come from one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kontext_batch.ports.admin import Act

Row = Mapping[str, Any]
"""A row as JSON: times as ISO 8601."""
Sections = Callable[[str], Iterator[Row]]
"""Name of a section of an archive -> its rows, anew at each call."""

SECTIONS = ("run", "models", "workers", "artifacts", "batches", "steps", "instances", "deliveries")


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of an archive."""

    run_id: int
    old_run: int
    """Its number where it came from."""
    known: bool
    """The run was here already."""
    new_steps: int
    known_steps: int
    """Equal keys are the same step: what is here stays as it is."""
    differing: int
    """Of these: done here with other bytes."""
    undone: int
    """New ones that count as cancelled, for a step that they read is not done here."""
    forgotten: int
    """Steps that are left out: made from a photo that was taken down here."""


class Archives(Protocol):
    """Part of `ports.Repository`."""

    def archived(self, run_id: int, section: str) -> Iterator[Row]:
        """Rows of a section of a finished run, in an order that is its own, read a thousand at a time."""
        ...

    def import_run(self, sections: Sections, uri_of: Callable[[str, str], str], *, by: Act) -> Imported:
        """Store a run and its steps in one transaction; what is here by its key stays. No bytes are there yet.

        `uri_of`: (sha256, media type) -> where an artifact will lie.
        """
        ...

    def missing_artifacts(self, sha256s: Iterator[str]) -> Mapping[str, str]:
        """sha256 -> URI of those that steps here name and whose bytes are not here."""
        ...

    def announce_artifact(self, sha256: str) -> None:
        """Its bytes are about to be put: should that come to nothing, they are an orphan."""
        ...

    def restore_artifact(self, sha256: str, put: Callable[[str], None]) -> bool:
        """Its bytes are there; `put` is called with its URI under the lock of who might delete them, to make sure."""
        ...
