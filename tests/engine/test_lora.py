"""Every family of adapters, written by hand in its layout, against the same change merged into the weights by hand."""

from __future__ import annotations

import ast
import copy
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.config import FlowConfig
from engine.errors import AdapterError
from engine.layers import RMSNorm
from engine.lora import target_names
from engine.pipeline import EditRequest, KontextEngine
from engine.transformer import FlowTransformer
from tests.engine.conftest import REFERENCE
from tests.engine.tiny import Sizes, load_engine, picture, worst, write_model

RANK, HIDDEN = 4, 48  # hidden size of tiny.Sizes: 3 heads of 16
BOUND = 2e-5

LINEARS = {
    "img_in": (64, 48),
    "txt_in": (48, 48),
    "time_in.in_layer": (256, 48),
    "time_in.out_layer": (48, 48),
    "vector_in.in_layer": (32, 48),
    "vector_in.out_layer": (48, 48),
    "guidance_in.in_layer": (256, 48),
    "guidance_in.out_layer": (48, 48),
    "final_layer.linear": (48, 64),
    "final_layer.adaLN_modulation.1": (48, 96),
}
DOUBLE = {
    **{f"{stream}_{name}": shape for stream in ("img", "txt") for name, shape in (
        ("mod.lin", (48, 288)),
        ("attn.qkv", (48, 144)),
        ("attn.proj", (48, 48)),
        ("mlp.0", (48, 192)),
        ("mlp.2", (192, 48)),
    )}
}  # fmt: skip
SINGLE = {"modulation.lin": (48, 144), "linear1": (48, 336), "linear2": (240, 48)}
BLOCKS = {f"double_blocks.0.{name}": shape for name, shape in DOUBLE.items()} | {
    f"single_blocks.{index}.{name}": shape for index in range(3) for name, shape in SINGLE.items()
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("lora") / "model", Sizes())


@pytest.fixture(scope="module")
def loaded(folder: Path) -> KontextEngine:
    return load_engine(folder)


@pytest.fixture
def tiny(loaded: KontextEngine) -> Iterator[KontextEngine]:
    """A tiny model without adapters, before and after."""
    yield loaded
    loaded.unload_adapters()


REQUEST = EditRequest("make the mug red", image=picture(64, 80), width=64, height=48, steps=3, seed=1)


def latents(engine: KontextEngine) -> Tensor:
    return engine.edit([REQUEST])[0].latents


class Author:
    """Writes an adapter file and keeps the weights that it should come to."""

    def __init__(self, engine: KontextEngine, seed: int = 0) -> None:
        self.engine = engine
        self.merged = copy.deepcopy(engine.transformer)
        self.tensors: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)
        for module in self.merged.modules():
            module._forward_hooks.clear()

    def random(self, *shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=self.generator)

    def merge(self, module: str, change: Tensor, start: int = 0) -> None:
        """Add `change` to the rows from `start` of a weight, in BFL names."""
        linear = self.merged.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight[start : start + change.shape[0]] += change

    def merge_bias(self, module: str, change: Tensor) -> None:
        linear = self.merged.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.bias.add_(change)

    def pair(self, name: str, shape: tuple[int, int], down: str, up: str, rank: int = RANK) -> tuple[Tensor, Tensor]:
        """Random A and B of a module (columns, rows), under their names in the file."""
        a, b = self.random(rank, shape[0]), self.random(shape[1], rank)
        self.tensors |= {f"{name}.{down}": a, f"{name}.{up}": b}
        return a, b

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path, metadata=metadata)
        return path

    def expected(self) -> Tensor:
        """Final latents with the merged weights."""
        engine = self.engine
        other = KontextEngine(
            config=engine.config,
            transformer=self.merged,
            autoencoder=engine.autoencoder,
            text=engine.text,
            device=engine.device,
        )
        return latents(other)


def check(author: Author, engine: KontextEngine, path: Path, *, scale: float = 1.0) -> None:
    """The adapter equals the merged weights, makes a difference, and leaves no trace."""
    wanted, before = author.expected(), latents(engine)
    engine.load_adapter(path, scale=scale)
    with_adapter = latents(engine)
    assert worst(with_adapter, wanted) < BOUND
    assert worst(with_adapter, before) > 1e-2
    engine.unload_adapters()
    assert torch.equal(latents(engine), before)


@pytest.fixture
def author(tiny: KontextEngine) -> Author:
    return Author(tiny)


# Family 1: kohya


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
@pytest.mark.parametrize("underscores", [True, False], ids=["lora_unet_", "diffusion_model."])
def test_kohya(author: Author, tiny: KontextEngine, tmp_path: Path, underscores: bool, alpha: float | None) -> None:
    for module, shape in (BLOCKS | LINEARS).items():
        name = f"lora_unet_{module.replace('.', '_')}" if underscores else f"diffusion_model.{module}"
        a, b = author.pair(name, shape, "lora_down.weight", "lora_up.weight")
        if alpha is not None:
            author.tensors[f"{name}.alpha"] = torch.tensor(alpha)
        author.merge(module, (1.0 if alpha is None else alpha / RANK) * b @ a)
    path = author.save(tmp_path / "kohya.safetensors")
    check(author, tiny, path)
    assert tiny.load_adapter(path).family == "kohya"


def test_kohya_block_diagonal_fused_parts(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    for module, rows in (("double_blocks.0.txt_attn.qkv", [48] * 3), ("single_blocks.2.linear1", [48, 48, 48, 192])):
        name, total = f"lora_unet_{module.replace('.', '_')}", RANK * len(rows)
        downs = [author.random(RANK, HIDDEN) for _ in rows]
        ups = [author.random(count, RANK) for count in rows]
        author.tensors[f"{name}.lora_down.weight"] = torch.cat(downs)
        author.tensors[f"{name}.lora_up.weight"] = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
        author.tensors[f"{name}.alpha"] = torch.tensor(6.0)
        start = 0
        for a, b in zip(downs, ups, strict=True):
            author.merge(module, 6.0 / total * b @ a, start)  # alpha over the rank in the file, as diffusers has it
            start += b.shape[0]
    check(author, tiny, author.save(tmp_path / "sparse.safetensors"))


DIFFUSERS = {
    "transformer_blocks.0.norm1.linear": ("double_blocks.0.img_mod.lin", 0, (48, 288)),
    "transformer_blocks.0.norm1_context.linear": ("double_blocks.0.txt_mod.lin", 0, (48, 288)),
    "transformer_blocks.0.attn.to_q": ("double_blocks.0.img_attn.qkv", 0, (48, 48)),
    "transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", 48, (48, 48)),
    "transformer_blocks.0.attn.to_v": ("double_blocks.0.img_attn.qkv", 96, (48, 48)),
    "transformer_blocks.0.attn.add_q_proj": ("double_blocks.0.txt_attn.qkv", 0, (48, 48)),
    "transformer_blocks.0.attn.add_k_proj": ("double_blocks.0.txt_attn.qkv", 48, (48, 48)),
    "transformer_blocks.0.attn.add_v_proj": ("double_blocks.0.txt_attn.qkv", 96, (48, 48)),
    "transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj", 0, (48, 48)),
    "transformer_blocks.0.attn.to_add_out": ("double_blocks.0.txt_attn.proj", 0, (48, 48)),
    "transformer_blocks.0.ff.net.0.proj": ("double_blocks.0.img_mlp.0", 0, (48, 192)),
    "transformer_blocks.0.ff.net.2": ("double_blocks.0.img_mlp.2", 0, (192, 48)),
    "transformer_blocks.0.ff_context.net.0.proj": ("double_blocks.0.txt_mlp.0", 0, (48, 192)),
    "transformer_blocks.0.ff_context.net.2": ("double_blocks.0.txt_mlp.2", 0, (192, 48)),
    "single_transformer_blocks.1.norm.linear": ("single_blocks.1.modulation.lin", 0, (48, 144)),
    "single_transformer_blocks.1.attn.to_q": ("single_blocks.1.linear1", 0, (48, 48)),
    "single_transformer_blocks.1.attn.to_k": ("single_blocks.1.linear1", 48, (48, 48)),
    "single_transformer_blocks.1.attn.to_v": ("single_blocks.1.linear1", 96, (48, 48)),
    "single_transformer_blocks.1.proj_mlp": ("single_blocks.1.linear1", 144, (48, 192)),
    "single_transformer_blocks.1.proj_out": ("single_blocks.1.linear2", 0, (240, 48)),
    "x_embedder": ("img_in", 0, (64, 48)),
    "context_embedder": ("txt_in", 0, (48, 48)),
    "time_text_embed.timestep_embedder.linear_1": ("time_in.in_layer", 0, (256, 48)),
    "time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer", 0, (48, 48)),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer", 0, (32, 48)),
    "time_text_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", 0, (48, 48)),
    "proj_out": ("final_layer.linear", 0, (48, 64)),
}
"""diffusers' name -> BFL module, first row, (columns, rows)."""


def change_in_diffusers_names(
    author: Author, prefix: str, down: str, up: str, scale: Callable[[str], float] = lambda name: 1.0
) -> None:
    for name, (module, start, shape) in DIFFUSERS.items():
        a, b = author.pair(prefix + name, shape, down, up)
        author.merge(module, scale(name) * b @ a, start)
    a, b = author.pair(f"{prefix}norm_out.linear", (48, 96), down, up)
    change = scale("norm_out.linear") * b @ a
    author.merge("final_layer.adaLN_modulation.1", torch.cat([change[48:], change[:48]]))  # (scale, shift) there


def test_kohya_with_diffusers_names(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    change_in_diffusers_names(author, "", "lora_down.weight", "lora_up.weight")
    author.tensors = {
        f"lora_transformer_{name.partition('.lora_')[0].replace('.', '_')}.lora_{name.partition('.lora_')[2]}": tensor
        for name, tensor in author.tensors.items()
    }
    assert "lora_transformer_single_transformer_blocks_1_proj_mlp.lora_up.weight" in author.tensors
    check(author, tiny, author.save(tmp_path / "mixture.safetensors"))


def test_everything_said_twice_counts_once(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    module = "double_blocks.0.img_attn.proj"
    a, b = author.pair("transformer.transformer_blocks.0.attn.to_out.0", (48, 48), "lora_A.weight", "lora_B.weight")
    author.merge(module, b @ a)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    author.tensors |= {f"{name}.lora_down.weight": a.clone(), f"{name}.lora_up.weight": b.clone()}
    path = author.save(tmp_path / "twice.safetensors")
    check(author, tiny, path)
    assert [line.split()[0] for line in tiny.load_adapter(path).ignored] == [name]


# Family 2: XLabs


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs(author: Author, tiny: KontextEngine, tmp_path: Path, prefix: str) -> None:
    pairs = [
        ("double_blocks.0.processor.qkv_lora1", "double_blocks.0.img_attn.qkv", (48, 144)),
        ("double_blocks.0.processor.qkv_lora2", "double_blocks.0.txt_attn.qkv", (48, 144)),
        ("double_blocks.0.processor.proj_lora1", "double_blocks.0.img_attn.proj", (48, 48)),
        ("double_blocks.0.processor.proj_lora2", "double_blocks.0.txt_attn.proj", (48, 48)),
        ("single_blocks.2.processor.qkv_lora", "single_blocks.2.linear1", (48, 144)),
        ("single_blocks.2.processor.proj_lora", "single_blocks.2.linear2", (240, 48)),
    ]
    for name, module, shape in pairs:
        a, b = author.pair(prefix + name, shape, "down.weight", "up.weight")
        author.merge(module, b @ a)
    path = author.save(tmp_path / "xlabs.safetensors")
    check(author, tiny, path)
    assert tiny.load_adapter(path).family == "xlabs"


# Family 3: BFL's control adapters


def test_control_adapter_is_merged_without_its_control_columns(
    author: Author, tiny: KontextEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for module, shape in (BLOCKS | LINEARS).items():
        columns = 128 if module == "img_in" else shape[0]
        a, b = author.pair(module, (columns, shape[1]), "lora_A.weight", "lora_B.weight")
        author.tensors[f"{module}.lora_B.bias"] = bias = author.random(shape[1])
        author.merge(module, b @ a[:, : shape[0]])
        author.merge_bias(module, bias)
    for name, module in author.merged.named_modules():
        if isinstance(module, RMSNorm):
            author.tensors[f"{name}.scale"] = 1.0 + author.random(16)
            module.scale.data = author.tensors[f"{name}.scale"].clone()
    path = author.save(tmp_path / "control.safetensors")
    check(author, tiny, path)
    with caplog.at_level(logging.WARNING):
        adapter = tiny.load_adapter(path)
    assert adapter.family == "bfl-control"
    assert any("control image" in line for line in adapter.ignored)
    assert "control image" in caplog.text


# Family 4: fal's Kontext trainer


def test_peft_on_bfl_names(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    modules = BLOCKS | {name: shape for name, shape in LINEARS.items() if "adaLN" not in name}
    for module, shape in modules.items():
        a, b = author.pair(f"base_model.model.{module}", shape, "lora_A.weight", "lora_B.weight")
        author.merge(module, b @ a)
    path = author.save(tmp_path / "fal.safetensors")
    check(author, tiny, path)
    assert tiny.load_adapter(path).family == "peft-bfl"


# Family 5: diffusers, PEFT


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model.", "diffusion_model."])
def test_diffusers_names(author: Author, tiny: KontextEngine, tmp_path: Path, prefix: str) -> None:
    change_in_diffusers_names(author, prefix, "lora_A.weight", "lora_B.weight")
    check(author, tiny, author.save(tmp_path / "peft.safetensors"))


def test_alpha_tensors(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    change_in_diffusers_names(author, "transformer.", "lora_A.weight", "lora_B.weight", lambda name: 0.5)
    for name in (*DIFFUSERS, "norm_out.linear"):
        author.tensors[f"transformer.{name}.alpha"] = torch.tensor(RANK / 2)
    check(author, tiny, author.save(tmp_path / "alpha.safetensors"))


def in_metadata(settings: dict[str, Any], prefix: str = "transformer.") -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"{prefix}{key}": value for key, value in settings.items()})}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": RANK, "lora_alpha": 2}, lambda name: 2 / RANK),
        ({"lora_alpha": 2, "use_rslora": True}, lambda name: 2 / math.sqrt(RANK)),
        ({"lora_alpha": 2, "alpha_pattern": {"to_q": 6}}, lambda name: (6 if name.endswith("to_q") else 2) / RANK),
        (
            {"lora_alpha": 2, "alpha_pattern": {"^x_embedder": 1}},
            lambda name: (1 if name == "x_embedder" else 2) / RANK,
        ),
    ],
    ids=["alpha", "rslora", "pattern", "anchored"],
)
@pytest.mark.parametrize("where", ["transformer.", "", "beside"])
def test_alpha_in_settings(
    author: Author,
    tiny: KontextEngine,
    tmp_path: Path,
    settings: dict[str, Any],
    scale: Callable[[str], float],
    where: str,
) -> None:
    change_in_diffusers_names(author, "transformer.", "lora_A.weight", "lora_B.weight", scale)
    if where == "beside":
        path = author.save(tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "LORA"}))
    else:
        path = author.save(tmp_path / "peft.safetensors", in_metadata(settings, where))
    check(author, tiny, path)


# Names at full size


def test_every_linear_of_the_published_files_has_its_names() -> None:
    """19 and 38 blocks of width 3072: kohya's underscores over BFL's names, and diffusers' dotted names."""
    with torch.device("meta"):
        names = target_names({"transformer": FlowTransformer(FlowConfig())})
    for layout, written in (("bfl_transformer", "_"), ("diffusers_transformer", ".")):
        covered: dict[str, int] = {}
        for line in (REFERENCE / "keys" / f"{layout}.tsv").read_text().splitlines():
            key, shape = line.split("\t")
            rows, *columns = ast.literal_eval(shape)
            if not key.endswith(".weight") or not columns:
                continue
            target = names["transformer", key.removesuffix(".weight").replace(".", written)]
            assert (target.rows, target.width) == (rows, columns[0])
            covered[target.module] = covered.get(target.module, 0) + target.rows
        assert len(covered) == 19 * 10 + 38 * 3 + 10
        assert all(covered[target.module] == target.stop for (_, name), target in names.items() if name in covered)


# Several at once, scales, dtypes


def small(engine: KontextEngine, path: Path, seed: int) -> tuple[Path, dict[str, Tensor]]:
    """An adapter of two modules, and what it adds to each weight."""
    author = Author(engine, seed)
    modules = {"double_blocks.0.img_attn.qkv": (48, 144), "single_blocks.0.linear2": (240, 48)}
    changes = {}
    for module, shape in modules.items():
        a, b = author.pair(f"diffusion_model.{module}", shape, "lora_A.weight", "lora_B.weight")
        changes[module] = b @ a
    return author.save(path), changes


def test_several_adapters_add_up_with_their_scales(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    before, paths = latents(tiny), []
    for seed, scale in ((1, 0.75), (2, -0.5), (1, 0.25)):
        path, changes = small(tiny, tmp_path / f"{seed}.safetensors", seed)
        paths.append((path, scale))
        for module, change in changes.items():
            author.merge(module, scale * change)
    wanted = author.expected()
    for path, scale in paths:
        tiny.load_adapter(path, scale=scale)
    assert worst(latents(tiny), wanted) < BOUND
    assert [scale for _, scale in tiny.adapters.loaded] == [0.75, -0.5, 0.25]
    tiny.unload_adapters()
    assert tiny.adapters.loaded == []
    assert torch.equal(latents(tiny), before)


def test_scale_zero_changes_nothing(tiny: KontextEngine, tmp_path: Path) -> None:
    before = latents(tiny)
    tiny.load_adapter(small(tiny, tmp_path / "a.safetensors", 1)[0], scale=0.0)
    assert worst(latents(tiny), before) == 0


def test_a_saved_model_is_without_its_adapters(tiny: KontextEngine, tmp_path: Path) -> None:
    before = latents(tiny)
    tiny.load_adapter(small(tiny, tmp_path / "a.safetensors", 1)[0])
    tiny.save(tmp_path / "saved")
    assert torch.equal(latents(load_engine(tmp_path / "saved")), before)


def test_a_bf16_file_counts_as_its_numbers(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    path, _ = small(tiny, tmp_path / "a.safetensors", 1)
    author = Author(tiny, 1)
    for module, shape in {"double_blocks.0.img_attn.qkv": (48, 144), "single_blocks.0.linear2": (240, 48)}.items():
        a, b = author.pair(f"diffusion_model.{module}", shape, "lora_A.weight", "lora_B.weight")
        author.merge(module, b.bfloat16().float() @ a.bfloat16().float())
    author.tensors = {name: tensor.bfloat16() for name, tensor in author.tensors.items()}
    check(author, tiny, author.save(path))


def test_one_by_one_convolutions_are_matrices(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    a, b = author.pair("lora_unet_single_blocks_0_linear2", (240, 48), "lora_down.weight", "lora_up.weight")
    author.merge("single_blocks.0.linear2", b @ a)
    author.tensors = {name: tensor[:, :, None, None] for name, tensor in author.tensors.items()}
    check(author, tiny, author.save(tmp_path / "conv.safetensors"))


def test_bias_changes_are_applied(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    """The adapter's own scale counts for a bias as well, alpha does not."""
    author.tensors["diffusion_model.single_blocks.0.linear1.diff_b"] = bias = author.random(336)
    author.merge_bias("single_blocks.0.linear1", 0.5 * bias)
    a, b = author.pair("diffusion_model.single_blocks.1.linear1", (48, 336), "lora_down.weight", "lora_up.weight")
    author.tensors["diffusion_model.single_blocks.1.linear1.alpha"] = torch.tensor(2.0)
    author.tensors["diffusion_model.single_blocks.1.linear1.diff_b"] = bias = author.random(336)
    author.merge("single_blocks.1.linear1", 0.5 * 2.0 / RANK * b @ a)
    author.merge_bias("single_blocks.1.linear1", 0.5 * bias)
    check(author, tiny, author.save(tmp_path / "bias.safetensors"), scale=0.5)


# Text encoders


def text_features(engine: KontextEngine) -> tuple[Tensor, Tensor]:
    features = engine.text.encode(REQUEST.prompt)
    return features.t5, features.pooled


@pytest.mark.parametrize(
    ("name", "down", "up"),
    [
        ("lora_te1_text_model_encoder_layers_1_self_attn_q_proj", "lora_down.weight", "lora_up.weight"),
        ("lora_te_text_model_encoder_layers_1_self_attn_q_proj", "lora_down.weight", "lora_up.weight"),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj",
            "lora_down.weight",
            "lora_up.weight",
        ),
        ("text_encoder.text_model.encoder.layers.1.self_attn.q_proj", "lora_A.weight", "lora_B.weight"),
        ("text_encoder.encoder.layers.1.self_attn.q_proj", "lora_A.weight", "lora_B.weight"),
    ],
)
def test_clip_part_is_applied(
    author: Author, tiny: KontextEngine, tmp_path: Path, name: str, down: str, up: str
) -> None:
    t5_before, pooled_before = text_features(tiny)
    a, b = author.pair(name, (32, 32), down, up)
    tiny.load_adapter(author.save(tmp_path / "clip.safetensors"), scale=0.5)
    _, pooled = text_features(tiny)
    tiny.unload_adapters()
    assert torch.equal(text_features(tiny)[1], pooled_before)
    clip = tiny.text.clip
    original = clip.state_dict()["encoder.layers.1.self_attn.q_proj.weight"].clone()
    clip.get_submodule("encoder.layers.1.self_attn.q_proj").weight.data += 0.5 * b @ a
    try:
        assert worst(pooled, text_features(tiny)[1]) < 1e-6
        assert worst(pooled, pooled_before) > 1e-4
        assert torch.equal(text_features(tiny)[0], t5_before)
    finally:
        clip.get_submodule("encoder.layers.1.self_attn.q_proj").weight.data = original


@pytest.mark.parametrize(
    "name",
    [
        "lora_te3_encoder_block_1_layer_1_DenseReluDense_wo",
        "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo",
    ],
)
def test_t5_part_is_applied(author: Author, tiny: KontextEngine, tmp_path: Path, name: str) -> None:
    before, _ = text_features(tiny)
    a, b = author.pair(name, (96, 48), "lora_down.weight", "lora_up.weight")
    tiny.load_adapter(author.save(tmp_path / "t5.safetensors"))
    found, _ = text_features(tiny)
    tiny.unload_adapters()
    wo = tiny.text.t5.get_submodule("encoder.block.1.layer.1.DenseReluDense.wo")
    original = wo.weight.data.clone()
    wo.weight.data += b @ a
    try:
        assert worst(found, text_features(tiny)[0]) < 1e-5
        assert worst(found, before) > 1e-4
    finally:
        wo.weight.data = original


@pytest.mark.parametrize(
    ("name", "shape", "zero"),
    [
        ("lora_te1_text_model_embeddings_position_embedding", (77, 32), True),
        ("text_encoders.clip_l.transformer.text_projection", (32, 32), False),
    ],
)
def test_text_parts_without_effect_are_left_out_and_named(
    author: Author,
    tiny: KontextEngine,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    shape: tuple[int, int],
    zero: bool,
) -> None:
    a, b = author.pair("lora_unet_img_in", (64, 48), "lora_down.weight", "lora_up.weight")
    author.merge("img_in", b @ a)
    _, up = author.pair(name, shape, "lora_down.weight", "lora_up.weight")
    if zero:
        up.zero_()
    path = author.save(tmp_path / "text.safetensors")
    check(author, tiny, path)
    assert name in caplog.text
    assert [line.split()[0] for line in tiny.load_adapter(path).ignored] == [name]


def test_text_parts_that_count_and_cannot_be_applied_are_refused(
    author: Author, tiny: KontextEngine, tmp_path: Path
) -> None:
    author.pair("lora_unet_img_in", (64, 48), "lora_down.weight", "lora_up.weight")
    author.pair("lora_te1_text_model_embeddings_position_embedding", (77, 32), "lora_down.weight", "lora_up.weight")
    refused(tiny, author.save(tmp_path / "a.safetensors"), "position_embedding", "no module")


# Errors


def refused(engine: KontextEngine, path: Path, *words: str) -> None:
    """Loading raises an AdapterError with the file's name and these words, and changes nothing."""
    before = latents(engine)
    with pytest.raises(AdapterError) as error:
        engine.load_adapter(path)
    for word in (path.name, *words):
        assert word in str(error.value)
    assert torch.equal(latents(engine), before)
    assert engine.adapters.loaded == []


@pytest.mark.parametrize(
    ("suffixes", "word"),
    [
        (("lokr_w1", "lokr_w2"), "LoKr"),
        (("hada_w1_a", "hada_w2_a"), "LoHa"),
        (("oft_blocks",), "OFT"),
        (("a1.weight", "b1.weight"), "GLoRA"),
        (("lora_down.weight", "lora_mid.weight", "lora_up.weight"), "core"),
        (("lora_down.weight", "lora_up.weight", "dora_scale"), "DoRA"),
        (("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), "DoRA"),
    ],
)
def test_other_kinds_are_refused_by_name(
    author: Author, tiny: KontextEngine, tmp_path: Path, suffixes: tuple[str, ...], word: str
) -> None:
    for suffix in suffixes:
        author.tensors[f"lora_unet_single_blocks_0_linear1.{suffix}"] = torch.ones(4, 4)
    refused(tiny, author.save(tmp_path / "a.safetensors"), word, "not supported", "single_blocks_0_linear1")


def test_dora_and_other_peft_kinds_in_settings_are_refused(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    author.pair("transformer.x_embedder", (64, 48), "lora_A.weight", "lora_B.weight")
    refused(tiny, author.save(tmp_path / "a.safetensors", in_metadata({"use_dora": True})), "DoRA")
    refused(tiny, author.save(tmp_path / "a.safetensors", in_metadata({"peft_type": "LOKR"})), "LOKR")
    refused(tiny, author.save(tmp_path / "a.safetensors", {"lora_adapter_metadata": "{"}), "JSON")
    refused(tiny, author.save(tmp_path / "a.safetensors", in_metadata({"lora_alpha": "much"})), "alpha")


def test_modules_that_the_model_lacks_are_listed(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    for index in range(3, 12):
        author.pair(
            f"transformer.single_transformer_blocks.{index}.proj_out", (240, 48), "lora_A.weight", "lora_B.weight"
        )
    refused(
        tiny,
        author.save(tmp_path / "a.safetensors"),
        "no module transformer.single_transformer_blocks.10.proj_out",
        "and 4 more",
        "nearest",
        "single_transformer_blocks.1.proj_out",
    )


@pytest.mark.parametrize(
    ("down", "up", "words"),
    [
        ((4, 63), (48, 4), ("(A)", "[4, 63]", "[4, 64]")),
        ((4, 64), (47, 4), ("(B)", "[47, 4]", "[48, 4]")),
        ((4, 64), (48, 3), ("(B)", "[48, 3]", "[48, 4]")),
        ((4,), (48, 4), ("(A)", "[4]")),
    ],
)
def test_wrong_shapes(
    author: Author,
    tiny: KontextEngine,
    tmp_path: Path,
    down: tuple[int, ...],
    up: tuple[int, ...],
    words: tuple[str, ...],
) -> None:
    author.tensors = {
        "lora_unet_img_in.lora_down.weight": torch.ones(down),
        "lora_unet_img_in.lora_up.weight": torch.ones(up),
    }
    refused(tiny, author.save(tmp_path / "a.safetensors"), "img_in", *words)


def only_down(author: Author) -> None:
    del author.tensors["transformer.x_embedder.lora_B.weight"]


def only_alpha(author: Author) -> None:
    author.tensors = {"transformer.x_embedder.alpha": torch.tensor(1.0)}


def alpha_of_two(author: Author) -> None:
    author.tensors["transformer.x_embedder.alpha"] = torch.ones(2)


def not_finite(author: Author) -> None:
    author.tensors["transformer.x_embedder.lora_A.weight"][1, 2] = float("nan")


def quantised(author: Author) -> None:
    author.tensors["transformer.x_embedder.lora_A.weight"] = torch.ones(4, 64, dtype=torch.int8)


def whole_weight(author: Author) -> None:
    author.tensors = {"img_in.weight": torch.ones(48, 64)}


def replaced(author: Author) -> None:
    author.tensors["diffusion_model.img_in.diff"] = torch.ones(48, 64)


def said_twice(author: Author) -> None:
    author.pair("img_in", (64, 48), "lora_A.weight", "lora_B.weight")


def two_names(author: Author) -> None:
    author.tensors["transformer.x_embedder.lora_down.weight"] = torch.ones(4, 64)


def strange(author: Author) -> None:
    author.tensors["something.else"] = torch.ones(1)


def empty(author: Author) -> None:
    author.tensors = {}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (only_down, ("x_embedder", "only one of its two matrices")),
        (only_alpha, ("x_embedder", "no matrices")),
        (alpha_of_two, ("x_embedder", "alpha")),
        (not_finite, ("x_embedder.lora_A.weight", "NaN")),
        (quantised, ("x_embedder.lora_A.weight", "int8")),
        (whole_weight, ("img_in", "not a LoRA")),
        (replaced, ("img_in", "diff")),
        (said_twice, ("same module",)),
        (two_names, ("second down matrix",)),
        (strange, ("something.else", "no tensor of a LoRA")),
        (empty, ("no LoRA",)),
    ],
)
def test_damaged_files(
    author: Author, tiny: KontextEngine, tmp_path: Path, damage: Callable[[Author], None], words: tuple[str, ...]
) -> None:
    author.pair("transformer.x_embedder", (64, 48), "lora_A.weight", "lora_B.weight")
    damage(author)
    refused(tiny, author.save(tmp_path / "a.safetensors"), *words)


def test_pickles_are_refused(tiny: KontextEngine, tmp_path: Path) -> None:
    weights = {"lora_unet_img_in.lora_down.weight": torch.ones(4, 64)}
    for name in ("a.safetensors", "a.pt", "a.bin"):
        torch.save(weights, tmp_path / name)
        refused(tiny, tmp_path / name, "pickled", "convert")
    only_pickles = tmp_path / "pickles"
    only_pickles.mkdir()
    torch.save(weights, only_pickles / "pytorch_lora_weights.bin")
    refused(tiny, only_pickles, "pytorch_lora_weights.bin", "pickled")


def test_missing_and_truncated_files(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    refused(tiny, tmp_path / "none.safetensors", "missing")
    author.pair("img_in", (64, 48), "lora_A.weight", "lora_B.weight")
    path = author.save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    refused(tiny, path, "damaged")


def test_a_folder_with_one_file_is_that_file(author: Author, tiny: KontextEngine, tmp_path: Path) -> None:
    a, b = author.pair("img_in", (64, 48), "lora_A.weight", "lora_B.weight")
    author.merge("img_in", b @ a)
    author.save(tmp_path / "pytorch_lora_weights.safetensors")
    check(author, tiny, tmp_path)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_must_be_finite(tiny: KontextEngine, tmp_path: Path, scale: float) -> None:
    path, _ = small(tiny, tmp_path / "a.safetensors", 1)
    with pytest.raises(AdapterError, match="scale"):
        tiny.load_adapter(path, scale=scale)
