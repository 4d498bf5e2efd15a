"""The kinds of values that fields of a recipe take: each is checked, and normalised to one form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from kontext_batch.recipes.source import WrittenFloat, WrittenInt

MAX_SIDE = 16_384
"""Pixels; the limit of WebP, and more than a web shop asks for."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# A name becomes a word in `${...}`, in file names and in the database.
NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$"


def _text(value: Any) -> Any:
    """A number where text is wanted is what the author wrote: `1.10`, not `1.1`."""
    if isinstance(value, (WrittenInt, WrittenFloat)):
        return value.text
    if isinstance(value, bool):
        word = str(value).lower()
        raise ValueError(f"{word} without quotes is a truth value; write '{word}' if the word is meant")
    if isinstance(value, (int, float)):
        return str(value)
    return value


def _name(value: str) -> str:
    if not re.fullmatch(NAME_PATTERN, value):
        raise ValueError(
            f"'{value[:80]}' is no name: letters, digits, '_' and '-', beginning with a letter, at most 64"
        )
    return value


def _value_key(value: str) -> str:
    if not value or len(value) > 200 or not value.isprintable() or value != value.strip():
        raise ValueError("a value is 1 to 200 printable characters without spaces around it")
    return value


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels of `1920x1080`. Raises `ValueError`."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})\s*[xX×]\s*([1-9][0-9]{0,5})", text)
    if match is None:
        hint = "; a ratio belongs into `frame`" if re.fullmatch(r"[0-9.]+:[0-9.]+", text) else ""
        raise ValueError(f"'{text}' is no size; write width x height in pixels, as in 1920x1080{hint}")
    width, height = int(match[1]), int(match[2])
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{width}x{height}: a side is at most {MAX_SIDE} pixels")
    return width, height


def parse_frame(text: str) -> tuple[int, int] | None:
    """What a frame asks for as a ratio of whole numbers; None for `keep`. Raises `ValueError`."""
    if text == "keep":
        return None
    match = re.fullmatch(r"([0-9]{1,5}(?:\.[0-9]{1,3})?)\s*:\s*([0-9]{1,5}(?:\.[0-9]{1,3})?)", text)
    if match is None:
        try:
            return parse_size(text)
        except ValueError:
            raise ValueError(
                f"'{text}' is no frame; write a ratio (16:9), a size whose ratio is meant (1920x1080), or keep"
            ) from None
    width, height = round(float(match[1]) * 1000), round(float(match[2]) * 1000)
    if not width or not height or not 1 / 100 <= width / height <= 100:
        raise ValueError(f"'{text}' is no ratio of a picture")
    return width, height


def parse_color(text: str) -> str:
    """`#E4002B`, upper case, from six hex digits with or without `#`. Raises `ValueError`."""
    if not re.fullmatch(r"#?[0-9A-Fa-f]{6}", text):
        raise ValueError(f"'{text}' is no colour; write six hex digits, as in '#E4002B'")
    return "#" + text.removeprefix("#").upper()


def parse_bytes(text: str) -> int:
    """Bytes of `350KB`, `2MB` or `1.5MiB`; KB is 1000 bytes. Raises `ValueError`."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([A-Za-z]*)", text)
    unit = match[2].upper() if match else "?"
    if match is None or unit not in _UNITS or float(match[1]) * _UNITS[unit] < 1:
        raise ValueError(f"'{text}' is no number of bytes; write 350KB, 2MB, ...")
    return int(float(match[1]) * _UNITS[unit])


def parse_margin(text: str) -> str | int:
    """Pixels as a number, or `3%` (of the shorter side of the result). Raises `ValueError`."""
    match = re.fullmatch(r"([0-9]{1,5}(?:\.[0-9]{1,3})?)\s*(px|%)?", text)
    if match is None or (match[2] == "%" and float(match[1]) > 45) or (match[2] != "%" and "." in match[1]):
        raise ValueError(f"'{text}' is no margin; write pixels (24) or percent of the shorter side up to 45 (3%)")
    return f"{float(match[1]):g}%" if match[2] == "%" else int(match[1])


def _file(value: str) -> str:
    if not value or not value.isprintable():
        raise ValueError("the name of a file or place is printable characters")
    return value


def _size_text(value: str) -> str:
    return "{}x{}".format(*parse_size(value))


def _bytes(value: Any) -> Any:
    return parse_bytes(_text(value)) if isinstance(value, (str, int, float)) else value


def _margin(value: Any) -> Any:
    return parse_margin(_text(value)) if isinstance(value, (str, int, float)) else value


def _one_or_many(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def _as_list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(items), {"type": "array", "items": dict(items), "minItems": 1}]}


_TEXT_SCHEMA: dict[str, Any] = {"type": ["string", "number"]}

Str = Annotated[str, Field(strict=True)]
"""Text, and nothing that YAML reads as something else."""
Int = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Prompt = Annotated[str, Field(strict=True, min_length=1, max_length=10_000)]
"""Text with references."""
Text = Annotated[str, Field(strict=True), BeforeValidator(_text), WithJsonSchema(_TEXT_SCHEMA)]
"""A value that is data: numbers are taken as they are written."""
TextTemplate = Annotated[
    str, Field(max_length=10_000, strict=True), BeforeValidator(_text), WithJsonSchema(_TEXT_SCHEMA)
]
Name = Annotated[
    str, Field(strict=True), AfterValidator(_name), WithJsonSchema({"type": "string", "pattern": NAME_PATTERN})
]
"""The name of an axis, a step, a variable: usable in `${...}`."""
DottedName = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_][A-Za-z0-9_-]*)?$")]
"""An axis, or a column or field of one: `locale`, `item.category`."""
ValueKey = Annotated[
    str, Field(strict=True), BeforeValidator(_text), AfterValidator(_value_key), WithJsonSchema(_TEXT_SCHEMA)
]
"""The key of an axis value; goes into file names."""
Values = Annotated[
    tuple[ValueKey, ...], Field(min_length=1), BeforeValidator(_one_or_many), WithJsonSchema(_as_list(_TEXT_SCHEMA))
]
"""One value or a list that means any of."""
FileName = Annotated[
    str, Field(strict=True, max_length=1024), AfterValidator(_file), WithJsonSchema({"type": "string"})
]
"""A path relative to the recipe, or an s3: or file: URI."""
Picture = Annotated[str, Field(strict=True, min_length=4, max_length=1000)]
"""A reference that is a picture: `${item.packshot}`, `${headline | staged}`."""
Pictures = Annotated[
    tuple[Picture, ...],
    Field(min_length=1),
    BeforeValidator(_one_or_many),
    WithJsonSchema(_as_list({"type": "string"})),
]
SizeText = Annotated[
    str,
    Field(strict=True),
    AfterValidator(_size_text),
    WithJsonSchema({"type": "string", "pattern": r"^\d+\s*[xX×]\s*\d+$"}),
]
Color = Annotated[
    str,
    Field(strict=True),
    BeforeValidator(_text),
    AfterValidator(parse_color),
    WithJsonSchema({"type": ["string", "number"], "pattern": "^#?[0-9A-Fa-f]{6}$"}),
]
Bytes = Annotated[
    int,
    BeforeValidator(_bytes),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^[0-9.]+\s*([KMG]i?)?B?$"}]}
    ),
]
Margin = Annotated[
    str | int,
    BeforeValidator(_margin),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^[0-9.]+\s*(px|%)?$"}]}
    ),
]
