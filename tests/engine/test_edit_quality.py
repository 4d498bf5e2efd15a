"""What the benchmark of edits says about edits whose faults are known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.edit_quality import COLOUR_TOLERANCE, Measured, figures, table
from engine.likeness import psnr
from engine.training.evaluate import Outcome
from engine.training.instructions import Example
from engine.training.products import Scene, render

BEFORE = Scene("mug", "red", background="plain", background_colour="grey")
AFTER = Scene("mug", "blue", background="plain", background_colour="grey")
EXAMPLE = Example(BEFORE, AFTER, "make the mug blue", "colour")


def outcome(edited: Image.Image, example: Example = EXAMPLE) -> Outcome:
    source, target = render(BEFORE), render(example.after)
    return Outcome(example, source, edited, target, psnr(edited, target), 40.0, psnr(source, target))


def test_a_perfect_edit_keeps_everything_and_has_the_colour() -> None:
    measured = Measured.of(outcome(render(AFTER)))
    assert measured.kept_db == 99
    assert measured.colour_error == pytest.approx(0, abs=1e-9)


def test_an_edit_of_another_colour_keeps_the_background_and_misses_the_colour() -> None:
    measured = Measured.of(outcome(render(Scene("mug", "green", background="plain", background_colour="grey"))))
    assert measured.kept_db == 99
    assert measured.colour_error is not None
    assert measured.colour_error > 3 * COLOUR_TOLERANCE


def test_a_change_outside_the_edit_is_seen_there_alone() -> None:
    """10 levels over the untouched region are 28.1 dB, whatever the rest looks like."""
    target = np.asarray(render(AFTER), np.int16)
    untouched = (np.asarray(render(BEFORE), np.int16) == target).all(axis=-1)
    spoilt = np.where(untouched[..., None], target + 10, target).astype(np.uint8)
    measured = Measured.of(outcome(Image.fromarray(spoilt)))
    assert measured.kept_db == pytest.approx(20 * np.log10(25.5), abs=0.01)
    assert measured.far_db == pytest.approx(20 * np.log10(25.5), abs=0.01)
    assert measured.colour_error == pytest.approx(0, abs=1e-9)


def test_a_wobbling_outline_is_not_far_from_what_is_edited() -> None:
    target = np.asarray(render(AFTER), np.int16)
    changed = (np.asarray(render(BEFORE), np.int16) != target).any(axis=-1)
    beside = np.roll(changed, 2, axis=1) & ~changed
    measured = Measured.of(outcome(Image.fromarray(np.where(beside[..., None], target + 10, target).astype(np.uint8))))
    assert measured.kept_db is not None
    assert measured.kept_db < 99
    assert measured.far_db == 99


def test_figures_count_what_they_can_and_leave_out_the_rest() -> None:
    good = Measured.of(outcome(render(AFTER)))
    bad = Measured.of(outcome(render(BEFORE)))
    from_text = Measured.of(
        Outcome(
            Example(None, AFTER, "a blue mug", "text-to-image"), None, render(AFTER), render(AFTER), 99.0, 40.0, None
        )
    )
    found = figures([good, bad, from_text])
    assert found["nearer_share"] == 0.5
    assert found["colour_share"] == 0.5
    assert found["kept_db"] == 99
    assert figures([from_text])["nearer_share"] is None
    assert table({"all": [good, bad], "text": [from_text]}).splitlines()[2].split()[-3:] == ["-", "-", "-"]
