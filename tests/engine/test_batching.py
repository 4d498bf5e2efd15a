"""Rows that are sampled together: who shares a pass, who joins and leaves when, and that company changes no result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.batching import Batch, Row, advance, schedule
from engine.linear import Linear
from engine.packed import Condition, Place
from engine.pipeline import EditRequest, EditResult, KontextEngine
from engine.sampling import euler_step, guide
from engine.sampling import schedule as times
from engine.session import Session
from engine.text import TextFeatures
from tests.engine.conftest import CASE
from tests.engine.tiny import Sizes, load_engine, picture, worst, write_model

BOUND = 2e-5
CHANNELS = 4


class Fake:
    """A forward pass that counts, and answers with a velocity that a function of each place gives."""

    def __init__(self, velocity: Callable[[Place], Tensor]) -> None:
        self.velocity = velocity
        self.passes: list[Sequence[Place]] = []

    def __call__(self, places: Sequence[Place]) -> list[Tensor]:
        self.passes.append(places)
        return [self.velocity(place) for place in places]

    @property
    def sizes(self) -> list[int]:
        """Places of each pass."""
        return [len(places) for places in self.passes]


def constant(value: float) -> Fake:
    return Fake(lambda place: torch.full_like(place.x, value))


def condition(*, text: int = 3, image: int = 6, context: int = 0, fill: float = 0.0) -> Condition:
    return Condition(
        text=torch.full((text, 5), fill),
        context=torch.full((context, 5), 100.0),
        rotation=torch.zeros(text + image + context, 1, dtype=torch.complex64),
        modulation=(),
    )


def row(
    *,
    tokens: int = 6,
    context: int = 0,
    text: int = 3,
    steps: int = 4,
    guided: bool = False,
    cfg_scale: float = 3.0,
    fill: float = 0.0,
) -> Row:
    negative = condition(text=text, image=tokens, context=context, fill=-1.0)
    return Row(
        x=torch.full((tokens, CHANNELS), fill),
        condition=condition(text=text, image=tokens, context=context, fill=fill),
        times=times(steps, tokens),
        negative=negative if guided else None,
        cfg_scale=cfg_scale,
    )


def run(batch: Batch, waiting: Sequence[Row]) -> list[Row]:
    """Sample all rows, each joining as soon as it may; the finished in the order of their leaving."""
    left, finished = list(waiting), []
    while left or batch.rows:
        while left and batch.free:
            batch.admit(left.pop(0))
        batch.step()
        finished += batch.retire()
    return finished


# Who shares a pass

places = st.lists(st.integers(1, 40), max_size=12).map(
    lambda counts: [
        Place(torch.zeros(1, CHANNELS), condition(text=0, image=1, context=count - 1), 0) for count in counts
    ]
)


@given(places=places, most=st.integers(0, 100))
@settings(deadline=None)
def test_every_place_is_in_one_pass_within_the_budget(places: list[Place], most: int) -> None:
    passes = schedule(places, most)
    assert [place for each in passes for place in each] == places
    for each in passes:
        assert each
        assert len(each) == 1 or sum(place.tokens for place in each) <= most


@given(places=places, most=st.integers(0, 100))
@settings(deadline=None)
def test_a_pass_is_closed_only_when_the_next_place_would_not_fit(places: list[Place], most: int) -> None:
    passes = schedule(places, most)
    for each, following in pairwise(passes):
        assert sum(place.tokens for place in (*each, following[0])) > most


def test_rows_of_any_shape_share_a_pass() -> None:
    model = constant(0.0)
    others = [row(tokens=4, steps=1), row(context=2, steps=1), row(text=5, steps=1)]
    run(Batch(model), [row(steps=1), *others])
    assert model.sizes == [4]


def test_a_negative_prompt_takes_a_place_of_its_own() -> None:
    guided = row(guided=True, fill=7.0)
    assert [place.condition for place in guided.places] == [guided.condition, guided.negative]
    assert [place.x is guided.x for place in guided.places] == [True, True]
    assert [place.condition for place in row().places] != []


def test_each_place_is_at_its_own_time() -> None:
    model = constant(0.0)
    late = row(steps=5)
    late.done = 3
    batch = Batch(model)
    for each in (row(steps=2), late):
        batch.admit(each)
    batch.step()
    batch.step()
    assert [[place.step for place in each] for each in model.passes] == [[0, 3], [1, 4]]


# The way of a row


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_constant_velocity_lands_on_noise_minus_velocity(steps: int) -> None:
    """x goes from t = 1 to t = 0, so it moves by exactly -v, whatever the schedule."""
    (finished,) = run(Batch(constant(0.75)), [row(steps=steps, fill=2.0)])
    assert worst(finished.x, torch.full((6, CHANNELS), 1.25)) < 1e-6
    assert finished.finished
    assert finished.done == steps


def test_a_perfect_model_lands_on_its_data() -> None:
    """v = (x - data) / t is the velocity of a straight line; Euler's steps follow it exactly."""
    data = torch.linspace(-1, 1, 6 * CHANNELS).reshape(6, CHANNELS)
    model = Fake(lambda place: (place.x - data) / times(round(float(place.condition.text[0, 0])), 6)[place.step])
    rows = [row(steps=steps, fill=float(steps)) for steps in (1, 3, 9)]
    finished = run(Batch(model), rows)
    assert all(worst(each.x, data) < 1e-6 for each in finished)


def test_classifier_free_guidance_by_hand() -> None:
    """Velocity 1 with the prompt (text 0), 5 with the negative one (text -1): 5 + 3 (1 - 5) = -7."""
    model = Fake(lambda place: torch.ones_like(place.x) - 4 * place.condition.text[0, 0])
    guided, plain = row(guided=True, cfg_scale=3.0), row()
    run(Batch(model), [guided, plain])
    assert worst(guided.x, torch.full((6, CHANNELS), 7.0)) < 1e-5
    assert worst(plain.x, torch.full((6, CHANNELS), -1.0)) < 1e-6


def test_advance_is_one_euler_step() -> None:
    one = row(fill=2.0)
    advance(one, [torch.full((6, CHANNELS), 3.0), torch.full((6, CHANNELS), 1.0)])
    velocity = guide(torch.full((6, CHANNELS), 3.0), torch.full((6, CHANNELS), 1.0), 3.0)
    assert torch.equal(one.x, euler_step(torch.full((6, CHANNELS), 2.0), velocity, one.times[0], one.times[1]))
    assert one.done == 1


# Joining and leaving


def test_rows_of_different_steps_share_passes() -> None:
    model = constant(0.0)
    finished = run(Batch(model), [row(steps=5), row(steps=2), row(steps=3)])
    assert model.sizes == [3, 3, 2, 1, 1]
    assert [len(each.times) - 1 for each in finished] == [2, 3, 5]


def test_a_waiting_row_joins_as_soon_as_another_leaves() -> None:
    model = constant(0.0)
    run(Batch(model, max_rows=2), [row(steps=1), row(steps=4), row(steps=2), row(steps=1)])
    assert model.sizes == [2, 2, 2, 2]  # 8 row steps in 4 passes of 2: no slot is ever idle
    assert [len([place for place in each if place.step == 0]) for each in model.passes] == [2, 1, 0, 1]


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_the_limit_bounds_live_rows(most: int) -> None:
    model = constant(0.0)
    waiting = [row(steps=steps, guided=steps % 2 == 0) for steps in (3, 2, 4, 1, 2)]
    places = sum(len(each.places) * (len(each.times) - 1) for each in waiting)
    batch = Batch(model, max_rows=most)
    while waiting or batch.rows:
        while waiting and batch.free:
            batch.admit(waiting.pop(0))
        assert len(batch.rows) <= most
        batch.step()
        batch.retire()
    assert sum(model.sizes) == places


def test_a_full_batch_admits_nobody() -> None:
    batch = Batch(constant(0.0), max_rows=1)
    batch.admit(row())
    assert batch.free == 0
    with pytest.raises(AssertionError, match="full"):
        batch.admit(row())


def test_rows_leave_in_the_order_of_their_joining() -> None:
    first, second = row(steps=1), row(steps=1)
    batch = Batch(constant(0.0))
    batch.admit(first)
    batch.admit(second)
    batch.step()
    assert batch.retire() == [first, second]
    assert batch.rows == []


# Through the engine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> KontextEngine:
    return load_engine(write_model(tmp_path_factory.mktemp("batching") / "model", Sizes(double=2, single=2)))


@pytest.fixture
def small() -> KontextEngine:
    """The reference case's model, freshly loaded."""
    return load_engine(CASE / "model")


def mixed() -> list[EditRequest]:
    """Requests that differ in everything; several share a shape."""
    canvas = picture(64, 64)
    plain = EditRequest("a mug", image=canvas, width=64, height=64, steps=3)
    return [
        plain,
        replace(plain, prompt="a bottle", seed=1, steps=5),
        replace(plain, image=picture(64, 64, 2), seed=2, guidance=4.0),
        replace(plain, seed=3, negative_prompt="ugly", true_cfg_scale=2.5),
        replace(plain, width=48, height=80, seed=4),
        replace(plain, image=None, seed=5, steps=1),
        replace(plain, references=(picture(48, 32, 3),), seed=6),
        replace(plain, references=(picture(48, 32, 3), picture(32, 48, 4)), reference_layout="index", seed=7),
        replace(plain, seed=8, steps=2, negative_prompt="", true_cfg_scale=3.0),
        replace(plain, image=picture(16, 16, 5), references=(picture(48, 64, 5),), seed=9),
    ]


@pytest.fixture(scope="module")
def alone(tiny: KontextEngine) -> list[Tensor]:
    return [tiny.edit([request])[0].latents for request in mixed()]


@pytest.fixture(
    params=[(1, 1000), (3, 1000), (8, 1000), (8, 120)], ids=lambda each: f"{each[0]} rows, {each[1]} tokens"
)
def limited(tiny: KontextEngine, request: pytest.FixtureRequest) -> Iterator[KontextEngine]:
    before = tiny.max_rows, tiny.max_tokens
    tiny.max_rows, tiny.max_tokens = request.param
    yield tiny
    tiny.max_rows, tiny.max_tokens = before


@pytest.mark.parametrize("order", ["as written", "reversed", "shuffled"])
def test_a_batch_equals_its_rows_alone(limited: KontextEngine, alone: list[Tensor], order: str) -> None:
    requests = mixed()
    indices = list(range(len(requests)))
    if order == "reversed":
        indices.reverse()
    elif order == "shuffled":
        indices = torch.randperm(len(indices), generator=torch.Generator().manual_seed(5)).tolist()
    results = limited.edit([requests[index] for index in indices])
    assert [result.seed for result in results] == [requests[index].seed for index in indices]  # in the order asked
    for index, result in zip(indices, results, strict=True):
        assert worst(result.latents, alone[index]) < BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_results_are_equal_bit_for_bit_whatever_the_batch(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rows of other sizes, prompts and steps join and leave beside them; images and latents stay the same."""
    folder = write_model(tmp_path / "model", Sizes(double=2, single=2))
    engine = KontextEngine.load(folder, device="cpu", dtype=dtype, text_length=32)
    requests = mixed()

    def edit(order: Sequence[int]) -> dict[int, EditResult]:
        return dict(zip(order, engine.edit([requests[index] for index in order]), strict=True))

    engine.batch_invariant = True
    alone = {index: engine.edit([request])[0] for index, request in enumerate(requests)}
    for order in (range(10), list(reversed(range(10))), (3, 0, 9, 3, 7)):
        for index, result in edit(order).items():
            assert torch.equal(result.latents, alone[index].latents)
            assert result.image.tobytes() == alone[index].image.tobytes()


@pytest.mark.parametrize("invariant", [True, False])
def test_the_batch_invariant_mode_keeps_places_apart(
    tiny: KontextEngine, monkeypatch: pytest.MonkeyPatch, invariant: bool
) -> None:
    """No operation of a block sees the tokens of more than one place, though all are in one forward pass."""
    rows: list[int] = []
    original = Linear.rows

    def counted(linear: Linear, x: Tensor, start: int, stop: int, *, gelu: bool = False) -> Tensor:
        rows.append(x.shape[0])
        return original(linear, x, start, stop, gelu=gelu)

    monkeypatch.setattr(tiny, "batch_invariant", invariant)
    with tiny.session() as session:
        for seed in range(3):
            session.admit(replace(mixed()[0], seed=seed), seed)
        monkeypatch.setattr(Linear, "rows", counted)
        session.step()
    assert max(rows) == (16 + 16 + 32) * (1 if invariant else 3)  # target, context and text


def test_what_a_full_session_refuses_is_not_in(tiny: KontextEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "max_rows", 1)
    with tiny.session() as session:
        session.admit(mixed()[0], "first")
        with pytest.raises(AssertionError, match="full"):
            session.admit(mixed()[1], "second")
        assert (session.alive, session.free) == (1, 0)


def test_equal_requests_in_one_batch_come_out_equal(tiny: KontextEngine) -> None:
    first, second, other = tiny.edit([mixed()[0], mixed()[0], replace(mixed()[0], seed=77)])
    assert worst(first.latents, second.latents) < 1e-6
    assert worst(first.latents, other.latents) > 0.1


def test_the_same_call_gives_the_same_bits(tiny: KontextEngine) -> None:
    first, second = tiny.edit(mixed()), tiny.edit(mixed())
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(first, second, strict=True))


def test_progress_counts_row_steps(tiny: KontextEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(tiny, "max_rows", 2)
    requests = [EditRequest("a mug", width=32, height=32, steps=steps, seed=steps) for steps in (1, 4, 2)]
    tiny.edit(requests, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_results_stream_as_they_finish(tiny: KontextEngine) -> None:
    requests = [EditRequest("a mug", width=32, height=32, steps=steps) for steps in (4, 1, 2)]
    assert [index for index, _ in tiny.stream(requests)] == [1, 2, 0]


def test_prompts_and_pictures_are_encoded_once(small: KontextEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []
    text, autoencoder = small.text.encode, small.autoencoder.encode

    def encode_text(prompt: str) -> TextFeatures:
        encoded.append(prompt)
        return text(prompt)

    def encode_picture(pixels: Tensor) -> Tensor:
        encoded.append(tuple(pixels.shape))
        return autoencoder(pixels)

    monkeypatch.setattr(small.text, "encode", encode_text)
    monkeypatch.setattr(small.autoencoder, "encode", encode_picture)
    mug = EditRequest("a mug", picture(32, 32), steps=1, negative_prompt="ugly", true_cfg_scale=2.0)
    small.edit([mug, replace(mug, seed=1), replace(mug, prompt="ugly", negative_prompt="a mug", image=picture(32, 32))])
    small.edit([replace(mug, image=picture(32, 32, 5))])  # also in a later call
    assert encoded == [(1, 3, 32, 32), "a mug", "ugly", (1, 3, 32, 32)]
    assert (small.prompts.hits, small.prompts.misses) == (6, 2)
    assert (small.pictures.hits, small.pictures.misses) == (2, 2)
    assert small.prompts.nbytes == 2 * small.encode_prompt("ugly").nbytes


def test_no_requests_no_results(tiny: KontextEngine) -> None:
    assert tiny.edit([]) == []


def test_saved_and_loaded_engines_batch_alike(tiny: KontextEngine, alone: list[Tensor], tmp_path: Path) -> None:
    tiny.save(tmp_path / "saved")
    results = load_engine(tmp_path / "saved").edit(mixed())
    assert all(worst(result.latents, wanted) < BOUND for result, wanted in zip(results, alone, strict=True))


def test_the_cpu_is_one_denoise_step_ahead_of_a_card_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        """Of a card's clock."""

        def __init__(self, device: torch.device) -> None:
            self.number = len([each for each in told if each.startswith("record")])

        def record(self) -> None:
            told.append(f"record {self.number}")

        def synchronize(self) -> None:
            told.append(f"await {self.number}")

    monkeypatch.setattr("engine.session.torch.Event", Event)
    card = SimpleNamespace(
        device=torch.device("cuda"),
        transformer=None,
        kernels=None,
        batch_invariant=False,
        cuda_graphs=False,
        max_rows=1,
        max_tokens=1,
    )
    session: Session[int] = Session(cast(KontextEngine, card))
    for _ in range(3):
        session.step()
    assert told == ["record 0", "record 1", "await 0", "record 2", "await 1"]
