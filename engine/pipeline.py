"""The engine's public face: load a model, edit pictures.

    engine = KontextEngine.load("models/kontext-dev")
    result = engine.edit([EditRequest("make the mug red", image=photo)])[0]

Requests of one call may differ in everything. The engine knows tensors, prompts and images; it knows no jobs, queues
or buckets. Choosing and making picture sizes is `engine.geometry`'s and the caller's work.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from engine import geometry
from engine.autoencoder import Autoencoder
from engine.batching import DEFAULT_MAX_ROWS, DEFAULT_MAX_TOKENS
from engine.config import ModelConfig
from engine.errors import AdapterError, ConfigError, EngineError, NonFiniteError, RequestError
from engine.kept import Kept
from engine.kernels import Kernels, kernels_for
from engine.latents import Latents, image_to_tensor, pack, tensor_to_image, unpack
from engine.linear import FP8
from engine.lora import CLIP, T5, TRANSFORMER, Adapter, Adapters
from engine.memory import free_memory, plan_for
from engine.modes import EXACT, Approximation
from engine.requests import EditRequest, EditResult, check
from engine.session import Session
from engine.text import TextEncoder, TextFeatures
from engine.transformer import FlowTransformer
from engine.weights import ModelFiles, find_model, load_autoencoder, load_transformer, save_model

__all__ = ["Approximation", "EditRequest", "EditResult", "KontextEngine", "choose_device"]

logger = logging.getLogger(__name__)

PROMPT_BYTES = 256 * 2**20
"""Of prompt features that are kept: some 60 prompts of Kontext-dev."""
PICTURE_BYTES = 128 * 2**20
"""Of context latents that are kept: some 120 pictures of 1 MP."""

OnStep = Callable[[int, int], None]
"""Called after each denoise step with the row steps done and the row steps of the whole call."""


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
        max_tokens: int = DEFAULT_MAX_TOKENS,
        approximation: Approximation = EXACT,
        kernels: Kernels | None = None,
    ) -> None:
        _check_rows(max_rows)
        self.config = config
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.text = text
        self.device = device
        self.max_rows = max_rows
        """Most rows alive at once."""
        self.kernels = kernels or kernels_for(device)
        """What runs between linears and attention."""
        self.max_tokens = max_tokens
        """Most tokens of one forward pass: bounds the memory of a step."""
        self.batch_invariant = False
        """Whether a result is to be the same, bit for bit, whatever else is in the batch."""
        self.cuda_graphs = False
        """Whether, on cuda, small passes of unchanged rows are launched whole (`engine.graphs`)."""
        self.approximation = approximation
        """What may be left out of sampling; the default is exact."""
        self.adapters = Adapters({TRANSFORMER: transformer, CLIP: text.clip, T5: text.t5})
        self.open_sessions = 0
        """Weights must not change under a session's rows."""
        self.prompts: Kept[str, TextFeatures] = Kept(PROMPT_BYTES, size=lambda text: text.nbytes)
        self.pictures: Kept[Hashable, Tensor] = Kept(PICTURE_BYTES, size=lambda latents: latents.nbytes)
        """What is encoded once, by prompt and by the pixels of a context picture."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        text_length: int | None = None,
        config: ModelConfig | Mapping[str, Any] | None = None,
        max_rows: int = DEFAULT_MAX_ROWS,
        approximation: Approximation = EXACT,
        compiled: bool = False,
    ) -> Self:
        """Load a diffusers folder, or a folder with BFL files, strictly; quantised weights (fp8, GGUF) become `dtype`.

        `device`: `auto` takes cuda, mps or cpu, in that order. `dtype` of transformer and text encoders: bfloat16 on
        cuda, else float32; float8_e4m3fn is bfloat16 with the linears of the blocks in fp8. The autoencoder is float32.
        `text_length`: T5 tokens of every prompt; left out, the tokenizer's own when at most 512, else 512. `config`:
        sizes of BFL files, else their `config.json`, else Kontext-dev. `compiled`: torch.compile makes what runs
        between linears and attention, at the first requests; last bits differ. On cuda the text encoders stay on the
        CPU, and fewer than `max_rows` rows are taken at once, in passes of fewer tokens, when the device's memory is
        short with rows that are sampled by `approximation` (see `engine.memory`). Raises `WeightsError` and
        `ConfigError`.
        """
        _check_rows(max_rows)
        chosen = choose_device(device)
        kind = dtype or (torch.bfloat16 if chosen.type == "cuda" else torch.float32)
        if kind == FP8 and not _multiplies_fp8(chosen):
            raise ConfigError(f"float8 is not to be had on {chosen}: it needs compute capability 8.9; take bfloat16")
        kernels = kernels_for(chosen, compiled=compiled)
        sizes = config if config is None or isinstance(config, ModelConfig) else ModelConfig.from_dict(config)
        files = find_model(Path(path), sizes)
        text_device, max_rows, max_tokens = _placed(files, chosen, kind, max_rows, approximation)
        text_dtype = torch.bfloat16 if kind == FP8 else kind
        return cls(
            config=files.config,
            transformer=load_transformer(files, device=chosen, dtype=kind),
            autoencoder=load_autoencoder(files, device=chosen),
            text=TextEncoder.load(files, device=text_device, dtype=text_dtype, text_length=text_length),
            device=chosen,
            max_rows=max_rows,
            max_tokens=max_tokens,
            approximation=approximation,
            kernels=kernels,
        )

    def save(self, path: str | Path) -> None:
        """Write the model in the diffusers layout; adapters are not part of it. Not from fp8, which has lost bits."""
        if any(parameter.dtype == FP8 for parameter in self.transformer.parameters()):
            raise ConfigError("a model in fp8 is not saved: load it in bfloat16 or float32 to save it")
        save_model(Path(path), transformer=self.transformer, autoencoder=self.autoencoder, save_texts=self.text.save)

    def load_adapter(self, path: str | Path, *, scale: float = 1.0) -> Adapter:
        """Apply a LoRA file (ENGINE.md 3c) on top of those already loaded; `scale` 1 is as it was trained.

        Parts for the text encoders are applied as well. What has no effect here is left out, logged, and listed in the
        result's `ignored`. Raises `AdapterError`, also while a stream is running, and then leaves the model as it was.
        """
        self._check_idle()
        self.prompts.clear()  # an adapter may be the text encoders'
        return self.adapters.load(Path(path), scale)

    def unload_adapters(self) -> None:
        """Take all adapters off; results are then bit for bit those of the model alone."""
        self._check_idle()
        self.prompts.clear()
        self.adapters.unload()

    def _check_idle(self) -> None:
        if self.open_sessions:
            raise AdapterError("adapters cannot be changed while a stream is running; finish or close it first")

    def session(self) -> Session[Any]:
        """A set of requests that are sampled together, which others join and leave between denoise steps."""
        return Session(self)

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

        A waiting request joins, in the order asked, as soon as another leaves.
        """
        waiting: list[int] = []
        for index, request in enumerate(requests):
            try:
                check(request, self.config)
            except RequestError as error:
                yield index, error
            else:
                waiting.append(index)
        total, done = sum(requests[index].steps for index in waiting), 0
        with self.session() as session:
            while waiting or session.alive:
                while waiting and session.free:
                    index = waiting.pop(0)
                    try:
                        session.admit(requests[index], index)
                    except RequestError as error:
                        total -= requests[index].steps
                        yield index, error
                if not session.alive:
                    continue
                done += session.alive
                session.step()
                yield from session.retire()
                if on_step is not None:
                    on_step(done, total)

    def encode_prompt(self, prompt: str) -> TextFeatures:
        """Features of a prompt, on the engine's device; those of the prompts used last are kept."""
        return self.prompts.get(prompt, lambda: self.text.encode(prompt).to(self.device))

    @torch.no_grad()
    def encode_picture(self, picture: Image.Image | Latents) -> Tensor:
        """Packed fp32 latents (tokens, channels) of a context picture, on the device; the last used are kept."""
        if isinstance(picture, Latents):
            return picture.tokens.to(self.device, torch.float32)
        pixels = image_to_tensor(picture)
        key = pixels.shape, hashlib.sha256(pixels.numpy().tobytes()).digest()
        return self.pictures.get(key, lambda: pack(self.autoencoder.encode(pixels[None].to(self.device)))[0])

    @torch.no_grad()
    def decode(self, latents: Latents) -> Image.Image:
        """The picture that packed latents stand for; raises `NonFiniteError`."""
        rows, columns = geometry.token_grid(latents.width, latents.height)
        z = unpack(latents.tokens.to(self.device, torch.float32), rows, columns)
        pixels = self.autoencoder.decode(z[None])[0]
        if not torch.isfinite(pixels).all():
            raise NonFiniteError("the decoded picture is not finite; check the autoencoder's weights")
        return tensor_to_image(pixels)


def _check_rows(most: int) -> None:
    if most < 1:
        raise ConfigError(f"max_rows is {most}; at least 1 is needed")


def _placed(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, rows: int, approximation: Approximation
) -> tuple[torch.device, int, int]:
    """The device of the text encoders; how many of `rows` rows, and tokens of a pass, fit beside the weights."""
    if device.type != "cuda":
        return device, rows, DEFAULT_MAX_TOKENS
    memory = free_memory(device)
    plan = plan_for(files, device, memory=memory, dtype=dtype, rows=rows, approximation=approximation)
    if plan.offload_texts:
        logger.warning("%s: memory is short; the text encoders stay on the CPU", files.transformer.parent)
    texts = torch.device("cpu") if plan.offload_texts else device
    return texts, max(1, plan.rows), min(DEFAULT_MAX_TOKENS, plan.tokens)


def _multiplies_fp8(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "cpu"  # slowly: for tests


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
