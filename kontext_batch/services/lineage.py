"""Where pictures come from, and what was made from what: what is meant by a question, and its answer as a value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kontext_batch.errors import ObjectNotFound
from kontext_batch.ports import Repository
from kontext_batch.ports.tracing import MadePage, MadeStep, Place, StepRead, Subject, SubjectKind, TracedStep, Weights
from kontext_batch.services.questions import found_steps, number

SHORTEST_PREFIX = 4
"""Of a hash: shorter ones mean many."""
HEX = re.compile(r"[0-9a-f]+")
LONGEST_PLACE = 10_000
NAMED = ("model", "adapter", "recipe")
"""`model:NAME`: what such a question begins with."""
PAGE = 1000
"""Steps that are read at once."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """Pictures with everything that they come from."""

    subject: Subject
    steps: tuple[TracedStep, ...]
    """Those asked about first, each step once; what a step reads stands somewhere after it."""

    @property
    def by_id(self) -> dict[int, TracedStep]:
        return {each.step.id: each for each in self.steps}

    @property
    def pictures(self) -> tuple[TracedStep, ...]:
        """Those that were asked about."""
        return tuple(each for each in self.steps if each.step.id in self.subject.step_ids)

    @property
    def photos(self) -> tuple[StepRead, ...]:
        """What was not made here, each once."""
        reads = (read for each in self.steps for read in each.reads if read.step_id is None)
        return tuple({(read.uri, read.sha256): read for read in reads}.values())


@dataclass(frozen=True, slots=True)
class Impact:
    """What was made from something, or a part of it."""

    subject: Subject
    direct: int
    """Steps that read the photo, were computed with the weights, or were wanted by runs of the recipe."""
    steps: tuple[MadeStep, ...]
    after: Place | None
    """From where more is told; None when this is the end."""


# --------------------------------------------------------------------------------------------------- what is meant


def meant(repository: Repository, text: str, *, uri: str | None = None) -> Subject:
    """What `text` means: a number, hash, place or name. `uri`: the place, where `text` is a path.

    Raises `ObjectNotFound`, which says what was looked for.
    """
    kind, colon, name = text.partition(":")
    if colon and kind in NAMED:
        return _named(repository, kind, name.strip())
    step_id = number(text)
    if step_id is not None and repository.steps_by_id([step_id]):
        return Subject(SubjectKind.STEP, f"step {step_id}", step_ids=(step_id,))
    lowered = text.lower()
    if HEX.fullmatch(lowered) and SHORTEST_PREFIX <= len(lowered) <= 64:
        found = by_hash(repository, lowered)
        if found is not None:
            return found
    if ("/" in text or "." in text) and len(text) <= LONGEST_PLACE:
        there = repository.known_by_place(uri or text)
        if there:
            return there[0]
    try:
        steps = found_steps(repository, text)
    except ObjectNotFound as error:
        raise ObjectNotFound(
            f"nothing is known as '{text[:80]}': looked for the number, key or name of a step; for the sha256 of a "
            f"picture, delivered file, photo, weights or recipe, {SHORTEST_PREFIX} digits or more of it; and for the "
            "path or URI of a delivered file or a photo. Else ask for model:NAME, adapter:NAME or recipe:SHA256"
        ) from error
    return Subject(SubjectKind.STEP, text, step_ids=tuple(step.id for step in steps))


def by_hash(repository: Repository, digits: str) -> Subject | None:
    """What has this sha256, or the only one that begins so. Raises `ObjectNotFound` when several do."""
    found = repository.known_by_hash(digits)
    if len({each.sha256s for each in found}) > 1:
        raise ObjectNotFound(_ambiguous(digits, [each.name for each in found]))
    return found[0] if found else None


def _named(repository: Repository, kind: str, name: str) -> Subject:
    """Raises `ObjectNotFound`."""
    if kind == "recipe":
        found = [each for each in _hashed(repository, name) if each.kind is SubjectKind.RECIPE]
        if not found:
            raise ObjectNotFound(
                f"no run is of a recipe revision {name[:80]!r}: give the first {SHORTEST_PREFIX} digits or more of its "
                "sha256, as `runs show` and `lineage` tell it"
            )
        if len(found) > 1:
            raise ObjectNotFound(_ambiguous(name, [each.name for each in found]))
        return found[0]
    used = [each for each in repository.weights() if each.kind == kind]
    meant_here = [each for each in used if name in each.names] or [
        each for each in used if len(name) >= SHORTEST_PREFIX and each.sha256.startswith(name.lower())
    ]
    if not meant_here:
        raise ObjectNotFound(f"no step was computed with {_a(kind)} {name[:80]!r}{_others(used)}")
    label = f"{kind} {name}: " + ", ".join(f"sha256 {each.sha256}" for each in meant_here)
    return Subject(SubjectKind.WEIGHTS, label, tuple(each.sha256 for each in meant_here))


def _hashed(repository: Repository, digits: str) -> Sequence[Subject]:
    digits = digits.lower()
    fits = HEX.fullmatch(digits) and SHORTEST_PREFIX <= len(digits) <= 64
    return repository.known_by_hash(digits) if fits else ()


def _a(kind: str) -> str:
    return f"an {kind}" if kind == "adapter" else f"a {kind}"


def _others(used: Sequence[Weights]) -> str:
    names = sorted({name for each in used for name in each.names})
    return f"; used were: {', '.join(names[:10])}" if names else ""


def _ambiguous(digits: str, names: Sequence[str]) -> str:
    return f"'{digits}' is the beginning of several hashes; give more digits:\n" + "\n".join(
        f"  {name}" for name in names
    )


# ------------------------------------------------------------------------------------------------------ the answers


def above(repository: Repository, subject: Subject) -> Lineage:
    """Where the pictures of these steps come from. Raises `ObjectNotFound` for what comes from nothing."""
    if subject.kind is not SubjectKind.STEP:
        raise ObjectNotFound(f"{subject.name}: nothing is above it; what was made from it is told by --down")
    links = repository.above(subject.step_ids)
    order = dict.fromkeys([*subject.step_ids, *(child for child, _ in links), *(parent for _, parent in links)])
    rows = {each.step.id: each for each in repository.traced(order)}
    return Lineage(subject, tuple(rows[step_id] for step_id in order))


def below(repository: Repository, subject: Subject, *, after: Place | None = None, limit: int = 0) -> Impact:
    """What was made from it: at most `limit` steps, 0 for all."""
    steps: list[MadeStep] = []
    end = after
    for page in _pages(repository, subject, after, limit):
        steps += page.steps
        end = page.after
    return Impact(subject, repository.made_directly(subject), tuple(steps), end)


def _pages(repository: Repository, subject: Subject, after: Place | None, limit: int) -> Iterator[MadePage]:
    told = 0
    while True:
        page = repository.made_from(subject, after=after, limit=min(PAGE, limit - told) if limit else PAGE)
        yield page
        told += len(page.steps)
        after = page.after
        if after is None or (limit and told >= limit):
            return
