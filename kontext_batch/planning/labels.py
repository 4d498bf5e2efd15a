"""Labels of contact sheets in the letters that can be drawn: Pillow's built-in font, the same everywhere, has ASCII."""

from __future__ import annotations

import unicodedata

_SPELLED = {"ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L",
            "đ": "d", "Đ": "D", "þ": "th", "Þ": "Th", "·": "-", "–": "-", "—": "-", "×": "x", "’": "'", "‘": "'",
            "“": '"', "”": '"', "„": '"', "…": "..."}  # fmt: skip
"""What Unicode does not take apart into a letter and its accents."""


def as_ascii(text: str) -> str:
    """`Größe 42` as `Grosse 42`, `写真` as `??`, any white space as one blank."""
    return _without_accents(text).encode("ascii", "replace").decode()


def can_be_drawn(text: str) -> bool:
    """Whether every letter is drawn, if without its accents; others show as `?`."""
    return _without_accents(text).isascii()


def _without_accents(text: str) -> str:
    spelled = "".join(_SPELLED.get(char, char) for char in " ".join(text.split()))
    return "".join(char for char in unicodedata.normalize("NFKD", spelled) if not unicodedata.combining(char))
