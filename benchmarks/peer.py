"""diffusers, beside which the engine's benchmarks measure: its pipeline, and one call of it as its users make it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.pipeline import EditRequest


def load_peer(folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' pipeline over the weights of a model folder."""
    from diffusers import FluxKontextPipeline

    with contextlib.redirect_stderr(io.StringIO()):
        pipeline = FluxKontextPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_peer(
    pipeline: Any,
    request: EditRequest,
    *,
    text_length: int,
    rows: int = 1,
    output: str = "pil",
    on_step: Callable[[], None] | None = None,
) -> Any:
    """What one call of diffusers makes of a request, `rows` times with seeds that follow one another."""

    def told(pipeline: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step()
        return {}

    assert request.width is not None
    assert request.height is not None
    return pipeline(
        prompt=request.prompt,
        image=request.image,
        width=request.width,
        height=request.height,
        max_area=request.width * request.height,
        _auto_resize=False,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        num_images_per_prompt=rows,
        generator=[torch.Generator("cpu").manual_seed(request.seed + row) for row in range(rows)],
        max_sequence_length=text_length,
        callback_on_step_end=told,
        output_type=output,
    ).images
