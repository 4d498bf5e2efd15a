"""A step computed again from what is stored, and compared with what was stored.

A model rounds by what it samples beside a picture, unless in batch-invariant mode. So a step that was sampled with
others is sampled with them again: each joins at the denoise step at which it joined then, in the same order, until the
step asked for has left. Nothing is written here, and nothing of what is found out about the store is told to the
database.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kontext_batch.errors import InfrastructureError, NotAllowed, ObjectNotFound, PlanRefused, StepError
from kontext_batch.hashing import sha256_hex
from kontext_batch.planning.marking import xmp_packet
from kontext_batch.planning.params import SAMPLING
from kontext_batch.planning.plan import OPERATIONS_LANE
from kontext_batch.ports import (
    BatchMemberRow,
    EditJob,
    Editor,
    EditSession,
    Judge,
    LoadedPicture,
    MadePicture,
    ObjectStore,
    Operations,
    PictureDifference,
    Prepared,
    Repository,
    SampledPicture,
    SourceInput,
    StoredOutput,
    StoredParent,
    StoredStep,
)
from kontext_batch.services.recorded import Recorded, Weights, differences, gaps, has_its_key, missing_weights, recorded


@dataclass(frozen=True, slots=True)
class Replay:
    """How a step that was computed again compares with what was stored."""

    step_id: int
    operation: str
    equal: bool
    """Pixels and latents are bit for bit those of then; of a picture operation, the bytes of the file."""
    batch_id: int | None
    """In which it was computed then; None where that is not recorded."""
    batch_invariant: bool
    beside: tuple[int, ...]
    """Ids of the steps that were sampled beside it now; none: it was computed alone."""
    picture: PictureDifference | None
    """None where the file is the very one that was committed, or where that is gone."""
    latents: float | None
    """The largest difference; None where there are none, or none to compare with."""
    sha256: str
    """Of the file that was made now."""
    stored_sha256: str
    """Of the one that was committed then."""
    changes: tuple[str, ...]
    """What is not as it was then."""
    notes: tuple[str, ...]
    """What else bears on the comparison."""
    made: MadePicture = field(repr=False)


@dataclass(slots=True)
class Replayer:
    """Computes steps again."""

    repository: Repository
    store: ObjectStore
    operations: Operations
    judge: Judge
    editor: Callable[[int, bool], Editor]
    """(rows at once, whether batch-invariant) -> an editor."""
    weights: Mapping[tuple[str, str], Weights]
    """("model" or "adapter", name) -> what is registered here."""
    admit: Callable[[Iterable[str]], None]
    """Let the store read around these recipes."""
    stand_in: bytes
    """A picture that takes the place of one that is gone, of a step that was only beside."""
    max_input_bytes: int
    tell: Callable[[str], None] = lambda text: None
    """Told of each change and note when it is found: before anything is sampled."""

    def replay(self, step_id: int, *, alone: bool = False) -> Replay:
        """Compute a step again and compare. `alone`: without those that were beside it.

        Raises `PlanRefused` with all that stands against it, `StepError` when it fails now.
        """
        step = self._stored(step_id)
        record = recorded(self.repository, step)
        told: list[str] = []
        job, reasons = self._job(step, told)
        if step.operation in SAMPLING:
            reasons += missing_weights(step.params, self.weights)
        if reasons:
            raise PlanRefused(reasons)
        told += [] if has_its_key(step) else ["its parameters in the database are not those that its key was made of"]
        changes: list[str] = []
        beside: tuple[int, ...] = ()
        if step.lane == OPERATIONS_LANE:
            if record.batch is not None:
                changes += differences(record.batch, step.params, self.operations.describe())
            self._say([*told, *changes])
            made = _as_then(step, lambda xmp: self.operations.run(step.operation, job.params, job.pictures, xmp=xmp))
        else:
            together = not alone and not record.invariant
            members = record.members if together else ()
            told += gaps(record) if together else []
            queue = self._queue(step, job, members, told)
            self._say(told)
            beside = tuple(each for each, _, _ in queue if each != step.id)
            made = self._sampled(step, queue, record, changes)
        return self._compared(step, record, made, beside, changes, told)

    def _stored(self, step_id: int) -> StoredStep:
        step = self.repository.stored_steps([step_id])[step_id]
        if "image" not in step.outputs:
            state = f"is {step.state}" if step.state != "done" else "has no picture"
            raise PlanRefused([f"step {step_id} {state}: nothing is stored that it could be compared with"])
        self.admit(step.recipes)
        return step

    # ----------------------------------------------------------------------------------------------------------- read

    def _job(self, step: StoredStep, told: list[str]) -> tuple[EditJob, list[str]]:
        """What it was computed from, and why that cannot be had."""
        pictures, reasons = [], []
        by_latents = step.params.get("handoff") == "latents"
        for source in step.sources:
            try:
                pictures.append(LoadedPicture(source.role, source.position, self._photo(source)))
            except _Gone as gone:
                reasons.append(str(gone))
        for parent in step.parents:
            try:
                pictures.append(self._parent(parent, told, latents=by_latents and parent.role == "image"))
            except _Gone as gone:
                reasons.append(str(gone))
        return EditJob(step.params, tuple(pictures)), reasons

    def _photo(self, source: SourceInput) -> bytes:
        if (stone := self.repository.forgotten([source.sha256]).get(source.sha256)) is not None:
            raise _Gone(f"{source.uri}: the photo was taken down on {stone.at:%Y-%m-%d}: {stone.reason}")
        try:
            data = self.store.read(source.uri, max_bytes=self.max_input_bytes)
        except ObjectNotFound as error:
            raise _Gone(f"{source.uri}: the photo is gone; put the one with sha256 {source.sha256} back") from error
        except (NotAllowed, StepError) as error:
            raise _Gone(f"{source.uri}: the photo cannot be read: {error}") from error
        if (now := sha256_hex(data)) != source.sha256:
            raise _Gone(
                f"{source.uri}: the photo is another one than then (sha256 {now[:12]} now, {source.sha256[:12]} then); "
                "put the old file back, then reproduce again"
            )
        return data

    def _parent(self, parent: StoredParent, told: list[str], *, latents: bool) -> LoadedPicture:
        wanted = ("image", "latents") if latents else ("image",)
        found: dict[str, bytes] = {}
        for slot in wanted:
            output = parent.outputs.get(slot)
            if output is None:
                raise _Gone(
                    f"step {parent.step_id}, whose picture it reads, is {parent.state}: run the recipe, then reproduce "
                    "again"
                )
            if output.collected is not None:
                found = self._made_again(parent, output, told)
                break
            found[slot] = self._artifact(output)
        return LoadedPicture(parent.role, parent.position, found["image"], found["latents"] if latents else None)

    def _made_again(self, parent: StoredParent, output: StoredOutput, told: list[str]) -> dict[str, bytes]:
        """The files of a parent whose bytes were collected: they are what its own replay makes, or nothing is."""
        gone = f"{output.artifact.uri}, of step {parent.step_id}, was collected on {output.collected:%Y-%m-%d}"
        try:
            again = self.replay(parent.step_id)
        except PlanRefused as error:
            raise _Gone(f"{gone}, and cannot be made again: {'; '.join(error.reasons)}") from error
        made = {"image": again.made.data, **({"latents": again.made.latents} if again.made.latents else {})}
        if any(sha256_hex(made.get(slot, b"")) != each.artifact.sha256 for slot, each in parent.outputs.items()):
            raise _Gone(f"{gone}, and is another file when it is made again: what was read then is not to be had")
        told.append(f"{gone}, and was made again, bit for bit")
        return made

    def _artifact(self, output: StoredOutput) -> bytes:
        artifact = output.artifact
        try:
            data = self.store.read(artifact.uri)
        except ObjectNotFound as error:
            raise _Gone(f"{artifact.uri}: the stored file is gone; `kontext-batch verify` says what else is") from error
        except (NotAllowed, StepError) as error:
            raise _Gone(f"{artifact.uri}: the stored file cannot be read: {error}") from error
        if sha256_hex(data) != artifact.sha256:
            raise _Gone(f"{artifact.uri}: the stored file is damaged; `kontext-batch verify --repair` lets it be made")
        return data

    def _queue(
        self, step: StoredStep, job: EditJob, members: Sequence[BatchMemberRow], told: list[str]
    ) -> list[tuple[int, int, EditJob]]:
        """(step id, denoise step at which it joins, what it reads) of all that are sampled, in order."""
        if len(members) < 2:
            return [(step.id, 0, job)]
        others = self.repository.stored_steps(each.step_id for each in members)
        self.admit({uri for each in others.values() for uri in each.recipes})
        queue = []
        for member in members:
            other = job if member.step_id == step.id else self._beside(others[member.step_id], told)
            queue.append((member.step_id, member.joined, other))
        return queue

    def _beside(self, step: StoredStep, told: list[str]) -> EditJob:
        """Of a picture that was only beside it counts how large it is, not what it shows."""
        by_latents = step.params.get("handoff") == "latents"
        pictures = []
        read: tuple[SourceInput | StoredParent, ...] = (*step.sources, *step.parents)
        for each in read:
            try:
                if isinstance(each, SourceInput):
                    pictures.append(LoadedPicture(each.role, each.position, self._photo(each)))
                    continue
                if any(output.collected is not None for output in each.outputs.values()):
                    raise _Gone(f"the picture of step {each.step_id} was collected")
                pictures.append(self._parent(each, told, latents=by_latents and each.role == "image"))
            except _Gone as gone:
                told.append(f"step {step.id}, which was beside it, is given a grey picture: {gone}")
                pictures.append(LoadedPicture(each.role, each.position, self.stand_in))
        return EditJob(step.params, tuple(pictures))

    # --------------------------------------------------------------------------------------------------------- sample

    def _sampled(
        self, step: StoredStep, queue: Sequence[tuple[int, int, EditJob]], record: Recorded, changes: list[str]
    ) -> MadePicture:
        rows = record.rows if len(queue) > 1 else 1
        editor = self.editor(rows, record.invariant)
        prepared = [(each, joined, editor.prepare(job)) for each, joined, job in queue]
        with editor.session(step.params) as session:
            if record.batch is not None:
                changes += differences(record.batch, step.params, editor.describe())
                self._say(changes)
            sampled = sample_together(session, prepared, step.id)
        return _as_then(step, lambda xmp: sampled.encode(xmp=xmp))

    # -------------------------------------------------------------------------------------------------------- compare

    def _compared(
        self,
        step: StoredStep,
        record: Recorded,
        made: MadePicture,
        beside: tuple[int, ...],
        changes: Sequence[str],
        told: list[str],
    ) -> Replay:
        known = len(told)
        image = step.outputs["image"]
        sha256 = sha256_hex(made.data)
        picture, same_picture = None, sha256 == image.artifact.sha256
        stored = self._kept(image, told, committed=same_picture)
        if stored is not None and sha256_hex(stored) != sha256:
            try:
                picture = self.judge.pictures(stored, made.data)
                same_picture = picture.equal and step.operation in SAMPLING
            except StepError as error:
                told.append(f"{image.artifact.uri}: the stored picture does not decode: {error}")
                same_picture = False
        latents, same_latents = None, True
        if made.latents is not None and (output := step.outputs.get("latents")) is not None:
            same_latents = sha256_hex(made.latents) == output.artifact.sha256
            kept = self._kept(output, told, committed=same_latents)
            if same_latents and (kept is None or kept == made.latents):
                latents = 0.0
            elif kept is not None:
                try:
                    latents = self.judge.latents(kept, made.latents)
                    same_latents = latents == 0.0
                except StepError as error:
                    told.append(f"{output.artifact.uri}: {error}")
                    same_latents = False
        self._say(told[known:])
        return Replay(
            step_id=step.id,
            operation=step.operation,
            equal=same_picture and same_latents,
            batch_id=None if record.batch is None else record.batch.id,
            batch_invariant=record.invariant,
            beside=beside,
            picture=picture,
            latents=latents,
            sha256=sha256,
            stored_sha256=image.artifact.sha256,
            changes=tuple(changes),
            notes=tuple(told),
            made=made,
        )

    def _kept(self, output: StoredOutput, told: list[str], *, committed: bool) -> bytes | None:
        """What is in the store now; `committed`: whether the replay is what was committed then."""
        uri = output.artifact.uri
        if output.collected is not None:
            how = "" if committed else ": how far they are apart cannot be told"
            told.append(f"{uri} was collected on {output.collected:%Y-%m-%d}; its sha256 alone is compared{how}")
            return None
        replayed = "; the replay is what was committed" if committed else ""
        try:
            data = self.store.read(uri)
        except ObjectNotFound:
            told.append(f"{uri}: the stored file is gone{replayed}")
            return None
        except (NotAllowed, StepError) as error:
            told.append(f"{uri}: the stored file cannot be read: {error}{replayed}")
            return None
        if sha256_hex(data) != output.artifact.sha256:
            told.append(f"{uri}: the stored file is damaged, its sha256 is not the one that was committed{replayed}")
        return data

    def _say(self, texts: Iterable[str]) -> None:
        for each in texts:
            self.tell(each)


class _Gone(Exception):
    """What a step read cannot be had any more."""


def _as_then(step: StoredStep, make: Callable[[bytes | None], MadePicture]) -> MadePicture:
    """The file with the mark that workers write, or without, if that gives the bytes of then (setting `mark`)."""
    wanted = step.outputs["image"].artifact.sha256
    try:
        marked = make(xmp_packet(step.key, step.ancestry))
    except StepError:  # with its mark it may be larger than it may be; what else is wrong is so without it too
        return make(None)
    if sha256_hex(marked.data) == wanted:
        return marked
    plain = make(None)
    return plain if sha256_hex(plain.data) == wanted else marked


def sample_together(session: EditSession, queue: Sequence[tuple[int, int, Prepared]], wanted: int) -> SampledPicture:
    """Let each join at its denoise step, until the one wanted leaves. Raises what is wrong with that one's picture."""
    waiting, inside, clock = deque(queue), 0, 0
    while True:
        if not inside:
            clock = waiting[0][1]
        while waiting and waiting[0][1] <= clock:
            ticket, _, prepared = waiting.popleft()
            if not session.free:
                raise InfrastructureError(
                    f"the device has no room for the {inside + 1} pictures that were in at once; --alone computes the "
                    "step by itself"
                )
            try:
                session.admit(ticket, prepared)
            except StepError:
                if ticket == wanted:
                    raise
                continue
            inside += 1
        if not inside:  # those of this step are not in after all
            continue
        session.step()
        clock += 1
        for ticket, result in session.retire():
            inside -= 1
            if ticket == wanted:
                if isinstance(result, StepError):
                    raise result
                return result


def finished_from(repository: Repository, step_id: int) -> list[int]:
    """The step and, while it is a picture operation, the step whose picture it works on: up to what was sampled."""
    found = [step_id]
    while (step := repository.stored_steps([found[-1]])[found[-1]]).operation not in SAMPLING:
        above = [each.step_id for each in step.parents if each.role == "image"]
        if not above:
            break
        found.append(above[0])
    return found
