"""Logs of a process: structlog to standard error, as text for people or one JSON object a line for machines.

Standard output stays free for what a command was asked for. What libraries log by `logging` comes out the same way.
Tracebacks are told without the values of variables, and credentials are masked in every line.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import structlog
from structlog.contextvars import bound_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

from kontext_batch.observability.masking import hide, masked

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "PGPASSWORD")


def level_number(name: LogLevel) -> int:
    """The level of the setting `log_level` as `logging` counts it."""
    return logging.getLevelNamesMapping()[name.upper()]


def set_up_logging(*, json: bool = False, level: int = logging.WARNING) -> None:
    """Set up once, at the entry point; calling it again replaces what was set."""
    hide(*(os.environ.get(name) for name in SECRET_VARIABLES))
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    after: list[Processor] = [structlog.processors.format_exc_info, mask_values]
    if json:
        after.append(structlog.processors.JSONRenderer())
    else:
        # Not rich's tracebacks, which show the values of all variables.
        after.append(
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback, sort_keys=False
            )
        )
    structlog.configure(
        processors=[*before, *after],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # what that is when a line is written
        cache_logger_on_first_use=False,
    )
    _take_over_library_logs(before, after, level)


def mask_values(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """A processor: no credential goes further."""
    return dict(masked(event))


@contextmanager
def about_batch(*, worker: str, lane: str, steps: Sequence[int], runs: Sequence[int]) -> Iterator[None]:
    """Every line that is logged within says whose work it is about."""
    with bound_contextvars(worker=worker, lane=lane, steps=list(steps), runs=sorted(set(runs))):
        yield


class _ToStandardError(logging.Handler):
    """Writes to what is standard error at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _take_over_library_logs(before: list[Processor], after: list[Processor], level: int) -> None:
    handler = _ToStandardError()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*before, structlog.stdlib.add_logger_name],
            processors=[_without_meta, *after],
        )
    )
    root = logging.getLogger()
    for old in [each for each in root.handlers if isinstance(each, _ToStandardError)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)


def _without_meta(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """What the formatter needs for itself; kept out of the line, `exc_info` stays."""
    record: Any = event.pop("_record", None)
    event.pop("_from_structlog", None)
    if record is not None and record.exc_info:
        event.setdefault("exc_info", record.exc_info)
    return event
