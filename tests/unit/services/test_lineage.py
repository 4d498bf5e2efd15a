"""What a question about lineage means, and how two pictures differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from kontext_batch.errors import ObjectNotFound
from kontext_batch.ports.tracing import BatchMate, SubjectKind, TracedStep
from kontext_batch.services.differences import compare
from kontext_batch.services.lineage import Lineage, above, below, meant
from tests.unit.services.conftest import RECIPE, Studio


@pytest.fixture
def run(studio: Studio) -> int:
    return studio.worker().run_until_done(studio.submit()).id


def lineage_of(studio: Studio, name: str) -> Lineage:
    repository = studio.app.repository
    return above(repository, meant(repository, f"file://{studio.folder}/out/{name}"))


def nodes(found: Lineage) -> list[str]:
    return [each.step.node for each in found.steps]


def made(studio: Studio, text: str) -> list[str]:
    repository = studio.app.repository
    return [each.node for each in below(repository, meant(repository, text)).steps]


def test_whatever_people_have_at_hand_is_understood(studio: Studio, run: int) -> None:
    repository = studio.app.repository
    found = lineage_of(studio, "mug_snow.png")
    assert nodes(found) == ["finish", "staged", "clean"]
    [picture] = found.pictures
    assert picture.step.artifact is not None
    for text in (
        str(picture.step.id),
        picture.step.key,
        picture.step.artifact.sha256,
        picture.step.artifact.sha256[:12].upper(),
        picture.step.artifact.uri,
        "out/mug_snow.png",
    ):
        assert above(repository, meant(repository, text)).steps == found.steps, text
    [photo] = found.photos
    assert photo.uri is not None
    assert photo.sha256 is not None
    for text in (photo.uri, photo.sha256, photo.sha256[:12]):
        assert sorted(made(studio, text)) == ["clean", "finish", "finish", "staged", "staged"], text
    for text in ("model:toy", f"model:{'a' * 12}", "a" * 64):
        assert sorted(made(studio, text)) == ["clean"] * 2 + ["finish"] * 4 + ["staged"] * 4, text
    assert len(made(studio, f"recipe:{picture.origin.recipe_sha256[:8]}")) == 10
    assert made(studio, str(found.steps[1].step.id)) == ["staged", "finish"]
    uri = f"file://{studio.folder}/out/mug_snow.png"
    assert meant(repository, "../anywhere/mug_snow.png", uri=uri).step_ids == (picture.step.id,)


def test_a_name_may_mean_several_steps(studio: Studio, run: int) -> None:
    found = above(studio.app.repository, meant(studio.app.repository, "staged"))
    assert nodes(found) == ["staged"] * 4 + ["clean"] * 2
    assert len(found.pictures) == 4
    assert len(found.photos) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("zzz", "nothing is known as 'zzz': looked for"),
        ("ab" * 32, "nothing is known as 'abab"),
        ("out/nothing.png", "nothing is known as 'out/nothing.png'"),
        ("", "nothing is known as ''"),
        ("x" * 100_000, "nothing is known as 'xxx"),
        ("9" * 5000, "nothing is known as '999"),
        ("model:none", "no step was computed with a model 'none'; used were: toy"),
        ("adapter:toy", "no step was computed with an adapter 'toy'"),
        ("recipe:abcd", "no run is of a recipe revision 'abcd'"),
        ("recipe:shop", "no run is of a recipe revision 'shop'"),
        ("recipe:", "no run is of a recipe revision ''"),
        ("model:", "no step was computed with a model ''"),
    ],
)
def test_what_is_unknown_is_told_with_what_was_looked_for(studio: Studio, run: int, text: str, told: str) -> None:
    with pytest.raises(ObjectNotFound) as error:
        meant(studio.app.repository, text)
    assert str(error.value).startswith(told)


def test_a_beginning_of_several_hashes_is_not_enough(studio: Studio, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = studio.app.repository
    pictures = [each.artifact.sha256 for each in repository.run_steps(run) if each.artifact is not None]
    by_digit: dict[str, list[str]] = {}
    for sha256 in dict.fromkeys(pictures):
        by_digit.setdefault(sha256[0], []).append(sha256)
    digit, several = next((digit, found) for digit, found in by_digit.items() if len(found) > 1)
    monkeypatch.setattr("kontext_batch.services.lineage.SHORTEST_PREFIX", 1)
    if not digit.isdigit():
        with pytest.raises(ObjectNotFound, match=f"'{digit}' is the beginning of several hashes") as error:
            meant(repository, digit)
        assert several[0] in str(error.value)


def test_nothing_is_above_a_photo(studio: Studio, run: int) -> None:
    subject = meant(studio.app.repository, f"file://{studio.folder}/photos/mug.png")
    assert subject.kind is SubjectKind.PHOTO
    with pytest.raises(ObjectNotFound, match="nothing is above it; what was made from it is told by --down"):
        above(studio.app.repository, subject)


def test_an_answer_goes_on_where_it_ended(studio: Studio, run: int) -> None:
    repository = studio.app.repository
    subject = meant(repository, "model:toy")
    first = below(repository, subject, limit=3)
    assert first.after is not None
    rest = below(repository, subject, after=first.after)
    assert rest.after is None
    assert first.steps + rest.steps == below(repository, subject).steps
    assert first.direct == 6


# ----------------------------------------------------------------------------------------------------------- diff


def changed(lineage: Lineage, node: str, change: Callable[[TracedStep], TracedStep]) -> Lineage:
    """Another picture of which one step is not as in `lineage`; the steps below it have other numbers, too."""

    def moved(step_id: int | None) -> int | None:
        return None if step_id is None else step_id + 1000

    def other(each: TracedStep) -> TracedStep:
        reads = tuple(replace(read, step_id=moved(read.step_id)) for read in each.reads)
        found = replace(each, step=replace(each.step, id=each.step.id + 1000), reads=reads)
        return change(found) if each.step.node == node else found

    subject = replace(lineage.subject, step_ids=tuple(each + 1000 for each in lineage.subject.step_ids))
    return replace(lineage, subject=subject, steps=tuple(map(other, lineage.steps)))


def params(**values: Any) -> Callable[[TracedStep], TracedStep]:
    return lambda each: replace(each, step=replace(each.step, params={**each.step.params, **values}))


def origin(**values: Any) -> Callable[[TracedStep], TracedStep]:
    return lambda each: replace(each, origin=replace(each.origin, **values))


def batch(**values: Any) -> Callable[[TracedStep], TracedStep]:
    return lambda each: replace(each, batches=tuple(replace(one, **values) for one in each.batches))


def read(**values: Any) -> Callable[[TracedStep], TracedStep]:
    return lambda each: replace(each, reads=tuple(replace(one, **values) for one in each.reads))


def another_mate(each: TracedStep) -> TracedStep:
    """Whether the step had any is a matter of who was quicker."""
    mate = BatchMate(step_id=10_000, key="f" * 64, joined=0, left=1, place=7)
    return replace(each, batches=tuple(replace(one, mates=(*one.mates, mate)) for one in each.batches))


CHANGES: Mapping[str, tuple[str, Callable[[TracedStep], TracedStep]]] = {
    "source bytes": ("clean", read(sha256="cd" * 32)),
    "recipe revision": ("staged", origin(recipe_sha256="ef" * 32)),
    "recipe line": ("staged", origin(line=99)),
    "operation": ("staged", lambda each: replace(each, step=replace(each.step, operation="generate"))),
    "prompt": ("staged", params(prompt="Something else.")),
    "negative prompt": ("staged", params(negative_prompt="blur")),
    "seed": ("clean", params(seed=1)),
    "model": ("clean", params(model="other", model_sha256="b" * 64)),
    "adapters": ("staged", params(adapters=[{"name": "look", "scale": 0.5, "sha256": "c" * 64}])),
    "guidance": ("staged", params(guidance=9.0)),
    "size": ("finish", params(size={"width": 9, "height": 9})),
    "parent image bytes": ("finish", read(sha256="cd" * 32)),
    "numeric mode": ("staged", batch(numeric_mode="fp8")),
    "device": ("staged", batch(device="cuda:0")),
    "library torch": ("staged", batch(libraries={"torch": "1"})),
    "batch": ("clean", another_mate),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_first_thing_that_differs_is_named(studio: Studio, run: int, what: str) -> None:
    found = lineage_of(studio, "mug_snow.png")
    node, change = CHANGES[what]
    compared = compare(found, changed(found, node, change))
    first = compared.differences[0]
    assert first.what == what
    assert first.one != first.other
    assert compare(found, changed(found, node, lambda each: each)).differences == ()


def test_differences_are_told_from_the_photos_down(studio: Studio, run: int) -> None:
    found = lineage_of(studio, "mug_snow.png")
    other = changed(changed(found, "staged", params(prompt="x", seed=1)), "finish", params(quality=3))
    other = changed(other, "clean", read(sha256="cd" * 32))
    told = [each.what for each in compare(found, other).differences]
    assert told == ["source bytes", "prompt", "seed", "quality"]


def test_pictures_of_two_photos_differ_first_in_their_photos(studio: Studio, run: int) -> None:
    compared = compare(lineage_of(studio, "mug_snow.png"), lineage_of(studio, "bag_snow.png"))
    first = compared.differences[0]
    assert (first.what, first.one.split(",")[0]) == ("source bytes", f"file://{studio.folder}/photos/mug.png")
    assert compared.same_bytes is False


def test_a_changed_prompt_is_shown_on_both_sides(studio: Studio, run: int) -> None:
    before = lineage_of(studio, "mug_snow.png")
    words = ", in the last light of a very long day" * 3
    studio.recipe.write_text(RECIPE.replace("${scene.place}.", f"${{scene.place}}{words}."))
    studio.worker().run_until_done(studio.submit())
    compared = compare(before, lineage_of(studio, "mug_snow.v2.png"))
    told = {each.what: (each.one, each.other) for each in compared.differences}
    assert told["prompt"] == tuple(f"Change the background to deep snow{more}." for more in ("", words))
    assert next(each.what for each in compared.differences if each.matters) == "prompt"


def test_a_picture_is_equal_to_itself(studio: Studio, run: int) -> None:
    found = lineage_of(studio, "mug_snow.png")
    assert compare(found, found).differences == ()
    assert compare(found, found).same_bytes is True


def test_two_chains_are_compared_however_many_ways_lead_up(studio: Studio, run: int) -> None:
    [picture] = lineage_of(studio, "mug_snow.png").pictures
    subject = lineage_of(studio, "mug_snow.png").subject

    def chain(first: int, prompt: str) -> Lineage:
        """Each of 40 steps reads the one before it twice."""
        steps = []
        for number in range(first + 39, first - 1, -1):
            above = number - 1 if number > first else None
            reads = tuple(replace(picture.reads[0], role=role, step_id=above) for role in ("image", "reference"))
            made = replace(picture.step, id=number, params={"prompt": prompt if above is None else "same"})
            steps.append(replace(picture, step=made, reads=reads))
        return Lineage(replace(subject, step_ids=(first + 39,)), tuple(steps))

    [found] = compare(chain(1, "snow"), chain(101, "rain")).differences
    assert (found.what, found.one, found.other) == ("prompt", "snow", "rain")
