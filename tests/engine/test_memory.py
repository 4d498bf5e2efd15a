"""What is planned for a device's memory: figures of FLUX.1 Kontext [dev], and what follows from them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import memory, pipeline
from engine.batching import DEFAULT_MAX_TOKENS
from engine.config import KONTEXT_DEV
from engine.errors import ConfigError
from engine.linear import FP8
from engine.memory import MemoryPlan, Parameters, count_parameters, memory_plan, plan_for
from engine.modes import EXACT, Approximation
from engine.pipeline import EditRequest, KontextEngine
from engine.text import clip_l_config, t5_xxl_config
from engine.weights import find_model
from tests.engine.conftest import CASE
from tests.engine.tiny import edited_json, picture

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 10**9


@pytest.fixture(scope="module")
def parameters() -> Parameters:
    return count_parameters(KONTEXT_DEV, clip=clip_l_config(), t5=t5_xxl_config())


def planned(
    parameters: Parameters,
    size: float,
    *,
    dtype: torch.dtype = torch.bfloat16,
    approximation: Approximation = EXACT,
    may_offload: bool = True,
) -> MemoryPlan:
    """The plan of Kontext-dev for a device of `size` GB."""
    return memory_plan(
        KONTEXT_DEV,
        parameters,
        memory=int(size * GB),
        dtype=dtype,
        rows=8,
        approximation=approximation,
        may_offload=may_offload,
    )


def test_parameters_of_kontext_dev(parameters: Parameters) -> None:
    """ENGINE.md 1."""
    wanted = Parameters(
        transformer=11_901_408_320,
        block_linears=8_606_711_808,
        t5=4_762_310_656,
        clip=123_060_480,
        autoencoder=83_819_683,
    )
    assert parameters == wanted


def test_bytes_of_kontext_dev(parameters: Parameters) -> None:
    """ENGINE.md 2.7, but for the autoencoder: ours is fp32."""
    plan = planned(parameters, 80)
    weights = {name: getattr(plan, name) / GB for name in ("transformer", "t5", "clip", "autoencoder", "weights")}
    wanted = {"transformer": 23.8, "t5": 9.5, "clip": 0.25, "autoencoder": 0.34, "weights": 33.9}
    assert weights == pytest.approx(wanted, rel=0.02)
    assert 1.2 * GB < plan.row < 1.4 * GB
    assert 1.4 * GB < plan.decode < 1.6 * GB


def test_fp8_is_counted_of_the_linears_that_have_it(parameters: Parameters) -> None:
    plan, wide = planned(parameters, 80, dtype=FP8), planned(parameters, 80)
    assert plan.transformer == pytest.approx(15.2 * GB, rel=0.005)
    assert (plan.t5, plan.clip, plan.row) == (wide.t5, wide.clip, wide.row)


@pytest.mark.parametrize(
    ("size", "offload_texts", "rows"),
    [
        (24, True, 0),
        (26, True, 0),
        (28, True, 1),
        (32, True, 4),
        (36, True, 7),
        (36.5, True, 8),
        (37, False, 1),
        (40, False, 3),
        (80, False, 8),
    ],
)
def test_what_is_decided_for_kontext_dev(parameters: Parameters, size: float, offload_texts: bool, rows: int) -> None:
    plan = planned(parameters, size)
    assert (plan.offload_texts, plan.rows) == (offload_texts, rows)


@pytest.mark.parametrize(
    ("size", "offload_texts", "rows"), [(28, True, 0), (31, True, 1), (39, True, 3), (40, False, 1), (80, False, 8)]
)
def test_contexts_that_are_kept_take_their_room(
    parameters: Parameters, size: float, offload_texts: bool, rows: int
) -> None:
    near = Approximation(context_every=2)
    plan = planned(parameters, size, approximation=near)
    assert (plan.offload_texts, plan.rows) == (offload_texts, rows)
    assert plan.row - planned(parameters, size).row == pytest.approx(2.87 * GB, rel=0.01)


@pytest.mark.parametrize("near", [EXACT, Approximation(context_every=2)])
@pytest.mark.parametrize("negative", [None, "ugly"])
def test_what_a_row_keeps_is_planned(engine: KontextEngine, near: Approximation, negative: str | None) -> None:
    """Once for a row, and once more for its negative prompt."""
    side = round(engine.config.native_area**0.5)
    request = EditRequest("a mug", picture(side, side), width=side, height=side, negative_prompt=negative)
    with pytest.MonkeyPatch.context() as patch, engine.session() as session:
        patch.setattr(engine, "approximation", near)
        session.admit(replace(request, true_cfg_scale=1.0 if negative is None else 2.0), 0)
        session.step()
        (row,) = session._batch.rows
    places = [row.condition] if row.negative is None else [row.condition, row.negative]
    modulations = sum(each.nbytes for place in places for each in place.modulation)
    contexts = [each for one in row.memories if one is not None for each in (*one.keys, *one.values)]
    planned = memory._kept_bytes(engine.config, torch.float32, near)
    assert modulations + sum(each.nbytes for each in contexts) == planned * len(places)


@pytest.mark.parametrize("near", [EXACT, Approximation(context_every=2)])
@pytest.mark.parametrize("size", [24, 28, 31, 34, 40, 45, 60, 80])
def test_passes_have_no_more_tokens_than_fit(parameters: Parameters, size: float, near: Approximation) -> None:
    """Of rows that share what there is, each has its own pass's tokens; a negative prompt's wait for another pass."""
    plan = planned(parameters, size, approximation=near)
    token = memory._token_bytes(KONTEXT_DEV.flow, torch.bfloat16)
    kept = memory._kept_bytes(KONTEXT_DEV, torch.bfloat16, near)
    assert plan.row == kept + 8704 * token
    assert plan.tokens >= plan.rows * 8704
    texts = 0 if plan.offload_texts else plan.t5 + plan.clip
    if plan.rows:
        total = plan.transformer + plan.autoencoder + texts + plan.rows * kept
        assert total + max(plan.tokens * token, plan.decode) <= plan.memory - memory.RESERVE


def test_the_text_encoders_of_a_cpu_have_nowhere_to_go(parameters: Parameters) -> None:
    plan = planned(parameters, 32, may_offload=False)
    assert (plan.offload_texts, plan.rows) == (False, 0)


def test_t5_of_a_half_precision_model_is_counted_as_it_is_loaded(parameters: Parameters) -> None:
    plan = planned(parameters, 80, dtype=torch.float16)
    assert plan.t5 == 4 * parameters.t5
    assert plan.clip == 2 * parameters.clip


@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_a_folder_is_planned_by_its_configs(dtype: torch.dtype) -> None:
    engine = KontextEngine.load(CASE / "model", device="cpu", dtype=dtype)
    plan = plan_for(find_model(CASE / "model"), CUDA, memory=80 * GB, dtype=dtype, rows=4)
    parts = {"transformer": engine.transformer, "t5": engine.text.t5, "clip": engine.text.clip}
    for name, part in {**parts, "autoencoder": engine.autoencoder}.items():
        assert getattr(plan, name) == sum(each.nbytes for each in part.parameters()), name
    assert plan.rows == 4


@pytest.mark.parametrize(("name", "value"), [("d_model", "wide"), ("d_kv", -1), ("num_heads", None)])
def test_a_damaged_config_is_named(model_folder: Path, name: str, value: object) -> None:
    with edited_json(model_folder / "text_encoder_2" / "config.json") as config:
        config[name] = value
    with pytest.raises(ConfigError, match="text_encoder_2"):
        plan_for(find_model(model_folder), CUDA, memory=GB, dtype=torch.float32, rows=1)


@pytest.mark.parametrize(
    ("device", "free", "texts", "rows", "tokens"),
    [
        (CUDA, 80 * GB, CUDA, 6, DEFAULT_MAX_TOKENS),
        (CUDA, 0, CPU, 1, 0),
        (CPU, 0, CPU, 6, DEFAULT_MAX_TOKENS),
    ],
)
def test_loading_follows_the_plan_on_cuda_alone(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: torch.device,
    free: int,
    texts: torch.device,
    rows: int,
    tokens: int,
) -> None:
    monkeypatch.setattr(pipeline, "free_memory", lambda _: free)
    with caplog.at_level(logging.WARNING):
        placed = pipeline._placed(find_model(CASE / "model"), device, torch.float32, 6, EXACT)
    assert placed == (texts, rows, tokens)
    assert ("stay on the CPU" in caplog.text) == (texts != device)


def test_an_engine_works_as_it_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def placed(*given: object) -> tuple[torch.device, int, int]:
        asked.extend(given[2:])
        return CPU, 3, 1000

    monkeypatch.setattr(pipeline, "_placed", placed)
    near = Approximation(context_every=2)
    engine = KontextEngine.load(CASE / "model", device="cpu", dtype=FP8, max_rows=5, approximation=near)
    assert asked == [FP8, 5, near]
    assert (engine.max_rows, engine.max_tokens, engine.approximation) == (3, 1000, near)


@pytest.mark.parametrize("rows", [0, -1])
def test_an_engine_without_rows_is_refused(engine: KontextEngine, rows: int) -> None:
    with pytest.raises(ConfigError, match=f"max_rows is {rows}; at least 1"):
        KontextEngine.load("no/such/folder", device="cpu", max_rows=rows)  # before anything is read
    with pytest.raises(ConfigError, match=f"max_rows is {rows}; at least 1"):
        KontextEngine(
            config=engine.config,
            transformer=engine.transformer,
            autoencoder=engine.autoencoder,
            text=engine.text,
            device=CPU,
            max_rows=rows,
        )


def test_features_are_handed_to_the_engines_device(engine: KontextEngine) -> None:
    """Whatever the device of the text encoders is."""
    elsewhere = KontextEngine(
        config=engine.config,
        transformer=engine.transformer,
        autoencoder=engine.autoencoder,
        text=engine.text,
        device=torch.device("meta"),
    )
    features = elsewhere.encode_prompt("make it red")
    assert {features.t5.device.type, features.pooled.device.type} == {"meta"}
    assert engine.text.t5.device == CPU


def test_what_torch_holds_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that was loaded before has left it there."""
    for name, value in {"memory_reserved": 30, "memory_allocated": 10, "mem_get_info": (5, 80)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert (memory.free_memory(CUDA), memory.total_memory(CUDA)) == (25, 80)
    assert memory.free_memory(CPU) > 0
