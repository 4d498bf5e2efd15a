"""Where the sidecar of a delivered file lies."""

from __future__ import annotations

from typing import Final

ENDING: Final = ".lineage.json"


def sidecar_path(path: str) -> str:
    """`a/b.jpg` -> `a/b.jpg.lineage.json`: with the file's ending, for `b.jpg` and `b.png` may lie side by side."""
    return f"{path}{ENDING}"


def is_sidecar(path: str) -> bool:
    """By its name."""
    return path.endswith(ENDING)
