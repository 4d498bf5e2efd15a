"""What commands write: results to standard output, side talk to standard error, events as NDJSON under `--json`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from io import TextIOWrapper
from typing import Any

TERMINAL_EVENTS = frozenset({"finished", "interrupted", "paused", "error"})
"""Exactly one of these ends the NDJSON of `run --json`; a failing command ends with `error`."""
COMMANDS = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}
"""Characters that a terminal may obey; prompts, names and errors may hold them."""
_AS_TEXT = {code: f"\\x{code:02x}" for code in COMMANDS}
_AS_JSON = {code: f"\\u{code:04x}" for code in COMMANDS}
_last = ""


def escape_what_is_no_text() -> None:
    """Write bytes in the name of a file that are no UTF-8 as `\\udcff`, which stands for them in JSON too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def open_closed_streams() -> None:
    """Give a process that was started without standard streams (`>&-`) silent ones.

    Python sets those to None. What is opened next gets the number of the first one that is closed: were that the
    database, a library that writes to standard output would write into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for good


class OutputLost(Exception):
    """Standard output cannot be written to, so nothing can be told there; `__cause__` is the `OSError`.

    None of this project's errors: a step that meets it in the middle of a batch did not fail.
    """


@contextlib.contextmanager
def _written() -> Iterator[None]:
    """Raises `BrokenPipeError` when whoever read has gone, else `OutputLost`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(f"standard output cannot be written to: {error.strerror or error}") from error


def silence() -> None:
    """Let everything that is written from here on go nowhere: Python tries once more when the process ends."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a stream of a test has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def has_ended() -> bool:
    """Whether the last event that was written is a terminal one."""
    return _last in TERMINAL_EVENTS


def as_json(value: Any) -> Any:
    """Dataclasses, tuples and times as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value


def say(text: str = "") -> None:
    """A line of the result, or several; what a terminal would obey is written as `\\x1b`."""
    with _written():
        sys.stdout.write(text.translate(_AS_TEXT) + "\n")
        sys.stdout.flush()


def say_line(text: str) -> None:
    """A line of the result and no more, though a prompt or an error in it may hold line ends."""
    say("".join(each if each.isprintable() else ascii(each)[1:-1] for each in text))


def tell(text: str) -> None:
    """A line of side talk."""
    sys.stderr.write(text.translate(_AS_TEXT) + "\n")
    sys.stderr.flush()


def say_json(value: Any) -> None:
    """A document of the result, indented."""
    say(json.dumps(as_json(value), indent=2, ensure_ascii=False).translate(_AS_JSON))


def event(name: str, **values: Any) -> None:
    """One event, one line."""
    global _last
    _last = name
    say(json.dumps({"event": name, **as_json(values)}, ensure_ascii=False).translate(_AS_JSON))


def table(columns: list[str], rows: list[list[object]], *, right: tuple[int, ...] = ()) -> None:
    """A table on standard output; without a terminal, wide enough for its cells. `right`: numbers of right columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text("" if cell is None else str(cell).translate(_AS_TEXT)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)
    with _written():
        console.print(drawn)
