"""Cron lines as a recipe may hold them: exactly five fields, standard meaning, nothing of any one cron's own."""

from __future__ import annotations

import re

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]

_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, 1)}),
    ("day of week", 0, 7, {name: number for number, name in enumerate(_DAYS)}),
)


def parse_cron(text: str) -> tuple[frozenset[int], ...]:
    """The five fields as sets of numbers; day of week has 0 for Sunday (7 is taken too). Raises `ValueError`."""
    words = text.split()
    if len(words) != 5:
        raise ValueError(
            f"'{text}' has {len(words)} fields; a cron line has five: minute, hour, day of month, month, day of week"
        )
    parsed = [_field(word, *field) for word, field in zip(words, _FIELDS, strict=True)]
    parsed[4] = frozenset(day % 7 for day in parsed[4])
    return tuple(parsed)


def _field(word: str, name: str, low: int, high: int, names: dict[str, int]) -> frozenset[int]:
    numbers: set[int] = set()
    for part in word.split(","):
        match = re.fullmatch(r"(?:(\*)|([0-9]{1,2}|[A-Za-z]{3})(?:-([0-9]{1,2}|[A-Za-z]{3}))?)(?:/([0-9]{1,2}))?", part)
        if match is None:
            raise ValueError(f"'{part}' is no {name} of a cron line; write *, 5, 1-5, */15 or 1,15")
        star, first, last, every = match.groups()
        begin = low if star else _number(first, name, names)
        end = high if star else _number(last, name, names) if last else high if every else begin
        step = int(every) if every else 1
        if not low <= begin <= high or not low <= end <= high or begin > end or step < 1:
            raise ValueError(f"'{part}' is no {name} of a cron line ({low} to {high}, the smaller one first)")
        numbers.update(range(begin, end + 1, step))
    return frozenset(numbers)


def _number(word: str, name: str, names: dict[str, int]) -> int:
    if word.isdigit():
        return int(word)
    if word.lower() not in names:
        raise ValueError(f"'{word}' is no {name} of a cron line")
    return names[word.lower()]
