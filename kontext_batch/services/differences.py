"""What differs between two pictures: both chains are walked side by side, from the photos down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kontext_batch.hashing import canonical_json
from kontext_batch.planning.render import axes_text
from kontext_batch.ports.tracing import StepBatch, StepRead, TracedStep
from kontext_batch.services.lineage import Lineage

TOLD_APART = ("prompt", "negative_prompt", "seed", "model", "model_sha256", "adapters")
"""Parameters with a place of their own in the order."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same."""

    what: str
    """`prompt`, `source bytes`, `library torch`, ..."""
    where: str
    """The steps, or the role, that it belongs to."""
    one: str
    other: str
    matters: bool
    """It may change pixels; the wording of a recipe around a step does not."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two pictures differ, in the order in which they were made."""

    one: TracedStep
    other: TracedStep
    differences: tuple[Difference, ...]
    same_bytes: bool | None
    """None where one of them is not made yet."""


def compare(one: Lineage, other: Lineage) -> Comparison:
    """The first picture of each."""
    left, right = one.pictures[0], other.pictures[0]
    found = _Walk(one.by_id, other.by_id).step(left.step.id, right.step.id)
    pictures = left.step.artifact, right.step.artifact
    asked = one.subject.sha256s, other.subject.sha256s
    if all(asked) and left.step.id == right.step.id:
        same: bool | None = asked[0] == asked[1]
    elif pictures[0] is None or pictures[1] is None:
        same = None
    else:
        same = pictures[0].sha256 == pictures[1].sha256
    return Comparison(left, right, found, same)


@dataclass(frozen=True, slots=True)
class _Walk:
    one: Mapping[int, TracedStep]
    other: Mapping[int, TracedStep]
    _found: dict[tuple[int, int], tuple[Difference, ...]] = field(default_factory=dict)
    """Of pairs of steps: many ways may lead to one."""

    def step(self, left_id: int, right_id: int) -> tuple[Difference, ...]:
        """What two steps read first, then they themselves; each difference once."""
        pair = left_id, right_id
        if pair not in self._found:
            self._found[pair] = ()  # of a step that reads what comes from itself
            if left_id != right_id:
                self._found[pair] = tuple(dict.fromkeys(self._step(self.one[left_id], self.other[right_id])))
        return self._found[pair]

    def _step(self, left: TracedStep, right: TracedStep) -> Iterator[Difference]:
        reads = _by_role(left), _by_role(right)
        roles = dict.fromkeys([*reads[0], *reads[1]])
        above = {role: list(self._read(role, reads[0].get(role), reads[1].get(role))) for role in roles}
        for found in above.values():
            yield from found
        yield from _own(left, right)
        for role, found in above.items():
            if not found:  # else it is plain why
                yield from _parent_bytes(role, reads[0][role], reads[1][role])
        yield from _conditions(left, right)

    def _read(self, role: str, left: StepRead | None, right: StepRead | None) -> Iterator[Difference]:
        if left is None or right is None:
            yield Difference("what is read", role, _read_text(left), _read_text(right), True)
        elif left.step_id is not None and right.step_id is not None:
            yield from self.step(left.step_id, right.step_id)
        elif left.step_id is None and right.step_id is None:
            if left.sha256 != right.sha256:
                yield Difference("source bytes", role, _read_text(left), _read_text(right), True)
        else:
            yield Difference("what is read", role, _read_text(left), _read_text(right), True)


def _own(left: TracedStep, right: TracedStep) -> Iterator[Difference]:
    """Recipe, operation and parameters."""
    where = _where(left, right)

    def unless_equal(what: str, one: Any, other: Any, *, matters: bool = True) -> Iterator[Difference]:
        if one != other:
            yield Difference(what, where, _text(one), _text(other), matters)

    a, b, p, q = left.origin, right.origin, left.step.params, right.step.params
    yield from (
        unless_equal(
            "recipe revision",
            f"{a.recipe} {a.recipe_sha256[:12]} (run {a.run_id})",
            f"{b.recipe} {b.recipe_sha256[:12]} (run {b.run_id})",
            matters=False,
        )
        if a.recipe_sha256 != b.recipe_sha256
        else ()
    )
    yield from unless_equal("recipe line", f"{a.file}:{a.line}", f"{b.file}:{b.line}", matters=False)
    yield from unless_equal("operation", left.step.operation, right.step.operation)
    for name in ("prompt", "negative_prompt", "seed"):
        yield from unless_equal(name.replace("_", " "), p.get(name), q.get(name))
    if p.get("model_sha256") != q.get("model_sha256"):
        yield from unless_equal("model", _model(p), _model(q))
    if _weights(p) != _weights(q):
        yield from unless_equal("adapters", _adapters(p), _adapters(q))
    for name in sorted((p.keys() | q.keys()) - set(TOLD_APART)):
        yield from unless_equal(name.replace("_", " "), p.get(name), q.get(name))


def _parent_bytes(role: str, left: StepRead, right: StepRead) -> Iterator[Difference]:
    made = left.step_id is not None and right.step_id is not None
    if made and left.sha256 != right.sha256:
        yield Difference("parent image bytes", role, _read_text(left), _read_text(right), True)


def _conditions(left: TracedStep, right: TracedStep) -> Iterator[Difference]:
    """With whom, in which mode, where and with what it was computed."""
    if not left.batches or not right.batches:
        return
    where, a, b = _where(left, right), left.batches[-1], right.batches[-1]
    if a.numeric_mode != b.numeric_mode:
        yield Difference("numeric mode", where, a.numeric_mode, b.numeric_mode, True)
    if a.device != b.device:
        yield Difference("device", where, a.device, b.device, True)
    for name in sorted(a.libraries.keys() | b.libraries.keys()):
        versions = a.libraries.get(name, "none"), b.libraries.get(name, "none")
        if versions[0] != versions[1]:
            yield Difference(f"library {name}", where, *versions, True)
    if _company(a) != _company(b):
        yield Difference("batch", where, _batch_text(a), _batch_text(b), True)


def _company(batch: StepBatch) -> tuple[object, ...]:
    """How a batch looks from a row: how long it was in, and how many were in with it when."""
    mates = sorted(
        (max(0, mate.joined - batch.joined), min(mate.left, batch.left) - batch.joined) for mate in batch.mates
    )
    return batch.left - batch.joined, tuple(mates)


def _by_role(traced: TracedStep) -> dict[str, StepRead]:
    return {f"{read.role} {read.position}" if read.position else read.role: read for read in traced.reads}


def _where(left: TracedStep, right: TracedStep) -> str:
    names = [f"step {each.step.id} {each.step.node} {axes_text(each.step.axes)}".strip() for each in (left, right)]
    return " and ".join(dict.fromkeys(names))


def _read_text(read: StepRead | None) -> str:
    if read is None:
        return "nothing"
    what = f"step {read.step_id}" if read.step_id is not None else str(read.uri)
    return f"{what}, sha256 {read.sha256[:12]}" if read.sha256 else what


def _model(params: Mapping[str, Any]) -> str | None:
    return f"{params.get('model')} (sha256 {str(params['model_sha256'])[:12]})" if params.get("model_sha256") else None


def _weights(params: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return [(each["sha256"], each["scale"]) for each in params.get("adapters") or ()]


def _adapters(params: Mapping[str, Any]) -> str | None:
    told = [
        f"{each['name']} at {each['scale']:g} (sha256 {each['sha256'][:12]})" for each in params.get("adapters") or ()
    ]
    return ", ".join(told) or None


def _batch_text(batch: StepBatch) -> str:
    return f"batch {batch.id} with {len(batch.mates)} others, denoise steps {batch.joined + 1} to {batch.left}"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else canonical_json(value)
