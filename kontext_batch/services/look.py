"""Look at the world for a plan: read the recipe and its tables, list and probe the pictures that it names.

A picture is read and hashed once for each ETag; the database remembers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kontext_batch.errors import NotAllowed, ObjectNotFound, Problem, RecipeError, StepError
from kontext_batch.hashing import sha256_hex
from kontext_batch.planning import uris
from kontext_batch.planning.inputs import join, read_rows, wanted_files, wanted_tables
from kontext_batch.planning.listing import FileProblem, Found, Listed
from kontext_batch.planning.plan import ImageInfo
from kontext_batch.planning.sidecars import is_sidecar
from kontext_batch.ports import InputRecord, ObjectInfo, ObjectStore, Probe, Repository, Tombstone
from kontext_batch.recipes.loader import Recipe, load_recipe

MAX_RECIPE_BYTES = 256 * 1024
MAX_TABLE_BYTES = 64 * 10**6
REMEMBER_EVERY = 200
"""Pictures probed between two writes of what was found: a killed first plan does not read everything again."""


@dataclass(frozen=True, slots=True)
class Looker:
    """Reads what recipes name, within the store's prefixes."""

    store: ObjectStore
    repository: Repository
    probe: Probe
    max_input_bytes: int
    readable: tuple[str, ...]
    """Prefixes that recipes may read."""

    def recipe(self, uri: str, *, shown: str, data: bytes | None = None) -> tuple[Recipe, str]:
        """The recipe at `uri` and its text; `shown` is how problems name it. Raises `RecipeError`.

        `data`: its bytes, where they were read already.
        """
        try:
            data = self.store.read(uri, max_bytes=MAX_RECIPE_BYTES) if data is None else data
        except ObjectNotFound as error:
            raise RecipeError([Problem(shown, 0, 0, "", "there is no such file")]) from error
        except StepError as error:
            raise RecipeError([Problem(shown, 0, 0, "", f"a recipe has at most {MAX_RECIPE_BYTES} bytes")]) from error
        folder = base_of(uri)

        def read_import(name: str) -> bytes:
            try:
                where = uris.literal(uris.expand([(name, False)], folder, pattern=False))
            except ValueError as error:
                raise NotAllowed(str(error)) from error
            return self.store.read(where, max_bytes=MAX_RECIPE_BYTES)

        recipe = load_recipe(data, file=shown, read_import=read_import)
        return recipe, data.decode("utf-8")

    def listed(self, recipe: Recipe, base: str) -> Listed:
        """Rows with their pictures. Raises `RecipeError` with everything that is wrong with tables and files."""
        tables = {}
        problems: list[Problem] = []
        for axis, uri in wanted_tables(recipe, base, allowed=self.readable).items():
            try:
                tables[axis] = self.store.read(uri, max_bytes=MAX_TABLE_BYTES)
            except ObjectNotFound:
                problems.append(recipe.problem(("inputs", axis, "table"), f"there is no table at {uri}"))
            except (NotAllowed, StepError) as error:
                problems.append(recipe.problem(("inputs", axis, "table"), str(error)))
        try:
            rows = read_rows(recipe, tables)
        except RecipeError as error:
            raise RecipeError([*problems, *error.problems]) from error
        if problems:
            raise RecipeError(problems)
        wanted = wanted_files(recipe, rows, base, allowed=self.readable)
        found = self.find([each.uri for each in wanted])
        return join(recipe, rows, wanted, found)

    def find(self, patterns: Sequence[str]) -> Mapping[str, Sequence[Found]]:
        """Pattern -> the pictures, or unusable files, that match it."""
        objects: dict[str, ObjectInfo] = {}
        closed: list[FileProblem] = []  # folders: which of their files match is unknown, so the folder is told
        for folder in uris.folders(patterns):
            for each in self.store.list(folder):
                if each.problem is not None and each.uri.endswith("/"):
                    closed.append(FileProblem(each.uri, each.problem))
                elif not is_sidecar(each.uri):  # `out/*` of an earlier recipe means its pictures
                    objects[each.uri] = each
        matches = uris.assign(patterns, objects)
        wanted = sorted({uri for matched in matches.values() for uri in matched})
        records = self._records([objects[uri] for uri in wanted])
        gone = self.repository.forgotten(record.sha256 for record in records.values())
        return {
            pattern: [
                *(_found(records[uri], gone.get(records[uri].sha256)) for uri in matched),
                *(FileProblem(each.uri.rstrip("/"), each.reason) for each in closed if uris.reaches(pattern, each.uri)),
            ]
            for pattern, matched in matches.items()
        }

    def current(self, wanted: Iterable[str]) -> Mapping[str, ImageInfo | None]:
        """What lies at each URI now; None where nothing usable does."""
        infos: dict[str, ObjectInfo] = {}
        for uri in wanted:
            try:
                infos[uri] = self.store.head(uri)
            except ObjectNotFound:
                continue
        records = self._records(list(infos.values()))
        gone = self.repository.forgotten(record.sha256 for record in records.values())
        found = {uri: _found(records[uri], gone.get(records[uri].sha256)) for uri in infos}
        return {uri: each if isinstance(each, ImageInfo) else None for uri, each in found.items()}

    def _records(self, objects: Sequence[ObjectInfo]) -> Mapping[str, InputRecord]:
        """What is known of each object, from the database where its ETag stands, else by reading it.

        A file that may not be read, or is gone by now, is a problem of that file, as one that is no picture is.
        """
        known = self.repository.inputs([each.uri for each in objects])
        records: dict[str, InputRecord] = {}
        fresh: list[InputRecord] = []
        for each in objects:
            if each.problem is not None:  # not remembered: it goes when the folders that may be read change
                records[each.uri] = _unusable(each, each.problem)
                continue
            record = known.get(each.uri)
            if record is None or record.etag != each.etag:
                try:
                    record = self._probe(each)
                except (NotAllowed, ObjectNotFound) as error:
                    # Not remembered: whoever lets it be read changes no ETag.
                    records[each.uri] = _unusable(each, str(error).removeprefix(each.uri).lstrip(": "))
                    continue
                fresh.append(record)
                if len(fresh) >= REMEMBER_EVERY:
                    self.repository.remember_inputs(fresh)
                    fresh = []
            records[each.uri] = record
        if fresh:
            self.repository.remember_inputs(fresh)
        return records

    def _probe(self, info: ObjectInfo) -> InputRecord:
        if info.bytes > self.max_input_bytes:
            return _unusable(info, f"{info.bytes} bytes; at most {self.max_input_bytes} are read")
        data = self.store.read(info.uri, etag=info.etag, max_bytes=self.max_input_bytes)
        sha256 = sha256_hex(data)
        try:
            kind, width, height = self.probe(data)
        except StepError as error:
            return _unusable(info, str(error), sha256)
        return InputRecord(info.uri, info.etag, sha256, len(data), width, height, kind)


def base_of(uri: str) -> str:
    """URI of the folder that a recipe lies in, ending in `/`."""
    return uri.rpartition("/")[0] + "/"


def _unusable(info: ObjectInfo, problem: str, sha256: str = "") -> InputRecord:
    return InputRecord(info.uri, info.etag, sha256, info.bytes, 0, 0, "", problem)


def _found(record: InputRecord, stone: Tombstone | None) -> Found:
    if stone is not None:
        return FileProblem(record.uri, f"was taken down on {stone.at:%Y-%m-%d} by {stone.who}: {stone.reason}")
    if record.problem is not None:
        return FileProblem(record.uri, record.problem)
    return ImageInfo(record.uri, record.etag, record.sha256, record.bytes, record.width, record.height, record.format)
