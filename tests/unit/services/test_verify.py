"""A pass of `verify`: what is found, that it goes on where it stopped, how fast it reads; on a real database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from kontext_batch.errors import InfrastructureError, NotAllowed, ObjectNotFound, StepError
from kontext_batch.hashing import sha256_hex
from kontext_batch.lineage.migrate import upgrade
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.ports import Act, Artifact, StepDone, StepOutput
from kontext_batch.services import verify
from kontext_batch.services.verify import Pace, Verifier, begin, finish, repair
from tests.contract.plans import claim, make_plan, submit, worker

BY = Act("ann", "cli", "verify")


@dataclass
class Store:
    """Bytes by URI; remembers what was read."""

    objects: dict[str, bytes] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    on_read: Callable[[str], None] = lambda uri: None

    def read(self, uri: str, *, max_bytes: int | None = None) -> bytes:
        self.seen.append(uri)
        self.on_read(uri)
        if uri not in self.objects:
            raise ObjectNotFound(uri)
        if max_bytes is not None and len(self.objects[uri]) > max_bytes:
            raise StepError("too large")
        return self.objects[uri]

    def delete(self, uri: str) -> None:
        self.objects.pop(uri, None)


@dataclass
class Vault:
    """A database with artifacts of ten bytes, in order of their sha256."""

    repository: SqlRepository
    store: Store
    artifacts: list[Artifact]
    now: float = 0.0

    def verifier(self, rate: float = 1e9) -> Verifier:
        def sleep(seconds: float) -> None:
            self.now += seconds

        clock = lambda: self.now  # noqa: E731
        return Verifier(self.repository, cast(Any, self.store), Pace(rate, clock, sleep), clock=clock)

    def run(self, *, again: bool = False) -> dict[str, str]:
        """A whole pass; sha256 -> problem."""
        since, _ = begin(self.repository, BY, again=again)
        self.verifier().run(since)
        return {each.artifact.sha256: each.problem for each in finish(self.repository, BY)}


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    url = f"sqlite:///{tmp_path / 'kontext.db'}"
    upgrade(url)
    repository = SqlRepository(url)
    repository.register_worker(worker())
    yield keep(repository, 8)
    assert repository.verify() == []
    repository.close()


def keep(repository: SqlRepository, count: int) -> Vault:
    submit(repository, make_plan({f"s{number}": [] for number in range(count)}))
    store, artifacts = Store(), []
    for step in claim(repository, limit=count):
        data = f"{step.id:10}".encode()
        made = Artifact(sha256_hex(data), f"file:///objects/{step.id}", "image/png", len(data), 8, 8)
        repository.intend_uploads([(made.uri, step.id, step.token)])
        store.objects[made.uri] = data
        repository.commit(None, [StepDone(step.id, step.token, (StepOutput("image", made),), {})])
        artifacts.append(made)
    return Vault(repository, store, sorted(artifacts, key=lambda each: each.sha256))


def test_a_sound_store_is_read_whole_once(vault: Vault) -> None:
    assert vault.run() == {}
    assert vault.store.seen == [each.uri for each in vault.artifacts]
    assert vault.run() == {}
    assert len(vault.store.seen) == 16, "after a finished pass a new one begins"


def test_what_is_wrong_is_told_and_stays_until_it_is_mended(vault: Vault) -> None:
    gone, other, longer, shorter, hidden, *_ = vault.artifacts
    kept = dict(vault.store.objects)
    vault.store.objects[other.uri] = b"0123456789"
    vault.store.objects[longer.uri] = b"0123456789+"
    vault.store.objects[shorter.uri] = b"0123"
    del vault.store.objects[gone.uri]

    def on_read(uri: str) -> None:
        if uri == hidden.uri:
            raise NotAllowed("outside of what may be read")

    vault.store.on_read = on_read
    found = {
        gone.sha256: "missing: nothing lies at its place",
        other.sha256: "changed: its sha256 is another one",
        longer.sha256: "changed: it has more than its 10 bytes",
        shorter.sha256: "changed: it has 4 bytes instead of 10",
        hidden.sha256: "unreadable: outside of what may be read",
    }
    assert vault.run() == found
    assert {each.artifact.sha256: each.problem for each in vault.repository.damaged_artifacts()} == found
    vault.store.objects, vault.store.on_read = kept, lambda uri: None
    assert vault.run() == {}


def test_a_pass_that_was_stopped_goes_on_where_it_was(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    vault.store.objects[vault.artifacts[1].uri] = b"0123456789"

    def stop(uri: str) -> None:
        if uri == vault.artifacts[5].uri:
            raise KeyboardInterrupt

    vault.store.on_read = stop
    with pytest.raises(KeyboardInterrupt):
        vault.run()
    vault.store.on_read = lambda uri: None
    vault.store.seen.clear()
    assert list(vault.run()) == [vault.artifacts[1].sha256], "what the first half found counts"
    assert vault.store.seen == [each.uri for each in vault.artifacts[5:]]


def test_a_killed_one_has_written_down_all_but_the_last(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "NOTED", 2)

    def kill(uri: str) -> None:
        if uri == vault.artifacts[5].uri:
            monkeypatch.setattr(Verifier, "_note", lambda self: None)  # what is in memory is lost
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vault.store, "on_read", kill)
        with pytest.raises(KeyboardInterrupt):
            vault.run()
    monkeypatch.undo()
    since, goes_on = begin(vault.repository, BY)
    assert goes_on
    assert vault.repository.unread_artifacts_size(since=since) == (4, 40)


def test_again_begins_anew(vault: Vault) -> None:
    since, goes_on = begin(vault.repository, BY)
    vault.verifier().run(since)
    assert not goes_on
    assert begin(vault.repository, BY) == (since, True)
    vault.store.seen.clear()
    vault.run(again=True)
    assert len(vault.store.seen) == 8


def test_what_is_collected_meanwhile_is_no_problem(vault: Vault) -> None:
    first = vault.artifacts[0]

    def collect(uri: str) -> None:
        if uri == first.uri:
            vault.repository.forget_artifact(first.sha256, vault.store.delete)

    vault.store.on_read = collect
    assert vault.run() == {}


def test_what_is_made_again_meanwhile_is_no_problem(vault: Vault) -> None:
    first = vault.artifacts[0]
    data = vault.store.objects.pop(first.uri)

    def put(uri: str) -> None:
        if vault.store.seen.count(first.uri) > 1:
            vault.store.objects[first.uri] = data

    vault.store.on_read = put
    assert vault.run() == {}


def test_bytes_that_were_made_anew_have_no_old_problem(vault: Vault) -> None:
    first = vault.artifacts[0]
    del vault.store.objects[first.uri]
    found = vault.run()
    assert list(found) == [first.sha256]
    damaged = vault.repository.damaged_artifacts()
    assert damaged[0].steps == (int(first.uri.rpartition("/")[2]),)
    assert repair(vault.repository, cast(Any, vault.store), damaged) == 1
    assert vault.repository.damaged_artifacts() == []
    submit(vault.repository, make_plan({f"s{number}": [] for number in range(8)}, deliver=["s0", "s1", "s2", "s3"]))
    submit(vault.repository, make_plan({f"s{number}": [] for number in range(8)}, deliver=["s4", "s5", "s6", "s7"]))
    [step] = claim(vault.repository)
    vault.repository.commit(None, [StepDone(step.id, step.token, (StepOutput("image", first),), {})])
    assert vault.repository.damaged_artifacts() == []


def test_a_store_that_does_not_answer_ends_the_pass_and_blames_no_object(vault: Vault) -> None:
    def silent(uri: str) -> None:
        if uri in [each.uri for each in vault.artifacts[2:]]:
            raise InfrastructureError("no answer")

    vault.store.on_read = silent
    since, _ = begin(vault.repository, BY)
    with pytest.raises(InfrastructureError):
        vault.verifier().run(since)
    assert vault.repository.damaged_artifacts() == []
    assert vault.repository.unread_artifacts_size(since=since) == (6, 60)


def test_one_object_that_cannot_be_read_is_unreadable(vault: Vault) -> None:
    def silent(uri: str) -> None:
        if uri == vault.artifacts[2].uri:
            raise InfrastructureError("input/output error")

    vault.store.on_read = silent
    assert vault.run() == {vault.artifacts[2].sha256: "unreadable: input/output error"}
    assert repair(vault.repository, cast(Any, vault.store), vault.repository.damaged_artifacts()) == 0


def test_the_rate_is_kept_on_average() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    pace = Pace(100.0, lambda: now, sleep)
    for _ in range(10):
        now += 0.05  # reading takes time as well
        pace.read(10)
    assert now == pytest.approx(1.0)
    now += 60.0
    pace.read(10)
    pace.read(10)
    assert now == pytest.approx(61.1), "a pause is not made up for"
