"""From the bytes of a recipe and its imports to a `Recipe`, or to every problem in them at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kontext_batch.errors import AuthorError, ObjectNotFound, Problem, RecipeError
from kontext_batch.recipes import brand as brands
from kontext_batch.recipes.brand import Brand
from kontext_batch.recipes.check import build_scope
from kontext_batch.recipes.schema import BrandDocument, Budget, RecipeDocument, Schedule
from kontext_batch.recipes.scope import Scope
from kontext_batch.recipes.source import Path, Source, read_yaml
from kontext_batch.recipes.validate import validate


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """A recipe without faults of its own; what its tables and files hold is seen when it is planned."""

    document: RecipeDocument
    brand: Brand
    scope: Scope
    """Names, axes and the graph of the steps."""
    source: Source
    sha256: str
    """Over the recipe file and its imports: the recipe's revision."""

    @property
    def name(self) -> str:
        return self.document.name

    @property
    def owner(self) -> str:
        return self.document.owner

    @property
    def file(self) -> str:
        """As the author named it; begins every problem."""
        return self.source.file

    @property
    def schedule(self) -> Schedule | None:
        return self.document.schedule

    @property
    def budget(self) -> Budget:
        return self.document.budget or Budget()

    def problem(self, path: Path, message: str) -> Problem:
        """A `Problem` at that place of the recipe file."""
        return self.source.problem(path, message)


def load_recipe(text: bytes | str, *, file: str, read_import: Callable[[str], bytes]) -> Recipe:
    """Read, check and understand a recipe.

    `file` is how problems name it. `read_import` gives the bytes of a brand file by the name that the recipe uses
    (relative to the recipe, as the author wrote it); its `ObjectNotFound`, `AuthorError` and `OSError` become
    problems at that import. Raises `RecipeError` with every problem of the recipe and its imports.
    """
    source, problems = read_yaml(text, file=file)
    if not source.data:
        raise RecipeError(problems or [Problem(file, 0, 0, "", "the recipe is empty")])
    document, found, pruned = validate(RecipeDocument, source)
    problems += found
    imports = source.data.get("import") if document is None else list(document.import_)
    unread = any(path[:1] == ("import",) for path in pruned)
    brand, found, texts = _read_brands(imports if isinstance(imports, list) else [], source, read_import, unread)
    problems += found
    if document is None:
        raise RecipeError(problems)
    scope, found = build_scope(document, brand, source, pruned=pruned)
    problems += found
    if problems:
        raise RecipeError(problems)
    return Recipe(document, brand, scope, source, _revision(text, texts))


def _read_brands(
    names: list[Any], source: Source, read_import: Callable[[str], bytes], opaque: bool
) -> tuple[Brand, list[Problem], Mapping[str, bytes]]:
    problems: list[Problem] = []
    documents: list[tuple[Source, BrandDocument]] = []
    texts: dict[str, bytes] = {}
    for index, name in enumerate(names):
        path: Path = ("import", index)
        if not isinstance(name, str):
            continue
        if name in texts:
            problems.append(source.problem(path, f"'{name}' is imported twice"))
            continue
        try:
            texts[name] = read_import(name)
        except (ObjectNotFound, AuthorError, OSError) as error:
            what = (
                "is not there" if isinstance(error, (ObjectNotFound, FileNotFoundError)) else f"not readable: {error}"
            )
            problems.append(source.problem(path, f"'{name}' {what}"))
            opaque = True
            continue
        imported, found = read_yaml(texts[name], file=name)
        if imported.data:
            document, more, _ = validate(BrandDocument, imported)
            found += more
            if document is not None:
                documents.append((imported, document))
        problems += found
        opaque = opaque or bool(found)
    brand, found = brands.merge(documents, opaque=opaque)
    return brand, [*problems, *found], texts


def _revision(text: bytes | str, imports: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, data in [("", text.encode() if isinstance(text, str) else text), *sorted(imports.items())]:
        # Lengths first, so that no two sets of files run together into the same bytes.
        digest.update(f"{len(name.encode())}:{len(data)}:{name}".encode() + data)
    return digest.hexdigest()
