"""Sizes through a chain: canvas, target, padding, and the way back to the source (RECIPES.md 2.10, 2.13)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_batch.planning.frames import Origin, Shape, fit_canvas, fit_reference, source_shape, upscale
from kontext_batch.planning.plan import Plan
from tests.unit.planning.world import MODELS, image, params_of, plan, refused, step_of

MP = 1024 * 1024
SIDES = st.integers(16, 6000)


def shape_of(width: int, height: int) -> Shape:
    return source_shape(image("a.jpg", (width, height)))


def test_keep_takes_the_nearest_size_and_pads() -> None:
    fitted = fit_canvas(shape_of(3000, 1800), None, "pad", MP)
    assert (fitted.canvas, fitted.target) == ((1328, 800), (1328, 800))
    assert fitted.box == (0, 1, 1328, 797)
    assert fitted.shape == Shape((1328, 800), (0, 1, 1328, 797), Origin((0, 1, 1328, 797), (3000, 1800)))


def test_a_picture_of_a_kontext_ratio_needs_no_padding() -> None:
    fitted = fit_canvas(shape_of(3000, 2000), None, "pad", MP)
    assert fitted.box == (0, 0, 1248, 832)
    assert fitted.shape.trim is None
    assert fitted.shape.origin == Origin((0, 0, 1248, 832), (3000, 2000))


def test_a_frame_pads_and_its_padding_is_kept() -> None:
    fitted = fit_canvas(shape_of(3000, 2000), (1, 1), "pad", MP)
    assert (fitted.canvas, fitted.fit, fitted.box) == ((1024, 1024), "pad", (0, 170, 1024, 683))
    assert fitted.shape == Shape((1024, 1024), None, Origin((0, 170, 1024, 683), (3000, 2000)))


def test_a_frame_crops() -> None:
    fitted = fit_canvas(shape_of(3000, 2000), (1, 1), "crop", MP)
    assert (fitted.canvas, fitted.fit, fitted.box) == ((1024, 1024), "crop", (500, 0, 2000, 2000))
    assert fitted.shape == Shape((1024, 1024), None, Origin((0, 0, 1024, 1024), (2000, 2000)))


def test_recompose_keeps_the_canvas_and_only_the_target_takes_the_frame() -> None:
    fitted = fit_canvas(shape_of(3000, 2000), (1, 1), "recompose", MP)
    assert (fitted.canvas, fitted.target, fitted.fit) == ((1248, 832), (1024, 1024), "pad")
    assert fitted.shape == Shape((1024, 1024), None, None)


def test_recompose_into_its_own_ratio_has_a_way_back() -> None:
    assert fit_canvas(shape_of(3000, 2000), (3, 2), "recompose", MP).shape.origin is not None


def test_a_second_step_of_the_same_size_moves_nothing() -> None:
    first = fit_canvas(shape_of(3000, 1800), None, "pad", MP).shape
    second = fit_canvas(first, None, "pad", MP)
    assert second.box == (0, 0, 1328, 800)
    assert second.shape == first


def test_boxes_are_carried_through_another_frame() -> None:
    first = fit_canvas(shape_of(2000, 2000), None, "pad", MP).shape
    wide = fit_canvas(first, (2, 1), "pad", MP).shape
    assert wide.size == (1456, 720)
    assert wide.origin == Origin((368, 0, 720, 720), (2000, 2000))


def test_the_shipped_models_sizes() -> None:
    fitted = fit_canvas(shape_of(640, 480), None, "pad", 128 * 128)
    assert fitted.canvas == (144, 112)
    assert fitted.box == (0, 2, 144, 108)


def test_references_are_padded_to_their_own_size() -> None:
    assert fit_reference((1000, 2000), MP) == ((720, 1456), (0, 8, 720, 1440))


def test_upscale() -> None:
    assert upscale((1000, 500), (2000, 2000), "pad") == 2
    assert upscale((1000, 500), (2000, 2000), "crop") == 4
    assert upscale((1000, 1000), (500, 250), "pad") == 0.25


@given(SIDES, SIDES, st.none() | st.tuples(SIDES, SIDES), st.sampled_from(["pad", "crop", "recompose"]), st.booleans())
def test_nothing_is_stretched_and_boxes_lie_inside(
    width: int, height: int, frame: tuple[int, int] | None, fit: str, small: bool
) -> None:
    area = 128 * 128 if small else MP
    fitted = fit_canvas(shape_of(width, height), frame, fit, area)
    again = fit_canvas(fitted.shape, None, "pad", area)
    assert fitted.canvas[0] % 16 == fitted.canvas[1] % 16 == fitted.target[0] % 16 == fitted.target[1] % 16 == 0
    inside = (width, height) if fitted.fit == "crop" else fitted.canvas
    for box, (w, h) in ((fitted.box, inside), *((each, again.target) for each in (again.shape.trim,) if each)):
        assert 0 <= box[0] < box[0] + box[2] <= w
        assert 0 <= box[1] < box[1] + box[3] <= h
    w, h = fitted.box[2:]
    if fitted.fit == "pad" and min(w, h) > 8:
        # One scale on both sides, up to the rounding of a pixel.
        assert abs(w / width * height - h) <= 0.5 + 0.5 * height / width + 1
    if fitted.shape.origin is not None:
        assert fitted.shape.origin.size[0] <= width
        assert fitted.shape.origin.size[1] <= height


# ------------------------------------------------------------------------------------------------------- in plans

RECIPE = """
inputs: {{item: {{table: items.csv, key: sku, files: {{photo: "photos/${{item.sku}}.*"}}}}}}
defaults: {{edit: {{model: kontext}}}}
steps:
  clean: {{op: edit, image: "${{item.photo}}", prompt: Clean.{edit}}}
  finish: {{op: finish, image: "${{clean}}"{finish}}}
outputs: [{{from: "${{finish}}", to: "out/${{item}}.${{ext}}"}}]
"""


def finished(finish: str, *, edit: str = "", size: tuple[int, int] = (3000, 1800)) -> Any:
    made = plan(RECIPE.format(edit=edit, finish=finish), table="sku\nA\n", files={"photos/A.jpg": size})
    return params_of(made, "finish A")


def told(finish: str, *, edit: str = "", size: tuple[int, int] = (3000, 1800)) -> str:
    (problem,) = refused(RECIPE.format(edit=edit, finish=finish), table="sku\nA\n", files={"photos/A.jpg": size})
    return problem


PADDED = {"x": 0, "y": 1, "width": 1328, "height": 797}


def test_size_source_maps_back_to_the_inputs_own_pixels() -> None:
    params = finished(", size: source")
    assert (params["size"], params["box"]) == ({"width": 3000, "height": 1800}, PADDED)


def test_size_source_without_padding_needs_no_box() -> None:
    params = finished(", size: source", size=(3000, 2000))
    assert (params["size"], params["box"]) == ({"width": 3000, "height": 2000}, None)


def test_size_source_finds_the_way_back_out_of_a_frame() -> None:
    params = finished(", size: source", edit=', frame: "1:1"', size=(3000, 2000))
    assert params["box"] == {"x": 0, "y": 170, "width": 1024, "height": 683}


def test_size_source_of_a_crop_is_what_was_left() -> None:
    params = finished(", size: source", edit=', frame: "1:1", fit: crop', size=(3000, 2000))
    assert (params["size"], params["box"]) == ({"width": 2000, "height": 2000}, None)


def test_padding_that_nobody_asked_for_is_cut_off() -> None:
    assert finished(", size: 600x600")["box"] == PADDED
    assert finished(", size: 600x600", edit=', frame: "1:1"')["box"] is None


def test_without_a_size_the_picture_keeps_its_pixels() -> None:
    assert finished("")["size"] == {"width": 1328, "height": 797}


def test_a_recomposed_picture_has_no_way_back() -> None:
    assert "no way back to a source" in told(", size: source", edit=', frame: "1:1", fit: recompose')


def test_an_upscale_beyond_the_limit_is_told_with_its_numbers() -> None:
    assert told(", size: 4000x4000, max_upscale: 3").endswith(
        "steps.finish: 1328x797 to 4000x4000 enlarges 3.01 times, more than max_upscale 3 (at item A)"
    )


def test_settings_of_the_step_come_before_the_channels_and_the_defaults() -> None:
    params = finished(", channel: square, quality: 50, fit: crop")
    assert (params["quality"], params["fit"], params["format"]) == (50, "crop", "jpeg")
    assert (params["size"], params["background"]) == ({"width": 1000, "height": 1000}, "#EEEEEE")


@pytest.mark.parametrize(("format_", "quality"), [("jpeg", 90), ("webp", 85), ("avif", 60), ("png", None)])
def test_each_format_has_its_quality(format_: str, quality: int | None) -> None:
    assert finished(f", format: {format_}")["quality"] == quality


def test_the_background_of_a_canvas_may_come_from_a_column() -> None:
    body = RECIPE.format(edit=', background: "${item.color}"', finish="")
    made = plan(body, table="sku,color\nA,e4002b\n", files={"photos/A.jpg": (10, 10)})
    assert params_of(made, "clean A")["canvas"]["background"] == "#E4002B"
    (problem,) = refused(body, table="sku,color\nA,red\n", files={"photos/A.jpg": (10, 10)})
    assert problem.endswith(
        "steps.clean.background: 'red' is no colour; write six hex digits, as in '#E4002B' (at item A)"
    )


# ----------------------------------------------------------------------------------------------- latents handed on

HANDED = """
inputs: {{item: {{table: items.csv, key: sku, files: {{photo: "photos/${{item.sku}}.*"}}}}}}
defaults: {{edit: {{model: kontext{default}}}}}
steps:
  one: {{op: edit, image: "${{item.photo}}", prompt: One.}}
  two: {{op: edit, image: "${{one}}", prompt: Two.{two}}}
outputs: [{{from: "${{two}}", to: "out/${{item}}.png"}}]
"""


def handed(*, default: str = "", two: str = "") -> Plan:
    """A chain of two, with more keys in the defaults or in its second step."""
    body = HANDED.format(default=default, two=two)
    return plan(body, table="sku\nA\n", files={"photos/A.jpg": (3000, 1800)})


@pytest.mark.parametrize(
    ("default", "two", "expected"),
    [
        ("", "", "latents"),
        (", handoff: pixels", "", "pixels"),
        (", handoff: pixels", ", handoff: latents", "latents"),
        ("", ", handoff: pixels", "pixels"),
    ],
)
def test_latents_are_handed_on_between_steps_of_one_canvas_unless_pixels_are_asked_for(
    default: str, two: str, expected: str
) -> None:
    made = handed(default=default, two=two)
    assert params_of(made, "one A")["handoff"] == "pixels"  # from a photo
    assert params_of(made, "two A")["handoff"] == expected


@pytest.mark.parametrize(
    ("two", "other"), [(', frame: "1:1"', "size"), (", model: other", "model")], ids=["size", "model"]
)
def test_what_does_not_fit_hands_on_pixels_and_says_so_where_latents_were_asked_for(
    two: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "other", replace(MODELS["kontext"], name="other", sha256="e" * 64))
    note = f"steps.two: another {other} than its parent's, so pixels are handed on"
    asked, silent = handed(default=", handoff: latents", two=two), handed(two=two)
    assert [params_of(made, "two A")["handoff"] for made in (asked, silent)] == ["pixels", "pixels"]
    assert note in asked.notes
    assert note not in silent.notes


def test_a_step_keeps_its_key_when_another_reads_its_latents() -> None:
    alone = HANDED.replace('"${{two}}"', '"${{one}}"').format(default="", two="")
    first = plan(alone, table="sku\nA\n", files={"photos/A.jpg": (3000, 1800)})
    assert [step.key for step in first.steps] == [step_of(handed(), "one A").key]
