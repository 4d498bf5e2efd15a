"""What is asked of the engine and what it gives back, and all that can be told of a request before computing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real

from PIL import Image
from torch import Tensor

from engine import geometry
from engine.config import ModelConfig
from engine.errors import RequestError
from engine.latents import Latents


@dataclass(frozen=True, slots=True, eq=False)
class EditRequest:
    """One image to make.

    `image` is the canvas, `references` only condition; the context is the canvas first, then the references. Without
    either it is text-to-image. Sides are multiples of 16 pixels; left out, they are the model's own size nearest to
    the canvas.
    """

    prompt: str
    image: Image.Image | Latents | None = None
    references: Sequence[Image.Image | Latents] = ()
    width: int | None = None
    height: int | None = None
    steps: int = 28
    guidance: float = 2.5
    """Embedded guidance of the distilled model; typical values 1.5 to 4. Models without the embedding ignore it."""
    seed: int = 0
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    """Above 1, and with a negative prompt, classifier-free guidance with two passes a step."""
    reference_layout: str = "offset"
    """`offset` (works with the released model) or `index` (as in the paper)."""
    noise: Tensor | None = None
    """Packed fp32 (tokens, channels); replaces the seeded draw, for exact replay."""

    @property
    def context(self) -> list[Image.Image | Latents]:
        """Context pictures: the canvas first, then the references."""
        return ([] if self.image is None else [self.image]) + list(self.references)

    @property
    def guided(self) -> bool:
        """Whether it takes classifier-free guidance, and so two places in each forward pass."""
        return self.negative_prompt is not None and self.true_cfg_scale > 1


@dataclass(frozen=True, slots=True, eq=False)
class EditResult:
    """One finished image."""

    image: Image.Image
    latents: Tensor
    """Final packed fp32 latents (tokens, channels), on the CPU."""
    seed: int
    width: int
    height: int
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds: `encode` (text and context), `sample` (while the row was alive), `decode`."""
    joined: int = 0
    """Denoise steps that the session had taken when the row joined."""
    left: int = 0
    """The same when it left: `left - joined` is its number of steps."""

    def handed_on(self) -> Latents:
        """The result as the canvas of a next request, undecoded."""
        return Latents(self.latents, self.width, self.height)


def size_of(request: EditRequest, config: ModelConfig) -> tuple[int, int]:
    """Width and height in pixels of what the request makes."""
    if request.width is not None and request.height is not None:
        return request.width, request.height
    canvas = request.image
    width, height = (1, 1) if canvas is None else (canvas.width, canvas.height)
    chosen = geometry.nearest_size(width, height, area=config.native_area)
    return request.width or chosen[0], request.height or chosen[1]


def _is_text(value: object) -> bool:
    """Text that can be written down: half of a surrogate pair cannot."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def check(request: EditRequest, config: ModelConfig) -> None:
    """Raise `RequestError` for anything that can be told before computing."""
    side = geometry.TOKEN_SIDE
    for name in ("steps", "seed", "width", "height"):
        value = getattr(request, name)
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole and not (value is None and name in ("width", "height")):
            raise RequestError(f"{name} is {value!r}; a whole number is needed")
    if not 0 <= request.seed < 2**64:
        raise RequestError(f"seed {request.seed} is not between 0 and 2^64 - 1")
    for picture in request.context:
        if not isinstance(picture, Image.Image | Latents):
            raise RequestError(f"image and references are pictures or latents, not {type(picture).__name__}")
    sized = [(picture.width, picture.height) for picture in request.context]
    for width, height in [size_of(request, config), *sized]:
        if width < side or height < side or width % side or height % side:
            raise RequestError(f"{width}x{height} pixels: sides must be multiples of {side}")
    if request.steps < 1:
        raise RequestError(f"steps is {request.steps}; at least 1 is needed")
    for name in ("prompt", "negative_prompt"):
        text = getattr(request, name)
        if not _is_text(text) and not (text is None and name == "negative_prompt"):
            raise RequestError(f"{name} is {text!r}; text is needed")
    for name in ("guidance", "true_cfg_scale"):
        if not isinstance(getattr(request, name), Real):
            raise RequestError(f"{name} is {getattr(request, name)!r}; a number is needed")
    if not (math.isfinite(request.guidance) and math.isfinite(request.true_cfg_scale)):
        raise RequestError("guidance and true_cfg_scale must be finite")
    if request.reference_layout not in ("offset", "index"):
        raise RequestError(f"reference_layout {request.reference_layout!r} is neither 'index' nor 'offset'")
    channels = config.flow.in_channels
    width, height = size_of(request, config)
    wanted = (geometry.token_count(width, height), channels)
    if request.noise is not None and tuple(request.noise.shape) != wanted:
        raise RequestError(f"noise has shape {tuple(request.noise.shape)}; {width}x{height} pixels need {wanted}")
    for picture in request.context:
        if isinstance(picture, Latents):
            need = (geometry.token_count(picture.width, picture.height), channels)
            if tuple(picture.tokens.shape) != need:
                raise RequestError(f"latents have shape {tuple(picture.tokens.shape)} instead of {need}")
