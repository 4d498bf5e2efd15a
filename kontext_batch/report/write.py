"""Write the report of a run into a folder or a bucket.

What was begun is gone on with: a small picture bears the hash of what it shows, and one that is there is not made
again. `index.html` is written last and names its data by their content, so a report is whole at every moment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import structlog

from kontext_batch.errors import (
    InfrastructureError,
    KontextBatchError,
    NotAllowed,
    ObjectNotFound,
    PlanRefused,
    SettingsError,
)
from kontext_batch.hashing import sha256_hex
from kontext_batch.ports import ObjectStore, Repository, RunSummary
from kontext_batch.report import pages
from kontext_batch.report.data import Telling, Told

log = structlog.get_logger(__name__)

DETAILS, ROWS = 100, 5000
"""Instances in one file of details, and of rows of the grid."""
MOST = 100_000
"""Instances of a report: a browser holds a row of each."""
THREADS = min(4, os.cpu_count() or 1)
"""Each holds one decoded picture at most."""
OWN = re.compile(
    r"pictures/[0-9a-f]{64}-[sm]\.webp|data/(run|rows|details|links)-[0-9]+-[0-9a-f]{12}\.js"
    r"|assets/[a-z]+-[0-9a-f]{12}\.(js|css|svg)"
)
"""Names of files that a report before may have left, and of nothing else: they are deleted."""

Draw = Callable[[bytes], tuple[bytes, bytes]]
"""A picture -> its thumbnail and its preview, WebP. Raises `StepError`."""
OnProgress = Callable[[int, int], None]
"""(instances told, instances expected)."""


class Stopped(Exception):
    """Somebody asked to stop; what is there is gone on with next time."""


@dataclass(frozen=True, slots=True)
class Written:
    """A report that is there."""

    index: str
    """URI of its page."""
    instances: int
    made: int
    """Small pictures that were made for it, two of each."""
    kept: int
    """Pictures whose small ones were there."""
    missing: Mapping[str, str]
    """sha256 of a picture that cannot be shown -> why."""
    files: tuple[str, ...] = field(repr=False)
    """Names of all its files."""
    deliveries: tuple[tuple[str, str], ...] = field(repr=False)
    """(relative link, URI) of each delivered file that it links to."""


@dataclass(frozen=True, slots=True)
class ReportWriter:
    """Writes reports of the runs of one workspace."""

    repository: Repository
    store: ObjectStore
    """Where artifacts and photos lie."""
    draw: Draw
    max_bytes: int
    """Of a picture that is read."""
    threads: int = THREADS

    def write(
        self,
        run_id: int,
        folder: str,
        into: ObjectStore,
        *,
        on_progress: OnProgress = lambda done, total: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Written:
        """Write it below `folder`, a URI that ends in `/`, of the store `into`; a report that lies there is replaced.

        Raises `ObjectNotFound` (no such run), `PlanRefused` (too many instances), `SettingsError` (something else lies
        there), `Stopped`, and what the store raises.
        """
        summary = self.repository.run(run_id)
        own = {pages.SHARED} if check_place(into, folder) else set()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="report") as pool:
            return _Writing(self, summary, folder, into, pool, stopped, own).write(on_progress)

    def share(self, written: Written, folder: str, into: ObjectStore, *, title: str, seconds: int) -> str:
        """A link to a page of the report whose files are behind links too, all for so many seconds."""
        names = [name for name in written.files if name != pages.INDEX]
        with ThreadPoolExecutor(self.threads) as pool:
            signed = pool.map(lambda name: into.link(folder + name, seconds=seconds), names)
            links = dict(zip(names, signed, strict=True))
            outside = pool.map(lambda place: self._link(place[1], seconds), written.deliveries)
            links |= {href: url for (href, _), url in zip(written.deliveries, outside, strict=True) if url is not None}
        told = pages.data_file("links", 0, links)
        loaded = [told.name, *_loaded_at_once(written.files)]
        into.write(folder + told.name, told.data, media_type=told.media_type)
        links[told.name] = into.link(folder + told.name, seconds=seconds)
        page = pages.page(title, loaded, name=pages.SHARED, links=links)
        into.write(folder + page.name, page.data, media_type=page.media_type)
        return into.link(folder + page.name, seconds=seconds)

    def _link(self, uri: str, seconds: int) -> str | None:
        """A link to a delivered file; None where it lies there no more, or may not be read."""
        try:
            return self.store.link(uri, seconds=seconds)
        except (ObjectNotFound, NotAllowed):
            return None


def title_of(summary: RunSummary) -> str:
    return f"{summary.recipe}, run {summary.id}: {summary.state}"


def check_place(into: ObjectStore, folder: str) -> bool:
    """Whether a report lies there.

    Raises `SettingsError` where another page lies, and what the store raises where nothing can be written.
    """
    into.folder(folder, write=True)
    try:
        there = into.read(folder + pages.INDEX)
    except ObjectNotFound:
        return False
    if pages.is_report(there):
        return True
    raise SettingsError(f"{folder}{pages.INDEX} is no report of kontext-batch; choose another folder with --to")


def _loaded_at_once(files: Sequence[str]) -> list[str]:
    return [name for name in files if name.startswith("data/run-")]


@dataclass(slots=True)
class _Writing:
    """One report while it is written."""

    writer: ReportWriter
    summary: RunSummary
    folder: str
    into: ObjectStore
    pool: ThreadPoolExecutor
    stopped: Callable[[], bool]
    own: Set[str]
    """Names, beside those of `OWN`, of files that are the report's."""
    before: frozenset[str] = frozenset()
    """Names of the files of a report that lay there."""
    names: list[str] = field(default_factory=list)
    looked: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    made: int = 0

    def write(self, on_progress: OnProgress) -> Written:
        self.before = frozenset(
            name
            for info in self.into.list(self.folder)
            if OWN.fullmatch(name := info.uri.removeprefix(self.folder)) or name in self.own
        )
        telling = Telling(self.folder)
        expected = sum(self.summary.steps.values())
        chunks: dict[str, list[str]] = {"rows": [], "details": []}
        rows: list[list[Any]] = []
        texts: dict[str, int] = {}
        deliveries: list[tuple[str, str]] = []
        done = 0
        for group in self._groups():
            self._draw(group)
            details = []
            for told in group:
                artifact = told.instance.artifact
                shown = artifact is not None and artifact.sha256 not in self.missing
                rows.append(telling.row(told, shown, texts))
                detail = telling.detail(told, self.missing)
                details.append(detail)
                deliveries += [(each["href"], each["uri"]) for each in detail["outputs"] if each["href"]]
            done += len(group)
            if done > MOST:
                raise PlanRefused(
                    [f"run {self.summary.id} has more than {MOST} pictures, too many for a page; see `runs export`"]
                )
            self._data("details", chunks["details"], details)
            if len(rows) >= ROWS:
                self._data("rows", chunks["rows"], {"texts": list(texts), "rows": rows})
                rows, texts = [], {}
            on_progress(done, max(done, expected))
        if rows:
            self._data("rows", chunks["rows"], {"texts": list(texts), "rows": rows})
        counts = {"instances": done, "details_each": DETAILS}
        head = telling.run(self.summary, written=datetime.now(UTC), counts=counts)
        self._data("run", [], {**head, "files": chunks})
        for file in pages.assets():
            self._put(file)
        index = pages.page(title_of(self.summary), _loaded_at_once(self.names))
        self._put(index)
        for name in self.before - set(self.names):
            self.into.delete(self.folder + name)
        return Written(
            index=self.folder + index.name,
            instances=done,
            made=self.made,
            kept=len(self.looked) - self.made - len(self.missing),
            missing=self.missing,
            files=tuple(self.names),
            deliveries=tuple(deliveries),
        )

    def _groups(self) -> Iterator[list[Told]]:
        """The run's instances, so many that one file holds their details."""
        repository = self.writer.repository
        instances = repository.export(self.summary.id)
        while group := list(islice(instances, DETAILS)):
            ids = sorted({each.step_id for each in group})
            params = {row.id: row.params for row in repository.steps_by_id(ids)}
            inputs = repository.step_inputs(ids)
            yield [Told(each, params.get(each.step_id, {}), inputs.get(each.step_id, ())) for each in group]

    def _draw(self, group: Sequence[Told]) -> None:
        """Small pictures of all that the group shows, unless they are there."""
        wanted = {sha256: uri for told in group for sha256, uri in told.pictures() if sha256 not in self.looked}
        gone = self.writer.repository.forgotten(wanted)
        self.missing |= {sha256: f"taken down: {each.reason}" for sha256, each in gone.items()}
        running: dict[str, Future[str | None]] = {}
        try:
            for sha256, uri in wanted.items():
                self.looked.add(sha256)
                if sha256 in gone:
                    continue
                names = [pages.preview_name(sha256), pages.thumbnail_name(sha256)]
                if self.before.issuperset(names):
                    self.names += names
                else:
                    running[sha256] = self.pool.submit(self._make, sha256, uri)
            for sha256, future in running.items():
                problem = future.result()
                if problem is None:
                    self.made += 1
                    self.names += [pages.preview_name(sha256), pages.thumbnail_name(sha256)]
                else:
                    self.missing[sha256] = problem
                    log.info("a picture cannot be shown", uri=wanted[sha256], reason=problem)
        finally:
            for future in running.values():
                future.cancel()

    def _make(self, sha256: str, uri: str) -> str | None:
        """Make both small pictures; returns why there are none."""
        if self.stopped():
            raise Stopped
        try:
            data = self.writer.store.read(uri, max_bytes=self.writer.max_bytes)
            if sha256_hex(data) != sha256:
                return "the file has changed since"
            thumbnail, preview = self.writer.draw(data)
        except InfrastructureError:
            raise
        except ObjectNotFound:
            return "the file is gone"
        except KontextBatchError as error:
            return str(error)
        for name, small in ((pages.preview_name(sha256), preview), (pages.thumbnail_name(sha256), thumbnail)):
            self.into.write(self.folder + name, small, media_type=pages.MEDIA_TYPES[".webp"])
        return None

    def _data(self, kind: str, chunks: list[str], value: Any) -> None:
        file = pages.data_file(kind, len(chunks), value)
        chunks.append(file.name)
        self._put(file)

    def _put(self, file: pages.File) -> None:
        self.names.append(file.name)
        if file.name == pages.INDEX or file.name not in self.before:  # all others are named by what they hold
            self.into.write(self.folder + file.name, file.data, media_type=file.media_type)
