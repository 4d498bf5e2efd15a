"""What is dropped into an inbox, and the names of the answers beside it. Pure.

claimed ──▶ accepted ──▶ finished | cancelled      a run came of it; accepted again while that run is open again
   │ ▲
   │ └── seen                                      a file of a folder, until two looks find it the same
   └──▶ refused | ignored | repeated | gone        no run; `error` says why
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from kontext_batch.errors import Problem
from kontext_batch.recipes.loader import Recipe

RECIPES = (".yaml", ".yml")
BUNDLE = ".zip"
CANCEL = ".cancel"
STATUS, PLAN, ERRORS, REPORT = ".status.json", ".plan.txt", ".errors.txt", ".report.html"
"""Endings of the answers; none of them is one of a drop."""
REPORT_FOLDER = ".report/"
"""Ending of the folder with all pictures of the run."""


class DropState(StrEnum):
    """Where a dropped file stands; the value is what the database holds."""

    SEEN = "seen"
    """It may still be being written: a folder shows a file before it is whole."""
    CLAIMED = "claimed"
    """Somebody reads and plans it until `claimed_until`, under `token`."""
    ACCEPTED = "accepted"
    """It has a run; `claimed_until` is when its answers are looked at next."""
    FINISHED = "finished"
    """Its run has ended and the last answers are written."""
    CANCELLED = "cancelled"
    """As finished, of a run that was cancelled."""
    REFUSED = "refused"
    IGNORED = "ignored"
    """No recipe, but something that recipes import."""
    REPEATED = "repeated"
    """The bytes are those that this name has had before."""
    GONE = "gone"
    """It was taken away or replaced before it was read."""


ENDED = (DropState.FINISHED, DropState.CANCELLED)
SPEAKING = (DropState.CLAIMED, DropState.ACCEPTED, *ENDED, DropState.REFUSED)
"""States of drops that the answers beside them can be about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDrop:
    """A file that was found in an inbox."""

    uri: str
    etag: str
    modified: datetime
    """By the clock of its store."""
    owner: str
    """Whose inbox it is."""
    settle_seconds: float = 0.0
    """It is acted on when it is found the same after so long; 0: its store shows no half file."""

    @property
    def stem(self) -> str:
        """Its URI without the ending: that of its answers. Of drops with one stem the newest is answered."""
        return stem_of(self.uri)


@dataclass(frozen=True, slots=True)
class ClaimedDrop:
    """A drop that this process acts on; what comes of it is fenced by `token`."""

    id: int
    token: int
    uri: str
    etag: str
    tries: int
    """How often somebody began to act on it, this time included."""

    @property
    def stem(self) -> str:
        return stem_of(self.uri)


@dataclass(frozen=True, slots=True)
class AnsweredDrop:
    """An accepted drop whose answers this process looks at, under `token`."""

    id: int
    token: int
    uri: str
    stem: str
    run_id: int
    answer: str | None
    """Hash of the status that was written last."""
    newest: bool
    """Whether the answers beside it are about this one."""


@dataclass(frozen=True, slots=True)
class DropRow:
    """What became of a drop."""

    id: int
    uri: str
    etag: str
    owner: str
    state: DropState
    run_id: int | None
    error: str | None
    """Why there is no run."""
    tries: int
    created: datetime
    answered: datetime | None
    """When its answers were written last."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """A file `x.cancel`: runs of `x` that were dropped before it are cancelled, once."""

    uri: str
    mark: str
    """Of this file: another one of the same name cancels again."""
    modified: datetime
    owner: str
    """Whose inbox it is."""

    @property
    def stem(self) -> str:
        return stem_of(self.uri)


@dataclass(frozen=True, slots=True)
class Place:
    """An inbox of the settings, and what the recipes that come by it may do."""

    prefix: str
    """URI of a folder, ending in `/`."""
    owner: str
    budget: Mapping[str, float]
    """Limit by the names of a recipe's budget; each must be given by a recipe, and not exceeded."""
    readable: tuple[str, ...]
    """URI prefixes, the inbox itself among them."""
    writable: tuple[str, ...]

    def holds(self, uri: str) -> bool:
        """Whether that may be a drop of this inbox: hidden files and folders are none."""
        inside = uri.removeprefix(self.prefix)
        return inside != uri and not any(part.startswith(".") for part in inside.split("/"))

    def problems(self, recipe: Recipe) -> list[Problem]:
        """What this inbox asks of a recipe beyond being right."""
        return list(self._problems(recipe))

    def _problems(self, recipe: Recipe) -> Iterator[Problem]:
        if not recipe.owner:
            yield recipe.problem(("owner",), f"an owner is required here: write `owner: {self.owner}`")
        elif recipe.owner != self.owner:
            yield recipe.problem(("owner",), f"'{recipe.owner}' is not the owner of this inbox ('{self.owner}')")
        given = recipe.budget.model_dump(exclude_none=True)
        for name, limit in self.budget.items():
            if name not in given:
                told = f"a budget is required here: write `budget: {{{name}: N}}`, N up to {limit:g}"
                yield recipe.problem(("budget",), told)
            elif given[name] > limit:
                yield recipe.problem(("budget", name), f"{given[name]:g}; recipes of this inbox have at most {limit:g}")


def place_of(uri: str, places: tuple[Place, ...]) -> Place | None:
    return next((place for place in places if place.holds(uri)), None)


def is_drop(uri: str) -> bool:
    """Whether a file of that name is a recipe or a bundle, whatever it holds. No answer has such a name."""
    return uri.lower().endswith((*RECIPES, BUNDLE))


def is_bundle(uri: str) -> bool:
    return uri.lower().endswith(BUNDLE)


def is_cancel(uri: str) -> bool:
    return uri.lower().endswith(CANCEL)


def stem_of(uri: str) -> str:
    """`s3://b/in/x.yaml` -> `s3://b/in/x`."""
    return uri[: uri.rindex(".")]
