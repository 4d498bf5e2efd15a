"""`${...}`: references, never code.

    text      = (literal | "$${" | "${" reference "}")*
    reference = name ("|" (name | filter))*
    name      = word ("." word)*                 scene, item.sku, brand.colors.red
    filter    = "slug" | "upper" | "lower" | "default(" text ")" | "pad(" number ")"

Names are tried from left to right, filters are applied in order to what was found. `$${` is a literal `${`. What a
reference stands for is data and is never looked at again for references.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

FILTERS = ("slug", "upper", "lower", "default", "pad")
MAX_PAD = 32
MAX_CANDIDATES = 700
"""Names among which a near one is looked for: all time zones, and not a trap of thousands."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_][A-Za-z0-9_-]*)*")
_CALL = re.compile(r"(?P<filter>[A-Za-z_]+)\s*\((?P<argument>.*)\)", re.DOTALL)


class TemplateError(ValueError):
    """A text whose `${...}` cannot be read; `offset` is the 0-based character where it goes wrong."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter of a reference."""

    name: str
    argument: str = ""

    def __call__(self, text: str) -> str:
        if self.name == "slug":
            return slug(text)
        if self.name == "upper":
            return text.upper()
        if self.name == "lower":
            return text.lower()
        if self.name == "pad":
            return text.zfill(int(self.argument))
        return text  # `default` acts where nothing was found, not on what was


@dataclass(frozen=True, slots=True)
class Reference:
    """One `${...}`: names of which the first that exists counts, then filters."""

    names: tuple[str, ...]
    filters: tuple[Filter, ...]
    offset: int
    """0-based, of the `$`."""
    text: str
    """As written, without `${` and `}`."""

    @property
    def default(self) -> str | None:
        """What stands in when none of the names exists."""
        return next((each.argument for each in self.filters if each.name == "default"), None)

    def apply(self, text: str) -> str:
        """`text` through the filters, in order."""
        for each in self.filters:
            text = each(text)
        return text


@dataclass(frozen=True, slots=True)
class Template:
    """A text with references: literals and references in turn."""

    parts: tuple[str | Reference, ...]
    text: str

    @property
    def references(self) -> tuple[Reference, ...]:
        return tuple(part for part in self.parts if isinstance(part, Reference))

    @property
    def names(self) -> tuple[str, ...]:
        """Every name used, in order of appearance, each once: the input of axis inference."""
        return tuple(dict.fromkeys(name for reference in self.references for name in reference.names))

    @property
    def whole(self) -> Reference | None:
        """The reference, when the text is nothing else: what a picture must be."""
        only = self.parts[0] if len(self.parts) == 1 else None
        return only if isinstance(only, Reference) else None


@lru_cache(maxsize=65_536)
def parse_template(text: str) -> Template:
    """Split `text` into literals and references. Raises `TemplateError`."""
    parts: list[str | Reference] = []
    literal = ""
    at = 0
    while (start := text.find("${", at)) >= 0:
        if start > at and text[start - 1] == "$":
            literal += text[at : start - 1] + "${"
            at = start + 2
            continue
        literal += text[at:start]
        end = _closing(text, start + 2)
        if literal:
            parts.append(literal)
            literal = ""
        parts.append(_reference(text[start + 2 : end], start))
        at = end + 1
    literal += text[at:]
    if literal:
        parts.append(literal)
    return Template(tuple(parts), text)


def _closing(text: str, at: int) -> int:
    """Index of the `}` that ends a reference; quotes in arguments may hold one."""
    quote = ""
    for index in range(at, len(text)):
        char = text[index]
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and "(" in text[at:index]:
            quote = char
        elif char == "}":
            return index
        elif char == "\n" or (char == "{" and text[index - 1] == "$"):
            break
    raise TemplateError("'${' without its '}'; write '$${' for the characters themselves", at - 2)


def _reference(text: str, offset: int) -> Reference:
    names: list[str] = []
    filters: list[Filter] = []
    for piece, start in _pieces(text):
        at = offset + 2 + start
        call = _CALL.fullmatch(piece)
        if call is None and piece not in FILTERS:
            if not _NAME.fullmatch(piece):
                said = f"'{piece}' is not a name" if piece else "a name is missing"
                raise TemplateError(
                    f"{said}; a reference is dotted names, '|' and the filters {', '.join(FILTERS)}; no expressions", at
                )
            if filters:
                raise TemplateError(f"the name '{piece}' stands after a filter; names come first", at)
            names.append(piece)
        else:
            filters.append(_filter(piece, call, at))
    if not names:
        raise TemplateError("a reference begins with a name", offset)
    return Reference(tuple(names), tuple(filters), offset, text.strip())


def _pieces(text: str) -> Iterator[tuple[str, int]]:
    """The text between bars (not those in quotes), stripped, with where each begins."""
    start, quote = 0, ""
    for index, char in enumerate([*text, "|"]):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "|":
            piece = text[start:index]
            yield piece.strip(), start + len(piece) - len(piece.lstrip())
            start = index + 1


def _filter(piece: str, call: re.Match[str] | None, at: int) -> Filter:
    name = call["filter"] if call else piece
    argument = call["argument"].strip() if call else None
    if name not in FILTERS:
        raise TemplateError(f"unknown filter '{name}'{nearest(name, FILTERS)}", at)
    if name in ("default", "pad"):
        if not argument:
            raise TemplateError(f"{name}(...) needs a value", at)
        if argument[0] in "'\"" and argument[-1] == argument[0] and len(argument) > 1:
            argument = argument[1:-1]
        if name == "pad" and not (argument.isascii() and argument.isdigit() and 1 <= int(argument[:3]) <= MAX_PAD):
            raise TemplateError(f"pad(...) needs a number of digits, 1 to {MAX_PAD}, not '{argument}'", at)
        return Filter(name, argument)
    if argument:
        raise TemplateError(f"{name} takes no value", at)
    return Filter(name)


def slug(text: str) -> str:
    """Lower case ASCII letters and digits with single hyphens; `Größe 42/EU` is `grosse-42-eu`.

    Letters without an ASCII form are kept (a Japanese name stays readable), so it is never empty for a text with
    letters or digits.
    """
    decomposed = unicodedata.normalize("NFKD", text.replace("ß", "ss").replace("ẞ", "SS"))
    kept = "".join(char for char in decomposed if not _is_latin_accent(char))
    return re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", kept).lower()).strip("-")


def _is_latin_accent(char: str) -> bool:
    return "\u0300" <= char <= "\u036f"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'scene'?`, or nothing when no known name is near."""
    found = nearest_name(name, known)
    return f"; did you mean '{found}'?" if found else ""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The known name that was meant, empty when none is near."""
    candidates = sorted(set(known))
    if len(candidates) > MAX_CANDIDATES:
        return ""
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if not found:
        lowered = {each.lower(): each for each in candidates}
        found = [lowered[name.lower()]] if name.lower() in lowered else []
    return found[0] if found else ""
