"""`ports.Retention` and `ports.Archives` over a database: a method is one transaction of the function of its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from kontext_batch.lineage import archived, archives, audit, garbage, holds, naming, takedown
from kontext_batch.lineage.engine import Transactions
from kontext_batch.ports import Act, Artifact, Descent, Hold, Imported, Row, Sections, Tombstone


class SqlRetention:
    """Part of `SqlRepository`, which opens the database."""

    _db: Transactions

    def add_hold(self, subject: str, reason: str, *, by: Act) -> bool:
        return self._db.write(audit.acted, by, subject, holds.add_hold, subject, reason, by.who)

    def release_hold(self, subject: str, *, by: Act) -> bool:
        return self._db.write(audit.acted, by, subject, holds.release_hold, subject)

    def holds(self, *, released: bool = False) -> Sequence[Hold]:
        return self._db.read(holds.holds, released=released)

    def expired(self, *, days: float, limit: int | None = None) -> Sequence[Artifact]:
        return self._db.read(garbage.expired, days=days, limit=limit)

    def photos(self, uri: str) -> Sequence[str]:
        return self._db.read(naming.photos, uri)

    def places(self, photo: str) -> Sequence[str]:
        return self._db.read(takedown.places, photo)

    def descent(self, photo: str) -> Descent:
        return self._db.read(takedown.descent, photo)

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
        return self._db.write(
            audit.acted,
            by,
            f"photo:{photo}",
            takedown.take_down,
            photo,
            reason,
            by.who,
            uris=uris,
            removes=removes,
            despite_hold=despite_hold,
        )

    def tombstones(
        self, *, photo: str | None = None, pending: bool = False, limit: int | None = None
    ) -> Sequence[Tombstone]:
        return self._db.read(takedown.tombstones, photo=photo, pending=pending, limit=limit)

    def forgotten(self, sha256s: Iterable[str]) -> Mapping[str, Tombstone]:
        return self._db.read(takedown.forgotten, sha256s)

    def bury_artifact(self, sha256: str, uri: str, delete: Callable[[str], None]) -> bool:
        return self._db.write(takedown.bury_artifact, sha256, uri, delete)

    def is_claimed(self, path: str) -> bool:
        return self._db.read(takedown.is_claimed, path)

    def settle_tombstone(self, sha256: str, uri: str, *, deleted: bool, note: str | None = None) -> None:
        self._db.write(takedown.settle_tombstone, sha256, uri, deleted=deleted, note=note)

    def withdraw(self) -> int:
        return self._db.write(takedown.withdraw)


class SqlArchives:
    """Part of `SqlRepository`, which opens the database."""

    _db: Transactions

    def archived(self, run_id: int, section: str) -> Iterator[Row]:
        found = self._db.read(archived.page, run_id, section, -1)
        while found:
            yield from found
            found = self._db.read(archived.page, run_id, section, found[-1]["id"])

    def import_run(self, sections: Sections, uri_of: Callable[[str, str], str], *, by: Act) -> Imported:
        return self._db.write(archives.import_and_note, sections, uri_of, by)

    def missing_artifacts(self, sha256s: Iterator[str]) -> Mapping[str, str]:
        return self._db.read(archives.missing_artifacts, sha256s)

    def announce_artifact(self, sha256: str) -> None:
        self._db.write(archives.announce_artifact, sha256)

    def restore_artifact(self, sha256: str, put: Callable[[str], None]) -> bool:
        return self._db.write(archives.restore_artifact, sha256, put)
