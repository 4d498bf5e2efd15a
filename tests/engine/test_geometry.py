from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import geometry

SIDES = st.integers(1, 5000)


def test_the_17_sizes_of_kontext() -> None:
    sizes = geometry.sizes()
    assert len(sizes) == 17
    assert sizes[0] == (672, 1568)
    assert sizes[8] == (1024, 1024)
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert {geometry.token_count(*size) for size in sizes} <= set(range(4042, 4151))


@pytest.mark.parametrize("area", [128 * 128, 256 * 256, 512 * 512, 768 * 1024])
def test_sizes_at_another_area_keep_it_within_a_tenth_and_lie_on_the_grid(area: int) -> None:
    sizes = geometry.sizes(area)
    assert len(sizes) == len(set(sizes))
    assert {(h, w) for w, h in sizes} == set(sizes)
    for width, height in sizes:
        assert width % 16 == height % 16 == 0
        assert abs(width * height / area - 1) <= 0.1
    assert list(sizes) == sorted(sizes, key=lambda size: size[0] / size[1])


def test_sizes_of_the_shipped_model() -> None:
    assert (128, 128) in geometry.sizes(128 * 128)
    assert all(58 <= geometry.token_count(*size) <= 70 for size in geometry.sizes(128 * 128))


def test_an_area_below_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="less than one token"):
        geometry.sizes(255)


@pytest.mark.parametrize(
    ("wanted", "size"),
    [
        ((1000, 1000), (1024, 1024)),
        ((1920, 1080), (1392, 752)),
        ((3000, 2000), (1248, 832)),
        ((2000, 3000), (832, 1248)),
        ((10_000, 100), (1568, 672)),
        ((100, 10_000), (672, 1568)),
        ((16, 9), (1392, 752)),
    ],
)
def test_nearest_size(wanted: tuple[int, int], size: tuple[int, int]) -> None:
    assert geometry.nearest_size(*wanted) == size


def test_of_equally_near_sizes_the_narrower_one() -> None:
    # 5:4 between 8:8 and 12:8 tokens: both are 1/4 away.
    assert geometry.nearest_size(5, 4, area=4 * 256) == min(
        geometry.sizes(4 * 256), key=lambda size: (abs(size[0] / size[1] - 1.25), size[0])
    )


@given(SIDES, SIDES)
def test_nearest_size_is_bfls_rule(width: int, height: int) -> None:
    best = min((abs(width / height - w / h), w, h) for w, h in geometry.KONTEXT_SIZES)
    assert geometry.nearest_size(width, height) == best[1:]


def test_pixels_latents_and_tokens() -> None:
    assert geometry.token_grid(1392, 752) == (47, 87)
    assert geometry.token_count(1392, 752) == 47 * 87
    assert geometry.latent_size(1392, 752) == (174, 94)
    with pytest.raises(ValueError, match="multiples of 16"):
        geometry.token_grid(1000, 1024)


def test_padding_is_centred() -> None:
    assert geometry.pad_box(200, 100, 128, 128) == (0, 32, 128, 64)
    assert geometry.pad_box(100, 200, 128, 128) == (32, 0, 64, 128)
    assert geometry.pad_box(50, 50, 128, 128) == (0, 0, 128, 128)


def test_cropping_is_centred() -> None:
    assert geometry.crop_box(200, 100, 128, 128) == (50, 0, 100, 100)
    assert geometry.crop_box(100, 200, 128, 128) == (0, 50, 100, 100)


@given(SIDES, SIDES, SIDES, SIDES)
def test_boxes_lie_inside_and_keep_the_ratio(width: int, height: int, into_width: int, into_height: int) -> None:
    x, y, w, h = geometry.pad_box(width, height, into_width, into_height)
    assert 0 <= x <= x + w <= into_width
    assert 0 <= y <= y + h <= into_height
    assert w == into_width or h == into_height
    exact = min(into_width / width, into_height / height)
    assert math.isclose(w, width * exact, abs_tol=1)
    assert math.isclose(h, height * exact, abs_tol=1)
    x, y, w, h = geometry.crop_box(width, height, into_width, into_height)
    assert 0 <= x <= x + w <= width
    assert 0 <= y <= y + h <= height
    assert w == width or h == height
