"""Channels that a recipe defines for itself, as values with fields on the axis `channel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kontext_batch.errors import Problem
from kontext_batch.recipes.brand import Brand
from kontext_batch.recipes.schema import Channel
from kontext_batch.recipes.source import Path, Source
from kontext_batch.recipes.validate import told_value

CHANNEL_AXIS = "channel"
CHANNEL_FIELDS = tuple(Channel.model_fields)


def own_channels(
    values: Mapping[str, Mapping[str, str]], brand: Brand, source: Source
) -> tuple[dict[str, Channel], list[Problem]]:
    """Name -> channel, of the values that have fields of a channel.

    Other fields are texts for prompts, and free. A channel of the brand keeps what the brand file says of it.
    """
    channels: dict[str, Channel] = {}
    problems: list[Problem] = []
    for name, fields in values.items():
        own = {field: _number(field, text) for field, text in fields.items() if field in CHANNEL_FIELDS}
        path: Path = ("matrix", CHANNEL_AXIS, name)
        if not own:
            continue
        if name in brand.channels:
            for field in own:
                message = f"'{name}' is a channel of the brand, whose file says its {field}"
                problems.append(source.problem((*path, field), message, key=True))
            continue
        try:
            channels[name] = Channel.model_validate(own)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                place = (*path, *fault["loc"]) if fault["type"] != "missing" else path
                problems.append(source.problem(place, told_value(fault)))
    return channels, problems


def _number(field: str, text: str) -> Any:
    """Fields of the matrix are texts as they were written."""
    try:
        if field == "quality":
            return int(text)
        if field == "max_upscale":
            return float(text)
    except ValueError:
        pass
    return text
