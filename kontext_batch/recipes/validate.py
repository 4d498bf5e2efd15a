"""From a YAML source to a checked document, with pydantic's findings told as an author's problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from kontext_batch.errors import Problem
from kontext_batch.recipes.references import nearest, nearest_name
from kontext_batch.recipes.schema import UNKNOWN_OPERATION, Model
from kontext_batch.recipes.source import Path, Source, WrittenFloat, WrittenInt

M = TypeVar("M", bound=Model)

LOST = "a value is missing: an unquoted '#' begins a comment; quote it ('#ff0000')"

_PRUNED_SECTIONS = ("inputs", "texts", "vars", "matrix", "steps", "outputs", "colors", "logos", "channels")


def validate(model: type[M], source: Source) -> tuple[M | None, list[Problem], frozenset[Path]]:
    """The document, the problems, and the paths that were left out of it because of them.

    What is wrong in one step or input does not hide what is wrong elsewhere: faulty parts are taken out and the rest
    is checked again, so that names can be looked up in what remains. None when nothing remains.
    """
    document, problems, faulty = _try(model, source, source.data)
    told = {(problem.line, problem.column) for problem in problems}
    for path in source.lost:  # where a value may be left out, pydantic has nothing against it
        mark = source.mark(path)
        if (mark.line, mark.column) not in told:
            problems.append(source.problem(path, LOST))
    if document is not None:
        return document, problems, frozenset()
    pruned = frozenset(path[:2] if path[:1] and path[0] in _PRUNED_SECTIONS else path[:1] for path in faulty)
    if () in pruned:
        return None, problems, pruned
    rest = _without(source.data, pruned)
    for section, stand_in in _STAND_INS.items():
        if (section,) in pruned or (section in source.data and not rest.get(section)):
            rest[section] = stand_in
    document, _, _ = _try(model, source, rest)
    return document, problems, pruned


# Enough of the required keys that the rest can be looked at; what comes of them is never used.
_STAND_INS: Mapping[str, Any] = {"version": 1, "name": "unnamed", "kind": "brand"}


def _without(data: Any, pruned: frozenset[Path]) -> Any:
    rest: dict[str, Any] = {}
    for key, value in data.items():
        if (key,) in pruned:
            continue
        if isinstance(value, dict):
            rest[key] = {name: item for name, item in value.items() if (key, name) not in pruned}
        elif isinstance(value, list):
            rest[key] = [item for index, item in enumerate(value) if (key, index) not in pruned]
        else:
            rest[key] = value
    for key in ("steps", "outputs"):
        if not rest.get(key):
            rest.pop(key, None)
    return rest


def _try(model: type[M], source: Source, data: Any) -> tuple[M | None, list[Problem], list[Path]]:
    keys: dict[int, tuple[str, ...]] = {}
    try:
        return model.model_validate(data, context=keys), [], []
    except ValidationError as error:
        faults = [(*_data_path(data, fault["loc"]), fault) for fault in error.errors(include_url=False)]
        faulty = [path if path else tuple(rest[:1]) for path, rest, _ in faults]
        # A key that is missing because it is misspelt is told once, where it is misspelt.
        misspelt = {
            (path[:-1], nearest_name(str(path[-1]), keys.get(id(_at(data, path[:-1])), ())))
            for path, _, fault in faults
            if fault["type"] == "extra_forbidden"
        }
        problems = [
            _tell(source, path, rest, fault, keys)
            for path, rest, fault in faults
            if fault["type"] != "missing" or (path, _missing(rest, fault)) not in misspelt
        ]
        return None, problems, faulty


def _data_path(data: Any, loc: Sequence[str | int]) -> tuple[Path, tuple[str | int, ...]]:
    """The part of a pydantic location that is in the data, and what comes after it; tags of unions are dropped."""
    path: list[str | int] = []
    at: Any = data
    for index, part in enumerate(loc):
        if _has(at, part):
            at = at[part]
        elif isinstance(part, str) and (part.startswith("<") or part == "[key]"):
            continue
        else:
            rest = tuple(each for each in loc[index:] if isinstance(each, str) and not each.startswith(("<", "[")))
            return tuple(path), rest
        path.append(part)
    return tuple(path), ()


def _has(data: Any, part: str | int) -> bool:
    if isinstance(data, list):
        return isinstance(part, int) and part < len(data)
    return isinstance(data, dict) and part in data


def _tell(
    source: Source,
    path: Path,
    rest: tuple[str | int, ...],
    fault: Mapping[str, Any],
    keys: Mapping[int, tuple[str, ...]],
) -> Problem:
    kind, value = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        around = _at(source.data, path[:-1])
        known = keys.get(id(around), ())
        hint = nearest(str(path[-1]), known) or (f" (known: {', '.join(known)})" if known else "")
        return source.problem(path, f"unknown key '{path[-1]}'{hint}", key=True)
    if kind == "missing":
        return source.problem(path, f"'{_missing(rest, fault)}' is missing", key=True)
    if kind == UNKNOWN_OPERATION:
        path, value = (*path, "op"), value["op"]
    if value is None and path in source.lost:
        return source.problem(path, LOST)
    # A mapping begins in the line after its key; it is the key that one looks for.
    key = "[key]" in fault["loc"] or isinstance(value, dict)
    return source.problem(path, told_value(fault), key=key)


def _missing(rest: tuple[str | int, ...], fault: Mapping[str, Any]) -> str | int:
    """The key that is missing. A union's model may stand above: it is the last name that the data lacks."""
    missing: str | int = rest[-1] if rest else fault["loc"][-1]
    return missing


def told_value(fault: Mapping[str, Any]) -> str:
    """pydantic's finding in an author's words."""
    if fault["type"] == "missing":
        return f"'{fault['loc'][-1]}' is missing"
    message: str = _MESSAGES.get(fault["type"], _other)(fault["input"], fault.get("ctx", {}), fault)
    return message


def _at(data: Any, path: Path) -> Any:
    for part in path:
        data = data[part]
    return data


def _shown(value: Any) -> str:
    if isinstance(value, (WrittenInt, WrittenFloat)):
        return value.text
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = str(value)
    return f"'{text[:60]}...'" if len(text) > 63 else f"'{text}'"


def _wanted(what: str, hint: str = "") -> Any:
    return lambda value, _context, _fault: f"{what} is wanted here, not {_shown(value)}{hint}"


def _literal(value: Any, context: Mapping[str, Any], _fault: Mapping[str, Any]) -> str:
    expected = context["expected"].replace(" or ", ", ")
    words = [word.strip().strip("'") for word in expected.split(",")]
    return f"{_shown(value)} is not possible here{nearest(str(value), words)} (one of {', '.join(words)})"


def _number_text(value: Any, _context: Mapping[str, Any], fault: Mapping[str, Any]) -> str:
    what = "a whole number" if "int" in fault["type"] else "a number"
    hint = ""
    if isinstance(value, str):
        digits = value.strip().replace(",", ".").replace("_", "")
        if digits.lstrip("+-").replace(".", "", 1).isdigit():
            hint = "; write it without quotes, leading zeros, commas or underscores"
    return f"{what} is wanted here, not {_shown(value)}{hint}"


def _text(value: Any, _context: Mapping[str, Any], _fault: Mapping[str, Any]) -> str:
    hint = "; quote it" if isinstance(value, (int, float)) else ""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)).startswith("{"):
        hint = '; quote "${...}"'
    return f"text is wanted here, not {_shown(value)}{hint}"


def _compared(word: str, name: str) -> Any:
    def tell(value: Any, context: Mapping[str, Any], _fault: Mapping[str, Any]) -> str:
        return f"{_shown(value)} is out of range: {word} {context[name]:g}"

    return tell


def _value_error(_value: Any, context: Mapping[str, Any], fault: Mapping[str, Any]) -> str:
    return str(context.get("error", fault["msg"]))


def _other(value: Any, _context: Mapping[str, Any], fault: Mapping[str, Any]) -> str:
    return f"{fault['msg']}, not {_shown(value)}"


_MESSAGES: Mapping[str, Any] = {
    "literal_error": _literal,
    "int_type": _number_text,
    "int_parsing": _number_text,
    "int_from_float": _number_text,
    "float_type": _number_text,
    "float_parsing": _number_text,
    "string_type": _text,
    "dict_type": _wanted("a mapping of keys to values"),
    "model_type": _wanted("a mapping of keys to values"),
    "model_attributes_type": _wanted("a mapping of keys to values"),
    "tuple_type": _wanted("a list"),
    "list_type": _wanted("a list"),
    "greater_than_equal": _compared("at least", "ge"),
    "greater_than": _compared("more than", "gt"),
    "less_than_equal": _compared("at most", "le"),
    "too_short": lambda _v, context, _f: f"at least {context['min_length']} wanted here",
    "too_long": lambda _v, context, _f: f"at most {context['max_length']} possible here",
    "string_too_short": lambda _v, context, _f: f"text of at least {context['min_length']} characters is wanted here",
    "string_too_long": lambda _v, context, _f: f"text of at most {context['max_length']} characters is possible here",
    "string_pattern_mismatch": lambda value, context, _f: f"{_shown(value)} is not of the form {context['pattern']}",
    "value_error": _value_error,
    UNKNOWN_OPERATION: lambda _v, context, _f: context["said"],
}
