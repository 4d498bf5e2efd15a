"""What the record says of how a step was computed, and what of it is not so any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kontext_batch.planning.params import SAMPLING, step_key
from kontext_batch.planning.plan import ImageInfo, StepInput
from kontext_batch.ports import BatchMemberRow, BatchRecord, BatchRow, Repository, StoredStep

INVARIANT = "+batch-invariant"
"""End of the numeric mode of a batch whose pictures do not depend on one another."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A model or adapter as it is registered here."""

    sha256: str
    path: str
    unchanged: bool
    """Whether its files are those that were registered."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """How the batch had a step."""

    batch: BatchRow | None
    members: tuple[BatchMemberRow, ...] = ()
    """Those that were in while it was, itself among them, in the order in which they joined."""
    unknown: int = 0
    """How many others joined among them or right before, of which nothing else is known."""

    @property
    def invariant(self) -> bool:
        return self.batch is not None and self.batch.numeric_mode.endswith(INVARIANT)

    @property
    def rows(self) -> int:
        """Most that were in at once."""
        return max((sum(m.joined <= each.joined < m.left for m in self.members) for each in self.members), default=1)


def recorded(repository: Repository, step: StoredStep) -> Recorded:
    """The batch in which a step was done, as far as it was in."""
    done = [each for each in repository.attempts(step.id) if each.outcome == "ok"]
    if not done or done[-1].batch_id is None:
        return Recorded(None)
    batch = repository.batch(done[-1].batch_id)
    mine = next((each for each in batch.members if each.step_id == step.id), None)
    if mine is None or step.operation not in SAMPLING:
        return Recorded(batch)
    beside = [each for each in batch.members if each.joined < mine.left and mine.joined < each.left]
    beside.sort(key=lambda each: (each.joined, each.place is None, each.place or 0, each.step_id))
    known = {each.place for each in batch.members}
    places = [each.place for each in beside if each.place is not None] or [0]
    first = min(places)
    while first > 0 and first - 1 not in known:
        first -= 1
    return Recorded(batch, tuple(beside), sum(place not in known for place in range(first, max(places))))


def missing_weights(params: Mapping[str, Any], registered: Mapping[tuple[str, str], Weights]) -> list[str]:
    """Why the model and adapters of these params are not to be had, each with what to do."""
    wanted = [("model", str(params["model"]), str(params["model_sha256"]))]
    wanted += [("adapter", str(each["name"]), str(each["sha256"])) for each in params["adapters"]]
    reasons = []
    for kind, name, sha256 in wanted:
        found = registered.get((kind, name))
        add = f"`kontext-batch {kind}s add {name} PATH`, with the files of then"
        if found is None:
            reasons.append(f"{kind} '{name}' (sha256 {sha256[:12]}) is not registered here; {add}")
        elif found.sha256 != sha256:
            reasons.append(
                f"{kind} '{name}' is registered here with other weights (sha256 {found.sha256[:12]}, {sha256[:12]} "
                f"then); {add}"
            )
        elif not found.unchanged:
            reasons.append(f"the files of {kind} '{name}' in {found.path} are not those that were registered; {add}")
    return reasons


def differences(batch: BatchRow | BatchRecord, params: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """What is not as it was when the batch was computed. `about`: what the editor says of itself now."""
    device, now = str(about["device"]), {name: str(version) for name, version in about["libraries"].items()}
    found = [] if _same_device(batch.device, device) else [f"device: {batch.device} then, {device} now"]
    found += [
        f"{name}: {version} then, {now.get(name, 'not there')} now"
        for name, version in sorted(batch.libraries.items())
        if version != now.get(name)
    ]
    if "numeric_mode" not in params:  # of a picture operation
        return found
    mode = batch.numeric_mode.removesuffix(INVARIANT)
    if mode != params.get("numeric_mode"):
        found.append(f"numeric mode: {mode} then, {params.get('numeric_mode')} now")
    if batch.model_sha256 != params.get("model_sha256"):
        found.append(f"model: sha256 {batch.model_sha256} then, {params.get('model_sha256')} now")
    return found


def _same_device(then: str, now: str) -> bool:
    """`cuda:0 NVIDIA H100` and `cuda:1 NVIDIA H100` are; without names, which were not always recorded, by the kind."""
    (then_at, _, then_name), (now_at, _, now_name) = then.partition(" "), now.partition(" ")
    if then_name and now_name:
        return then_name == now_name
    return then_at.partition(":")[0] == now_at.partition(":")[0]


def gaps(record: Recorded) -> list[str]:
    """What the record of a batch does not say."""
    if record.batch is None:
        return ["the batch in which it was computed was not recorded: it is computed alone"]
    found = []
    if len(record.members) > 1 and any(each.place is None for each in record.members):
        found.append("who came before whom at the same denoise step was not recorded: the older step is taken first")
    if record.unknown:
        found.append(
            f"{record.unknown} more joined the batch and left no result (given back, lost or refused): if they were "
            "in with it, they are missing now"
        )
    return found


def has_its_key(step: StoredStep) -> bool:
    """Whether the database still has the parameters and inputs that the step's key was made of."""
    sources = [
        StepInput(each.role, each.position, ImageInfo(each.uri, "", each.sha256, 0, 0, 0, ""), None)
        for each in step.sources
    ]
    parents = [StepInput(each.role, each.position, None, each.key) for each in step.parents]
    inputs = sorted([*sources, *parents], key=lambda each: (each.role, each.position))
    return step_key(step.operation, step.params, inputs) == step.key
