"""Model folders that are damaged, incomplete or of another model: each is a named error with the file in its text."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import AutoencoderConfig, FlowConfig, ModelConfig
from engine.errors import ConfigError, EngineError, WeightsError
from engine.keys import swap_halves
from engine.pipeline import EditRequest, KontextEngine
from engine.weights import fingerprint
from tests.engine.tiny import Sizes, edited_json, load_engine, picture, write_model

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
CLIP = "text_encoder/model.safetensors"
T5 = "text_encoder_2/model.safetensors"
COMPONENTS = [TRANSFORMER, VAE, CLIP, T5]


def refused(folder: Path, kind: type[EngineError], *words: str) -> None:
    with pytest.raises(kind) as error:
        load_engine(folder)
    for word in words:
        assert word in str(error.value)


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """Change the tensors of a file; returns the name of its first tensor of two dimensions."""
    tensors = load_file(file)
    first = min(name for name, tensor in tensors.items() if tensor.ndim == 2)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return first


def first_matrix(tensors: dict[str, Tensor]) -> str:
    return min(name for name, tensor in tensors.items() if tensor.ndim == 2)


# Names, shapes, dtypes


def drop_first(tensors: dict[str, Tensor]) -> None:
    del tensors[first_matrix(tensors)]


@pytest.mark.parametrize("component", COMPONENTS)
def test_missing_tensor(model_folder: Path, component: str) -> None:
    name = rewrite(model_folder / component, drop_first)
    last = name.rpartition(".")[0].rpartition(".")[2]
    refused(model_folder, WeightsError, component.partition("/")[0], "1 missing", last, "complete copy")


@pytest.mark.parametrize("component", COMPONENTS)
def test_surplus_tensor(model_folder: Path, component: str) -> None:
    rewrite(model_folder / component, lambda tensors: tensors.update({"something.weight": torch.ones(2, 2)}))
    refused(model_folder, WeightsError, component.partition("/")[0], "1 surplus: something.weight", "complete copy")


@pytest.mark.parametrize("component", COMPONENTS)
def test_wrong_shape(model_folder: Path, component: str) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        name = first_matrix(tensors)
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    name = rewrite(model_folder / component, widen)
    last = name.rpartition(".")[0].rpartition(".")[2]
    refused(model_folder, WeightsError, component.partition("/")[0], "1 wrong shape", last, "instead of")


def test_all_that_is_wrong_is_said_at_once(bfl_folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["img_in.bias"]
        tensors["more"] = torch.ones(1)
        tensors["txt_in.bias"] = torch.ones(5)
        for index in range(7):
            tensors[f"extra.{index}"] = torch.ones(1)

    rewrite(bfl_folder / "flux1-tiny.safetensors", change)
    refused(
        bfl_folder,
        WeightsError,
        "flux1-tiny.safetensors",
        "1 missing: img_in.bias",
        "8 surplus: extra.0, extra.1, extra.2, extra.3, extra.4 and 3 more",
        "1 wrong shape: txt_in.bias [5] instead of [64]",
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("component", [TRANSFORMER, VAE])
def test_integers_are_no_weights(model_folder: Path, component: str, dtype: torch.dtype) -> None:
    name = rewrite(
        model_folder / component,
        lambda tensors: tensors.update({first_matrix(tensors): tensors[first_matrix(tensors)].to(dtype)}),
    )
    refused(model_folder, WeightsError, component, name, "quantised", "BF16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes_are_cast(model_folder: Path, dtype: torch.dtype) -> None:
    wanted = {name: tensor.to(dtype).float() for name, tensor in load_file(model_folder / TRANSFORMER).items()}
    rewrite(
        model_folder / TRANSFORMER,
        lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}),
    )
    weight = load_engine(model_folder).transformer.img_in.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, wanted["x_embedder.weight"])


# Files


@pytest.mark.parametrize("component", COMPONENTS)
def test_truncated_file(model_folder: Path, component: str) -> None:
    file = model_folder / component
    file.write_bytes(file.read_bytes()[:-1000])
    refused(model_folder, WeightsError, component.partition("/")[0])


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("content", [b"", b"x" * 64])
def test_file_that_is_none(model_folder: Path, component: str, content: bytes) -> None:
    (model_folder / component).write_bytes(content)
    refused(model_folder, WeightsError, component.partition("/")[0])


class Bomb:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("component", COMPONENTS)
def test_pickle_with_another_name_is_not_opened(model_folder: Path, component: str, tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "mark"), model_folder / component)
    refused(model_folder, WeightsError, component.partition("/")[0])
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_folder_with_pickles_alone(model_folder: Path, component: str, name: str, tmp_path: Path) -> None:
    file = model_folder / component
    file.unlink()
    torch.save(Bomb(tmp_path / "mark"), file.with_name(name))
    refused(model_folder, WeightsError, component.partition("/")[0], name, "pickled", "convert it to safetensors")
    assert not (tmp_path / "mark").exists()


def test_bfl_folder_with_pickles_alone(bfl_folder: Path) -> None:
    (bfl_folder / "flux1-tiny.safetensors").rename(bfl_folder / "flux1-tiny.pt")
    refused(bfl_folder, WeightsError, "flux1-tiny.pt", "pickled")


@pytest.mark.parametrize("component", COMPONENTS)
def test_missing_file(model_folder: Path, component: str) -> None:
    (model_folder / component).unlink()
    refused(model_folder, WeightsError, component.partition("/")[0], "no safetensors file")


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_missing_folder(model_folder: Path, name: str) -> None:
    shutil.rmtree(model_folder / name)
    refused(model_folder, WeightsError, str(model_folder), f"{name}/ is missing")


def test_no_model_at_all(tmp_path: Path, model_folder: Path) -> None:
    refused(tmp_path / "nothing", WeightsError, "nothing", "not a folder")
    refused(model_folder / TRANSFORMER, WeightsError, "not a folder")
    shutil.rmtree(model_folder / "transformer")
    refused(model_folder, WeightsError, str(model_folder), "transformer/config.json", "flux1-*.safetensors")


@pytest.mark.parametrize("name", ["flux1-other.safetensors", "ae.safetensors"])
def test_bfl_files_must_be_one_of_each(bfl_folder: Path, name: str) -> None:
    if name == "ae.safetensors":
        (bfl_folder / name).unlink()
    else:
        shutil.copy(bfl_folder / "flux1-tiny.safetensors", bfl_folder / name)
    refused(bfl_folder, WeightsError, "one flux1-*.safetensors", "ae.safetensors")


def test_two_files_without_an_index(model_folder: Path) -> None:
    shutil.copy(model_folder / TRANSFORMER, model_folder / "transformer" / "other.safetensors")
    refused(model_folder, WeightsError, "transformer", "2 safetensors files and no index")


@pytest.mark.parametrize("component", [TRANSFORMER, T5])
@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, ("outside.safetensors", "not there")),
        ({"weight_map": {"a": "/etc/passwd"}}, ("passwd", "not there")),
        ({"weight_map": {"a": "lost.safetensors"}}, ("lost.safetensors", "not there")),
        ({"weight_map": {}}, ("no file",)),
        ({"weight_map": ["a"]}, ("weight_map",)),
        ({"weight_map": {"a": 3}}, ("weight_map",)),
        ({}, ("weight_map",)),
    ],
)
def test_index_that_names_other_files(
    model_folder: Path, component: str, index: dict[str, Any], words: tuple[str, ...]
) -> None:
    file = model_folder / component
    shutil.copy(file, model_folder / "outside.safetensors")
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    refused(model_folder, WeightsError, component.partition("/")[0], "index.json", *words)


# Configs


@pytest.mark.parametrize("name", ["vae", "text_encoder", "text_encoder_2"])
def test_missing_config(model_folder: Path, name: str) -> None:
    (model_folder / name / "config.json").unlink()
    refused(model_folder, ConfigError, f"{name}/config.json", "missing")


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_config_that_is_no_json_object(model_folder: Path, name: str, content: str) -> None:
    (model_folder / name / "config.json").write_text(content)
    refused(model_folder, ConfigError, f"{name}/config.json", "JSON")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": None}, ("depth_double", "None")),
        ({"num_single_layers": "two"}, ("depth_single", "'two'")),
        ({"num_layers": -1}, ("depth_double", "-1")),
        ({"num_attention_heads": "2"}, ("wrong type", "num_attention_heads is '2'")),
        ({"joint_attention_dim": 0}, ("text_dim", "0")),
        ({"axes_dims_rope": [8, 12, 8]}, ("axes_dims", "32")),
        ({"axes_dims_rope": [8, 12, 6, 6]}, ("axes_dims",)),
        ({"axes_dims_rope": [7, 12, 13]}, ("even",)),
        ({"axes_dims_rope": 8}, ("wrong type",)),
        ({"patch_size": 2}, ("patch_size 2",)),
        ({"in_channels": 384, "out_channels": 64}, ("Fill", "384")),
        ({"in_channels": 128, "out_channels": 64}, ("Canny", "128")),
        ({"in_channels": 32}, ("4 x 16",)),
        ({"_class_name": "SD3Transformer2DModel"}, ("SD3Transformer2DModel",)),
    ],
)
def test_wrong_transformer_config(model_folder: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with edited_json(model_folder / "transformer/config.json") as data:
        data.update(changes)
    refused(model_folder, ConfigError, str(model_folder), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_quant_conv": True}, ("quant",)),
        ({"scaling_factor": None}, ("scale", "None")),
        ({"scaling_factor": 0}, ("scale",)),
        ({"shift_factor": "much"}, ("shift", "'much'")),
        ({"block_out_channels": [16, 32, 32]}, ("four levels",)),
        ({"block_out_channels": [16, 32, 32, 36]}, ("groups",)),
        ({"block_out_channels": None}, ("wrong type",)),
        ({"norm_num_groups": 0}, ("groups",)),
        ({"latent_channels": 4}, ("4 x 4",)),
        ({"act_fn": "relu"}, ("SiLU",)),
        ({"mid_block_add_attention": False}, ("attention",)),
        ({"_class_name": "AutoencoderTiny"}, ("AutoencoderTiny",)),
    ],
)
def test_wrong_vae_config(model_folder: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with edited_json(model_folder / "vae/config.json") as data:
        data.update(changes)
    refused(model_folder, ConfigError, str(model_folder), *words)


@pytest.mark.parametrize("entry", ["num_layers", "in_channels", "pooled_projection_dim"])
def test_config_that_lacks_an_entry(model_folder: Path, entry: str) -> None:
    with edited_json(model_folder / "transformer/config.json") as data:
        del data[entry]
    refused(model_folder, ConfigError, "transformer/config.json", "lacks", entry)


def test_sizes_that_are_not_those_of_the_weights(model_folder: Path) -> None:
    with edited_json(model_folder / "transformer/config.json") as data:
        data["num_layers"] = 3
    refused(model_folder, WeightsError, "transformer", "missing: transformer_blocks.2")
    with edited_json(model_folder / "transformer/config.json") as data:
        data["num_layers"] = 1
    refused(model_folder, WeightsError, "transformer", "surplus: transformer_blocks.1")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"flows": {}}, ("flows", "autoencoder")),
        ({"flow": {"hiden_size": 64}}, ("hiden_size", "hidden_size")),
        ({"flow": {"hidden_size": 65}}, ("65",)),
        ({"flow": []}, ("FlowConfig", "[]")),
        ({"flow": {"num_heads": "2"}}, ("num_heads",)),
        ({"autoencoder": {"latent_channels": 8}}, ("4 x 8",)),
        ({"transformer": {}}, ("lacks",)),
    ],
)
def test_wrong_config_beside_bfl_files(bfl_folder: Path, config: dict[str, Any], words: tuple[str, ...]) -> None:
    (bfl_folder / "config.json").write_text(json.dumps(config))
    refused(bfl_folder, ConfigError, "config.json", *words)
    with pytest.raises(ConfigError):
        KontextEngine.load(bfl_folder, device="cpu", config=config)


def test_bfl_files_without_a_config_are_taken_for_kontext_dev(bfl_folder: Path) -> None:
    (bfl_folder / "config.json").unlink()
    refused(bfl_folder, WeightsError, "flux1-tiny.safetensors", "wrong shape", "instead of [3072]")


def test_config_of_bfl_files_from_the_caller(bfl_folder: Path, tiny_config: ModelConfig) -> None:
    (bfl_folder / "config.json").unlink()
    for config in (tiny_config, tiny_config.to_dict()):
        assert KontextEngine.load(bfl_folder, device="cpu", config=config).config == tiny_config


def test_config_of_bfl_files_in_diffusers_names(bfl_folder: Path, model_folder: Path, tiny_config: ModelConfig) -> None:
    theirs = {name: json.loads((model_folder / name / "config.json").read_text()) for name in ("transformer", "vae")}
    (bfl_folder / "config.json").write_text(json.dumps(theirs))
    assert load_engine(bfl_folder).config == tiny_config


def test_config_that_contradicts_the_folder(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="not that of the folder"):
        KontextEngine.load(model_folder, device="cpu", config=ModelConfig())


@pytest.mark.parametrize("kind", [FlowConfig, AutoencoderConfig])
def test_configs_survive_the_way_to_diffusers_and_back(kind: Any, tiny_config: ModelConfig) -> None:
    for config in (kind(), tiny_config.flow if kind is FlowConfig else tiny_config.autoencoder):
        assert kind.from_diffusers(config.to_diffusers()) == config


# Variants of the model


@pytest.mark.parametrize(("width", "name"), [(384, "Fill"), (128, "Canny")])
def test_other_variants_in_bfl_files_are_named(bfl_folder: Path, width: int, name: str) -> None:
    rewrite(
        bfl_folder / "flux1-tiny.safetensors",
        lambda tensors: tensors.update({"img_in.weight": torch.ones(64, width)}),
    )
    refused(bfl_folder, WeightsError, "flux1-tiny.safetensors", name, "not of Kontext")


def test_repackaged_prefix_is_accepted(bfl_folder: Path, engine: KontextEngine) -> None:
    def prefix(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"model.diffusion_model.{name}"] = tensors.pop(name)

    rewrite(bfl_folder / "flux1-tiny.safetensors", prefix)
    found = load_engine(bfl_folder).transformer.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in engine.transformer.state_dict().items())


def test_a_tensor_with_and_without_the_prefix(bfl_folder: Path) -> None:
    rewrite(
        bfl_folder / "flux1-tiny.safetensors",
        lambda tensors: tensors.update({"model.diffusion_model.img_in.bias": torch.ones(64)}),
    )
    refused(bfl_folder, WeightsError, "img_in.bias", "twice")


def test_a_model_without_guidance_embedding(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", Sizes(guidance=False))
    assert load_engine(folder).transformer.guidance_in is None
    with edited_json(folder / "transformer/config.json") as data:
        data["guidance_embeds"] = True
    refused(folder, WeightsError, "4 missing", "guidance_embedder")


# Text encoders and tokenizers


@pytest.mark.parametrize(
    ("name", "entry"), [("text_encoder", "pooled_projection_dim"), ("text_encoder_2", "joint_attention_dim")]
)
def test_text_encoder_of_another_width(tmp_path: Path, name: str, entry: str) -> None:
    folder = write_model(tmp_path / "model", Sizes())
    file = folder / TRANSFORMER
    with edited_json(folder / "transformer/config.json") as data:
        data[entry] = 40
    target = "time_text_embed.text_embedder.linear_1.weight" if name == "text_encoder" else "context_embedder.weight"
    rewrite(file, lambda tensors: tensors.update({target: torch.ones(48, 40)}))
    refused(folder, WeightsError, str(folder / name), "wide", "40")


def test_text_encoders_in_one_anothers_place(model_folder: Path) -> None:
    (model_folder / "text_encoder").rename(model_folder / "other")
    (model_folder / "text_encoder_2").rename(model_folder / "text_encoder")
    (model_folder / "other").rename(model_folder / "text_encoder_2")
    refused(model_folder, ConfigError, "text_encoder/config.json", "'t5'", "clip")


@pytest.mark.parametrize(("name", "file"), [("tokenizer", "vocab.json"), ("tokenizer_2", "tokenizer.json")])
def test_damaged_tokenizer(model_folder: Path, name: str, file: str) -> None:
    for other in ("tokenizer.json", "spiece.model", file):
        if (model_folder / name / other).exists():
            (model_folder / name / other).write_bytes(b"{")
    refused(model_folder, WeightsError, str(model_folder / name), "tokenizer")


def test_an_embedding_that_is_stored_twice_is_accepted(model_folder: Path, engine: KontextEngine) -> None:
    """Some T5 files repeat `shared.weight` as `encoder.embed_tokens.weight`."""
    rewrite(
        model_folder / T5,
        lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}),
    )
    found = load_engine(model_folder).text.t5.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in engine.text.t5.state_dict().items())


def test_loading_is_quiet(
    model_folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        load_engine(model_folder)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


# Memory and identity


def test_every_parameter_has_memory_of_its_own(engine: KontextEngine) -> None:
    for module in (engine.transformer, engine.autoencoder, engine.text.clip):
        for name, parameter in module.named_parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
            assert not parameter.requires_grad


def test_convolutions_are_laid_out_for_the_quicker_kernels(engine: KontextEngine) -> None:
    kernels = [parameter for parameter in engine.autoencoder.parameters() if parameter.dim() == 4]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_weights_live_on_when_the_files_go(model_folder: Path) -> None:
    loaded = load_engine(model_folder)
    request = EditRequest("a mug", image=picture(32, 32), width=32, height=32, steps=1)
    before = loaded.edit([request])[0].latents
    for file in model_folder.rglob("*.safetensors"):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(loaded.edit([request])[0].latents, before)


def test_fingerprint_tells_models_apart(model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    read: list[int] = []
    original = fingerprint(model_folder, on_bytes=read.append)
    assert fingerprint(copy) == original
    assert sum(read) > 1_000_000
    (copy / "README.md").write_text("notes change no result")
    assert fingerprint(copy) == original
    for file in (TRANSFORMER, "transformer/config.json", "tokenizer_2/spiece.model"):
        data = (copy / file).read_bytes()
        (copy / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert fingerprint(copy) != original
        (copy / file).write_bytes(data)
    (copy / VAE).rename(copy / "vae/other.safetensors")
    assert fingerprint(copy) != original
    assert fingerprint(model_folder / TRANSFORMER) == fingerprint(copy / TRANSFORMER)


def test_swapping_halves_twice_is_nothing() -> None:
    tensor = torch.arange(8.0).reshape(4, 2)
    assert torch.equal(swap_halves(tensor), torch.tensor([[4.0, 5.0], [6.0, 7.0], [0.0, 1.0], [2.0, 3.0]]))
    assert torch.equal(swap_halves(swap_halves(tensor)), tensor)
