"""Every error a caller may meet, by whose fault it is (DESIGN.md section 6).

KontextBatchError
├── AuthorError            the author's: told before anything runs                         exit 2
│   ├── RecipeError        a recipe, brand file or table, with file:line:column for each problem
│   ├── SettingsError      a setting, a model that is not registered, a bad workspace
│   ├── NotAllowed         a path outside the allowed prefixes
│   └── BadArchive         an archive that is damaged, was changed, or is of a newer version
├── PlanRefused            the plan may not run: budget, changed input, missing filter    exit 5
├── Held                   a legal hold stands against it                                 exit 5
├── StepError              the step's: this step fails, its dependents are skipped
├── InfrastructureError    nobody's: retried with backoff, never counted against the step
│   ├── StorageFull        no space left; the run stops and goes on when there is some
│   ├── StorageReadOnly    the place may not be written to
│   ├── OutOfMemory        the device has no room for a batch of this size; tried again by halves
│   └── LeaseLost          another worker holds the step now
├── ObjectNotFound         nothing lies at that URI
└── ObjectChanged          what lies at that URI is not what was planned
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class KontextBatchError(Exception):
    """Base of all errors that are told to a user in one sentence, without a traceback."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One fault of an author, at one place."""

    file: str
    """Path or URI of the recipe, brand file or table, as the author named it."""
    line: int
    """1-based; 0 when the fault belongs to the whole file."""
    column: int
    """1-based; 0 when the fault belongs to the whole line."""
    path: str
    """Where in the document: `steps.staged.prompt`; empty for the document itself."""
    message: str
    """What is wrong and what to do next, one sentence."""

    def __str__(self) -> str:
        place = self.file
        if self.line:
            place += f":{self.line}"
            if self.column:
                place += f":{self.column}"
        return f"{place} {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class AuthorError(KontextBatchError, ValueError):
    """The author's fault; nothing has run."""


class RecipeError(AuthorError):
    """All problems found in a recipe, its imports and its tables, in the order of the files.

    Those of one place stay as they were found: "and 3 more" comes after what it counts.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a RecipeError names at least one problem"
        distinct = dict.fromkeys(problems)
        self.problems = tuple(sorted(distinct, key=lambda each: (each.file, each.line, each.column, each.path)))
        super().__init__("\n".join(str(problem) for problem in self.problems))


class SettingsError(AuthorError):
    """A setting, the model registry or the workspace is not usable."""


class NotAllowed(AuthorError):
    """A recipe names a place outside the prefixes that it may read or write."""


class BadArchive(AuthorError):
    """An archive is not what it says it is; nothing was imported."""


class Held(KontextBatchError):
    """A legal hold stands against what would be removed."""


class PlanRefused(KontextBatchError):
    """The plan is sound but may not run; the reasons say which limit or change stands against it."""

    def __init__(self, reasons: Sequence[str]) -> None:
        assert reasons, "a refusal names at least one reason"
        self.reasons = tuple(reasons)
        super().__init__("\n".join(reasons))


class StepError(KontextBatchError):
    """The step cannot succeed with these inputs: it fails at once and is not retried by the machinery."""


class InfrastructureError(KontextBatchError):
    """A store, database or device did not do its part; the step is tried again."""


class StorageFull(InfrastructureError):
    """No space is left where the URI points to."""


class StorageReadOnly(InfrastructureError):
    """The place that the URI points to may not be written to."""


class OutOfMemory(InfrastructureError):
    """The device has no room for this batch; smaller ones may fit."""


class LeaseLost(InfrastructureError):
    """The step's lease token has moved on: another worker holds it."""


class ObjectNotFound(KontextBatchError):
    """Nothing lies at that URI."""


class ObjectChanged(KontextBatchError):
    """The object at that URI is not the one that was planned (ETag or sha256 differs)."""
