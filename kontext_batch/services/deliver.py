"""Bring finished images to the paths that the recipe wants.

A delivery may be done twice (a worker dies between the write and the record): every policy is such that the second
time changes nothing. Identical bytes never make a new version; nor does a picture that was signed before, which no
second signature would give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import structlog

from kontext_batch.errors import InfrastructureError, KontextBatchError, NotAllowed, ObjectNotFound, StorageReadOnly
from kontext_batch.hashing import sha256_hex
from kontext_batch.observability import metrics
from kontext_batch.planning.marking import asset_id, digital_source_type
from kontext_batch.ports import (
    Claim,
    ContentFilter,
    DeliveredPicture,
    MadeStep,
    ObjectStore,
    Parent,
    PendingDelivery,
    Repository,
    SettledDelivery,
    Signer,
)
from kontext_batch.services.artifacts import read_artifact
from kontext_batch.services.sidecars import PROMPTS, sidecar, write_sidecar

log = structlog.get_logger(__name__)

MAX_VERSIONS = 10_000
AT_ONCE = 16
"""Deliveries that a worker claims together."""
CLAIM_SECONDS = 300.0
"""How long they are its own: another brings what a host that died had claimed. Twice changes nothing."""
MAX_MANIFEST = 8 * 10**6
"""Bytes that a signature may add."""


@dataclass(frozen=True, slots=True)
class Papers:
    """What delivered files come with."""

    sidecars: bool = False
    signer: Signer | None = None
    prompts: bool = False
    """Whether prompts are told in either."""
    licences: Mapping[str, str] = field(default_factory=dict)
    """sha256 of weights -> licence, of those that this machine knows."""

    @property
    def wanted(self) -> bool:
        """Whether it has to be known what made a picture."""
        return self.sidecars or self.signer is not None


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a delivery ended."""

    path: str
    version: int
    """1 for the path itself, n for `name.vN.ext`."""
    skipped: str | None = None
    """Why it was left out; None when it was not."""
    sha256: str = ""
    """Of the file that lies there; nothing where it was left out."""
    bytes: int = 0


def versioned(path: str, version: int) -> str:
    """`a/b.jpg` as version 3 is `a/b.v3.jpg`; version 1 is the path itself."""
    if version == 1:
        return path
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    return f"{folder}{slash}{stem}.v{version}{dot}{extension}" if dot else f"{path}.v{version}"


def deliver_pending(
    repository: Repository,
    store: ObjectStore,
    *,
    worker_id: str,
    run_id: int | None = None,
    content_filter: ContentFilter | None = None,
    papers: Papers | None = None,
    admit: Callable[[Iterable[str]], None] | None = None,
    patient: bool = False,
    on_delivery: Callable[[], None] = lambda: None,
) -> int:
    """Deliver what is finished and claimed by nobody else, up to `AT_ONCE` images; returns how many are settled.

    A delivery that cannot be made, or that the content filter does not allow, is recorded as failed. Raises
    `InfrastructureError` (a full disk, a store that does not answer) with the rest still pending.
    `patient`: nothing is raised; what a place does not take now is tried again later, and the others' goes on.
    `admit`: told of the recipes of what is claimed, whose places are about to be used.
    `on_delivery` is called before each.
    """
    claimed = repository.claim_deliveries(worker_id, limit=AT_ONCE, seconds=CLAIM_SECONDS, run_id=run_id)
    if not claimed:
        return 0
    if admit is not None:
        admit({each.source for each in claimed})
    bringer = Bringer(repository, store, content_filter, papers or Papers())
    settled: list[SettledDelivery] = []
    silent: set[str] = set()
    """Places that did not answer: what else goes there would meet the same."""
    later: list[int] = []
    told = 0
    try:
        bringer.look_up(claimed)
        for delivery in claimed:
            if place_of(delivery.path) in silent:
                later.append(delivery.id)
                continue
            on_delivery()
            try:
                placed = bringer.bring(delivery)
            except KontextBatchError as error:
                if isinstance(error, InfrastructureError) and not isinstance(error, StorageReadOnly):
                    if not patient:
                        raise  # what is pending stays so, and the same command goes on
                    log.warning("delivery put off", path=delivery.path, run=delivery.run_id, error=str(error))
                    silent.add(place_of(delivery.path))
                    later.append(delivery.id)
                    continue
                log.warning("delivery failed", path=delivery.path, run=delivery.run_id, error=str(error))
                settled.append(SettledDelivery(delivery.id, error=str(error)))
                metrics.DELIVERIES.labels("failed").inc()
            else:
                settled.append(_settled(delivery, placed))
                metrics.DELIVERIES.labels("skipped" if placed.skipped else "delivered").inc()
                if delivery.if_exists == "replace":  # others look at what is recorded before they replace it
                    repository.settle_deliveries(worker_id, settled[told:])
                    told = len(settled)
    finally:
        if told < len(claimed):
            ended = {*later, *(each.id for each in settled)}
            back = [each.id for each in claimed if each.id not in ended]
            repository.settle_deliveries(worker_id, settled[told:], back=back, later=later)
    return len(settled)


def place_of(path: str) -> str:
    """What answers or does not answer as one: the bucket, or the disk."""
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _settled(delivery: PendingDelivery, placed: Placed) -> SettledDelivery:
    signed = placed.skipped is None and placed.sha256 != delivery.artifact.sha256
    return SettledDelivery(
        delivery.id, placed.path, placed.version, placed.skipped, file_sha256=placed.sha256 if signed else None
    )


@dataclass(slots=True)
class Bringer:
    """Brings single deliveries, with their papers."""

    repository: Repository
    store: ObjectStore
    content_filter: ContentFilter | None
    papers: Papers
    _known: dict[int, DeliveredPicture] = field(default_factory=dict)

    def look_up(self, deliveries: Iterable[PendingDelivery]) -> None:
        """What made these pictures, in one question for all."""
        if self.papers.wanted:
            self._known |= self.repository.delivered_pictures([each.id for each in deliveries])

    def bring(self, delivery: PendingDelivery) -> Placed:
        """`place`, unless a newer run was faster: a run that stood still and goes on brings what is out of date."""
        data = read_artifact(self.repository, self.store, delivery.artifact)
        if self.content_filter is not None and not self.content_filter.allows(data):
            raise KontextBatchError(f"{delivery.path}: the content filter does not allow this image")
        if delivery.if_exists != "replace":  # the only policy that takes anything away
            return self._place(delivery, data)
        newer = self.repository.newer_delivery(delivery.run_id, delivery.path)
        if newer is None:
            placed = self._place(delivery, data)
            newer = self.repository.newer_delivery(delivery.run_id, delivery.path)
            if newer is None:
                return placed
            # It delivered between the look and the write: put its image back.
            self.look_up([newer])
            artifact = read_artifact(self.repository, self.store, newer.artifact)
            self._place(replace(newer, if_exists="replace"), artifact)
        return Placed(delivery.path, 1, skipped=f"run {newer.run_id} is newer and has delivered there")

    def _place(self, delivery: PendingDelivery, data: bytes) -> Placed:
        papers = self.papers
        if not papers.wanted:
            return place(self.store, delivery, data)
        picture, seal = self._known[delivery.id], None
        if papers.signer is not None:
            seal = Seal(papers.signer, claim_of(picture, delivery.artifact.sha256, prompts=papers.prompts))
        placed = place(self.store, delivery, data, seal=seal)
        if papers.sidecars and placed.skipped is None:
            document = sidecar(
                picture,
                delivery.artifact,
                placed.sha256,
                placed.bytes,
                prompts=papers.prompts,
                licences=papers.licences,
            )
            write_sidecar(self.store, placed.path, document)
        return placed


def claim_of(picture: DeliveredPicture, sha256: str, *, prompts: bool) -> Claim:
    """What is signed for the picture of this hash."""
    return Claim(
        asset=asset_id(picture.steps[0].key),
        sha256=sha256,
        digital_source_type=digital_source_type(picture.ancestry),
        parent=_parent(picture),
        prompts=tuple(
            str(step.params[name])
            for step in reversed(picture.steps)
            for name in PROMPTS
            if prompts and step.params.get(name)
        ),
    )


def _parent(picture: DeliveredPicture) -> Parent | None:
    """The photo at the upper end of the chain of canvases, else the picture that was read last."""
    steps = {step.key: step for step in picture.steps}
    step: MadeStep | None = picture.steps[0]
    found: Parent | None = None
    while step is not None:
        photo = next((each for each in step.sources if each.role == "image"), None)
        if photo is not None:
            return Parent(f"sha256:{photo.sha256}")
        above = next((each for each in step.parents if each.role == "image"), None)
        if above is None:
            break
        found = Parent(asset_id(above.key))
        step = steps.get(above.key)
    return found


@dataclass(frozen=True, slots=True)
class Seal:
    """A signature that a picture is to have."""

    signer: Signer
    claim: Claim


@dataclass(slots=True)
class _File:
    """What is to lie at some path."""

    store: ObjectStore
    delivery: PendingDelivery
    picture: bytes
    seal: Seal | None
    _made: tuple[bytes, str] | None = None

    @property
    def media_type(self) -> str:
        return self.delivery.artifact.media_type

    def made(self) -> tuple[bytes, str]:
        """The file and its sha256; signed when it is first asked for, since that may ask a server for the time."""
        if self._made is None:
            if self.seal is None:
                self._made = self.picture, self.delivery.artifact.sha256
            else:
                data = self.seal.signer.sign(self.picture, self.media_type, self.seal.claim)
                self._made = data, sha256_hex(data)
        return self._made

    def held(self, path: str) -> tuple[str, int] | None:
        """sha256 and bytes of what lies at `path`, if it is this file, or this picture signed before."""
        artifact = self.delivery.artifact
        try:
            size = self.store.head(path).bytes
            if self.seal is None:
                same = size == artifact.bytes and sha256_hex(self.store.read(path)) == artifact.sha256
                return (artifact.sha256, size) if same else None
            if not artifact.bytes < size <= artifact.bytes + MAX_MANIFEST:
                return None
            data = self.store.read(path)
        except (ObjectNotFound, NotAllowed):  # not allowed: a link that leads out of what may be read; not these bytes
            return None
        if self.seal.signer.signed_from(data, self.media_type) != artifact.sha256:
            return None
        return sha256_hex(data), len(data)

    def bring(self, path: str) -> tuple[str, int] | None:
        """Write it where nothing is; None when something else is there."""
        if self.seal is not None and (there := self.held(path)) is not None:
            return there
        data, sha256 = self.made()
        if self.store.write_if_absent(path, data, media_type=self.media_type):
            return sha256, len(data)
        return self.held(path)

    def put(self, path: str) -> tuple[str, int]:
        """Write it whatever is there."""
        if (there := self.held(path)) is not None:
            return there
        data, sha256 = self.made()
        self.store.write(path, data, media_type=self.media_type)
        return sha256, len(data)


def place(store: ObjectStore, delivery: PendingDelivery, data: bytes, *, seal: Seal | None = None) -> Placed:
    """Write one image, `data`, to its path under its policy, signed where there is a `seal`.

    Raises the store's and the signer's errors, and `KontextBatchError` for `fail`.
    """
    file = _File(store, delivery, data, seal)
    if delivery.if_exists == "replace":
        sha256, size = file.put(delivery.path)
        return Placed(delivery.path, 1, sha256=sha256, bytes=size)
    for version in range(1, MAX_VERSIONS):
        path = versioned(delivery.path, version)
        there = file.bring(path)
        if there is not None:
            return Placed(path, version, sha256=there[0], bytes=there[1])
        if delivery.if_exists == "skip":
            return Placed(path, 1, skipped="something is there already")
        if delivery.if_exists == "fail":
            raise KontextBatchError(f"{path}: another image is there already, and the recipe says if_exists: fail")
    raise KontextBatchError(f"{delivery.path}: {MAX_VERSIONS} versions are there already")
