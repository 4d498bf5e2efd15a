"""The one bridge to the engine: jobs of the services become requests of `engine.pipeline`, and back.

The engine and torch are imported when the first batch is computed, so that planning and cached runs start at once.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from kontext_batch.errors import InfrastructureError, OutOfMemory, SettingsError, StepError
from kontext_batch.operations.pictures import encode_png, open_picture
from kontext_batch.ports import EditJob, LoadedPicture, MadePicture

if TYPE_CHECKING:
    import torch

    from engine.gate import Verdict
    from engine.latents import Latents
    from engine.memory import MemoryPlan
    from engine.pipeline import EditRequest, EditResult, KontextEngine
    from engine.session import Session

DType = Literal["auto", "float32", "bfloat16", "float16", "float8"]
LIBRARIES = ("torch", "transformers", "safetensors", "pillow", "kontext-batch")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model folder says of itself."""

    layout: str
    sha256: str
    native_area: int
    text_length: int


def read_model(path: Path) -> ModelFacts:
    """Check the folder and hash its weights. Raises `SettingsError` with what is wrong with it."""
    from engine.errors import EngineError
    from engine.text import default_text_length
    from engine.weights import find_model, fingerprint, read_json

    try:
        files = find_model(path)
        tokenizer = read_json(files.t5_tokenizer / "tokenizer_config.json")
        return ModelFacts(
            layout=files.layout,
            sha256=fingerprint(path),
            native_area=files.config.native_area,
            text_length=default_text_length(int(tokenizer.get("model_max_length", 0)), None),
        )
    except EngineError as error:
        raise SettingsError(str(error)) from error


def check_model(path: Path) -> None:
    """Load the model whole, strictly. Raises `SettingsError` with what is wrong with it."""
    from engine.errors import EngineError
    from engine.pipeline import KontextEngine

    try:
        KontextEngine.load(path, device="cpu")
    except EngineError as error:
        raise SettingsError(str(error)) from error


def convert_model(path: Path, target: Path) -> None:
    """Write the model at `path`, of either layout, as a diffusers folder."""
    from engine.errors import EngineError
    from engine.pipeline import KontextEngine

    try:
        KontextEngine.load(path, device="cpu").save(target)
    except EngineError as error:
        raise SettingsError(str(error)) from error


def train_model(config: Path, *, say: Callable[[str], None]) -> None:
    """Train, or go on training, what the YAML file `config` describes (docs/training.md). Raises `SettingsError`."""
    from engine.errors import EngineError
    from engine.training.config import TrainingConfig
    from engine.training.run import train

    try:
        train(TrainingConfig.read(config), say=say)
    except EngineError as error:
        raise SettingsError(str(error)) from error


def gate_model(
    path: Path, asked: tuple[float, int] | None, *, device: str, dtype: DType, steps: int, images: int
) -> list[Verdict]:
    """Try the (step tolerance, context every) that is asked for, or several. Raises `SettingsError`."""
    from engine.errors import EngineError
    from engine.gate import SETTINGS, drawn_requests, gate
    from engine.pipeline import Approximation, KontextEngine

    try:
        tried = SETTINGS if asked is None else [Approximation(*asked)]
        engine = KontextEngine.load(
            path,
            device=device,
            dtype=_torch_dtype(numeric_mode(device, dtype)),
            approximation=max(tried, key=lambda each: each.keeps_context),  # the one that takes most memory
        )
        return gate(engine, drawn_requests(engine, images, steps), tried)
    except EngineError as error:
        raise SettingsError(str(error)) from error


def hash_adapter(path: Path) -> str:
    """sha256 that stands for an adapter file. Raises `SettingsError` when it is none."""
    from engine.errors import EngineError
    from engine.lora import check_adapter
    from engine.weights import fingerprint

    try:
        check_adapter(path)
    except EngineError as error:
        raise SettingsError(str(error)) from error
    return fingerprint(path)


@lru_cache(maxsize=4)
def _t5_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer_2" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def count_tokens(folder: Path, prompt: str) -> int:
    """Tokens of a prompt as the T5 of the model at `folder` counts them, its end token included."""
    return len(_t5_tokenizer(folder).encode(prompt).ids)


def chosen_device(device: str, *, compiled: bool) -> str:
    """The device that the engine takes for this setting: `cuda`, `mps`, `cpu`, ... Raises `SettingsError`, also where
    kernels are to be compiled and cannot be.
    """
    from engine.errors import EngineError
    from engine.kernels import kernels_for
    from engine.pipeline import choose_device

    try:
        chosen = choose_device(device)
        kernels_for(chosen, compiled=compiled)
        return str(chosen)
    except EngineError as error:
        raise SettingsError(str(error)) from error


def numeric_mode(
    device: str, dtype: DType, *, step_tolerance: float = 0.0, context_every: int = 1, compiled: bool = False
) -> str:
    """What results depend on: the dtype as set, else bfloat16 where a CUDA device will be used, else float32; whether
    kernels are compiled; and what approximate sampling leaves out.
    """
    from engine.modes import Approximation, Mode

    if dtype == "auto":
        cuda = device.startswith("cuda") or (device == "auto" and _has_cuda())
        dtype = "bfloat16" if cuda else "float32"
    return str(Mode(dtype, Approximation(step_tolerance, context_every), compiled))


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, {"float8": "float8_e4m3fn"}.get(name, name))
    return found


def needed_memory(path: Path, *, device: str, mode: str, rows: int) -> MemoryPlan:
    """How the model at `path` would lie in the memory of the device of this setting. Raises `SettingsError`."""
    from engine.errors import EngineError
    from engine.memory import plan_for, total_memory
    from engine.modes import Mode
    from engine.pipeline import choose_device
    from engine.weights import find_model

    try:
        chosen, asked = choose_device(device), Mode.parse(mode)
        return plan_for(
            find_model(path),
            chosen,
            memory=total_memory(chosen),
            dtype=_torch_dtype(asked.dtype),
            rows=rows,
            approximation=asked.approximation,
        )
    except EngineError as error:
        raise SettingsError(str(error)) from error


def _has_cuda() -> bool:
    """Whether the driver sees a device; asks the driver, since importing torch takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except OSError:
        return False


@dataclass(slots=True)
class EngineEditor:
    """`ports.Editor` over `engine.pipeline`. Keeps the model of the last lane loaded."""

    models: Mapping[str, Path]
    """Name in the registry -> folder."""
    adapters: Mapping[str, Path]
    device: str = "auto"
    max_rows: int = 8
    max_pixels: int = 100_000_000
    batch_invariant: bool = False
    """Whether a picture is to be the same, bit for bit, whatever is sampled beside it."""
    cuda_graphs: bool = False
    _engine: KontextEngine | None = None
    _loaded: tuple[str, str, bool, bool] | None = None
    """Model, dtype, whether room for context that is kept was planned, and whether kernels are compiled."""
    _adapted: tuple[tuple[str, float], ...] = field(default=())

    @contextmanager
    def session(self, params: Mapping[str, Any]) -> Iterator[EngineSession]:
        """Of the model and adapters that these params name, which are loaded when they are not."""
        with self._loaded_for(params).session() as session:
            yield EngineSession(session)

    def describe(self) -> Mapping[str, Any]:
        """Device and library versions, for the lineage: what a picture's last bits depend on."""
        libraries = {name: version(name) for name in LIBRARIES}
        device = self.device
        if self._engine is not None:
            device, more = _computes_by(self._engine)
            libraries |= more
        return {"device": device, "libraries": libraries, "batch_invariant": self.batch_invariant}

    def _loaded_for(self, params: Mapping[str, Any]) -> KontextEngine:
        """The engine with the lane's model and adapters."""
        import torch

        from engine.errors import EngineError
        from engine.modes import Mode
        from engine.pipeline import KontextEngine

        adapters = tuple((str(each["name"]), float(each["scale"])) for each in params["adapters"])
        for kind, known, name in [("model", self.models, str(params["model"]))] + [
            ("adapter", self.adapters, name) for name, _ in adapters
        ]:
            if name not in known:  # somebody has registered it elsewhere, or since: another worker may know it
                add = f"`kontext-batch {kind}s add {name} ...` there, and start it again"
                raise InfrastructureError(f"{kind} '{name}' is not registered on this worker: {add}")
        try:
            mode = Mode.parse(params["numeric_mode"])
            wanted = (str(params["model"]), mode.dtype, mode.approximation.keeps_context, mode.compiled)
            if self._loaded != wanted or self._engine is None:
                self._engine, self._adapted = None, ()
                self._engine = KontextEngine.load(
                    self.models[wanted[0]],
                    device=self.device,
                    dtype=_torch_dtype(mode.dtype),
                    max_rows=self.max_rows,
                    approximation=mode.approximation,
                    compiled=mode.compiled,
                )
                self._loaded = wanted
            self._engine.batch_invariant = self.batch_invariant
            self._engine.cuda_graphs = self.cuda_graphs
            self._engine.approximation = mode.approximation
            if self._adapted != adapters:
                self._engine.unload_adapters()
                for name, scale in adapters:
                    self._engine.load_adapter(self.adapters[name], scale=scale)
                self._adapted = adapters
        except EngineError as error:
            self._loaded = None
            raise StepError(str(error)) from error
        except torch.OutOfMemoryError as error:
            self._loaded = self._engine = None
            raise InfrastructureError(
                f"the device has no memory for model '{params['model']}' now; `kontext-batch doctor` says what it needs"
            ) from error
        return self._engine

    def prepare(self, job: EditJob) -> EditRequest:
        """The request that stands for a job; in any thread."""
        from engine.pipeline import EditRequest

        params = job.params
        target = params["target"]
        canvas = next((each for each in job.pictures if each.role == "image"), None)
        references = sorted((each for each in job.pictures if each.role == "reference"), key=lambda each: each.position)
        return EditRequest(
            prompt=params["prompt"],
            image=None if canvas is None else self._canvas(canvas, params["canvas"]),
            references=[
                self._fitted(each, {**size, "fit": "pad"})
                for each, size in zip(references, params.get("references", ()), strict=True)
            ],
            width=target["width"],
            height=target["height"],
            steps=params["steps"],
            guidance=params["guidance"],
            seed=params["seed"],
            negative_prompt=params["negative_prompt"],
            true_cfg_scale=params["true_cfg_scale"],
            reference_layout=params.get("reference_layout") or "offset",
        )

    def _canvas(self, picture: LoadedPicture, how: Mapping[str, Any]) -> Image.Image | Latents:
        """The canvas, undecoded where its parent handed its latents on."""
        if picture.latents is not None:
            return _read_latents(picture.latents)
        return self._fitted(picture, how)

    def _fitted(self, picture: LoadedPicture, how: Mapping[str, Any]) -> Image.Image:
        """The picture on its canvas: whole in a box of it, or a box of the picture filling it; never stretched."""
        try:
            image = open_picture(picture.data, max_pixels=self.max_pixels)
        except StepError as error:
            raise StepError(f"{picture.role}: {error}") from error
        size, box = (how["width"], how["height"]), how["box"]
        x, y, width, height = box["x"], box["y"], box["width"], box["height"]
        ground = Image.new("RGB", size, how["background"])
        if how["fit"] == "crop":
            image = image.crop((x, y, x + width, y + height))
            x, y, width, height = 0, 0, *size
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        ground.paste(image, (x, y), image if image.mode == "RGBA" else None)
        return ground


def _computes_by(engine: KontextEngine) -> tuple[str, dict[str, str]]:
    """The device by name, and what else decides how it rounds."""
    import torch

    device, how = engine.device, {"kernels": type(engine.kernels).__name__.lower()}
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}", {**how, "cuda": str(torch.version.cuda)}
    return str(device), {**how, "threads": str(torch.get_num_threads())} if device.type == "cpu" else how


@dataclass(frozen=True, slots=True)
class EngineSession:
    """`ports.EditSession` of the engine."""

    session: Session[int]

    @property
    def free(self) -> int:
        return self.session.free

    def admit(self, ticket: int, prepared: EditRequest) -> None:
        from engine.errors import RequestError

        try:
            with _enough_memory(self.session.alive + 1):
                self.session.admit(prepared, ticket)
        except RequestError as error:
            raise StepError(str(error)) from error

    def step(self) -> None:
        with _enough_memory(self.session.alive):
            self.session.step()

    def retire(self) -> Sequence[tuple[int, Sampled | StepError]]:
        from engine.errors import EngineError

        with _enough_memory(self.session.alive):
            left = self.session.retire()
        return [
            (ticket, StepError(str(result)) if isinstance(result, EngineError) else Sampled(result))
            for ticket, result in left
        ]


@contextmanager
def _enough_memory(images: int) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the device ran out of memory with {images} images; lower batch_rows in the settings"
        ) from error


@dataclass(frozen=True, slots=True)
class Sampled:
    """`ports.SampledPicture` of the engine."""

    result: EditResult

    def encode(self, *, xmp: bytes | None = None) -> MadePicture:
        result = self.result
        return MadePicture(
            data=encode_png(result.image, xmp=xmp),
            media_type="image/png",
            width=result.width,
            height=result.height,
            timings=result.timings,
            latents=_write_latents(result),
        )


def _write_latents(result: EditResult) -> bytes:
    from safetensors.torch import save

    # One entry: safetensors writes several in any order, and equal latents are to be equal files.
    size = {"size": f"{result.width}x{result.height}"}
    return save({"latents": result.latents.contiguous()}, metadata=size)


def _read_latents(data: bytes) -> Latents:
    from safetensors.torch import load

    from engine.latents import Latents

    length = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + length])["__metadata__"]
    size = about["size"].split("x") if "size" in about else (about["width"], about["height"])  # as once written
    return Latents(load(data)["latents"], *map(int, size))
