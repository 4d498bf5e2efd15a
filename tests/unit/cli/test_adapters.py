"""Adapters in the registry: checked when they come, and taken out again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kontext_batch.cli import main
from kontext_batch.registry import Registry

BLOCK = "transformer.transformer_blocks.0.attn.to_q"


def write(path: Path, names: tuple[str, ...]) -> None:
    save_file({name: torch.ones(2, 2) for name in names}, path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (None, "not a safetensors file"),
        ((), "no LoRA is in this file"),
        (("double_blocks.0.img_attn.qkv.weight",), "no LoRA is in this file"),
        (("ema.down.0",), "is no tensor of a LoRA"),
        ((f"{BLOCK}.lokr_w1",), "not supported"),
    ],
    ids=["text", "empty", "a model", "a checkpoint", "LoKr"],
)
def test_what_is_no_adapter_is_not_registered(
    studio: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...] | None, words: str
) -> None:
    file = studio / "junk.safetensors"
    if names is None:
        file.write_text("hello")
    else:
        write(file, names)
    assert main.main(["adapters", "add", "junk", str(file)]) == 2
    assert words in capsys.readouterr().err
    assert Registry.read(studio / "models.json").adapters == {}


def test_an_adapter_comes_and_goes(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(studio / "look.safetensors", (f"{BLOCK}.lora_A.weight", f"{BLOCK}.lora_B.weight"))
    assert main.main(["adapters", "add", "look", "look.safetensors"]) == 0
    assert list(Registry.read(studio / "models.json").adapters) == ["look"]
    assert main.main(["adapters", "remove", "look"]) == 0
    assert Registry.read(studio / "models.json").adapters == {}
    assert (studio / "look.safetensors").is_file()
    capsys.readouterr()
    assert main.main(["adapters", "remove", "look"]) == 2
    assert capsys.readouterr().err == "adapter 'look' is not registered; registered: none\n"
    assert main.main(["models", "remove", "kontext"]) == 2
    assert main.main(["models", "remove", "tiny"]) == 2
    assert "comes with the package" in capsys.readouterr().err
