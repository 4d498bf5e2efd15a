"""Lineage of real runs as PROV, OpenLineage, a drawing and a page."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import ValidationError

from kontext_batch.errors import StepError
from kontext_batch.provenance.dot import impact_dot, lineage_dot
from kontext_batch.provenance.openlineage import run_events, step_events
from kontext_batch.provenance.page import impact_page, lineage_page
from kontext_batch.provenance.prov import as_prov
from kontext_batch.services.lineage import Lineage, above, below, meant
from tests.unit.provenance.schemas import check_event, check_prov
from tests.unit.services.conftest import Studio, studio

__all__ = ["studio"]

EVIL = '"><script>alert(1)</script>\\n\\"]; x -> y'


@pytest.fixture
def run(studio: Studio) -> int:
    return studio.worker().run_until_done(studio.submit()).id


def lineage_of(studio: Studio, name: str) -> Lineage:
    repository = studio.app.repository
    return above(repository, meant(repository, f"file://{studio.folder}/out/{name}"))


def with_prompt(lineage: Lineage, prompt: str) -> Lineage:
    changed = [
        replace(each, step=replace(each.step, node=prompt, params={**each.step.params, "prompt": prompt}))
        for each in lineage.steps
    ]
    return replace(lineage, steps=tuple(changed))


# ----------------------------------------------------------------------------------------------------------- PROV


def test_prov_is_what_the_schema_says_and_says_what_is_known(studio: Studio, run: int) -> None:
    found = lineage_of(studio, "mug_snow.png")
    document = json.loads(json.dumps(as_prov(found.steps)))
    check_prov(document)
    [photo] = found.photos
    picture = found.pictures[0]
    assert picture.step.artifact is not None
    result = f"kb:image-{picture.step.artifact.sha256}"
    derived = {each["prov:generatedEntity"]: each["prov:usedEntity"] for each in document["wasDerivedFrom"].values()}
    above_it = [result]
    while above_it[-1] in derived:
        above_it.append(derived[above_it[-1]])
    assert len(above_it) == 4
    assert above_it[-1] == f"kb:image-{photo.sha256}"
    assert document["entity"][above_it[-1]]["prov:location"] == photo.uri
    prompts = [each.get("kb:prompt") for each in document["activity"].values()]
    assert "Change the background to deep snow." in prompts
    assert f"kb:weights-{'a' * 64}" in document["entity"]
    [plan] = [each for each in document["entity"].values() if each.get("prov:type", {}).get("$") == "prov:Plan"]
    assert plan["kb:sha256"] == picture.origin.recipe_sha256
    [file] = [each["prov:specificEntity"] for each in document["specializationOf"].values()]
    assert document["entity"][file]["prov:location"].endswith("/out/mug_snow.png")
    names = {name for kind in ("entity", "activity", "agent") for name in document[kind]}
    for relation in set(document) - {"prefix", "entity", "activity", "agent"}:
        for each in document[relation].values():
            named = {value for key, value in each.items() if key.startswith("prov:") and str(value).startswith("kb:")}
            assert named <= names, "whatever is named is described"


def test_the_prov_schema_refuses_what_is_wrong(studio: Studio, run: int) -> None:
    document = as_prov(lineage_of(studio, "mug_snow.png").steps)
    derivation = next(iter(document["wasDerivedFrom"].values()))
    del derivation["prov:usedEntity"]
    with pytest.raises(ValidationError):
        check_prov(document)
    with pytest.raises(ValidationError):
        check_prov({"activities": {}})


def test_prov_is_read_by_the_library_of_its_authors(studio: Studio, run: int) -> None:
    prov = pytest.importorskip("prov.model")
    document = as_prov(lineage_of(studio, "mug_snow.png").steps)
    read = prov.ProvDocument.deserialize(content=json.dumps(document))
    kinds = [type(record).__name__ for record in read.get_records()]
    assert kinds.count("ProvActivity") == 3
    assert kinds.count("ProvDerivation") == 3


def test_what_is_not_made_yet_is_valid_prov(studio: Studio) -> None:
    studio.submit()
    document = as_prov(lineage_of(studio, "mug_snow.png").steps)
    check_prov(document)
    assert "wasGeneratedBy" not in document


# ---------------------------------------------------------------------------------------------------- OpenLineage


def test_events_are_what_the_schemas_say(studio: Studio, run: int) -> None:
    found = lineage_of(studio, "mug_snow.png")
    events = json.loads(json.dumps([event for each in reversed(found.steps) for event in step_events(each)]))
    for event in events:
        check_event(event)
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 3
    assert [event["job"]["name"] for event in events[::2]] == ["shop.clean", "shop.staged", "shop.finish"]
    clean, _, finish = events[1::2]
    [photo] = clean["inputs"]
    assert (photo["namespace"], photo["name"]) == ("file", f"{studio.folder}/photos/mug.png")
    assert [each["name"] for each in finish["outputs"]][1:] == [f"{studio.folder}/out/mug_snow.png"]
    assert clean["outputs"][0]["name"] == events[2]["inputs"][0]["name"], "what one writes the next reads"
    told = events[2]["run"]["facets"]["kontextBatch_step"]
    assert told["params"]["prompt"] == "Change the background to deep snow."
    assert events[0]["run"]["runId"] == events[1]["run"]["runId"]
    assert len({event["run"]["runId"] for event in events}) == 3


def test_the_run_is_the_parent_of_its_steps(studio: Studio, run: int) -> None:
    start, end = run_events(studio.app.repository.run(run))
    check_event(start)
    check_event(end)
    assert (start["eventType"], end["eventType"]) == ("START", "COMPLETE")
    event = next(step_events(lineage_of(studio, "mug_snow.png").steps[0]))
    assert event["run"]["facets"]["parent"]["run"]["runId"] == start["run"]["runId"]
    assert event["run"]["facets"]["parent"]["job"]["name"] == start["job"]["name"]


def test_a_later_run_is_no_parent_of_what_it_found(studio: Studio, run: int) -> None:
    assert studio.worker().run_until_done(studio.submit()).id == run + 1
    found = lineage_of(studio, "mug_snow.png")
    assert found.pictures[0].origin.run_id == run + 1
    assert "parent" not in next(step_events(found.pictures[0]))["run"]["facets"]


def test_a_failure_is_told_with_its_error(studio: Studio) -> None:
    studio.editor.fault = lambda job: StepError("the picture is not finite")
    studio.worker().run_until_done(studio.submit())
    found = lineage_of(studio, "mug_snow.png")
    events = list(step_events(found.steps[-1]))
    for event in events:
        check_event(event)
    assert [event["eventType"] for event in events] == ["START", "FAIL"]
    assert events[1]["run"]["facets"]["errorMessage"]["message"] == "the picture is not finite"
    assert events[1]["outputs"] == []
    assert list(step_events(found.steps[0])) == [], "it was never tried"


def test_the_event_schema_refuses_what_is_wrong(studio: Studio, run: int) -> None:
    event: dict[str, Any] = next(step_events(lineage_of(studio, "mug_snow.png").steps[0]))
    for change in ({"eventType": "BEGIN"}, {"run": {"runId": "7"}}, {"eventTime": "yesterday"}):
        with pytest.raises(ValidationError):
            check_event({**event, **change})
    event["run"]["facets"]["parent"].pop("job")
    with pytest.raises(ValidationError):
        check_event(event)


# -------------------------------------------------------------------------------------------- drawings and pages


def test_a_drawing_has_every_step_photo_and_file(studio: Studio, run: int) -> None:
    found = lineage_of(studio, "mug_snow.png")
    drawing = lineage_dot(found)
    ids = [each.step.id for each in found.steps]
    for step_id in ids:
        assert f'"s{step_id}" [shape=box' in drawing
    assert f'"s{ids[1]}" -> "s{ids[0]}" [label="image"];' in drawing
    assert drawing.count("shape=note") == drawing.count("shape=folder") == 1
    impact = below(studio.app.repository, meant(studio.app.repository, f"file://{studio.folder}/photos/mug.png"))
    drawing = impact_dot(impact)
    assert drawing.count("shape=box") == 5
    assert drawing.count("shape=folder") == 2
    assert drawing.count('"subject" ->') == 1


def test_a_drawing_keeps_to_its_quotes(studio: Studio, run: int) -> None:
    drawing = lineage_dot(with_prompt(lineage_of(studio, "mug_snow.png"), EVIL))
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', drawing)
    assert "script" not in outside
    assert "alert" not in outside
    assert outside.count('"') % 2 == 0


class Outline(html.parser.HTMLParser):
    """Checks that tags close in order, and collects what a reader without eyes goes by."""

    EMPTY = {"meta", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        values = dict(attrs)
        self.attributes.append((tag, values))
        self.ids += [value for value in [values.get("id")] if value]
        self.targets += [value for value in [values.get("href")] if value]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def pages(studio: Studio) -> Iterator[str]:
    repository = studio.app.repository
    yield lineage_page(lineage_of(studio, "mug_snow.png"))
    photo = meant(repository, f"file://{studio.folder}/photos/mug.png")
    yield impact_page(below(repository, photo), more="")
    yield impact_page(below(repository, photo, limit=1), more="there is more: --after 1:1")


def test_a_page_stands_alone_and_can_be_read_by_ear(studio: Studio, run: int) -> None:
    for page in pages(studio):
        outline = Outline(page)
        assert not {"script", "img", "link", "iframe"} & set(outline.seen)
        assert (outline.seen.count("h1"), outline.seen.count("main"), outline.seen.count("title")) == (1, 1, 1)
        assert dict(outline.attributes)["html"] == {"lang": "en"}
        assert len(outline.ids) == len(set(outline.ids))
        assert {target.removeprefix("#") for target in outline.targets} <= set(outline.ids), "links stay on the page"
        assert outline.seen.count("caption") == outline.seen.count("table")
        assert all(values.get("scope") for tag, values in outline.attributes if tag == "th")
        assert "url(" not in page
        assert "@import" not in page


def test_a_page_says_what_is_asked(studio: Studio, run: int) -> None:
    page, impact, part = pages(studio)
    for told in ("Change the background to deep snow.", "photos/mug.png", "out/mug_snow.png", "a" * 64, "shop.yaml:"):
        assert told in page, told
    assert "out/mug_snow.png" in impact
    assert "out/mug_beach.png" in impact
    assert "there is more: --after 1:1" in part


def test_nothing_in_a_page_is_taken_for_html(studio: Studio, run: int) -> None:
    found = with_prompt(lineage_of(studio, "mug_snow.png"), EVIL)
    found = replace(found, subject=replace(found.subject, name=EVIL))
    assert "<script" not in lineage_page(found)
    Outline(lineage_page(found))
    impact = below(studio.app.repository, meant(studio.app.repository, f"file://{studio.folder}/photos/mug.png"))
    steps = tuple(replace(each, node=EVIL) for each in impact.steps)
    page = impact_page(replace(impact, steps=steps, subject=found.subject), more=EVIL)
    assert "<script" not in page
    Outline(page)
