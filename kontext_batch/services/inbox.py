"""The tick of the inboxes: what is dropped there becomes runs, and answers are written beside it.

Any number of processes may tick at once, be told of one file many times, or die over it: the repository lets each
(URI, ETag) have one run. What is written beside a drop may be written twice, never the run. Every tick lists, so that a
lost event loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Protocol
from urllib.parse import quote

import structlog

from kontext_batch.errors import (
    InfrastructureError,
    KontextBatchError,
    LeaseLost,
    NotAllowed,
    ObjectChanged,
    ObjectNotFound,
    PlanRefused,
    Problem,
    RecipeError,
    SettingsError,
    StepError,
)
from kontext_batch.hashing import content_hash, sha256_hex
from kontext_batch.planning import inbox, uris
from kontext_batch.planning.inbox import AnsweredDrop, Cancel, ClaimedDrop, DropState, NewDrop, Place
from kontext_batch.planning.states import OPEN_RUNS, RunState, StepState
from kontext_batch.ports import Act, Notice, ObjectEvents, ObjectInfo, ObjectStore, Repository, RunSummary, WakeUps
from kontext_batch.recipes.loader import Recipe
from kontext_batch.services import answers
from kontext_batch.services.bundles import Bundle, BundleLimits, is_imported, member_uri
from kontext_batch.services.look import MAX_RECIPE_BYTES
from kontext_batch.services.prepare import Planner, Prepared, submit

log = structlog.get_logger(__name__)

CLAIM_SECONDS = 600.0
"""How long planning one recipe may take before another process tries: a hundred thousand inputs are listed in it."""
RETRY_SECONDS = 30.0
"""After a store that did not answer."""
MAX_TRIES = 5
"""A drop that was begun so often without an end is refused: it may be what takes its watchers down."""
ANSWER_SECONDS = 60.0
"""How long writing the answers of one drop may take."""
ANSWER_EVERY = 5.0
REPORT_EVERY = 15.0
"""How often is asked whether a report is written; another process that asks first writes it too."""
MOST_STARTS = 50
"""Drops that are planned in one tick: answers and cancelling do not wait for a thousand others."""
MOST_ANSWERS = 200
"""Drops that are answered in one tick, those that waited longest."""
MEDIA_TYPES = {".json": "application/json", ".txt": "text/plain; charset=utf-8", ".html": "text/html; charset=utf-8"}

PlannerOf = Callable[[Place, Sequence[str]], Planner]
"""An inbox and prefixes that one recipe may read besides -> a planner that reads and writes nothing else."""


class Reports(Protocol):
    """Writes the pictures of runs that have ended, while the ticks go on."""

    def written(self, run_id: int, folder: str, into: ObjectStore) -> bool | None:
        """Whether the run's report lies in the folder, a URI; None: not yet. False: it cannot be written.

        Begins to write it, unless another one is being written.
        """
        ...


@dataclass(frozen=True, slots=True)
class Watcher:
    """Watches inboxes. It remembers nothing between two ticks."""

    repository: Repository
    wake_ups: WakeUps
    places: tuple[Place, ...]
    stores: Mapping[str, ObjectStore]
    """Prefix of an inbox -> a store that reaches no other inbox: a folder may hold symbolic links to anywhere."""
    objects: ObjectStore
    """Writes `bundles`."""
    bundles: str
    """URI of the folder, ending in `/`, that bundles are unpacked below, each under the hash of its bytes."""
    limits: BundleLimits
    settle_seconds: float
    """How long a file of a folder must stay as it is."""
    events: ObjectEvents | None = None
    reports: Reports | None = None
    """None: no pictures are put beside a drop."""

    def tick(self, planner: PlannerOf) -> list[int]:
        """Returns the runs that were started."""
        if not self.places:
            return []
        notices = self._notices()
        found = {info.uri: info for info in (*self._told(notices), *self._listed())}
        claimed = islice(self._claimed(found.values()), MOST_STARTS)
        started = [self._act(drop, planner) for drop in claimed]
        self.repository.cancel_drops(list(self._cancels(found.values())))
        if self.events is not None and notices:  # what they told of is in the database, or found by listing
            try:
                self.events.forget(notices)
            except InfrastructureError as error:
                log.warning("events stay in the queue; they change nothing", error=str(error))
        self._answer()
        return [run_id for run_id in started if run_id is not None]

    # ------------------------------------------------------------------------------------------------- what is there

    def _notices(self) -> Sequence[Notice]:
        if self.events is None:
            return ()
        try:
            return self.events.receive()
        except InfrastructureError as error:
            log.warning("no events; listing finds what they would tell", error=str(error))
            return ()

    def _told(self, notices: Sequence[Notice]) -> Iterator[ObjectInfo]:
        for uri in dict.fromkeys(uri for notice in notices for uri in notice.uris):
            if self._wanted(uri):
                try:
                    yield self._store(uri).head(uri)
                except KontextBatchError as error:  # gone again, or the store is away: listing finds it
                    log.info("an event tells of what is not to be had", uri=uri, error=str(error))

    def _listed(self) -> Iterator[ObjectInfo]:
        for place in self.places:
            try:
                for each in self.stores[place.prefix].list(place.prefix):
                    if self._wanted(each.uri) and each.problem is None:
                        yield each
            except (InfrastructureError, NotAllowed, ObjectNotFound) as error:
                log.warning("an inbox cannot be listed; tried again", inbox=place.prefix, error=str(error))

    def _wanted(self, uri: str) -> bool:
        return (inbox.is_drop(uri) or inbox.is_cancel(uri)) and inbox.place_of(uri, self.places) is not None

    def _store(self, uri: str) -> ObjectStore:
        """Of the inbox that holds it."""
        place = inbox.place_of(uri, self.places)
        assert place is not None, "only what an inbox holds is touched"
        return self.stores[place.prefix]

    def _claimed(self, found: Iterable[ObjectInfo]) -> Iterator[ClaimedDrop]:
        """One at a time: those of processes that were lost, then the new ones, the inboxes in turn."""
        while lost := self.repository.claim_lost_drop(seconds=CLAIM_SECONDS):
            yield lost
        drops = [each for each in found if inbox.is_drop(each.uri)]
        claimable = set(self.repository.claimable_drops([(each.uri, each.etag) for each in drops]))
        for place, info in self._in_turn(each for each in drops if (each.uri, each.etag) in claimable):
            settle = self.settle_seconds if info.uri.startswith("file:") else 0.0
            new = NewDrop(
                uri=info.uri, etag=info.etag, modified=info.modified, owner=place.owner, settle_seconds=settle
            )
            claimed = self.repository.claim_drop(new, seconds=CLAIM_SECONDS)
            if claimed is not None:
                yield claimed

    def _in_turn(self, drops: Iterable[ObjectInfo]) -> Iterator[tuple[Place, ObjectInfo]]:
        """The oldest drop of each inbox, then the second oldest of each: a thousand of one keep no other waiting."""
        of_place: dict[str, list[tuple[Place, ObjectInfo]]] = {}
        for info in sorted(drops, key=lambda each: (each.modified, each.uri)):
            place = inbox.place_of(info.uri, self.places)
            if place is not None:
                of_place.setdefault(place.prefix, []).append((place, info))
        for turn in zip_longest(*of_place.values()):
            yield from (each for each in turn if each is not None)

    def _cancels(self, found: Iterable[ObjectInfo]) -> Iterator[Cancel]:
        for each in found:
            if inbox.is_cancel(each.uri) and (place := inbox.place_of(each.uri, self.places)) is not None:
                mark = f"{each.etag} {each.modified.isoformat()}"  # empty files have one ETag
                yield Cancel(each.uri, mark, each.modified, place.owner)

    # ------------------------------------------------------------------------------------------------------- one drop

    def _act(self, drop: ClaimedDrop, planner: PlannerOf) -> int | None:
        try:
            return self._start(drop, planner)
        except LeaseLost:
            log.warning("another process has taken over", drop=drop.uri)
        except (InfrastructureError, SettingsError) as error:
            log.warning("a drop could not be planned; tried again later", drop=drop.uri, error=str(error))
            self.repository.postpone_drop(drop.id, drop.token, seconds=RETRY_SECONDS, blame=False)
        except KontextBatchError as error:
            self._refuse(drop, error)
        except Exception:  # a fault of this program: it must not keep other people's recipes from running
            log.exception("internal error over a drop", drop=drop.uri, tries=drop.tries)
            self.repository.postpone_drop(drop.id, drop.token, seconds=RETRY_SECONDS, blame=True)
        return None

    def _start(self, drop: ClaimedDrop, planner: PlannerOf) -> int | None:
        place = inbox.place_of(drop.uri, self.places)
        if place is None:
            self._settle(drop, DropState.REFUSED, "no inbox of the settings holds it any more")
            return None
        if drop.tries > MAX_TRIES:
            raise PlanRefused([f"tried {MAX_TRIES} times without an end; the administrator's log says more"])
        try:
            data = self._read(drop)
        except (ObjectNotFound, ObjectChanged) as error:
            self._settle(drop, DropState.GONE, str(error))
            return None
        sha256 = sha256_hex(data)
        earlier = self.repository.note_drop(drop.id, sha256)
        if earlier is not None:
            self._settle(drop, DropState.REPEATED, f"these bytes are run {earlier} already")
            return None
        if not inbox.is_bundle(drop.uri) and is_imported(data):
            self._settle(drop, DropState.IGNORED, "no recipe: a file that recipes import")
            return None
        self._answer_drop(drop, inbox.STATUS, answers.status_text(answers.planning_status(uris.file_name(drop.uri))))
        ready, notes = self._planned(drop, place, data, sha256, planner)
        self._answer_drop(drop, inbox.PLAN, answers.plan_text(ready, notes))
        by = Act(place.owner, "inbox", "submit", {"file": drop.uri})
        run_id = submit(self.repository, self.wake_ups, ready, trigger="inbox", drop=(drop.id, drop.token), by=by)
        log.info("a drop has a run", drop=drop.uri, run=run_id)
        return run_id

    def _read(self, drop: ClaimedDrop) -> bytes:
        """Raises `PlanRefused` for one that is too large, before it is read."""
        most = self.limits.max_bytes if inbox.is_bundle(drop.uri) else MAX_RECIPE_BYTES
        try:
            return self._store(drop.uri).read(drop.uri, etag=drop.etag, max_bytes=most)
        except StepError as error:
            kind = "bundle" if inbox.is_bundle(drop.uri) else "recipe"
            raise PlanRefused([f"a {kind} has at most {most} bytes"]) from error

    def _planned(
        self, drop: ClaimedDrop, place: Place, data: bytes, sha256: str, planner: PlannerOf
    ) -> tuple[Prepared, list[str]]:
        notes: list[str] = []

        def check(recipe: Recipe) -> list[Problem]:
            if recipe.schedule is not None:
                notes.append("it runs now, once; its schedule is followed when an administrator adds it")
            return place.problems(recipe)

        shown = uris.file_name(drop.uri)
        if not inbox.is_bundle(drop.uri):
            return planner(place, ()).from_recipe(drop.uri, shown=shown, data=data, check=check), notes
        bundle = Bundle(data, shown=shown, limits=self.limits)
        folder = f"{self.bundles}{sha256}/"
        for name, content in bundle.files():
            self.objects.write_if_absent(member_uri(folder, name), content, media_type="application/octet-stream")
        recipe = member_uri(folder, bundle.recipe)
        return planner(place, (folder,)).from_recipe(recipe, shown=f"{shown}/{bundle.recipe}", check=check), notes

    def _refuse(self, drop: ClaimedDrop, error: KontextBatchError) -> None:
        """Told beside the drop before it is settled: whoever takes over from here tells it again."""
        file = uris.file_name(drop.uri)
        if isinstance(error, RecipeError):
            lines = list(map(str, error.problems))
        elif isinstance(error, PlanRefused):
            lines = [f"{file}: {reason}" for reason in error.reasons]
        else:
            lines = [f"{file}: {error}"]
        try:
            self._answer_drop(drop, inbox.ERRORS, ("\n".join(lines) + "\n").encode("utf-8", "replace"))
            self._answer_drop(drop, inbox.STATUS, answers.status_text(answers.refused_status(file, lines)))
        except InfrastructureError as silent:
            log.warning("a refusal could not be told; tried again later", drop=drop.uri, error=str(silent))
            self.repository.postpone_drop(drop.id, drop.token, seconds=RETRY_SECONDS, blame=False)
            return
        self._settle(drop, DropState.REFUSED, "\n".join(lines))

    def _settle(self, drop: ClaimedDrop, state: DropState, reason: str) -> None:
        self.repository.settle_drop(drop.id, drop.token, state, reason)
        log.warning("a drop has no run", drop=drop.uri, state=state.value, reason=reason)

    # -------------------------------------------------------------------------------------------------------- answers

    def _answer_drop(self, drop: ClaimedDrop, ending: str, text: bytes) -> None:
        if self.repository.is_answered(drop.id):
            self._write(drop.stem + ending, text)

    def _answer(self) -> None:
        for drop in self.repository.claim_answers(limit=MOST_ANSWERS, seconds=ANSWER_SECONDS):
            try:
                self._answer_run(drop)
            except InfrastructureError as error:
                log.warning("answers could not be written; tried again later", drop=drop.uri, error=str(error))

    def _answer_run(self, drop: AnsweredDrop) -> None:
        summary = self.repository.run(drop.run_id)
        # A cancelled run still holds the batch in flight for a moment: the last answer tells what became of it.
        ended = summary.state not in OPEN_RUNS and not summary.steps.get(StepState.LEASED)
        file, digest = uris.file_name(drop.uri), drop.answer
        waits = False
        if drop.newest and inbox.place_of(drop.uri, self.places) is not None:
            status = answers.run_status(file, summary)
            digest = content_hash(status)
            if drop.answer is None:  # the first answer about this run: others may lie there
                self._delete(drop.stem + inbox.ERRORS)
            if ended:
                waits = self._report(drop, summary, told=digest == drop.answer)
            elif drop.answer is None:
                self._delete(drop.stem + inbox.REPORT)
            if digest != drop.answer:
                self._write(drop.stem + inbox.STATUS, answers.status_text(status))
        if ended and not waits:
            state = DropState.CANCELLED if summary.state is RunState.CANCELLED else DropState.FINISHED
        else:
            state = DropState.ACCEPTED
        again = REPORT_EVERY if waits else ANSWER_EVERY
        self.repository.settle_answer(drop.id, drop.token, state, digest, seconds=again)

    def _report(self, drop: AnsweredDrop, summary: RunSummary, *, told: bool) -> bool:
        """The page at once, and the pictures when they are there; says whether those are still being written.

        `told`: the page is there already.
        """
        folder = drop.stem + inbox.REPORT_FOLDER
        written: bool | None = False
        if self.reports is not None:
            written = self.reports.written(drop.run_id, folder, self._store(drop.uri))
        if written is not None or not told:
            pictures = f"{quote(uris.file_name(drop.stem))}{inbox.REPORT_FOLDER}index.html" if written else None
            page = answers.report_html(uris.file_name(drop.uri), summary, self.repository, pictures)
            self._write(drop.stem + inbox.REPORT, page)
        return written is None

    def _write(self, uri: str, data: bytes) -> None:
        """An answer that cannot lie there (a folder has its name) is left out: the run counts."""
        try:
            self._store(uri).write(uri, data, media_type=MEDIA_TYPES[uri[uri.rindex(".") :]])
        except NotAllowed as error:
            log.warning("an answer cannot be written", uri=uri, error=str(error))

    def _delete(self, uri: str) -> None:
        try:
            self._store(uri).delete(uri)
        except NotAllowed as error:
            log.warning("an old answer cannot be removed", uri=uri, error=str(error))
