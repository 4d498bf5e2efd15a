"""GGUF files: the header, and one tensor at a time, dequantised by the package `gguf` (ENGINE.md 3d).

The layout is that of ggml's docs/gguf.md, versions 2 and 3. The header is read here: the package's own reader goes
through arrays that are as long as the file claims, at whatever cost.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import WeightsError
from engine.keys import REPACKAGED_PREFIX

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

TYPES = (
    *("F32", "F16", "BF16"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
"""Of tensors that are read."""
MOST_HEADER_BYTES = 64 * 2**20
"""A FLUX.1 file has some 100 kB of it."""
MOST_DIMENSIONS = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Types of metadata values, as `struct` has them."""
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the file."""
    size: int
    """In bytes."""


class GgufFile:
    """The tensors of a GGUF file by name, read one at a time into fresh memory.

    Raises `WeightsError` where the file is damaged, cut off or claims what cannot be, holds a type that is not read,
    or where the package `gguf` is not installed.
    """

    def __init__(self, where: Path) -> None:
        self.where = where
        self._tensors: dict[str, _Tensor] = {}
        try:
            with where.open("rb") as file:
                header = _Header(file.read(MOST_HEADER_BYTES))
            for tensor in header.tensors(where.stat().st_size):
                short = tensor.name.removeprefix(REPACKAGED_PREFIX)
                if short in self._tensors:
                    raise WeightsError(f"{short} is there twice")
                self._tensors[short] = tensor
        except ImportError as error:
            raise WeightsError(f"{where}: GGUF files need a package: pip install 'kontext-batch[gguf]'") from error
        except (struct.error, UnicodeDecodeError, OSError) as error:
            raise WeightsError(f"{where}: not a GGUF file, or damaged or cut off ({error})") from error
        except WeightsError as error:
            raise WeightsError(f"{where}: {error}") from error
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        """A tensor in float32."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            data = np.fromfile(self.where, np.uint8, count=tensor.size, offset=tensor.offset)
        except OSError as error:
            raise WeightsError(f"{self.where}: {name} is not readable ({error})") from error
        if data.size != tensor.size:
            raise WeightsError(f"{self.where}: {name} is cut off; the file changed while it was read")
        values = dequantize(data.reshape(*tensor.shape[:-1], -1), tensor.kind)
        return torch.from_numpy(values.reshape(tensor.shape))


class _Header:
    """Reads the header from its beginning; nothing is taken from beyond `data`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def tensors(self, file_size: int) -> list[_Tensor]:
        """All tensors, each checked to lie within the file."""
        from gguf.constants import GGML_QUANT_SIZES

        magic, version, count, entries = self._take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise WeightsError(f"not a GGUF file of version 2 or 3 (it begins with {magic!r}, version {version})")
        alignment = 32
        for _ in range(entries):
            key, (kind,) = self._text(), self._take("I")
            value = self._value(kind)
            if key == "general.alignment":
                alignment = value
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise WeightsError(f"general.alignment is {alignment!r}, which is no power of two")
        found = [self._tensor(GGML_QUANT_SIZES) for _ in range(count)]
        start = -(-self._at // alignment) * alignment
        for tensor in found:
            if start + tensor.offset + tensor.size > file_size:
                raise WeightsError(
                    f"{tensor.name} ends at byte {start + tensor.offset + tensor.size} and the file at {file_size}; it "
                    "is cut off: fetch it again"
                )
        return [_Tensor(tensor.name, tensor.kind, tensor.shape, start + tensor.offset, tensor.size) for tensor in found]

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self._data, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return values

    def _skip(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise WeightsError(f"an entry of {size} bytes at byte {self._at} goes beyond the header or the file")
        self._at += size

    def _text(self) -> str:
        (size,) = self._take("Q")
        start = self._at
        self._skip(size)
        return self._data[start : self._at].decode()

    def _value(self, kind: int) -> Any:
        """A scalar of the metadata; strings and arrays, which nothing here needs, are passed over as None."""
        if kind in SCALARS:
            return self._take(SCALARS[kind])[0]
        if kind == STRING:
            self._skip(*self._take("Q"))
        elif kind == ARRAY:
            inner, count = self._take("IQ")
            if inner in SCALARS:
                self._skip(count * struct.calcsize(SCALARS[inner]))
            elif inner == STRING:
                for _ in range(count):  # each takes bytes of the header, however large `count` is
                    self._skip(*self._take("Q"))
            else:
                raise WeightsError(f"an array of the unknown type {inner} at byte {self._at}")
        else:
            raise WeightsError(f"a value of the unknown type {kind} at byte {self._at}")
        return None

    def _tensor(self, blocks: Mapping[GGMLQuantizationType, tuple[int, int]]) -> _Tensor:
        """One tensor's entry, its offset still that from the beginning of the data.

        `blocks` holds the values and the bytes of a block of each type.
        """
        name = self._text()
        (rank,) = self._take("I")
        if not 1 <= rank <= MOST_DIMENSIONS:
            raise WeightsError(f"{name} has {rank} dimensions; 1 to {MOST_DIMENSIONS} are possible")
        sizes = self._take(f"{rank}Q")
        number, offset = self._take("IQ")
        kind = next((kind for kind in blocks if kind.value == number), None)
        if kind is None or kind.name not in TYPES:
            found = f"of the unknown type {number}" if kind is None else kind.name
            raise WeightsError(f"{name} is {found}; of GGUF, {', '.join(TYPES)} are read; take a file of these")
        values, size = blocks[kind]
        if 0 in sizes or sizes[0] % values:
            raise WeightsError(f"{name} has rows of {sizes[0]} values, and blocks of {values}; fetch the file again")
        shape = tuple(reversed(sizes))  # ggml counts dimensions from the innermost
        return _Tensor(name, kind, shape, offset, math.prod(sizes) // values * size)
