"""Credentials are masked in whatever is logged, told or stored.

Two nets: secrets that this process knows are masked wherever they turn up (`hide`), and what has the look of a
credential is masked by its shape. Rather too much is masked than too little.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

MASK = "***"
SHORTEST = 6
"""Characters of the shortest secret that is masked by its text: shorter ones would mask half the log."""

_known: set[str] = set()

_NAME = (
    r"(?:passw(?:or)?d|passphrase|secret|token|signature|credential|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|private[_-]?key|authorization)"
)
_VALUE = r"(?:\"[^\"]{0,1000}\"|'[^']{0,1000}'|[^\s&,;\"')\]}]+)"
_SENSITIVE = re.compile(rf"{_NAME}$", re.IGNORECASE)
# Every repetition is bounded: what a recipe's author writes comes by here, and must not take quadratic time.
_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    # ://user:password@host, up to the last @: a password may hold any of :/?#@
    (re.compile(r"://[^\s:/@]{0,256}:[^\s'\"<>]{0,512}@"), f"://{MASK}@"),
    (re.compile(r"://[^\s:/@'\"<>]{1,512}@"), f"://{MASK}@"),
    (re.compile(r"\b(bearer|basic)\s{1,8}[\w.~+/=-]{6,}", re.IGNORECASE), rf"\1 {MASK}"),
    (re.compile(rf"({_NAME}[\"']?\s{{0,8}}[=:]\s{{0,8}}){_VALUE}", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA|AGPA|ANPA)[A-Z0-9]{16}\b"), MASK),
    (re.compile(r"\bwhsec_[A-Za-z0-9+/=_-]+"), f"whsec_{MASK}"),
)


def hide(*secrets: str | None) -> None:
    """Mask these texts from now on wherever they turn up; None and very short ones are left out."""
    _known.update(each for each in secrets if each is not None and len(each) >= SHORTEST)


def hide_password(*urls: str | None) -> None:
    """Mask the passwords of these URLs from now on, as they are written there and as they are meant."""
    for url in urls:
        with suppress(ValueError):  # told by whoever uses the URL
            password = urlsplit(url or "").password
            if password is not None:
                hide(password, unquote(password))


def mask(text: str) -> str:
    """`text` without credentials."""
    for each in sorted(_known, key=len, reverse=True):  # one may be the beginning of another
        text = text.replace(each, MASK)
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    return text


def masked(value: Any) -> Any:
    """The same for a log's values: mappings, lists and texts within one another; other objects by their `repr`.

    The value of a name such as `password` is masked whatever it looks like; numbers and flags stay.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {key: _under(key, each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [masked(each) for each in value]
    return mask(repr(value))


def _under(key: Any, value: Any) -> Any:
    return MASK if isinstance(value, str) and _SENSITIVE.search(str(key)) else masked(value)
