"""What the flow is trained on: pictures before and after and the words between them, as bytes and then as latents."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.autoencoder import Autoencoder
from engine.errors import ConfigError
from engine.geometry import sizes, token_grid
from engine.latents import pack
from engine.training.instructions import SHARES, random_example
from engine.training.products import render

COLUMNS = ("before", "after", "instruction")
SQUARE_SHARE = 0.5
"""Of what is drawn; the other sizes of the model's list have the rest in equal parts."""


def size_counts(count: int, area: int) -> dict[tuple[int, int], int]:
    """How many of `count` pictures to draw at each size (width, height) of an area."""
    others = [size for size in sizes(area) if size[0] != size[1]]
    square = math.isqrt(area)
    return {(square, square): round(SQUARE_SHARE * count)} | {
        size: max(1, round((1 - SQUARE_SHARE) * count / len(others))) for size in others
    }


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pictures before and after, as bytes (count, 3, height, width), and the words between them."""

    before: Tensor
    after: Tensor
    has_before: Tensor
    """(count,) bool: False for text-to-image."""
    prompts: list[str]


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Pairs of one size after the autoencoder: packed latents (count, tokens, channels), on the CPU."""

    before: Tensor
    after: Tensor
    has_before: Tensor
    prompts: list[str]
    grid: tuple[int, int]
    """Rows and columns of tokens."""


@dataclass(frozen=True, slots=True)
class FlowData:
    """Encoded pairs and the token ids of their words; the ids of the empty prompt come last."""

    pairs: EncodedPairs
    clip_ids: Tensor
    """(count + 1, 77)"""
    t5_ids: Tensor
    """(count + 1, text length)"""

    @classmethod
    def of(cls, pairs: EncodedPairs, token_ids: Callable[[list[str]], tuple[Tensor, Tensor]]) -> FlowData:
        return cls(pairs, *token_ids([*pairs.prompts, ""]))


def stacked(pictures: Iterable[Image.Image]) -> Tensor:
    """Pictures of one size as bytes (count, 3, height, width)."""
    return torch.from_numpy(np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures]))


def drawn_pairs(
    count: int, rng: np.random.Generator, width: int, height: int, shares: Mapping[str, float] = SHARES
) -> Pairs:
    """`count` drawn pairs of one size, of kinds as often as `shares` has them."""
    examples = [random_example(rng, shares) for _ in range(count)]
    nothing = Image.new("RGB", (width, height))
    return Pairs(
        before=stacked(nothing if each.before is None else render(each.before, width, height) for each in examples),
        after=stacked(render(each.after, width, height) for each in examples),
        has_before=torch.tensor([example.before is not None for example in examples]),
        prompts=[example.instruction for example in examples],
    )


def read_pairs(table: Path, width: int, height: int) -> Pairs:
    """Pairs from a CSV with the columns `before`, `after` (paths beside the table) and `instruction`.

    An empty `before` is text-to-image. Pictures are turned as their EXIF data say, laid on white where they are
    transparent, and cut around their middle to width x height. Raises `ConfigError`, with the line.
    """
    rows = _rows(table)

    def picture(name: str, line: int) -> Image.Image:
        try:
            with Image.open(table.parent / name) as image:
                upright = _opaque(ImageOps.exif_transpose(image))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ConfigError(f"{table}, line {line}: {name} cannot be read ({error})") from error
        return ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)

    nothing = Image.new("RGB", (width, height))
    return Pairs(
        after=stacked(picture(row["after"], line) for line, row in rows),
        before=stacked(picture(row["before"], line) if row["before"] else nothing for line, row in rows),
        has_before=torch.tensor([bool(row["before"]) for _, row in rows]),
        prompts=[row["instruction"] for _, row in rows],
    )


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    """(line, row) of a table of pairs, every one with exactly its columns. Raises `ConfigError`."""
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            names = [name.strip() for name in next(reader, [])]
            if missing := [name for name in COLUMNS if name not in names]:
                found = ", ".join(names) or "nothing"
                raise ConfigError(
                    f"{table}: the column {missing[0]} is missing; needed are {', '.join(COLUMNS)}, with commas "
                    f"between; found: {found[:200]}"
                )
            if double := [name for name in names if names.count(name) > 1]:
                raise ConfigError(f"{table}: there are two columns {double[0]}")
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(names):
                    raise ConfigError(
                        f"{table}, line {reader.line_num}: {len(cells)} cells for {len(names)} columns; a text with "
                        "commas stands in quotes"
                    )
                row = dict(zip(names, cells, strict=True))
                if not row["after"]:
                    raise ConfigError(f"{table}, line {reader.line_num}: `after` is empty")
                rows.append((reader.line_num, row))
    except OSError as error:
        raise ConfigError(f"{table}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{table}: this is no UTF-8 text; save it as CSV UTF-8 ({error.reason})") from error
    except csv.Error as error:
        raise ConfigError(f"{table}, line {reader.line_num}: {error}") from error
    if not rows:
        raise ConfigError(f"{table}: no pairs")
    return rows


def _opaque(image: Image.Image) -> Image.Image:
    """As RGB, on white where it is transparent. Raises `ValueError` for more than 8 bits a channel."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError("more than 8 bits a channel; convert it to RGB first")
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGB", image.size, "white")
    cut = image.convert("RGBA")
    ground.paste(cut, mask=cut)
    return ground


def encode_pairs(autoencoder: Autoencoder, pairs: Pairs) -> EncodedPairs:
    return EncodedPairs(
        before=encode_all(autoencoder, pairs.before),
        after=encode_all(autoencoder, pairs.after),
        has_before=pairs.has_before,
        prompts=pairs.prompts,
        grid=token_grid(pairs.after.shape[-1], pairs.after.shape[-2]),
    )


@torch.no_grad()
def encode_all(autoencoder: Autoencoder, pictures: Tensor) -> Tensor:
    """Packed latents (count, tokens, channels) of pictures given as bytes, back on the CPU."""
    device = next(autoencoder.parameters()).device
    parts = torch.split(pictures, 32)
    return torch.cat([pack(autoencoder.encode(part.to(device).float() / 127.5 - 1)).cpu() for part in parts])


def drawn_latents(
    autoencoder: Autoencoder, count: int, seed: int, folder: Path, shares: Mapping[str, float] = SHARES
) -> list[EncodedPairs]:
    """Drawn pairs at the sizes of the autoencoder's area, encoded once and kept in `folder`.

    They are made again when the autoencoder, the seed, the count or what is drawn has changed since.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = hashlib.sha256()
    for name, tensor in sorted(autoencoder.state_dict().items()):
        weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    out = []
    for index, ((width, height), part) in enumerate(size_counts(count, autoencoder.config.sample_size**2).items()):
        made_of = _made_of(weights.hexdigest(), part, (seed, index), width, height, shares)
        path = folder / f"{width}x{height}.safetensors"
        if _kept_under(path) != made_of:
            pairs = drawn_pairs(part, np.random.default_rng((seed, index)), width, height, shares)
            found = encode_pairs(autoencoder, pairs)
            tensors = {"before": found.before, "after": found.after, "has_before": found.has_before}
            unfinished = path.with_suffix(".part")
            save_file(tensors, unfinished, metadata={"prompts": json.dumps(found.prompts), "made_of": made_of})
            unfinished.replace(path)
        with safe_open(path, framework="pt") as file:
            prompts = json.loads(file.metadata()["prompts"])
            tensors = {name: file.get_tensor(name) for name in ("before", "after", "has_before")}
        out.append(EncodedPairs(**tensors, prompts=prompts, grid=token_grid(width, height)))
    return out


def _made_of(
    weights: str, count: int, seed: tuple[int, int], width: int, height: int, shares: Mapping[str, float]
) -> str:
    """Hash of what kept latents depend on; the first pairs stand for how pairs are drawn and worded."""
    first = drawn_pairs(min(count, 8), np.random.default_rng(seed), width, height, shares)
    digest = hashlib.sha256(f"{weights} {count} {seed} {sorted(shares.items())} {first.prompts}".encode())
    digest.update(first.after.numpy().tobytes())
    return digest.hexdigest()


def _kept_under(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("made_of")
    except SafetensorError:  # half of it is there: it is made again
        return None
