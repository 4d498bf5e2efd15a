"""GGUF files of the transformer, written by the package `gguf`, and headers written by hand that lie."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import WeightsError
from engine.gguf_file import TYPES, GgufFile
from engine.pipeline import KontextEngine
from engine.weights import fingerprint
from kontext_batch.cli import main
from tests.engine.tiny import bfl_weights, check_values, load_engine

Bytes = NDArray[np.uint8]
FILE = "flux1-tiny-Q4_K_M.gguf"
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where a block of a K-quant has its half-precision factors."""
LARGEST = {"Q2_K": 45, "Q3_K": 128, "Q4_K": 945, "Q5_K": 1953, "Q6_K": 4096}
"""What the integers of such a block come to."""


def pack(kind: str, tensor: Tensor, seed: int = 0) -> Bytes:
    """Bytes of the tensor, row by row. The package cannot make K-quants: theirs are random, with sensible factors."""
    values = tensor.numpy()
    if kind not in HALVES:
        return quantize(values, GGMLQuantizationType[kind]).view(np.uint8)
    length, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows, columns = values.shape
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, columns // length, size), dtype=np.uint8)
    for at in HALVES[kind]:
        blocks[..., at : at + 2] = np.array([0.1 / LARGEST[kind]], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def unpack(kind: str, data: Bytes) -> NDArray[np.float32]:
    """The values, by hand where a block is simple, and else as the package has them."""
    if kind in ("Q8_0", "Q4_0"):
        blocks = data.reshape(*data.shape[:-1], -1, 34 if kind == "Q8_0" else 18)
        factor = blocks[..., :2].copy().view(np.float16).astype(np.float32)
        if kind == "Q8_0":
            numbers = blocks[..., 2:].view(np.int8).astype(np.float32)
        else:
            low, high = blocks[..., 2:] & 15, blocks[..., 2:] >> 4
            numbers = np.concatenate([low, high], axis=-1).astype(np.float32) - 8
        return (factor * numbers).reshape(*data.shape[:-1], -1)
    if kind == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind == "F16":
        return data.view(np.float16).astype(np.float32)
    return dequantize(data, GGMLQuantizationType[kind])


def kind_of(name: str, tensor: Tensor, kind: str) -> str:
    """What a converter would take: F32 for vectors, F16 where rows make no whole blocks."""
    if tensor.ndim < 2:
        return "F32"
    return kind if tensor.shape[1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0 else "F16"


def write(file: Path, weights: Mapping[str, Tensor], kind: str, prefix: str = "") -> dict[str, Tensor]:
    """A GGUF file as the usual converters write it, and what its values stand for."""
    wanted = {}
    writer = GGUFWriter(file, "flux")
    writer.add_quantization_version(2)
    writer.add_array("tokens.that.nobody.needs", ["a", "b"])
    writer.add_array("comfy.gguf.orig_shape.none", [1, 2, 3])
    for seed, (name, tensor) in enumerate(weights.items()):
        chosen = kind_of(name, tensor, kind)
        data = pack(chosen, tensor, seed)
        wanted[name] = torch.from_numpy(unpack(chosen, data).copy()).reshape(tensor.shape)
        writer.add_tensor(f"{prefix}{name}", data, raw_dtype=GGMLQuantizationType[chosen])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "F32"])
def test_gguf_in_a_folder_with_bfl_files(wide_bfl: Path, wide_model: Path, wide: KontextEngine, kind: str) -> None:
    wanted = write(wide_bfl / FILE, bfl_weights(wide), kind)
    assert kind in {kind_of(name, tensor, kind) for name, tensor in wanted.items()}
    check_values(wide_bfl, wanted, wide_model)


def test_the_repackaged_prefix_is_accepted(wide_bfl: Path, wide_model: Path, wide: KontextEngine) -> None:
    wanted = write(wide_bfl / FILE, bfl_weights(wide), "Q8_0", prefix="model.diffusion_model.")
    check_values(wide_bfl, wanted, wide_model)


def test_a_quantised_model_is_registered_listed_verified_and_converted(
    wide_bfl: Path,
    wide_model: Path,
    wide: KontextEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KONTEXT_BATCH_MODELS_FILE", str(tmp_path / "models.json"))
    wanted = write(wide_bfl / FILE, bfl_weights(wide), "Q8_0")
    assert main.main(["models", "add", "small", str(wide_bfl)]) == 0
    assert main.main(["models", "list"]) == 0
    assert main.main(["models", "verify", "small"]) == 0
    told = capsys.readouterr().out
    assert "model small: bfl layout, 256x256" in told
    assert "whole and unchanged" in told
    assert main.main(["models", "convert", "small", "converted"]) == 0
    check_values(tmp_path / "converted", wanted, wide_model)
    data = bytearray((wide_bfl / FILE).read_bytes())
    data[-1] ^= 1
    (wide_bfl / FILE).write_bytes(data)
    assert main.main(["models", "verify", "small"]) == 2
    assert "changed" in capsys.readouterr().err


def test_gguf_counts_in_the_hash_of_a_model(wide_bfl: Path, wide: KontextEngine) -> None:
    hashes = set()
    for kind in ("Q8_0", "Q4_0"):
        write(wide_bfl / FILE, bfl_weights(wide), kind)
        hashes.add(fingerprint(wide_bfl))
    assert len(hashes) == 2


# What is refused


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(WeightsError) as error:
        load_engine(folder)
    for word in words:
        assert word in str(error.value)


def test_without_the_package_it_is_told_how_to_install_it(
    wide_bfl: Path, wide: KontextEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(wide_bfl / FILE, bfl_weights(wide), "Q8_0")
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        monkeypatch.setitem(sys.modules, name, None)
    refused(wide_bfl, FILE, "pip install 'kontext-batch[gguf]'")


def test_two_transformers_in_one_folder(wide_bfl: Path, wide: KontextEngine) -> None:
    write(wide_bfl / FILE, bfl_weights(wide), "Q8_0")
    save_file(bfl_weights(wide), wide_bfl / "flux1-tiny.safetensors")
    refused(wide_bfl, "one flux1-*.safetensors or flux1-*.gguf, here 2")


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder_2"])
def test_gguf_has_no_place_in_a_folder_of_safetensors(model_folder: Path, component: str) -> None:
    (file,) = (model_folder / component).glob("*.safetensors")
    file.rename(file.with_suffix(".gguf"))
    refused(model_folder, component, "GGUF is read of the transformer alone", "flux1-*.gguf")


def drop(weights: dict[str, Tensor]) -> None:
    del weights["img_in.bias"]


def add(weights: dict[str, Tensor]) -> None:
    weights["more.weight"] = torch.ones(2, 32)


def widen(weights: dict[str, Tensor]) -> None:
    weights["txt_in.weight"] = weights["txt_in.weight"].T.contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, "1 missing: img_in.bias"),
        (add, "1 surplus: more.weight"),
        (widen, "1 wrong shape: txt_in.weight [48, 256] instead of [256, 48]"),
    ],
)
def test_names_and_shapes_are_those_of_the_model(
    wide_bfl: Path, wide: KontextEngine, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    weights = bfl_weights(wide)
    change(weights)
    write(wide_bfl / FILE, weights, "F16")
    refused(wide_bfl, FILE, words)


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / FILE
    write(path, {"a.weight": torch.ones(4, 32)}, "Q8_0")
    file = GgufFile(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=rf"{FILE}: a\.weight is cut off"):
        file.get("a.weight")
    path.unlink()
    with pytest.raises(WeightsError, match=rf"{FILE}: a\.weight is not readable"):
        file.get("a.weight")


# Headers by hand


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(
    name: bytes = b"a.weight", dims: tuple[int, ...] = (32, 4), kind: int = 8, offset: int = 0, rank: int | None = None
) -> bytes:
    """The entry of a tensor; by default 4 rows of 32 values in Q8_0."""
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return (
        text(name) + struct.pack("<I", len(dims) if rank is None else rank) + sizes + struct.pack("<IQ", kind, offset)
    )


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def header(
    *tensors: bytes, entries: tuple[bytes, ...] = (), magic: bytes = b"GGUF", version: int = 3, count: int | None = None
) -> bytes:
    """A file with 136 bytes of data, as four rows of Q8_0 have."""
    start = struct.pack("<4sIQQ", magic, version, len(tensors) if count is None else count, len(entries))
    whole = start + b"".join(entries) + b"".join(tensors)
    return whole + bytes(-len(whole) % 32) + bytes(136)


def test_a_header_by_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / FILE
    for version in (2, 3):
        path.write_bytes(header(tensor(), entries=(entry(b"general.alignment", 4, b"\x10\0\0\0"),), version=version))
        assert GgufFile(path).shapes == {"a.weight": (4, 32)}
        assert GgufFile(path).get("a.weight").shape == (4, 32)


HUGE = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut off"),
        (b"GGUF", "cut off"),
        (header(tensor(), magic=b"PK\3\4"), "not a GGUF file of version 2 or 3"),
        (header(tensor(), version=1), "version 1"),
        (header(tensor(), version=3 << 24), "version 50331648"),
        (header(tensor(), count=2**63), "0 dimensions"),
        (header(tensor(), tensor()), "a.weight is there twice"),
        (header(tensor(), tensor(b"model.diffusion_model.a.weight")), "a.weight is there twice"),
        (header(tensor(b"\xff\xfe")), "utf-8"),
        (header(tensor(rank=2**31)), "a.weight has 2147483648 dimensions"),
        (header(tensor(dims=())), "0 dimensions"),
        (header(tensor(dims=(32, 2**40))), "cut off: fetch it again"),
        (header(tensor(dims=(2**63, 2**63, 2**63, 2**63))), "cut off: fetch it again"),
        (header(tensor(offset=2**63)), "cut off: fetch it again"),
        (header(tensor(offset=1)), "the file at"),
        (header(tensor(dims=(32, 0))), "rows of 32 values"),
        (header(tensor(dims=(31, 4))), "rows of 31 values, and blocks of 32"),
        (header(tensor(kind=20)), "a.weight is IQ4_NL; of GGUF, F32, F16"),
        (header(tensor(kind=24)), "a.weight is I8"),
        (header(tensor(kind=2**31)), "of the unknown type 2147483648"),
        (header(tensor(), entries=(entry(b"x", 8, HUGE),)), "goes beyond the header or the file"),
        (header(tensor(), entries=(entry(b"x", 9, struct.pack("<I", 0) + HUGE),)), "goes beyond"),
        (header(tensor(), entries=(entry(b"x", 9, struct.pack("<I", 8) + HUGE),)), "goes beyond"),
        (header(tensor(), entries=(entry(b"x", 9, struct.pack("<I", 9) + HUGE),)), "unknown type 9"),
        (header(tensor(), entries=(entry(b"x", 13, b""),)), "unknown type 13"),
        (header(tensor(), entries=(HUGE,)), "goes beyond"),
        (header(tensor(), entries=(entry(b"general.alignment", 4, bytes(4)),)), "general.alignment is 0"),
        (header(tensor(), entries=(entry(b"general.alignment", 4, b"\3\0\0\0"),)), "general.alignment is 3"),
        (header(tensor(), entries=(entry(b"general.alignment", 8, text(b"32")),)), "general.alignment is None"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / FILE
    path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        GgufFile(path)
    assert str(error.value).startswith(str(path))
    assert words in str(error.value)


def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    path, chance = tmp_path / FILE, random.Random(0)
    write(path, {"a.weight": torch.ones(4, 32), "a.bias": torch.ones(4)}, "Q8_0")
    whole = path.read_bytes()
    cuts = [whole[:size] for size in range(len(whole))]
    flips = []
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 127, 128, 255))
        flips.append(bytes(data))
    outcomes = set()
    for content in cuts + flips:
        path.write_bytes(content)
        try:
            file = GgufFile(path)
            outcomes |= {file.get(name).shape == shape for name, shape in file.shapes.items()}
        except WeightsError as error:
            outcomes.add(str(error).startswith(str(path)))
    assert outcomes == {True}
