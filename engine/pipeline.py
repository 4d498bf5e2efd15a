"""The engine's public face: load a model, edit pictures.

    engine = KontextEngine.load("models/kontext-dev")
    result = engine.edit([EditRequest("make the mug red", image=photo)])[0]

Requests of one call may differ in everything. The engine knows tensors, prompts and images; it knows no jobs, queues
or buckets. Choosing and making picture sizes is `engine.geometry`'s and the caller's work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from engine import geometry
from engine.autoencoder import Autoencoder
from engine.batching import DEFAULT_MAX_ROWS, Batch, Row
from engine.config import ModelConfig
from engine.errors import AdapterError, ConfigError, EngineError, NonFiniteError, RequestError
from engine.latents import Latents, context_ids, draw_noise, grid_ids, image_to_tensor, pack, tensor_to_image, unpack
from engine.lora import CLIP, T5, TRANSFORMER, Adapter, Adapters
from engine.sampling import schedule
from engine.text import TextEncoder, TextFeatures
from engine.transformer import FlowTransformer
from engine.weights import find_model, load_autoencoder, load_transformer, save_model

OnStep = Callable[[int, int], None]
"""Called after each denoise step with the row steps done and the row steps of the whole call."""


@dataclass(frozen=True, slots=True, kw_only=False, eq=False)
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

    def handed_on(self) -> Latents:
        """The result as the canvas of a next request, undecoded."""
        return Latents(self.latents, self.width, self.height)


class KontextEngine:
    """A loaded model."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        transformer: FlowTransformer,
        autoencoder: Autoencoder,
        text: TextEncoder,
        device: torch.device,
        max_rows: int = DEFAULT_MAX_ROWS,
    ) -> None:
        self.config = config
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.text = text
        self.device = device
        self.max_rows = max_rows
        """Most rows alive at once; bounds the memory of a step."""
        self.adapters = Adapters({TRANSFORMER: transformer, CLIP: text.clip, T5: text.t5})
        self._streams = 0
        """Streams that have rows alive: weights must not change under them."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        text_length: int | None = None,
        config: ModelConfig | Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a diffusers folder, or a folder with BFL files, strictly.

        `device`: `auto` takes cuda, mps or cpu, in that order. `dtype` of transformer and text encoders: bfloat16 on
        cuda, else float32; the autoencoder is float32. `text_length`: T5 tokens of every prompt; left out, the
        tokenizer's own when at most 512, else 512. `config`: sizes of BFL files, else their `config.json`, else
        Kontext-dev. Raises `WeightsError` and `ConfigError`.
        """
        chosen = choose_device(device)
        kind = dtype or (torch.bfloat16 if chosen.type == "cuda" else torch.float32)
        sizes = config if config is None or isinstance(config, ModelConfig) else ModelConfig.from_dict(config)
        files = find_model(Path(path), sizes)
        return cls(
            config=files.config,
            transformer=load_transformer(files, device=chosen, dtype=kind),
            autoencoder=load_autoencoder(files, device=chosen),
            text=TextEncoder.load(files, device=chosen, dtype=kind, text_length=text_length),
            device=chosen,
        )

    def save(self, path: str | Path) -> None:
        """Write the model in the diffusers layout; adapters are not part of it."""
        save_model(Path(path), transformer=self.transformer, autoencoder=self.autoencoder, save_texts=self.text.save)

    def load_adapter(self, path: str | Path, *, scale: float = 1.0) -> Adapter:
        """Apply a LoRA file (ENGINE.md 3c) on top of those already loaded; `scale` 1 is as it was trained.

        Parts for the text encoders are applied as well. What has no effect here is left out, logged, and listed in the
        result's `ignored`. Raises `AdapterError`, also while a stream is running, and then leaves the model as it was.
        """
        self._check_idle()
        return self.adapters.load(Path(path), scale)

    def unload_adapters(self) -> None:
        """Take all adapters off; results are then bit for bit those of the model alone."""
        self._check_idle()
        self.adapters.unload()

    def _check_idle(self) -> None:
        if self._streams:
            raise AdapterError("adapters cannot be changed while a stream is running; finish or close it first")

    def edit(self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None) -> list[EditResult]:
        """Make all images; results in the order asked. Raises the first error of any request."""
        results: list[EditResult | None] = [None] * len(requests)
        with closing(self.stream(requests, on_step=on_step)) as stream:
            for index, result in stream:
                if isinstance(result, EngineError):
                    raise result
                results[index] = result
        return [result for result in results if result is not None]

    def stream(
        self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None
    ) -> Generator[tuple[int, EditResult | EngineError]]:
        """Yield (index of the request, result) as images finish; a request's own error takes its result's place.

        A waiting request joins as soon as a row is free; requests of one shape come after one another, so that they
        share passes.
        """
        self._streams += 1
        try:
            yield from self._stream(requests, on_step)
        finally:
            self._streams -= 1

    def _stream(
        self, requests: Sequence[EditRequest], on_step: OnStep | None
    ) -> Iterator[tuple[int, EditResult | EngineError]]:
        waiting: list[tuple[int, EditRequest]] = []
        for index, request in enumerate(requests):
            try:
                self._check(request)
            except RequestError as error:
                yield index, error
            else:
                waiting.append((index, request))
        waiting.sort(key=lambda entry: self._shape_key(entry[1]))
        total, done = sum(request.steps for _, request in waiting), 0

        batch = Batch(self.transformer, self.max_rows)
        alive: dict[Row, _Job] = {}
        prompts: dict[str, TextFeatures] = {}
        while waiting or alive:
            while waiting and batch.free:
                index, request = waiting.pop(0)
                try:
                    job = self._prepare(index, request, prompts)
                except RequestError as error:
                    total -= request.steps
                    yield index, error
                else:
                    alive[job.row] = job
                    batch.admit(job.row)
            if not alive:
                continue
            batch.step()
            done += len(alive)
            for row in batch.retire():
                job = alive.pop(row)
                yield job.index, self._finish(job)
            if on_step is not None:
                on_step(done, total)

    def _shape_key(self, request: EditRequest) -> tuple[Any, ...]:
        """Equal for requests that can share a pass, so that sorting brings them together; the order asked is kept."""
        return self.size_for(request), [(picture.width, picture.height) for picture in _context(request)]

    def size_for(self, request: EditRequest) -> tuple[int, int]:
        """Width and height in pixels of what the request makes."""
        if request.width is not None and request.height is not None:
            return request.width, request.height
        canvas = request.image
        width, height = (1, 1) if canvas is None else (canvas.width, canvas.height)
        chosen = geometry.nearest_size(width, height, area=self.config.native_area)
        return request.width or chosen[0], request.height or chosen[1]

    def _check(self, request: EditRequest) -> None:
        """Raise `RequestError` for anything that can be told before computing."""
        side = geometry.TOKEN_SIDE
        for name in ("steps", "seed", "width", "height"):
            value = getattr(request, name)
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if not whole and not (value is None and name in ("width", "height")):
                raise RequestError(f"{name} is {value!r}; a whole number is needed")
        if not 0 <= request.seed < 2**64:
            raise RequestError(f"seed {request.seed} is not between 0 and 2^64 - 1")
        for picture in _context(request):
            if not isinstance(picture, Image.Image | Latents):
                raise RequestError(f"image and references are pictures or latents, not {type(picture).__name__}")
        sized = [(picture.width, picture.height) for picture in _context(request)]
        for width, height in [self.size_for(request), *sized]:
            if width < side or height < side or width % side or height % side:
                raise RequestError(f"{width}x{height} pixels: sides must be multiples of {side}")
        if request.steps < 1:
            raise RequestError(f"steps is {request.steps}; at least 1 is needed")
        if not (math.isfinite(request.guidance) and math.isfinite(request.true_cfg_scale)):
            raise RequestError("guidance and true_cfg_scale must be finite")
        if request.reference_layout not in ("offset", "index"):
            raise RequestError(f"reference_layout {request.reference_layout!r} is neither 'index' nor 'offset'")
        channels = self.config.flow.in_channels
        width, height = self.size_for(request)
        wanted = (geometry.token_count(width, height), channels)
        if request.noise is not None and tuple(request.noise.shape) != wanted:
            raise RequestError(f"noise has shape {tuple(request.noise.shape)}; {width}x{height} pixels need {wanted}")
        for picture in _context(request):
            if isinstance(picture, Latents):
                need = (geometry.token_count(picture.width, picture.height), channels)
                if tuple(picture.tokens.shape) != need:
                    raise RequestError(f"latents have shape {tuple(picture.tokens.shape)} instead of {need}")

    def _prepare(self, index: int, request: EditRequest, prompts: dict[str, TextFeatures]) -> _Job:
        """Encode text and context, draw the noise: a request becomes a row."""
        started = time.perf_counter()
        for prompt in (request.prompt, request.negative_prompt):
            if prompt is not None and prompt not in prompts:
                prompts[prompt] = self.text.encode(prompt)
        guided = request.negative_prompt is not None and request.true_cfg_scale > 1

        width, height = self.size_for(request)
        rows, columns = geometry.token_grid(width, height)
        channels = self.config.flow.in_channels
        noise = request.noise
        if noise is None:
            noise = draw_noise(rows * columns, channels, rows, columns, request.seed)

        pictures = _context(request)
        grids = [geometry.token_grid(picture.width, picture.height) for picture in pictures]
        context = [self._encode(picture) for picture in pictures]
        empty = torch.empty(0, channels, device=self.device)
        row = Row(
            x=noise.to(self.device, torch.float32),
            context=torch.cat([empty, *context]),
            ids=torch.cat([grid_ids(rows, columns), *context_ids(grids, request.reference_layout)]).to(self.device),
            text=prompts[request.prompt],
            times=schedule(request.steps, rows * columns),
            guidance=request.guidance,
            negative=prompts[request.negative_prompt] if guided and request.negative_prompt is not None else None,
            cfg_scale=request.true_cfg_scale,
        )
        now = time.perf_counter()
        return _Job(index, request, row, width, height, encode_seconds=now - started, joined=now)

    @torch.no_grad()
    def _encode(self, picture: Image.Image | Latents) -> Tensor:
        """Packed fp32 latents (tokens, channels) of a context picture, on the device."""
        if isinstance(picture, Latents):
            return picture.tokens.to(self.device, torch.float32)
        pixels = image_to_tensor(picture)[None].to(self.device)
        return pack(self.autoencoder.encode(pixels))[0]

    @torch.no_grad()
    def decode(self, latents: Latents) -> Image.Image:
        """The picture that packed latents stand for; raises `NonFiniteError`."""
        rows, columns = geometry.token_grid(latents.width, latents.height)
        z = unpack(latents.tokens.to(self.device, torch.float32), rows, columns)
        pixels = self.autoencoder.decode(z[None])[0]
        if not torch.isfinite(pixels).all():
            raise NonFiniteError("the decoded picture is not finite; check the autoencoder's weights")
        return tensor_to_image(pixels)

    def _finish(self, job: _Job) -> EditResult | NonFiniteError:
        sampled = time.perf_counter()
        latents = job.row.x.cpu()
        if not torch.isfinite(latents).all():
            return NonFiniteError(f"the result of seed {job.request.seed} is not finite; check the model's weights")
        try:
            image = self.decode(Latents(latents, job.width, job.height))
        except NonFiniteError as error:
            return error
        return EditResult(
            image=image,
            latents=latents,
            seed=job.request.seed,
            width=job.width,
            height=job.height,
            timings={
                "encode": job.encode_seconds,
                "sample": sampled - job.joined,
                "decode": time.perf_counter() - sampled,
            },
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A request while its row is alive."""

    index: int
    request: EditRequest
    row: Row
    width: int
    height: int
    encode_seconds: float
    joined: float


def _context(request: EditRequest) -> list[Image.Image | Latents]:
    """Context pictures: the canvas first, then the references."""
    return ([] if request.image is None else [request.image]) + list(request.references)


def choose_device(device: str | torch.device) -> torch.device:
    """`auto` is cuda, mps or cpu, in that order."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(device)!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return chosen
