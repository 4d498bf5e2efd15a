"""diffusers, beside which the engine's benchmarks measure: its pipeline, and one call of it as its users make it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.pipeline import EditRequest


def load_peer(folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' pipeline over the weights of a model folder."""
    from diffusers import FluxKontextPipeline

    with contextlib.redirect_stderr(io.StringIO()):
        pipeline = FluxKontextPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Let a model compute in fp32 with the weights that it has, of which one layer's at a time are cast."""
    own: dict[nn.Parameter, Tensor] = {}

    def before(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        for parameter in layer.parameters(recurse=False):
            own[parameter], parameter.data = parameter.data, parameter.data.float()
        return tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)

    def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = own.pop(parameter)

    layers = [layer for layer in model.modules() if any(True for _ in layer.parameters(recurse=False))]
    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
