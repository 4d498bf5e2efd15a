"""`runs export`: everything that is known of a run, one instance after the other, however many there are."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from enum import StrEnum
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kontext_batch.cli import common, output

if TYPE_CHECKING:
    from kontext_batch.ports import ExportedInstance, Repository

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


AT_ONCE = 500
"""Steps whose lineage is read at once."""


class Format(StrEnum):
    """What `runs export` writes."""

    JSON = "json"
    CSV = "csv"
    PROV = "prov"
    OPENLINEAGE = "openlineage"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Number of the run.", show_default=False)],
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="json: an array, one instance a line; csv: a table; prov: W3C PROV-JSON; "
            "openlineage: run events, one a line.",
        ),
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
        elif form is Format.PROV:
            _prov(application.repository, found)
        elif form is Format.OPENLINEAGE:
            _openlineage(application.repository, number, found)
        else:
            _json(found)


def _json(found: Iterable[ExportedInstance]) -> None:
    before = None
    for each in found:
        output.say("[" if before is None else before + ",")
        before = json.dumps({**output.as_json(each), "axes": dict(each.axes)}, ensure_ascii=False)
    output.say("[]" if before is None else before + "\n]")


def _prov(repository: Repository, found: Iterable[ExportedInstance]) -> None:
    from kontext_batch.provenance.prov import as_prov

    steps = (each.step_id for each in found)
    output.say_json(as_prov(traced for page in _pages(steps) for traced in repository.traced(page)))


def _openlineage(repository: Repository, run_id: int, found: Iterable[ExportedInstance]) -> None:
    """The run's own events around those of its steps, without what was there before it."""
    from kontext_batch.provenance.openlineage import run_events, step_events

    start, *end = run_events(repository.run(run_id))
    computed = (each.step_id for each in found if not each.cached)
    steps = (event for page in _pages(computed) for each in repository.traced(page) for event in step_events(each))
    for event in chain([start], steps, end):
        output.say(json.dumps(event, ensure_ascii=False))


def _pages(step_ids: Iterable[int]) -> Iterator[list[int]]:
    """Each step once."""
    left = iter(dict.fromkeys(step_ids))
    while page := list(islice(left, AT_ONCE)):
        yield page


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
