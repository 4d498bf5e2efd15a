"""The engine against the recorded reference case: every intermediate, then the final latents (2e-5; ENGINE.md 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.latents import context_ids, draw_noise, grid_ids, image_to_tensor, pack, tensor_to_image, unpack
from engine.pipeline import EditRequest, KontextEngine
from engine.sampling import euler_step, schedule, shift_mu

Tensors = Mapping[str, Tensor]
COLUMNS, ROWS = 4, 6  # the target's token grid: 64 x 96 pixels


def worst(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return (found.float() - wanted.float()).abs().max().item()


def picture(inputs: Tensors) -> Image.Image:
    return Image.fromarray(np.asarray(inputs["ctx0_rgb_u8"][0]))


@pytest.fixture(scope="module")
def request_(inputs: Tensors, case: dict[str, Any]) -> EditRequest:
    return EditRequest(case["prompts"][0], image=picture(inputs), width=64, height=96, steps=4, guidance=2.5, seed=0)


def test_tokens_and_features_of_both_text_encoders(
    engine: KontextEngine, inputs: Tensors, expected: Tensors, case: dict[str, Any]
) -> None:
    prompt = case["prompts"][0]
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    assert torch.equal(engine.text.t5_tokenizer(prompt, max_length=32, **options).input_ids, inputs["t5_input_ids"])
    assert torch.equal(engine.text.clip_tokenizer(prompt, max_length=77, **options).input_ids, inputs["clip_input_ids"])
    features = engine.text.encode(prompt)
    assert worst(features.t5[None], expected["t5_embeds"]) < 1e-5
    assert worst(features.pooled[None], expected["clip_pooled"]) < 1e-5


@torch.no_grad()
def test_context_latents(engine: KontextEngine, inputs: Tensors, expected: Tensors) -> None:
    assert worst(image_to_tensor(picture(inputs))[None], inputs["ctx0_pixels"]) == 0
    mean, logvar = engine.autoencoder.moments(inputs["ctx0_pixels"])
    assert worst(torch.cat([mean, logvar], dim=1), expected["ctx0_moments"]) < 5e-5
    latents = engine.autoencoder.encode(inputs["ctx0_pixels"])
    assert worst(latents, expected["ctx0_latents"]) < 2e-5
    assert worst(pack(latents), expected["ctx_packed"]) < 2e-5


def test_noise_positions_and_schedule(inputs: Tensors, case: dict[str, Any]) -> None:
    assert worst(draw_noise(24, 64, ROWS, COLUMNS, seed=0)[None], inputs["noise_packed"]) == 0
    assert worst(pack(inputs["noise"]), inputs["noise_packed"]) == 0
    assert worst(unpack(inputs["noise_packed"], ROWS, COLUMNS), inputs["noise"]) == 0
    ids = torch.cat([grid_ids(ROWS, COLUMNS), *context_ids([(7, 5)], "index")])
    assert worst(ids, inputs["img_ids"]) == 0
    assert shift_mu(24) == pytest.approx(case["mu"], abs=1e-12)
    assert worst(torch.tensor(schedule(4, 24)), inputs["sigmas"]) < 1e-7


@torch.no_grad()
def test_velocity_and_latents_of_every_step(engine: KontextEngine, inputs: Tensors, expected: Tensors) -> None:
    times, x = schedule(4, 24), inputs["noise_packed"]
    for step in range(4):
        velocity = engine.transformer(
            img=torch.cat([x, expected["ctx_packed"]], dim=1),
            img_ids=inputs["img_ids"][None],
            txt=expected["t5_embeds"],
            pooled=expected["clip_pooled"],
            t=torch.tensor([times[step]]),
            guidance=inputs["guidance"],
        )[:, :24]
        assert worst(velocity, expected[f"step{step:03d}.velocity"]) < 2e-5
        x = euler_step(x, velocity, times[step], times[step + 1])
        assert worst(x, expected[f"step{step:03d}.latents"]) < 2e-5


def test_edit_end_to_end(engine: KontextEngine, request_: EditRequest, expected: Tensors) -> None:
    steps: list[tuple[int, int]] = []
    result = engine.edit([request_], on_step=lambda done, total: steps.append((done, total)))[0]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert worst(result.latents[None], expected["final_packed"]) < 2e-5
    assert worst(unpack(result.latents[None], ROWS, COLUMNS), expected["final_latents"]) < 2e-5
    difference = np.abs(np.asarray(result.image, np.int16) - np.asarray(expected["image_u8"][0], np.int16))
    assert difference.max() <= 1  # a value on the edge of two bytes may round either way
    assert (difference > 0).mean() < 0.001


@torch.no_grad()
def test_decoded_pixels(engine: KontextEngine, expected: Tensors) -> None:
    decoded = engine.autoencoder.decode(expected["final_latents"])
    assert worst(decoded, expected["decoded"]) < 2e-5
    assert np.array_equal(np.asarray(tensor_to_image(expected["decoded"][0])), np.asarray(expected["image_u8"][0]))


def test_explicit_noise_replays_a_seed(engine: KontextEngine, request_: EditRequest, inputs: Tensors) -> None:
    seeded = engine.edit([request_])[0]
    replayed = engine.edit([replace(request_, seed=99, noise=inputs["noise_packed"][0])])[0]
    assert torch.equal(seeded.latents, replayed.latents)
    other = engine.edit([replace(request_, seed=99)])[0]
    assert worst(other.latents, seeded.latents) > 0.1
