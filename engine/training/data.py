"""What the flow is trained on: pictures before and after and the words between them, as bytes and then as latents."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from engine.autoencoder import Autoencoder
from engine.errors import ConfigError
from engine.latents import pack
from engine.training.instructions import random_example
from engine.training.products import render

COLUMNS = ("before", "after", "instruction")


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pictures before and after, as bytes (count, 3, height, width), and the words between them."""

    before: Tensor
    after: Tensor
    has_before: Tensor
    """(count,) bool: False for text-to-image."""
    prompts: list[str]


@dataclass(frozen=True, slots=True)
class FlowData:
    """Pairs as the flow sees them: packed latents (count, tokens, channels) and token ids, the empty prompt last."""

    before: Tensor
    after: Tensor
    has_before: Tensor
    clip_ids: Tensor
    """(count + 1, 77)"""
    t5_ids: Tensor
    """(count + 1, text length)"""
    grid: tuple[int, int]
    """Rows and columns of tokens."""


def drawn_pairs(count: int, seed: int, folder: Path) -> Pairs:
    """`count` drawn pairs of 128x128 pixels, kept in `folder` once they are drawn."""
    names = {name: folder / f"{name}.npy" for name in ("before", "after", "has_before")}
    words = folder / "prompts.json"
    if not words.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        before = np.zeros((count, 3, 128, 128), np.uint8)
        after = np.zeros_like(before)
        has_before = np.zeros(count, bool)
        prompts = []
        for index in range(count):
            example = random_example(rng)
            after[index] = np.asarray(render(example.after)).transpose(2, 0, 1)
            if example.before is not None:
                before[index] = np.asarray(render(example.before)).transpose(2, 0, 1)
                has_before[index] = True
            prompts.append(example.instruction)
        for name, array in (("before", before), ("after", after), ("has_before", has_before)):
            np.save(names[name], array)
        words.write_text(json.dumps(prompts))
    arrays = {name: torch.from_numpy(np.load(path, mmap_mode="c")) for name, path in names.items()}
    return Pairs(**arrays, prompts=json.loads(words.read_text()))


def read_pairs(table: Path, width: int, height: int) -> Pairs:
    """Pairs from a CSV with the columns `before`, `after` (paths beside the table) and `instruction`.

    An empty `before` is text-to-image. Pictures are cut around their middle to width x height. Raises `ConfigError`.
    """
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ConfigError(f"{table}: the column {missing[0]} is missing; needed are {', '.join(COLUMNS)}")
        rows = list(reader)
    if not rows:
        raise ConfigError(f"{table}: no pairs")

    def picture(name: str, line: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        try:
            with Image.open(table.parent / name) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
        except OSError as error:
            raise ConfigError(f"{table}, line {line}: {name} cannot be read ({error})") from error
        return np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)).transpose(2, 0, 1)

    after = np.stack([picture(row["after"], line) for line, row in enumerate(rows, start=2)])
    before = np.zeros_like(after)
    for index, row in enumerate(rows):
        if row["before"]:
            before[index] = picture(row["before"], index + 2)
    return Pairs(
        before=torch.from_numpy(before),
        after=torch.from_numpy(after),
        has_before=torch.tensor([bool(row["before"]) for row in rows]),
        prompts=[row["instruction"] for row in rows],
    )


@torch.no_grad()
def encode_all(autoencoder: Autoencoder, pictures: Tensor, cache: Path | None = None) -> Tensor:
    """Packed latents (count, tokens, channels) of pictures given as bytes, kept in `cache`."""
    if cache is not None and cache.is_file():
        return torch.from_numpy(np.load(cache))
    latents = torch.cat([pack(autoencoder.encode(part.float() / 127.5 - 1)) for part in torch.split(pictures, 32)])
    if cache is not None:
        np.save(cache, latents.numpy())
    return latents.contiguous()
