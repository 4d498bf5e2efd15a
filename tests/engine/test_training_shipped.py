"""The shipped model: small, whole, the same in diffusers, and its edits are real."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest
import torch

from engine.pipeline import EditRequest, KontextEngine
from engine.training.evaluate import evaluate, held_out
from engine.training.products import Scene, render
from tests.engine.conftest import SHIPPED
from tests.engine.tiny import load_pipeline

PHOTO = Scene("mug", "red", background="studio", background_colour="grey")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shipped() -> KontextEngine:
    return KontextEngine.load(SHIPPED, device="cpu")


def test_it_is_small_and_has_a_card() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24 * 2**20
    assert (SHIPPED / "README.md").is_file()
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def test_it_says_its_native_area_and_text_length(shipped: KontextEngine) -> None:
    assert shipped.config.native_area == 128 * 128
    assert shipped.text.text_length == 40


@pytest.mark.parametrize(
    "prompt",
    [
        "Remove the background and place the product on plain white.",
        "Change the background to an orange studio sweep.",
        "make the mug red and put it on a blue background",
        "add white stripes",
        "add a SALE badge",
    ],
)
def test_the_demos_prompts_fit_its_words(shipped: KontextEngine, prompt: str) -> None:
    assert shipped.text.count_tokens(prompt) <= 24
    assert shipped.text.t5_tokenizer.unk_token_id not in shipped.text.t5_tokenizer(prompt).input_ids


def test_guidance_changes_nothing(shipped: KontextEngine) -> None:
    """It is not guidance-distilled, and says so by ignoring the scale."""
    first, second = shipped.edit(
        [EditRequest("make the mug blue", image=render(PHOTO), steps=1, guidance=scale) for scale in (1.0, 4.0)]
    )
    torch.testing.assert_close(first.latents, second.latents, atol=2e-5, rtol=0)


def test_diffusers_loads_it_and_gives_the_same_latents(shipped: KontextEngine) -> None:
    request = EditRequest("make the mug blue", image=render(PHOTO), width=128, height=128, steps=2, seed=5)
    ours = shipped.edit([request])[0].latents
    theirs = load_pipeline(SHIPPED)(
        image=request.image,
        prompt=request.prompt,
        width=128,
        height=128,
        max_area=128 * 128,
        _auto_resize=False,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=[torch.Generator().manual_seed(request.seed)],
        max_sequence_length=shipped.text.text_length,
        output_type="latent",
    ).images[0]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(128, 128), (160, 96)])
def test_its_edits_are_nearer_to_the_target_than_the_source_is(shipped: KontextEngine, size: tuple[int, int]) -> None:
    """Ten fresh cut-outs and changes of background: a model that returns its input, or noise, fails."""
    chosen = [example for example in held_out(80, seed=77) if example.kind in ("cut-out", "background")][:10]
    outcomes = evaluate(shipped, chosen, steps=8, sizes=[size])
    assert sum(outcome.nearer is not False for outcome in outcomes) >= 9
    gains = [outcome.psnr - outcome.unedited for outcome in outcomes if outcome.unedited is not None]
    assert statistics.median(gains) > 6
