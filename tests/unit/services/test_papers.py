"""What delivered files come with: sidecars and signatures, however often a delivery is made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa
import structlog

from kontext_batch.errors import InfrastructureError, NotAllowed, StepError
from kontext_batch.hashing import sha256_hex
from kontext_batch.lineage import tables as t
from kontext_batch.planning.marking import EDITED, asset_id
from kontext_batch.planning.states import RunState
from kontext_batch.ports import Claim, StepRow
from kontext_batch.provenance.marks import step_key_of
from kontext_batch.services.work import Worker
from kontext_batch.storage.router import StoreRouter
from tests.unit.services.conftest import Studio


@dataclass
class Ink:
    """`ports.Signer` whose signatures are never the same."""

    claims: list[Claim] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=count)
    fault: Exception | None = None

    def sign(self, data: bytes, media_type: str, claim: Claim) -> bytes:
        if self.fault is not None:
            raise self.fault
        self.claims.append(claim)
        return data + f"\nsigned {next(self.numbers)} {claim.sha256}".encode()

    def signed_from(self, data: bytes, media_type: str) -> str | None:
        picture, _, signature = data.rpartition(b"\nsigned ")
        sha256 = signature.rpartition(b" ")[2].decode(errors="replace")
        return sha256 if sha256 == sha256_hex(picture) else None


def worker(studio: Studio, **papers: Any) -> Worker:
    made = studio.worker()
    made.papers = replace(made.papers, **papers)
    return made


def out(studio: Studio) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (studio.folder / "out").iterdir()}


def sidecar_of(studio: Studio, name: str = "bag_snow.png") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((studio.folder / "out" / f"{name}.lineage.json").read_text())
    return found


def step_of(studio: Studio, run_id: int, node: str, **axes: str) -> StepRow:
    rows = studio.app.repository.run_steps(run_id)
    (found,) = [row for row in rows if row.node == node and dict(row.axes) == axes]
    return found


def again(studio: Studio, run_id: int) -> None:
    """As after a worker that died between the write and the record."""
    with studio.app.repository._db._writing.begin() as conn:
        conn.execute(sa.update(t.runs).values(state="running", finished=None))
        conn.execute(sa.update(t.deliveries).values(state="pending", delivered_path=None, file_sha256=None))


def recorded(studio: Studio) -> dict[str, tuple[str, str | None]]:
    """Delivered name -> sha256 of the artifact and of the file."""
    columns = (t.deliveries.c.delivered_path, t.deliveries.c.sha256, t.deliveries.c.file_sha256)
    with studio.app.repository._db._reading.begin() as conn:
        rows = conn.execute(sa.select(*columns)).all()
    return {row.delivered_path.rpartition("/")[2]: (row.sha256, row.file_sha256) for row in rows}


# ----------------------------------------------------------------------------------------------------------- sidecars


def test_a_delivered_file_tells_its_step_and_its_sidecar_tells_the_rest(studio: Studio) -> None:
    run_id = studio.submit()
    assert studio.worker().run_until_done(run_id).state is RunState.DONE
    finish = step_of(studio, run_id, "finish", item="bag", scene="snow")
    staged = step_of(studio, run_id, "staged", item="bag", scene="snow")
    clean = step_of(studio, run_id, "clean", item="bag")
    data = (studio.folder / "out" / "bag_snow.png").read_bytes()

    assert step_key_of(data) == finish.key
    assert EDITED.encode() in data
    told = sidecar_of(studio)
    assert told["schema"] == "kontext-batch/lineage/1"
    assert told["file"] == {
        "sha256": sha256_hex(data),
        "bytes": len(data),
        "media_type": "image/png",
        "width": 32,
        "height": 32,
    }
    assert (told["asset"], told["digital_source_type"]) == (asset_id(finish.key), EDITED)
    assert told["run"] == run_id
    assert told["recipe"]["name"] == "shop"
    assert (told["recipe"]["file"], told["recipe"]["line"] > 1) == ("shop.yaml", True)
    assert told["step"] == {"node": "finish", "axes": {"item": "bag", "scene": "snow"}, "candidate": 1, "take": 0}
    assert [each["asset"] for each in told["steps"]] == [asset_id(each.key) for each in (finish, staged, clean)]
    first, edit, source = told["steps"]
    assert staged.artifact is not None
    assert first["parents"] == [
        {"role": "image", "position": 0, "asset": asset_id(staged.key), "sha256": staged.artifact.sha256}
    ]
    photo = sha256_hex((studio.folder / "photos" / "bag.png").read_bytes())
    assert source["sources"] == [{"role": "image", "position": 0, "sha256": photo}]
    assert edit["model"] == {"name": "toy", "sha256": "a" * 64, "licence": None}
    assert edit["parameters"]["seed"] == staged.params["seed"]
    assert edit["libraries"] == {"toy": "1"}
    assert edit["started"] <= edit["ended"]
    text = json.dumps(told)
    assert "deep snow" not in text
    assert "Remove the background" not in text
    assert str(studio.folder) not in text, "where things lie here is nobody's business"


def test_prompts_are_told_when_asked(studio: Studio) -> None:
    worker(studio, prompts=True).run_until_done(studio.submit())
    told = sidecar_of(studio)
    assert told["prompts"] is True
    assert told["steps"][1]["parameters"]["prompt"] == "Change the background to deep snow."
    # Not asked any more: what lies there is written anew.
    studio.worker().run_until_done(studio.submit())
    assert "deep snow" not in json.dumps(sidecar_of(studio))


def test_a_delivery_that_is_made_twice_changes_nothing(studio: Studio) -> None:
    run_id = studio.submit()
    studio.worker().run_until_done(run_id)
    before = {file: file.stat().st_mtime_ns for file in (studio.folder / "out").iterdir()}
    assert len(before) == 8
    again(studio, run_id)
    studio.worker().run_until_done(run_id)
    studio.worker().run_until_done(studio.submit())  # nor does a run that finds the same pictures there
    assert {file: file.stat().st_mtime_ns for file in (studio.folder / "out").iterdir()} == before


@pytest.mark.parametrize("policy", ["version", "replace"])
def test_a_sidecar_follows_its_picture(studio: Studio, policy: str) -> None:
    studio.recipe.write_text(studio.recipe.read_text().replace("if_exists: version", f"if_exists: {policy}"))
    studio.worker().run_until_done(studio.submit())
    studio.recipe.write_text(studio.recipe.read_text().replace("Change the", "Please change the"))
    studio.worker().run_until_done(studio.submit())
    files = out(studio)
    assert len(files) == (16 if policy == "version" else 8)
    for name in studio.outputs():
        assert sidecar_of(studio, name)["file"]["sha256"] == sha256_hex(files[name])


def test_a_conversion_without_a_model_is_not_marked_as_made_by_one(studio: Studio) -> None:
    text = studio.recipe.read_text()
    head, _, tail = text.partition("  clean:")
    tail = tail[tail.index("  finish:") :].replace("${staged}", "${item.file}").replace("${finish}", "${finish}")
    studio.recipe.write_text(f"{head}{tail}".replace("_${scene}", ""))
    run_id = studio.submit()
    assert studio.worker().run_until_done(run_id).state is RunState.DONE
    data = (studio.folder / "out" / "bag.png").read_bytes()
    assert step_key_of(data) == step_of(studio, run_id, "finish", item="bag").key
    assert b"DigitalSourceType" not in data
    assert sidecar_of(studio, "bag.png")["digital_source_type"] is None


def test_marks_and_sidecars_can_be_left_out(studio: Studio) -> None:
    made = worker(studio, sidecars=False)
    made.executor = replace(made.executor, mark=False)
    made.run_until_done(studio.submit())
    assert len(out(studio)) == 4
    assert all(step_key_of(data) is None for data in out(studio).values())
    keys = {row.key for row in studio.app.repository.run_steps(1)}
    assert {step.key for step in studio.prepare().plan.steps} == keys, "no part of what a step is"


@pytest.mark.parametrize("there", [b"notes of mine", b'{"schema": "else"}', b"[1]", b"[" * 100_000])
def test_what_is_no_sidecar_of_ours_stays(studio: Studio, there: bytes) -> None:
    (studio.folder / "out").mkdir()
    (studio.folder / "out" / "bag_snow.png.lineage.json").write_bytes(there)
    with structlog.testing.capture_logs() as logs:
        assert studio.worker().run_until_done(studio.submit()).delivered == 4
    assert out(studio)["bag_snow.png.lineage.json"] == there
    assert [each["event"] for each in logs if "sidecar" in each["event"]] == ["no sidecar: something else lies there"]


def failing(monkeypatch: pytest.MonkeyPatch, *faults: Exception) -> None:
    """The next writes of a sidecar meet these."""
    real, left = StoreRouter.write_if_absent, list(faults)

    def write(self: StoreRouter, uri: str, data: bytes, *, media_type: str) -> bool:
        if uri.endswith(".lineage.json") and left:
            raise left.pop(0)
        return real(self, uri, data, media_type=media_type)

    monkeypatch.setattr(StoreRouter, "write_if_absent", write)


def test_a_sidecar_that_cannot_be_written_loses_no_picture(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, NotAllowed("no"))
    summary = studio.worker().run_until_done(studio.submit())
    assert (summary.state, summary.delivered) == (RunState.DONE, 4)
    assert len(studio.outputs()) == 4
    assert len(out(studio)) == 7


def test_an_outage_between_picture_and_sidecar_is_made_up_for(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, InfrastructureError("gone for a moment"))
    run_id = studio.submit()
    with pytest.raises(InfrastructureError):
        studio.worker().run_until_done(run_id)
    assert studio.worker().run_until_done(run_id).delivered == 4
    assert len(out(studio)) == 8
    assert len(studio.outputs()) == 4


def test_a_later_recipe_that_reads_what_was_delivered_finds_pictures_alone(studio: Studio) -> None:
    studio.worker().run_until_done(studio.submit())
    studio.recipe.write_text(
        studio.recipe.read_text()
        .replace("photos/*", "out/*")
        .replace("on_missing: skip", "on_missing: fail")
        .replace("out/${item}_", "more/${item}_")
    )
    prepared = studio.prepare()
    assert len(prepared.plan.deliveries) == 8
    assert prepared.plan.skipped == ()


# ---------------------------------------------------------------------------------------------------------- signatures


def test_signed_files_are_recorded_and_their_sidecars_are_of_the_signed_file(studio: Studio) -> None:
    ink = Ink()
    worker(studio, signer=ink).run_until_done(studio.submit())
    files = out(studio)
    for name in studio.outputs():
        artifact, file = recorded(studio)[name]
        assert ink.signed_from(files[name], "image/png") == artifact
        assert file == sha256_hex(files[name]) == sidecar_of(studio, name)["file"]["sha256"]
    photos = {f"sha256:{sha256_hex(each.read_bytes())}" for each in (studio.folder / "photos").iterdir()}
    assert {claim.parent.asset for claim in ink.claims if claim.parent is not None} == photos
    assert {claim.digital_source_type for claim in ink.claims} == {EDITED}
    assert all(claim.prompts == () for claim in ink.claims)


@pytest.mark.parametrize("policy", ["version", "replace", "fail", "skip"])
def test_a_picture_that_was_signed_before_is_not_delivered_anew(studio: Studio, policy: str) -> None:
    studio.recipe.write_text(studio.recipe.read_text().replace("if_exists: version", f"if_exists: {policy}"))
    ink = Ink()
    run_id = studio.submit()
    worker(studio, signer=ink).run_until_done(run_id)
    before, was = out(studio), recorded(studio)
    again(studio, run_id)
    summary = worker(studio, signer=ink).run_until_done(run_id)
    assert (summary.state, summary.skipped_deliveries, summary.failed_deliveries) == (RunState.DONE, 0, 0)
    worker(studio, signer=ink).run_until_done(studio.submit())
    assert out(studio) == before
    assert recorded(studio) == was, "the hash of what lies there"
    assert len(ink.claims) == 4, "nothing was signed in vain"


def test_a_signed_file_that_was_changed_is_something_else(studio: Studio) -> None:
    ink = Ink()
    worker(studio, signer=ink).run_until_done(studio.submit())
    changed = studio.folder / "out" / "bag_snow.png"
    changed.write_bytes(b"\0" + changed.read_bytes()[1:])
    worker(studio, signer=ink).run_until_done(studio.submit())
    assert "bag_snow.v2.png" in studio.outputs()
    assert len(studio.outputs()) == 5


def test_a_signer_that_fails_delivers_nothing_unsigned(studio: Studio) -> None:
    summary = worker(studio, signer=Ink(fault=StepError("no ink"))).run_until_done(studio.submit())
    assert (summary.state, summary.failed_deliveries) == (RunState.FAILED, 4)
    assert studio.app.repository.failed_deliveries(1)[0][1] == "no ink"
    assert not (studio.folder / "out").exists()


def test_without_a_time_stamp_deliveries_wait(studio: Studio) -> None:
    run_id = studio.submit()
    with pytest.raises(InfrastructureError, match="no time"):
        worker(studio, signer=Ink(fault=InfrastructureError("no time"))).run_until_done(run_id)
    assert worker(studio, signer=Ink()).run_until_done(run_id).delivered == 4


def test_prompts_are_signed_when_asked(studio: Studio) -> None:
    ink = Ink()
    worker(studio, signer=ink, prompts=True).run_until_done(studio.submit())
    assert ("Remove the background.", "Change the background to deep snow.") in {each.prompts for each in ink.claims}
