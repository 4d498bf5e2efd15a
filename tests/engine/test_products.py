"""Drawn products: the same scene gives the same bytes, and an edit changes what it says and nothing else."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engine.training.instructions import (
    CHANGES,
    KINDS,
    Example,
    corpus,
    describe,
    random_example,
    unseen_example,
)
from engine.training.products import BACKGROUNDS, COLOURS, PATTERNS, PRODUCTS, Scene, on_white, random_scene, render

MUG = Scene("mug", "red", background="studio", background_colour="grey")


def pixels(image: Image.Image) -> NDArray[np.int16]:
    return np.asarray(image, np.int16)


def changed(first: Scene, second: Scene) -> set[str]:
    return {entry.name for entry in fields(Scene) if getattr(first, entry.name) != getattr(second, entry.name)}


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [random_example(rng) for _ in range(count)]


def test_there_are_enough_products_colours_and_patterns() -> None:
    assert len(PRODUCTS) >= 8
    assert len(COLOURS) >= 12
    assert len(PATTERNS) >= 4
    assert len(BACKGROUNDS) >= 3


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_scene_always_gives_the_same_bytes_and_a_product_of_its_own(product: str) -> None:
    scene = replace(MUG, product=product)
    assert render(scene).tobytes() == render(scene).tobytes()
    if product != "mug":
        assert render(scene).tobytes() != render(MUG).tobytes()


def test_a_picture_has_the_size_asked_for() -> None:
    assert render(MUG, 96, 160).size == (96, 160)


def test_edges_are_smooth() -> None:
    """A plain black box on plain white has greys between the two at its edges."""
    scene = Scene("lamp", "black", background_colour="white", shadow=False, x=0.503)
    levels = pixels(render(scene)).mean(axis=-1)
    between = (levels > 80) & (levels < 200)
    assert 50 < between.sum() < 2000


def test_a_colour_edit_leaves_the_background_alone() -> None:
    before, after = pixels(render(MUG)), pixels(render(replace(MUG, colour="blue")))
    differs = (before != after).any(axis=-1)
    assert not differs[:, :15].any()
    assert not differs[:15].any()
    assert differs[40:80, 40:70].all()


def test_a_background_edit_leaves_the_product_alone() -> None:
    before = pixels(render(replace(MUG, shadow=False)))
    after = pixels(render(replace(MUG, shadow=False, background="plain", background_colour="teal")))
    differs = (before != after).any(axis=-1)
    assert differs[:10].all()
    assert not differs[45:80, 45:70].any()


def test_a_cut_out_stands_on_one_even_white() -> None:
    around = pixels(render(on_white(MUG)))
    assert (around[:12] == COLOURS["white"]).all()
    assert (around[-12:] == COLOURS["white"]).all()


@pytest.mark.parametrize(
    ("kind", "may_change"),
    [
        ("colour", {"colour"}),
        ("background", {"background", "background_colour", "shadow"}),
        ("cut-out", {"background", "background_colour", "shadow"}),
        ("pattern", {"pattern"}),
        ("badge", {"badge"}),
    ],
)
def test_an_edit_changes_only_what_it_says(kind: str, may_change: set[str]) -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        scene = random_scene(rng)
        after, words = CHANGES[kind](rng, scene)
        assert changed(scene, after) <= may_change
        if kind == "colour":
            assert after.colour in words
            assert after.colour not in (scene.colour, scene.background_colour)
        elif kind == "background":
            assert after.background_colour in words
        elif kind == "pattern":
            assert after.pattern != scene.pattern
        elif kind == "badge":
            assert after.badge != scene.badge
            assert not after.badge or after.badge in words


def test_every_kind_comes_up_and_keeps_its_promise() -> None:
    found = examples(600)
    assert {example.kind for example in found} == set(KINDS)
    for example in found:
        if example.kind == "same":
            assert example.before == example.after
        elif example.kind == "text-to-image":
            assert example.before is None
            assert example.after.product in example.instruction
        else:
            assert example.before is not None
            assert not changed(example.before, example.after) & {"product", "x", "y", "size"}


def test_kinds_come_as_often_as_their_shares_say() -> None:
    rng = np.random.default_rng(0)
    shares = {**dict.fromkeys(KINDS, 0.0), "badge": 3, "same": 1}  # weights, of whatever sum
    kinds = [random_example(rng, shares).kind for _ in range(400)]
    assert set(kinds) == {"badge", "same"}
    assert 270 < kinds.count("badge") < 330


def test_examples_of_one_seed_are_the_same() -> None:
    assert examples(20, seed=5) == examples(20, seed=5)
    assert examples(20, seed=5) != examples(20, seed=6)


def test_a_product_is_told_from_its_background_by_colour() -> None:
    for example in examples(300):
        if example.kind != "cut-out":
            assert example.after.colour != example.after.background_colour or example.kind == "compound"


def test_words_for_a_scene_name_all_of_it() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        words = describe(rng, replace(MUG, pattern="dotted"))
        assert all(word in words for word in ("dotted", "red", "mug", "grey"))


def test_wordings_kept_for_the_benchmark_are_never_trained() -> None:
    rng = np.random.default_rng(0)
    unseen = [unseen_example(rng) for _ in range(300)]
    trained = {example.instruction.rstrip(".").lower() for example in examples(3000)}
    assert not trained & {example.instruction.lower() for example in unseen}
    assert {example.kind for example in unseen} == set(CHANGES)
    assert all(example.before != example.after for example in unseen if example.kind != "cut-out")


def test_a_shadow_lies_under_the_foot_of_every_product() -> None:
    for product in PRODUCTS:
        scene = Scene(product, "red", background_colour="white")
        shaded = pixels(render(scene)) != pixels(render(replace(scene, shadow=False)))
        lit = pixels(render(replace(scene, shadow=False))).min(axis=-1) < 200
        rows, body = np.nonzero(shaded.any(axis=(1, 2)))[0], np.nonzero(lit.any(axis=1))[0]
        assert abs(rows.mean() - body.max()) < 8, product


def test_an_orange_has_its_article() -> None:
    texts = [*(example.instruction for example in examples(2000)), *corpus()]
    assert any(" an orange" in text for text in texts)
    assert not any(" a orange" in text for text in texts)
