"""The engine against live diffusers, on models and requests other than the recorded case's (2e-5; ENGINE.md 5).

diffusers is called once for each request: with several prompts and several images in one call it pairs them wrongly.
It has no multi-reference path, so its transformer and scheduler are driven here by hand, with positions written out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.latents import pack
from engine.pipeline import EditRequest
from engine.sampling import schedule
from tests.engine.conftest import CASE
from tests.engine.tiny import (
    TEXT_LENGTH,
    Sizes,
    load_engine,
    load_pipeline,
    picture,
    run_pipeline,
    text_to_image,
    worst,
    write_model,
)

BOUND = 2e-5

MODELS = {
    "reference": None,
    "deep-single": Sizes(),
    "only-double": Sizes(heads=2, head_dim=24, axes=(8, 8, 8), double=3, single=0, seed=8),
    "8-latent-channels": Sizes(heads=4, head_dim=8, axes=(2, 4, 2), double=1, single=1, latent_channels=8, seed=9),
    "no-guidance": Sizes(double=2, single=1, guidance=False, seed=10),
}


class Pair:
    """One model in the engine and in diffusers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = load_engine(folder)
        self.pipeline = load_pipeline(folder)
        self.plain = text_to_image(self.pipeline)

    def check(self, *requests: EditRequest) -> None:
        """One call of the engine against one call of diffusers for each request."""
        results = self.engine.edit(requests)
        for request, result in zip(requests, results, strict=True):
            pipeline = self.plain if request.image is None else self.pipeline
            wanted = run_pipeline(pipeline, request)
            assert wanted.std() > 0.3
            assert worst(result.latents, wanted) < BOUND


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    root, found = tmp_path_factory.mktemp("models"), {}
    for name, sizes in MODELS.items():
        found[name] = Pair(CASE / "model" if sizes is None else write_model(root / name, sizes))
    return found


@pytest.fixture(params=list(MODELS))
def pair(pairs: dict[str, Pair], request: pytest.FixtureRequest) -> Pair:
    return pairs[request.param]


@pytest.fixture
def reference(pairs: dict[str, Pair]) -> Pair:
    return pairs["reference"]


def test_a_batch_of_prompts_and_seeds(pair: Pair) -> None:
    prompts = ["make the mug red", "a blue bottle", "", "remove the background and put the mug on a table"]
    pair.check(
        *(
            EditRequest(prompt, image=picture(64, 64, seed), width=64, height=64, steps=3, seed=seed)
            for seed, prompt in enumerate(prompts)
        )
    )


@pytest.mark.parametrize(
    ("canvas", "target"),
    [((96, 48), (96, 48)), ((48, 112), (48, 112)), ((112, 64), (48, 80)), ((64, 64), (16, 144)), ((16, 16), (64, 64))],
)
def test_wide_tall_and_different_canvas_and_target(
    pair: Pair, canvas: tuple[int, int], target: tuple[int, int]
) -> None:
    pair.check(EditRequest("a mug", image=picture(*canvas, 3), width=target[0], height=target[1], steps=3, seed=11))


def test_guidance_and_steps_of_each_row(pair: Pair) -> None:
    pair.check(
        *(
            EditRequest("a mug", image=picture(64, 48), width=48, height=64, steps=steps, guidance=guidance, seed=steps)
            for steps, guidance in ((1, 1.0), (2, 2.5), (5, 3.5), (9, 7.25))
        )
    )


@pytest.mark.parametrize(("scale", "negative"), [(3.0, "blurry"), (1.5, ""), (1.0, "blurry")])
def test_classifier_free_guidance(pair: Pair, scale: float, negative: str) -> None:
    pair.check(
        EditRequest(
            "a red mug",
            image=picture(64, 80),
            width=64,
            height=80,
            steps=4,
            seed=2,
            negative_prompt=negative,
            true_cfg_scale=scale,
        )
    )


@pytest.mark.parametrize("negative", [None, "blurry"])
def test_text_to_image(pair: Pair, negative: str | None) -> None:
    pair.check(
        EditRequest(
            "a red mug",
            width=96,
            height=64,
            steps=4,
            guidance=3.5,
            seed=4,
            negative_prompt=negative,
            true_cfg_scale=2.0,
        )
    )


def test_one_call_that_mixes_everything(pair: Pair) -> None:
    pair.check(
        EditRequest("a red mug", width=64, height=64, steps=3, seed=1),
        EditRequest("a shirt", image=picture(64, 64), width=64, height=64, steps=4, seed=2, guidance=4.0),
        EditRequest(
            "a bag",
            image=picture(64, 64, 1),
            width=64,
            height=64,
            steps=2,
            seed=3,
            negative_prompt="ugly",
            true_cfg_scale=4.0,
        ),
        EditRequest("a cup", image=picture(48, 96), width=96, height=32, steps=5, seed=4),
        EditRequest("a jar", image=picture(64, 64, 2), width=64, height=64, steps=4, seed=2**40, guidance=0.0),
    )


def test_prompts_longer_than_the_text_length_are_cut_alike(reference: Pair) -> None:
    prompt = "put the red mug on the wooden table beside the blue bottle and " * 5
    assert reference.engine.text.count_tokens(prompt) > TEXT_LENGTH
    reference.check(EditRequest(prompt, image=picture(64, 64), width=64, height=64, steps=2))


def test_decoded_picture(pair: Pair) -> None:
    request = EditRequest("a mug", image=picture(64, 64), width=48, height=64, steps=2, seed=6)
    found = np.asarray(pair.engine.edit([request])[0].image, np.int16)
    options = {"width": 48, "height": 64, "num_inference_steps": 2, "max_area": 48 * 64, "_auto_resize": False}
    generator = [torch.Generator("cpu").manual_seed(6)]
    wanted = pair.pipeline(
        image=request.image,
        prompt="a mug",
        guidance_scale=2.5,
        generator=generator,
        max_sequence_length=TEXT_LENGTH,
        **options,
    ).images[0]
    difference = np.abs(found - np.asarray(wanted, np.int16))
    assert difference.max() <= 1  # a value on the edge of two bytes may round either way
    assert (difference > 0).mean() < 0.002


# Several references


@torch.no_grad()
def run_by_hand(pipeline: Any, request: EditRequest, contexts: list[Image.Image], positions: list[Tensor]) -> Tensor:
    """Final packed latents by diffusers' own parts, for context images at given positions (rows x columns, 3)."""
    assert request.width is not None
    assert request.height is not None
    rows, columns = request.height // 16, request.width // 16
    prompt, pooled, text_ids = pipeline.encode_prompt(
        prompt=request.prompt, prompt_2=None, max_sequence_length=TEXT_LENGTH
    )
    latents = torch.randn(
        1, 16, 2 * rows, 2 * columns, generator=torch.Generator("cpu").manual_seed(request.seed), dtype=torch.float32
    )
    packed = pipeline._pack_latents(latents, 1, 16, 2 * rows, 2 * columns)
    context = []
    for image in contexts:
        encoded = pipeline._encode_vae_image(pipeline.image_processor.preprocess(image), generator=None)
        context.append(pipeline._pack_latents(encoded, 1, 16, *encoded.shape[2:]))
    target_ids = pipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
    scheduler = pipeline.scheduler
    slope = (1.15 - 0.5) / (4096 - 256)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / request.steps, request.steps), mu=0.5 + slope * (rows * columns - 256)
    )
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        velocity = pipeline.transformer(
            hidden_states=torch.cat([packed, *context], dim=1),
            timestep=t.expand(1) / 1000,
            guidance=torch.tensor([request.guidance]),
            pooled_projections=pooled,
            encoder_hidden_states=prompt,
            txt_ids=text_ids,
            img_ids=torch.cat([target_ids, *positions]),
            return_dict=False,
        )[0][:, : rows * columns]
        packed = scheduler.step(velocity, t, packed, return_dict=False)[0]
    result: Tensor = packed[0]
    return result


def at(time: int, top: int, left: int, rows: int, columns: int) -> Tensor:
    return torch.tensor(
        [[time, top + row, left + column] for row in range(rows) for column in range(columns)], dtype=torch.float32
    )


def references(layout: str) -> EditRequest:
    return EditRequest(
        "the logo on the mug",
        image=picture(80, 64, 1),
        references=(picture(48, 96, 2), picture(64, 32, 3)),
        reference_layout=layout,
        width=64,
        height=80,
        steps=4,
        seed=8,
    )


@pytest.mark.parametrize(
    ("layout", "positions"),
    [
        ("index", [at(1, 0, 0, 4, 5), at(2, 0, 0, 6, 3), at(3, 0, 0, 2, 4)]),
        # 4x5, then 6x3: 10 rows beat 8 columns, so beside it, at column 5; that makes 6x8. Then 2x4: 8 rows against
        # 12 columns, so below, at row 6.
        ("offset", [at(1, 0, 0, 4, 5), at(1, 0, 5, 6, 3), at(1, 6, 0, 2, 4)]),
    ],
)
def test_canvas_and_two_references(pairs: dict[str, Pair], layout: str, positions: list[Tensor]) -> None:
    request = references(layout)
    for name in ("reference", "deep-single"):
        pair = pairs[name]
        assert isinstance(request.image, Image.Image)
        pictures = [image for image in (request.image, *request.references) if isinstance(image, Image.Image)]
        wanted = run_by_hand(pair.pipeline, request, pictures, positions)
        assert worst(pair.engine.edit([request])[0].latents, wanted) < BOUND
    other = pairs["reference"].engine.edit([references("index" if layout == "offset" else "offset")])[0].latents
    assert worst(other, run_by_hand(pairs["reference"].pipeline, request, pictures, positions)) > 1e-2


def test_references_without_a_canvas(reference: Pair) -> None:
    image = picture(80, 64, 1)
    with_reference = EditRequest("a mug", references=(image,), width=64, height=80, steps=3)
    found = reference.engine.edit([with_reference])[0].latents
    wanted = run_by_hand(reference.pipeline, with_reference, [image], [at(1, 0, 0, 4, 5)])
    assert worst(found, wanted) < BOUND
    reference.check(EditRequest("a mug", image=image, width=64, height=80, steps=3))  # one context: the same thing
    as_canvas = reference.engine.edit([EditRequest("a mug", image=image, width=64, height=80, steps=3)])[0].latents
    assert torch.equal(found, as_canvas)


# Schedule


@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
@pytest.mark.parametrize("tokens", [1, 24, 256, 4032, 4096, 16384])
def test_schedule_is_that_of_the_scheduler(reference: Pair, steps: int, tokens: int) -> None:
    scheduler = reference.pipeline.scheduler
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    times = schedule(steps, tokens)
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert worst(torch.tensor(times), scheduler.sigmas) < 1e-7


# Files


def test_a_saved_folder_is_one_that_diffusers_loads(pair: Pair, tmp_path: Path) -> None:
    pair.engine.save(tmp_path / "saved")
    for component in ("transformer", "vae"):
        name = f"{component}/diffusion_pytorch_model.safetensors"
        saved, original = load_file(tmp_path / "saved" / name), load_file(pair.folder / name)
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[key], original[key]) for key in saved)
    request = EditRequest("a mug", image=picture(64, 64), width=48, height=64, steps=2, seed=6)
    again = load_pipeline(tmp_path / "saved")
    wanted = run_pipeline(pair.pipeline, request)
    assert worst(run_pipeline(again, request), wanted) < BOUND
    reloaded = load_engine(tmp_path / "saved")
    assert torch.equal(reloaded.edit([request])[0].latents, pair.engine.edit([request])[0].latents)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_both_layouts_load_to_identical_weights(reference: Pair, bfl_folder: Path, tmp_path: Path) -> None:
    one, other = reference.engine, load_engine(bfl_folder)
    assert same_weights(one.transformer, other.transformer)
    assert same_weights(one.autoencoder, other.autoencoder)
    assert one.config.flow == other.config.flow
    request = EditRequest("a mug", image=picture(64, 64), width=48, height=64, steps=3, seed=6)
    assert torch.equal(one.edit([request])[0].latents, other.edit([request])[0].latents)
    other.save(tmp_path / "saved")  # BFL files become a folder that diffusers loads
    assert worst(run_pipeline(load_pipeline(tmp_path / "saved"), request), one.edit([request])[0].latents) < BOUND


def test_sharded_folders_load_to_identical_results(reference: Pair, model_folder: Path) -> None:
    shutil.rmtree(model_folder / "transformer")
    FluxTransformer2DModel.from_pretrained(CASE / "model/transformer").save_pretrained(
        model_folder / "transformer", max_shard_size="300KB"
    )
    shutil.rmtree(model_folder / "text_encoder_2")
    reference.pipeline.text_encoder_2.save_pretrained(model_folder / "text_encoder_2", max_shard_size="40KB")
    for name in ("transformer", "text_encoder_2"):
        assert len(list((model_folder / name).glob("*-of-*.safetensors"))) > 1
    sharded = load_engine(model_folder)
    assert same_weights(sharded.transformer, reference.engine.transformer)
    assert same_weights(sharded.text.t5, reference.engine.text.t5)
    request = EditRequest("a mug", image=picture(64, 64), width=48, height=64, steps=3, seed=6)
    assert torch.equal(sharded.edit([request])[0].latents, reference.engine.edit([request])[0].latents)


def test_published_clip_names_with_text_model_load(reference: Pair, model_folder: Path) -> None:
    """Files made before transformers 5 have `text_model.` before every name."""
    file = model_folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = load_engine(model_folder)
    assert same_weights(loaded.text.clip, reference.engine.text.clip)


def test_saved_configs_say_what_diffusers_says(reference: Pair, tmp_path: Path) -> None:
    reference.engine.save(tmp_path / "saved")
    for component in ("transformer", "vae"):
        saved = json.loads((tmp_path / "saved" / component / "config.json").read_text())
        original = json.loads((CASE / "model" / component / "config.json").read_text())
        assert {key: original.get(key) for key in saved} == saved
    with safe_open(tmp_path / "saved/vae/diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@torch.no_grad()
def test_autoencoder(pair: Pair) -> None:
    """Mean of the encoder, scaled; and the decoder."""
    image = pair.pipeline.image_processor.preprocess(picture(96, 64))
    wanted = pair.pipeline._encode_vae_image(image, generator=None)
    found = pair.engine.autoencoder.encode(image)
    assert worst(found, wanted) < BOUND
    vae = pair.pipeline.vae
    decoded = vae.decode(wanted / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert worst(pair.engine.autoencoder.decode(wanted), decoded) < 5e-5  # pixels, of a decoder that is all noise
    channels = wanted.shape[1]
    assert torch.equal(pack(wanted), pair.pipeline._pack_latents(wanted, 1, channels, 8, 12))
