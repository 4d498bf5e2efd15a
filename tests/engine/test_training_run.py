"""Trainings from a config file: what they change, what they leave alone, and what they refuse."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

from engine.autoencoder import Autoencoder
from engine.config import AutoencoderConfig, FlowConfig
from engine.errors import AdapterError, ConfigError
from engine.geometry import sizes
from engine.likeness import psnr
from engine.pipeline import EditRequest, KontextEngine
from engine.training.__main__ import main
from engine.training.adapter import LowRankAdapter
from engine.training.autoencoder import normalised, picture_pool
from engine.training.config import TrainingConfig
from engine.training.data import EncodedPairs, FlowData, drawn_latents, encode_all, read_pairs
from engine.training.evaluate import evaluate, held_out, sheet, table
from engine.training.flow import FlowWithText, compile_blocks, edit_loss, start_like_dit, train_flow
from engine.training.instructions import KINDS
from engine.training.loop import LoopConfig, Moment
from engine.training.objective import Objective
from engine.training.place import alone_in
from engine.training.run import read_autoencoder
from engine.training.run import train as run
from engine.transformer import FlowTransformer
from engine.weights import save_component
from tests.engine.conftest import CASE

AE = AutoencoderConfig(block_channels=(4, 4, 4, 4), res_blocks=1, groups=2, scale=1.0, shift=0.0, sample_size=32)
LOOP = LoopConfig(steps=2, lr=1e-2, warmup=1, log_every=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def module() -> FlowWithText:
    """The reference case's model with a text of 16 tokens."""
    module = FlowWithText.load(CASE / "model")
    module.text.text_length = 16
    return module


def data_of(module: FlowWithText, count: int = 6) -> FlowData:
    generator = torch.Generator().manual_seed(0)
    pairs = EncodedPairs(
        before=torch.randn(count, 4, 64, generator=generator),
        after=torch.randn(count, 4, 64, generator=generator),
        has_before=torch.arange(count) % 3 != 0,
        prompts=[f"make it {index}" for index in range(count)],
        grid=(2, 2),
    )
    return FlowData.of(pairs, module.text.token_ids)


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def pairs_table(folder: Path, *, count: int = 3, size: tuple[int, int] = (48, 32)) -> Path:
    """A folder of pairs; the last is text-to-image."""
    rows = ["before,after,instruction"]
    for index in range(count):
        for name in ("before", "after"):
            Image.new("RGB", size, (40 * index, 90, 200)).save(folder / f"{name}{index}.png")
        rows.append(f"{'' if index == count - 1 else f'before{index}.png'},after{index}.png,make it {index}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder / "pairs.csv"


def write(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(json.dumps(data))  # JSON is YAML
    return path


# --- the objective over a batch


def test_rows_without_context_leave_its_tokens_out(module: FlowWithText, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    forward = module.flow.forward

    def spy(**given: Any) -> Tensor:
        lengths.append((given["img"].shape[0], given["img"].shape[1], given["img_ids"][0, -1, 0].item()))
        return forward(**given)

    monkeypatch.setattr(module.flow, "forward", spy)
    data = data_of(module)
    edit_loss(module, [data], Moment.of(0, 0), 16)
    assert sorted(entry[1:] for entry in lengths) == [(4, 0.0), (8, 1.0)]
    assert sum(entry[0] for entry in lengths) == 16
    lengths.clear()
    edit_loss(module, [data], Moment.of(0, 0), 16, context_dropout=1.0)
    assert lengths == [(16, 4, 0.0)]


def test_a_new_model_predicts_nothing_and_ignores_guidance() -> None:
    config = FlowConfig(
        hidden_size=16, num_heads=1, depth_double=1, depth_single=1, text_dim=8, pooled_dim=8, axes_dims=(4, 6, 6)
    )
    torch.manual_seed(0)
    flow = FlowTransformer(config)
    start_like_dit(flow)
    inputs: dict[str, Tensor] = {
        "img": torch.randn(2, 4, 64),
        "img_ids": torch.zeros(2, 4, 3),
        "txt": torch.randn(2, 3, 8),
        "pooled": torch.randn(2, 8),
        "t": torch.tensor([0.2, 0.9]),
    }
    assert not flow(**inputs, guidance=torch.ones(2)).any()
    torch.nn.init.normal_(flow.final_layer.linear.weight)
    torch.nn.init.normal_(flow.get_parameter("final_layer.adaLN_modulation.1.weight"))
    first = flow(**inputs, guidance=torch.ones(2))
    assert first.any()
    assert torch.equal(first, flow(**inputs, guidance=torch.full((2,), 7.0)))
    assert flow.guidance_in is not None
    assert not any(parameter.requires_grad for parameter in flow.guidance_in.parameters())


# --- fine-tuning, full and low-rank


def test_full_fine_tuning_moves_the_flow_and_leaves_the_texts(module: FlowWithText, tmp_path: Path) -> None:
    before = snapshot(module)
    train_flow(module, module.flow, [data_of(module)], LOOP, tmp_path, batch=4, say=lambda _: None)
    after = snapshot(module)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("flow.") for name in moved)


def test_low_rank_training_moves_the_adapter_alone(module: FlowWithText, tmp_path: Path) -> None:
    before = snapshot(module)
    adapter = LowRankAdapter(module.flow, rank=2)
    start = snapshot(adapter)
    train_flow(module, adapter, [data_of(module)], LOOP, tmp_path, batch=4, say=lambda _: None)
    after, trained = snapshot(module), snapshot(adapter)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(start[name], trained[name]) for name in start if name.startswith("up."))


@torch.no_grad()  # half of the compiling
def test_compiled_blocks_compute_the_same_and_keep_their_names(module: FlowWithText, compiling: None) -> None:
    data, names = data_of(module), set(module.state_dict())
    data.pairs.has_before.fill_(True)
    plain = edit_loss(module, [data], Moment.of(0, 0), 4)
    compile_blocks(module.flow)
    counters.clear()
    compiled = edit_loss(module, [data], Moment.of(0, 0), 4)
    assert counters["stats"]["unique_graphs"] >= 2, "a double and a single block"
    assert compiled.item() == pytest.approx(plain.item(), rel=1e-5)
    assert set(module.state_dict()) == names


def test_compiling_on_a_cpu_without_a_compiler_is_told(module: FlowWithText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        compile_blocks(module.flow)


def test_an_adapter_changes_nothing_before_it_is_trained(module: FlowWithText) -> None:
    data = data_of(module)
    bare = edit_loss(module, [data], Moment.of(0, 0), 4)
    LowRankAdapter(module.flow, rank=2)
    assert edit_loss(module, [data], Moment.of(0, 0), 4).item() == pytest.approx(bare.item(), abs=1e-6)


def test_a_saved_adapter_acts_in_the_engine_as_it_did_in_training(module: FlowWithText, tmp_path: Path) -> None:
    adapter = LowRankAdapter(module.flow, rank=3)
    for parameter in adapter.up:
        torch.nn.init.normal_(parameter, std=0.05)
    adapter.save(tmp_path / "adapter.safetensors")
    names = load_file(tmp_path / "adapter.safetensors")
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in names
    assert "transformer.single_transformer_blocks.1.proj_mlp.lora_B.weight" in names

    engine = KontextEngine.load(CASE / "model", device="cpu", text_length=16)
    ids = module.text.token_ids(["make it red"])
    x, t = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([0.7])
    with torch.no_grad():
        trained = module.velocity(x, t, None, ids, (2, 2))
    loaded = FlowWithText.load(CASE / "model")
    loaded.flow = engine.transformer
    with torch.no_grad():
        bare = loaded.velocity(x, t, None, ids, (2, 2))
        engine.load_adapter(tmp_path / "adapter.safetensors")
        acted = loaded.velocity(x, t, None, ids, (2, 2))
    torch.testing.assert_close(acted, trained, atol=2e-5, rtol=0)
    assert (acted - bare).abs().max() > 1e-2


def test_a_deepened_model_computes_what_it_did_before_and_its_new_blocks_learn() -> None:
    before, deeper = FlowWithText.load(CASE / "model"), FlowWithText.load(CASE / "model", deepen=2)
    assert deeper.flow.config.depth_single == before.flow.config.depth_single + 2
    ids = before.text.token_ids(["make it red"])
    x, t = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([0.7])
    with torch.no_grad():
        assert torch.equal(deeper.velocity(x, t, None, ids, (2, 2)), before.velocity(x, t, None, ids, (2, 2)))
    deeper.velocity(x, t, None, ids, (2, 2)).square().mean().backward()  # type: ignore[no-untyped-call]
    last = deeper.flow.config.depth_single - 1
    gates = dict(deeper.flow.named_parameters())[f"single_blocks.{last}.modulation.lin.weight"].grad
    assert gates is not None
    assert gates.abs().max() > 0


def test_adapters_of_no_rank_or_no_target_are_refused(module: FlowWithText) -> None:
    with pytest.raises(AdapterError, match="rank 0"):
        LowRankAdapter(module.flow, rank=0)
    with pytest.raises(AdapterError, match="no linear"):
        LowRankAdapter(module.flow, rank=1, targets=("conv",))


def test_a_lora_from_a_table_of_pairs_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "kind": "lora",
        "folder": str(tmp_path / "run"),
        "base": str(CASE / "model"),
        "pairs": str(pairs_table(tmp_path)),
        "size": [32, 32],
        "batch": 2,
        "rank": 2,
        "export": str(tmp_path / "adapter.safetensors"),
        "preview_every": 2,
        "for_steps": [2, 4],
        "pixel_share": 0.5,
        "huber": 0.3,
        "loop": {"steps": 2, "log_every": 1, "accumulate": 2},
    }
    assert main([str(write(tmp_path / "train.yaml", config))]) == 0
    assert "step 2/2" in capsys.readouterr().out
    with Image.open(tmp_path / "run" / "previews" / "000002.png") as previewed:
        assert np.asarray(previewed).std() > 10
    with Image.open(tmp_path / "run" / "metrics.png") as plotted:
        assert plotted.size == (800, 300)
    engine = KontextEngine.load(CASE / "model", device="cpu", text_length=16)
    assert not engine.load_adapter(tmp_path / "adapter.safetensors").ignored
    assert (tmp_path / "run" / "metrics.csv").is_file()


def test_what_a_config_asks_of_the_objective_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives: list[Objective] = []
    compiled: list[FlowTransformer] = []
    monkeypatch.setattr("engine.training.run.train_flow", lambda *args, objective, **kw: objectives.append(objective))
    monkeypatch.setattr("engine.training.run.compile_blocks", compiled.append)
    config = {
        "kind": "finetune",
        "folder": str(tmp_path / "run"),
        "base": str(CASE / "model"),
        "pairs": str(pairs_table(tmp_path)),
        "size": [32, 32],
        "compile": True,
        "time_mean": 1.5,
        "for_steps": [2, 4],
        "pixel_share": 0.5,
        "huber": 0.3,
        "loop": {"steps": 2},
    }
    run(TrainingConfig.from_dict(config), say=lambda _: None)
    [found] = objectives
    assert (found.time_mean, found.for_steps, found.huber) == (1.5, (2, 4), 0.3)
    assert found.metric is not None
    assert found.metric.shape == (64, 64)
    assert len(compiled) == 1


# --- the autoencoder


def test_normalised_latents_have_mean_nothing_and_deviation_one() -> None:
    torch.manual_seed(1)
    pictures = (255 * torch.rand(24, 3, 32, 32)).byte()
    module = normalised(Autoencoder(AE).eval(), pictures)
    with torch.no_grad():
        latents = module.encode(pictures.float() / 127.5 - 1)
    assert latents.mean().item() == pytest.approx(0, abs=1e-3)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)


def test_the_decoder_alone_is_trained_when_the_encoder_is_frozen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Autoencoder(replace(AE, scale=0.5, shift=0.25))
    save_component(start, tmp_path / "vae")
    config = TrainingConfig(
        kind="autoencoder",
        folder=tmp_path / "run",
        loop=LOOP,
        batch=2,
        pool=4,
        vae=tmp_path / "vae",
        freeze_encoder=True,
        export=tmp_path / "out",
    )
    run(config, say=lambda _: None)
    before, after = snapshot(start), snapshot(read_autoencoder(tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("decoder.") for name in moved)
    assert read_autoencoder(tmp_path / "out").config == start.config


def test_pictures_are_drawn_at_every_size_of_the_area_and_half_of_them_square() -> None:
    pools = picture_pool(40, 0)
    assert {(pool.shape[-1], pool.shape[-2]) for pool in pools} == set(sizes(128 * 128))
    assert pools[0].shape == (20, 3, 128, 128)
    assert all(torch.equal(first, second) for first, second in zip(pools, picture_pool(40, 0), strict=True))


def test_latents_of_drawn_pairs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(replace(AE, sample_size=64))
    first = drawn_latents(autoencoder, 8, 0, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("engine.training.data.encode_pairs", None)  # encoding again would fail
        second = drawn_latents(autoencoder, 8, 0, tmp_path)
    assert [part.grid for part in first] == [part.grid for part in second]
    assert all(torch.equal(one.after, other.after) for one, other in zip(first, second, strict=True))
    assert all(one.prompts == other.prompts for one, other in zip(first, second, strict=True))
    rows, columns = first[1].grid
    assert first[1].after.shape[1] == rows * columns
    kept = tmp_path / "64x64.safetensors"
    (tmp_path / "half").write_bytes(kept.read_bytes()[:100])
    (tmp_path / "half").replace(kept)  # not in place: what was read is a view of the file
    assert torch.equal(drawn_latents(autoencoder, 8, 0, tmp_path)[0].after, first[0].after)
    for parameter in autoencoder.parameters():
        parameter.data += 0.01
    third = drawn_latents(autoencoder, 8, 0, tmp_path)  # another autoencoder
    assert not torch.equal(third[0].after, second[0].after)
    assert len(drawn_latents(autoencoder, 12, 0, tmp_path)[0].prompts) == 6
    drawn_latents(autoencoder, 8, 0, tmp_path)
    same = {**dict.fromkeys(KINDS, 0.0), "same": 1.0}
    other = drawn_latents(autoencoder, 8, 0, tmp_path, same)  # other kinds of edits
    assert all(torch.equal(part.before, part.after) for part in other)


def test_pictures_are_encoded_where_the_autoencoder_is_and_kept_on_the_cpu() -> None:
    class Elsewhere(torch.nn.Module):
        """`meta` stands for a GPU."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1, device="meta"))

        def encode(self, images: Tensor) -> Tensor:
            assert images.device.type == "meta"
            return torch.ones(len(images), 16, 4, 4)

    latents = encode_all(cast(Autoencoder, Elsewhere()), torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert latents.shape == (3, 4, 64)
    assert latents.device.type == "cpu"


def test_an_adapter_lies_where_its_flow_lies(module: FlowWithText) -> None:
    adapter = LowRankAdapter(module.flow.to("meta"), rank=2)
    assert {parameter.device.type for parameter in adapter.parameters()} == {"meta"}


# --- what is refused


def test_pairs_are_cut_to_size_and_an_empty_before_is_text_to_image(tmp_path: Path) -> None:
    pairs = read_pairs(pairs_table(tmp_path), 32, 32)
    assert pairs.after.shape == (3, 3, 32, 32)
    assert pairs.has_before.tolist() == [True, True, False]
    assert pairs.prompts == ["make it 0", "make it 1", "make it 2"]
    assert (pairs.after[2, 0] == 80).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "fluxx"}, "kind 'fluxx'"),
        ({"lop": {}}, "unknown lop"),
        ({"loop": {"steps": 1, "learning": 2}}, "unknown loop.learning; known are accumulate"),
        ({"loop": 3}, "loop 3"),
        ({"loop": {}}, "loop.steps is missing"),
        ({"loop": {"steps": -1}}, "loop.steps -1"),
        ({"loop": {"steps": 2.5}}, "loop.steps 2.5"),
        ({"loop": {"steps": 1, "lr": -1}}, "loop.lr -1"),
        ({"loop": {"steps": 1, "lr": float("nan")}}, "loop.lr 'NaN'"),
        ({"loop": {"steps": 1, "ema": 1}}, "loop.ema 1"),
        ({"loop": {"steps": 1, "clip": 0}}, "loop.clip 0"),
        ({"loop": {"steps": 1, "save_every": 0}}, "loop.save_every 0"),
        ({"loop": {"steps": 1, "seed": -1}}, "loop.seed -1"),
        ({"loop": {"steps": 1, "bf16": 3}}, "loop.bf16 3"),
        ({"pool": 1}, "pool 1"),
        ({"threads": 0}, "threads 0"),
        ({"folder": ""}, "folder ''"),
        ({"export": 3}, "export 3"),
        ({"pairs": "p.csv"}, "pairs means nothing to kind autoencoder"),
        ({"kind": "lora", "base": "b", "vae": "v"}, "vae means nothing to kind lora"),
        ({"kind": "lora", "base": "b", "dtype": "fp16"}, "dtype means nothing to kind lora"),
        ({"kind": "lora", "base": "b", "targets": "attn.qkv"}, "targets 'attn.qkv'"),
        ({"kind": "lora", "base": "b", "rank": 0}, "rank 0"),
        ({"kind": "lora", "base": "b", "size": [64, 64]}, "there is no `pairs`"),
        ({"kind": "lora", "base": "b", "pairs": "p", "size": [60, 64]}, "size.0 60"),
        ({"kind": "lora", "base": "b", "pairs": "p", "size": "64x64"}, "size '64x64'"),
        ({"kind": "lora", "base": "b", "pairs": "p", "pool": 9}, "pool is for drawn pairs"),
        ({"kind": "flow", "base": "b", "time_mean": float("nan")}, "time_mean 'NaN'"),
        ({"kind": "flow", "base": "b", "context_dropout": 2}, "context_dropout 2"),
        ({"kind": "flow", "base": "b", "for_steps": [4, 0]}, "for_steps.1 0"),
        ({"kind": "flow", "base": "b", "pixel_share": 1.5}, "pixel_share 1.5"),
        ({"kind": "flow", "base": "b", "huber": 0}, "huber 0"),
        ({"huber": 0.3}, "huber means nothing to kind autoencoder"),
        ({"kind": "lora"}, "needs `base`"),
        ({"kind": "flow"}, "needs `vae`"),
        ({"kind": "flow", "vae": "a", "base": "b"}, "else `base`"),
        ({"kind": "flow", "vae": "a", "deepen": 2}, "deepen needs `base`"),
        ({"kind": "flow", "base": "b", "deepen": -1}, "deepen -1"),
        ({"freeze_encoder": True}, "needs `vae`"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"loop": {"steps": 1, "accumulate": 0}}, "loop.accumulate 0"),
        ({"batch": 0}, "batch 0"),
        ({"kind": "flow", "base": "b", "shares": ["colour"]}, "shares ['colour']"),
        ({"kind": "flow", "base": "b", "shares": {"color": 1}}, "unknown color; known are colour"),
        ({"kind": "flow", "base": "b", "shares": {"colour": -1}}, "shares.colour -1"),
        ({"kind": "flow", "base": "b", "shares": {"colour": "red"}}, "shares.colour 'red'"),
        ({"kind": "flow", "base": "b", "shares": dict.fromkeys(KINDS, 0)}, "needs more than 0"),
    ],
)
def test_a_wrong_config_is_told_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    good = {"kind": "autoencoder", "folder": str(tmp_path), "loop": {"steps": 1}}
    assert main([str(write(tmp_path / "train.yaml", {**good, **change}))]) == 2
    assert words in capsys.readouterr().err


def test_numbers_as_yaml_reads_them_are_taken(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-3 for text."""
    path = tmp_path / "train.yaml"
    path.write_text(f"kind: autoencoder\nfolder: {tmp_path}\nloop: {{steps: 1, lr: 1e-3}}\n")
    assert TrainingConfig.read(path).loop.lr == 0.001


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"kind: [", "not readable"), (b"kind: \xff", "not readable"), (b"- 1", "mapping"), (b"a: 1\na: 2", "twice")],
)
def test_a_file_that_is_no_config_is_told(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "train.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=words):
        TrainingConfig.read(tmp_path / "train.yaml")


def lora(tmp_path: Path, **changes: Any) -> TrainingConfig:
    """A training of no step."""
    values = {
        "kind": "lora",
        "folder": tmp_path / "run",
        "base": CASE / "model",
        "pairs": pairs_table(tmp_path),
        "size": [32, 32],
        "rank": 2,
        "loop": {"steps": 0},
        "export": tmp_path / "adapter.safetensors",
    }
    return TrainingConfig.from_dict({**values, **changes})


def test_the_place_of_the_export_is_looked_at_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    folder = {"rank": None, "kind": "finetune"}
    for changes, words in (
        ({"export": tmp_path / "mine"}, "is a folder"),
        ({"export": tmp_path / "file"}, "is there already"),
        ({"export": tmp_path / "file" / "x"}, "cannot be written"),
        ({"export": tmp_path / "mine", **folder}, "is there already"),
        ({"export": CASE / "model", **folder}, "would overwrite base"),
        ({"export": CASE / "model" / "transformer", **folder}, "would overwrite base"),
        ({"export": CASE, **folder}, "would overwrite base"),
        ({"export": tmp_path / "run", **folder}, "where the training itself lies"),
        ({"folder": tmp_path / "file"}, "cannot be used"),
        ({"device": "banana"}, "device 'banana' cannot be used here"),
        ({"device": "meta"}, "device 'meta' cannot be used here"),
    ):
        values = {name: value for name, value in changes.items() if value is not None}
        with pytest.raises(ConfigError, match=words):
            run(lora(tmp_path, **values) if "kind" not in values else finetune(tmp_path, values), say=lambda _: None)
    assert (tmp_path / "file").read_text() == "x"


def finetune(tmp_path: Path, values: dict[str, Any]) -> TrainingConfig:
    base = {"folder": tmp_path / "run", "base": CASE / "model", "pairs": pairs_table(tmp_path), "size": [32, 32]}
    return TrainingConfig.from_dict({**base, "loop": {"steps": 0}, **values})


def test_its_own_export_is_written_again(tmp_path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for kind in ("lora", "finetune"):
        export = tmp_path / f"{kind}-result"
        config = (
            lora(tmp_path, export=export, folder=tmp_path / kind)
            if kind == "lora"
            else finetune(tmp_path, {"kind": kind, "export": export, "folder": tmp_path / kind})
        )
        for _ in range(2):
            run(config, say=lambda _: None)
        written = export if export.is_file() else export / "transformer" / "diffusion_pytorch_model.safetensors"
        assert written.stat().st_mode & 0o044 == 0o044 & ~umask  # others may read it
        assert not list(tmp_path.glob(".*.part"))


def test_a_training_goes_on_as_itself_alone(tmp_path: Path) -> None:
    told: list[str] = []
    run(lora(tmp_path), say=told.append)
    config = lora(tmp_path, loop={"steps": 1, "log_every": 1}, batch=2)
    run(config, say=told.append)
    told.clear()
    run(lora(tmp_path, loop={"steps": 2, "lr": 0.01}, batch=3), say=told.append)
    assert told[:3] == [
        "goes on with batch 3 instead of 2",
        "goes on with loop.log_every 25 instead of 1",
        "goes on with loop.lr 0.01 instead of 0.001",
    ]
    for changes in ({"rank": 3}, {"targets": ["attn.qkv"]}):
        with pytest.raises(ConfigError, match=f"begun with {next(iter(changes))}"):
            run(lora(tmp_path, **changes), say=told.append)


def test_two_trainings_keep_out_of_one_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"), pytest.raises(ConfigError, match="another training is running"):
        run(lora(tmp_path), say=lambda _: None)
    run(lora(tmp_path), say=lambda _: None)


def test_pictures_are_laid_on_white_and_deep_ones_refused(tmp_path: Path) -> None:
    table = pairs_table(tmp_path)
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.save(tmp_path / "after0.png")
    assert (read_pairs(table, 32, 32).after[0] == 255).all()
    Image.new("I;16", (64, 64), 300).save(tmp_path / "after0.png")
    with pytest.raises(ConfigError, match="more than 8 bits"):
        read_pairs(table, 32, 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("before;after;instruction\na;b;c\n", "with commas between; found: before;after;instruction"),
        ("before,after,after,instruction\n", "two columns after"),
        ("before,after,instruction\na.png,b.png,make it red, and blue\n", "line 2: 4 cells for 3 columns"),
        ("before,after,instruction\na.png\n", "line 2: 1 cells"),
        ('before,after,instruction\n\n"a\nb.png",,go\n', "line 4: `after` is empty"),
        ("before,after,instruction\n,b.png,M\xfcll\n", "no UTF-8"),
        ('before,after,instruction\n,b.png,"open\n', "unexpected end"),
    ],
)
def test_tables_that_would_lose_something_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "pairs.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=words):
        read_pairs(tmp_path / "pairs.csv", 32, 32)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pairs(tmp_path / "none.csv", 32, 32)


def test_tables_that_cannot_be_used_are_told_by_line(tmp_path: Path) -> None:
    table_path = pairs_table(tmp_path)
    (tmp_path / "after1.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"line 3: after1\.png"):
        read_pairs(table_path, 32, 32)
    table_path.write_text("before,after\na.png,b.png\n")
    with pytest.raises(ConfigError, match="instruction is missing"):
        read_pairs(table_path, 32, 32)
    table_path.write_text("before,after,instruction\n")
    with pytest.raises(ConfigError, match="no pairs"):
        read_pairs(table_path, 32, 32)


# --- measuring


def test_psnr_of_a_known_difference() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    assert psnr(grey, Image.new("RGB", (8, 8), (110, 110, 110))) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr(grey, grey) == 99


def test_an_evaluation_compares_every_kind_with_its_target() -> None:
    engine = KontextEngine.load(CASE / "model", device="cpu", text_length=16)
    examples = held_out(8)
    assert len({example.kind for example in examples}) == 8
    outcomes = evaluate(engine, examples, steps=1)
    assert all(outcome.psnr < 30 for outcome in outcomes)  # random weights edit nothing
    assert {outcome.example.kind for outcome in outcomes if outcome.unedited is None} == {"text-to-image"}
    same = next(outcome for outcome in outcomes if outcome.example.kind == "same")
    assert same.unedited == 99
    assert same.nearer is None
    assert table(outcomes).count("\n") == 10
    assert sheet(outcomes).size == (3 * (3 * 128 + 12), 3 * (128 + 30))


def test_an_exported_model_is_the_one_that_was_trained(module: FlowWithText, tmp_path: Path) -> None:
    train_flow(module, module.flow, [data_of(module)], LOOP, tmp_path / "run", batch=4, say=lambda _: None)
    trained = snapshot(module.flow)
    engine = KontextEngine.load(CASE / "model", device="cpu")
    module.export(tmp_path / "model", engine.autoencoder, torch.bfloat16)
    loaded = KontextEngine.load(tmp_path / "model", device="cpu", text_length=16)
    for name, parameter in loaded.transformer.named_parameters():
        torch.testing.assert_close(parameter, trained[name], atol=0, rtol=2**-8)
    assert loaded.edit([EditRequest("make it red", width=32, height=32, steps=1)])[0].image.size == (32, 32)
