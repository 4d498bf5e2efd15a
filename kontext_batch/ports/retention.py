"""What the services ask of the database about what is kept, and what is taken down for good."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from kontext_batch.ports.admin import Act
from kontext_batch.ports.records import Artifact

TAKEN_DOWN = "taken down: "
"""So begins the error of whatever a takedown has ended."""


@dataclass(frozen=True, slots=True)
class Hold:
    """What may not be removed, and why."""

    id: int
    subject: str
    """`run:12`, `step:7`, `photo:<sha256>` or `picture:<sha256>`."""
    reason: str
    who: str
    placed: datetime
    released: datetime | None


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Something that was taken down."""

    sha256: str
    uri: str
    """Where it lay."""
    source: str
    """sha256 of the photo that was forgotten."""
    kind: str
    """`photo`, `artifact`, `file` (delivered), `claim` (a file that a worker may have been about to bring)."""
    reason: str
    who: str
    at: datetime
    deleted: datetime | None
    """When its object was gone."""
    note: str | None = None
    """What people should know; without a time of deletion: why it is left."""

    @property
    def pending(self) -> bool:
        """Whether it is still to be deleted."""
        return self.deleted is None and self.note is None


@dataclass(frozen=True, slots=True)
class DescendedDelivery:
    """A picture made from a photo, and where it was wanted."""

    run_id: int
    path: str
    """As the recipe wants it."""
    state: str
    delivered_path: str | None
    withdrawn: datetime | None


@dataclass(frozen=True, slots=True)
class Descent:
    """All that came from a photo, under whichever path it lay."""

    photo: str
    """Its sha256."""
    uris: tuple[str, ...]
    """Where the photo was seen."""
    steps: int
    """Made from it, directly or not; by way of a delivered picture that was taken for a photo, too."""
    live: int
    """Those of them that are not computed yet."""
    runs: tuple[int, ...]
    """That wanted them."""
    recipes: tuple[str, ...]
    """URIs of the recipes of these: what lies around them may be written to."""
    artifacts: tuple[Artifact, ...]
    """Theirs that are kept."""
    shared: tuple[Artifact, ...]
    """Of equal bytes as what other photos' steps made: they stay."""
    deliveries: tuple[DescendedDelivery, ...]
    holds: tuple[Hold, ...]
    """That stand against its removal."""


class Retention(Protocol):
    """Part of `ports.Repository`."""

    def add_hold(self, subject: str, reason: str, *, by: Act) -> bool:
        """False when one stands already. Raises `ObjectNotFound` for a run or step that is not there."""
        ...

    def release_hold(self, subject: str, *, by: Act) -> bool:
        """False when none stands."""
        ...

    def holds(self, *, released: bool = False) -> Sequence[Hold]:
        """Those that stand, the oldest first; `released`: the others too."""
        ...

    def expired(self, *, days: float, limit: int | None = None) -> Sequence[Artifact]:
        """Intermediates that nobody has wanted for so long, the oldest first: artifacts of steps that deliver nothing.

        Never what a hold keeps, a live step will read or an open run wants.
        """
        ...

    def photos(self, uri: str) -> Sequence[str]:
        """sha256 of every photo that was seen or read at that URI."""
        ...

    def places(self, photo: str) -> Sequence[str]:
        """URIs at which the photo of that sha256 was seen, read or taken down."""
        ...

    def descent(self, photo: str) -> Descent:
        """All that came from the photo of that sha256."""
        ...

    def take_down(
        self,
        photo: str,
        reason: str,
        *,
        uris: Collection[str],
        removes: Callable[[str], bool],
        despite_hold: bool,
        by: Act,
    ) -> Descent:
        """Write tombstones for the photo and all that came from it, and let none of it be made or delivered again.

        Live steps are cancelled, leased ones fenced; nothing is deleted yet. Done again it adds what is new, and lets
        what was left be tried once more. `uris`: where the photo lies besides those that are known; `removes`: whether
        it is to be deleted there. Raises `Held`.
        """
        ...

    def tombstones(
        self, *, photo: str | None = None, pending: bool = False, limit: int | None = None
    ) -> Sequence[Tombstone]:
        """`photo`: only those of that takedown; `pending`: only what is still to be deleted."""
        ...

    def forgotten(self, sha256s: Iterable[str]) -> Mapping[str, Tombstone]:
        """Those of these pictures that no plan may read."""
        ...

    def bury_artifact(self, sha256: str, uri: str, delete: Callable[[str], None]) -> bool:
        """Delete an artifact that was taken down, under the lock of `forget_artifact`; False when it has to wait.

        It stays, with a note, where a step that has nothing to do with the photo made the same bytes.
        """
        ...

    def is_claimed(self, path: str) -> bool:
        """Whether a worker may be about to bring something there."""
        ...

    def settle_tombstone(self, sha256: str, uri: str, *, deleted: bool, note: str | None = None) -> None: ...

    def withdraw(self) -> int:
        """Note of deliveries that their files were deleted as taken down; returns of how many."""
        ...
