"""The reference case and the engine loaded from it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch._inductor.config
from safetensors.torch import load_file, save_file
from torch import Tensor

import engine as engine_package
from engine.config import AutoencoderConfig, FlowConfig, ModelConfig
from engine.pipeline import KontextEngine

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
CASE = REFERENCE / "case-1"
SHIPPED = Path(engine_package.__path__[0]) / "models" / "tiny"


@pytest.fixture
def compiling() -> Iterator[None]:
    """For tests in which torch.compile runs: in this process alone. It warns of what it does itself."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on a CPU")
    with warnings.catch_warnings(action="ignore"), torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.fixture(scope="session")
def case() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((CASE / "case.json").read_text())
    return data


@pytest.fixture(scope="session")
def inputs() -> Mapping[str, Tensor]:
    return load_file(CASE / "inputs.safetensors")


@pytest.fixture(scope="session")
def expected() -> Mapping[str, Tensor]:
    return load_file(CASE / "expected.safetensors")


@pytest.fixture(scope="session")
def engine() -> KontextEngine:
    """The tiny random Kontext of the reference case, 32 text tokens as the case was made with."""
    return KontextEngine.load(CASE / "model", device="cpu", text_length=32)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return ModelConfig(
        flow=FlowConfig.from_diffusers(json.loads((CASE / "model/transformer/config.json").read_text())),
        autoencoder=AutoencoderConfig.from_diffusers(json.loads((CASE / "model/vae/config.json").read_text())),
    )


@pytest.fixture
def bfl_folder(tmp_path: Path, tiny_config: ModelConfig) -> Path:
    """The reference case as a folder of BFL files with a `config.json` beside them."""
    folder = tmp_path / "bfl"
    shutil.copytree(CASE / "bfl", folder)
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(CASE / "model" / name, folder / name)
    (folder / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    return folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A copy of the reference case's diffusers folder, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(CASE / "model", folder)
    return folder


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder whose linears have rows of 256 values: whole blocks of every quantised format."""
    from tests.engine.tiny import Sizes, write_model

    sizes = Sizes(heads=2, head_dim=128, axes=(16, 56, 56), double=1, single=1)
    return write_model(tmp_path_factory.mktemp("wide") / "model", sizes)


@pytest.fixture(scope="session")
def wide(wide_model: Path) -> KontextEngine:
    return KontextEngine.load(wide_model, device="cpu", text_length=32)


@pytest.fixture
def wide_bfl(wide_model: Path, wide: KontextEngine, tmp_path: Path) -> Path:
    """The same as a folder with BFL files, but for the transformer."""
    folder = tmp_path / "bfl"
    shutil.copytree(
        wide_model, folder, ignore=shutil.ignore_patterns("transformer", "vae", "scheduler", "model_index.json")
    )
    autoencoder = {name: tensor.contiguous() for name, tensor in wide.autoencoder.state_dict().items()}
    save_file(autoencoder, folder / "ae.safetensors")
    (folder / "config.json").write_text(json.dumps(wide.config.to_dict()))
    return folder
