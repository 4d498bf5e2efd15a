"""Brand files, merged: the colours, logos and channels that a recipe imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kontext_batch.errors import Problem
from kontext_batch.recipes.schema import BrandDocument, Channel
from kontext_batch.recipes.source import Source

SECTIONS = ("colors", "logos", "channels")


@dataclass(frozen=True, slots=True)
class Brand:
    """What `${brand....}` and a channel's name mean in one recipe."""

    colors: Mapping[str, str] = field(default_factory=dict)
    logos: Mapping[str, str] = field(default_factory=dict)
    """Name -> path or URI, as the brand file has it."""
    channels: Mapping[str, Channel] = field(default_factory=dict)
    origins: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    """`logos.mono` -> file, line, column."""
    opaque: bool = False
    """An import could not be read: unknown names are not the recipe's fault."""


def merge(documents: list[tuple[Source, BrandDocument]], *, opaque: bool) -> tuple[Brand, list[Problem]]:
    """All imports as one; a name that two files define is a problem of the second."""
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origins: dict[str, tuple[str, int, int]] = {}
    problems: list[Problem] = []
    for source, document in documents:
        for section in SECTIONS:
            for name, value in getattr(document, section).items():
                place = f"{section}.{name}"
                if place in origins:
                    file, line, _ = origins[place]
                    message = f"'{name}' is defined in {file}:{line} already"
                    problems.append(source.problem((section, name), message, key=True))
                    continue
                mark = source.mark((section, name))
                origins[place] = (source.file, mark.line, mark.column)
                merged[section][name] = value
    return Brand(**merged, origins=origins, opaque=opaque), problems
