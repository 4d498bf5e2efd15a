"""`runs export`: everything that is known of a run, one instance after the other, however many there are."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kontext_batch.cli import common, output

if TYPE_CHECKING:
    from kontext_batch.ports import ExportedInstance

COLUMNS = (
    "step",
    "node",
    "axes",
    "candidate",
    "take",
    "key",
    "operation",
    "lane",
    "state",
    "cached",
    "error",
    "sha256",
    "uri",
    "media_type",
    "width",
    "height",
    "bytes",
    "delivery",
    "delivered_path",
    "attempts",
    "started",
    "ended",
    "timings",
)


class Format(StrEnum):
    """What `runs export` writes."""

    JSON = "json"
    CSV = "csv"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Number of the run.", show_default=False)],
    form: Annotated[
        Format, typer.Option("--format", help="json: an array, one instance a line; csv: a table.")
    ] = Format.JSON,
    workspace: common.WorkspaceOption = None,
) -> None:
    """Write every instance of a run: state, key, axes, picture, deliveries, attempts and times.

    Example: kontext-batch runs export 12 --format csv > run-12.csv
    """
    from kontext_batch.services.questions import run_number

    number = run_number(run)
    with common.opened(workspace) as application:
        found = application.repository.export(number)
        if form is Format.CSV:
            _csv(found)
        else:
            _json(found)


def _json(found: Iterable[ExportedInstance]) -> None:
    before = None
    for each in found:
        output.say("[" if before is None else before + ",")
        before = json.dumps({**output.as_json(each), "axes": dict(each.axes)}, ensure_ascii=False)
    output.say("[]" if before is None else before + "\n]")


def _csv(found: Iterable[ExportedInstance]) -> None:
    output.say(_line(COLUMNS))
    for each in found:
        output.say(_line(_cells(each)))


def _cells(each: ExportedInstance) -> list[Any]:
    made, last = each.artifact, each.attempts[-1] if each.attempts else None
    return [
        each.step_id,
        each.node,
        json.dumps(dict(each.axes), ensure_ascii=False),
        each.candidate,
        each.take,
        each.key,
        each.operation,
        each.lane,
        each.state,
        int(each.cached),
        each.error,
        *((made.sha256, made.uri, made.media_type, made.width, made.height, made.bytes) if made else [None] * 6),
        " ".join(delivery.state for delivery in each.deliveries),
        " ".join(delivery.delivered_path or delivery.path for delivery in each.deliveries),
        len(each.attempts),
        None if last is None else last.started.isoformat(),
        None if last is None or last.ended is None else last.ended.isoformat(),
        None if last is None else json.dumps(output.as_json(last.timings)),
    ]


def _line(cells: Iterable[Any]) -> str:
    """One row; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    written = io.StringIO()
    csv.writer(written, lineterminator="").writerow([_harmless(cell) for cell in cells])
    return written.getvalue()


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
