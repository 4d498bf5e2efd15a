"""Lineage as one page of HTML that needs nothing else: no script, no picture, no font from outside."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from kontext_batch.hashing import canonical_json
from kontext_batch.planning.render import axes_text
from kontext_batch.ports.tracing import StepBatch, StepDelivery, StepRead, TracedStep
from kontext_batch.services.lineage import Impact, Lineage

STYLE = """
:root{color-scheme:light dark}
body{font:1rem/1.5 system-ui,sans-serif;max-width:70rem;margin:0 auto;padding:1rem;color:#1b1b1b;background:#fff}
a{color:#0b57a4}a:focus{outline:3px solid #0b57a4;outline-offset:2px}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem;border-top:1px solid #767676;padding-top:1rem}h3{font-size:1rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:0}dt{font-weight:600}dd{margin:0}
dd,td,p{overflow-wrap:anywhere}.prompt{white-space:pre-wrap}
table{border-collapse:collapse;margin:.5rem 0}caption{text-align:left;font-weight:600}
th,td{border:1px solid #767676;padding:.2rem .5rem;text-align:left;vertical-align:top}
.skip{position:absolute;left:-99rem}.skip:focus{position:static}
@media (max-width:40rem){dl{display:block}dd{margin:0 0 .5rem 1rem}}
@media (prefers-color-scheme:dark){body{color:#eee;background:#161616}a{color:#9ecbff}a:focus{outline-color:#9ecbff}}
"""
SHOWN_MATES = 50


def lineage_page(lineage: Lineage) -> str:
    """Every step above the pictures, the pictures first."""
    pictures = lineage.subject.step_ids
    index = [f'<li><a href="#step-{each.step.id}">{_e(_title(each))}</a></li>' for each in lineage.steps]
    steps = [part for each in lineage.steps for part in _step(each, asked=each.step.id in pictures)]
    photos = _table("Photos", ("Photo", "sha256"), [(read.uri, read.sha256) for read in lineage.photos])
    body = [
        f"<h1>Where it comes from: {_e(lineage.subject.name)}</h1>",
        f'<nav aria-label="Steps"><ol>{"".join(index)}</ol></nav>',
        '<main id="main">',
        *photos,
        *steps,
        "</main>",
    ]
    return _page(f"Lineage of {lineage.subject.name}", body)


def impact_page(impact: Impact, *, more: str) -> str:
    """Everything that is told of what was made from the subject. `more`: how to get the rest; empty at the end."""
    files = [each for step in impact.steps for each in step.deliveries]
    steps = [
        (
            f"{step.id}",
            step.node,
            axes_text(step.axes),
            step.operation,
            step.state,
            step.artifact and step.artifact.sha256,
        )
        for step in impact.steps
    ]
    body = [
        f"<h1>What was made from: {_e(impact.subject.name)}</h1>",
        '<main id="main">',
        f"<p>{len(impact.steps)} steps and {len(files)} deliveries are told here.</p>",
        *([f"<p>{_e(more)}</p>"] if more else []),
        *_table("Delivered files", DELIVERY_COLUMNS, [_delivery(each) for each in files]),
        *_table("Steps", ("Step", "Name", "Axes", "Operation", "State", "sha256 of the picture"), steps),
        "</main>",
    ]
    return _page(f"Made from {impact.subject.name}", body)


DELIVERY_COLUMNS = ("Where", "Run", "State", "When", "Withdrawn", "sha256 of the file")


def _delivery(each: StepDelivery) -> tuple[Any, ...]:
    place = each.delivered_path or each.path
    sha256 = each.file_sha256 or each.sha256
    return place, each.run_id, each.state, _time(each.delivered), _time(each.withdrawn), sha256


def _step(traced: TracedStep, *, asked: bool) -> Iterator[str]:
    step, origin = traced.step, traced.origin
    yield f'<section aria-labelledby="step-{step.id}"><h2 id="step-{step.id}">{_e(_title(traced))}</h2>'
    if asked:
        yield "<p>This picture was asked about.</p>"
    yield _facts(
        [
            ("Recipe", f"{origin.recipe}, {origin.file}:{origin.line}"),
            ("Revision", origin.recipe_sha256),
            ("Run", f"{origin.run_id}, by {origin.owner}, {origin.trigger}"),
            ("State", f"{step.state}{f': {step.error}' if step.error else ''}"),
            *_parameters(step.params),
            *_picture(traced),
        ]
    )
    yield from _table("What it read", ("Role", "What", "sha256"), [_read(each) for each in traced.reads], raw=True)
    for batch in traced.batches:
        yield from _batch(batch)
    yield from _table(
        "Attempts",
        ("Number", "Outcome", "Began", "Ended", "Worker", "Batch", "Error"),
        [
            (each.number, each.outcome or "running", _time(each.started), _time(each.ended), each.worker_id,
             each.batch_id, each.error)
            for each in traced.attempts
        ],
    )  # fmt: skip
    yield from _table("Delivered files", DELIVERY_COLUMNS, [_delivery(each) for each in traced.deliveries])
    yield "</section>"


def _picture(traced: TracedStep) -> Iterator[tuple[str, Any]]:
    made = traced.step.artifact
    if made is None:
        return
    yield "Picture", f"{made.width}x{made.height} {made.media_type}, {made.bytes} bytes"
    yield "sha256", made.sha256
    yield "Kept at", made.uri if traced.collected is None else f"{made.uri}, removed {_time(traced.collected)}"
    yield "Made", _time(traced.made)


def _parameters(params: Any) -> Iterator[tuple[str, Any]]:
    """Prompts first, then the others by name."""
    first = ("prompt", "negative_prompt", "seed", "model", "model_sha256", "adapters")
    for name in [*first, *sorted(set(params) - set(first))]:
        value = params.get(name)
        if value not in (None, [], {}, ""):
            yield name.replace("_", " ").capitalize(), value if isinstance(value, str) else canonical_json(value)


def _read(read: StepRead) -> tuple[str, str, str]:
    if read.step_id is None:
        what = _e(read.uri)
    else:
        what = f'<a href="#step-{read.step_id}">step {read.step_id}</a> {_e(read.uri or "")}'
    return _e(f"{read.role} {read.position}"), what, _e(read.sha256)


def _batch(batch: StepBatch) -> Iterator[str]:
    yield f"<h3>Batch {batch.id}</h3>"
    yield _facts(
        [
            ("Denoise steps", f"{batch.joined + 1} to {batch.left}"),
            ("Device", batch.device),
            ("Numeric mode", batch.numeric_mode),
            ("Worker", batch.worker_id),
            ("Libraries", ", ".join(f"{name} {version}" for name, version in sorted(batch.libraries.items()))),
            ("Committed", _time(batch.committed)),
        ]
    )
    mates = [(mate.step_id, mate.key, f"{mate.joined + 1} to {mate.left}") for mate in batch.mates[:SHOWN_MATES]]
    yield from _table("In the batch with it", ("Step", "Key", "Denoise steps"), mates)
    if len(batch.mates) > SHOWN_MATES:
        yield f"<p>and {len(batch.mates) - SHOWN_MATES} others; <code>batches show {batch.id}</code> tells all</p>"


def _facts(facts: Iterable[tuple[str, Any]]) -> str:
    told = [
        f"<dt>{_e(name)}</dt><dd{_class(name)}>{_e(value)}</dd>" for name, value in facts if value not in (None, "")
    ]
    return f"<dl>{''.join(told)}</dl>"


def _class(name: str) -> str:
    return ' class="prompt"' if name in ("Prompt", "Negative prompt") else ""


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, raw: bool = False) -> Iterator[str]:
    """Nothing where there are no rows. `raw`: the cells are HTML already."""
    if not rows:
        return
    heads = "".join(f'<th scope="col">{_e(column)}</th>' for column in columns)
    yield f"<table><caption>{_e(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{cell if raw else _e(cell)}</td>' for cell in row)}</tr>"
    yield "</tbody></table>"


def _title(traced: TracedStep) -> str:
    step = traced.step
    number = f" #{step.candidate}" if step.candidate > 1 else ""
    return f"{step.node} {axes_text(step.axes)}{number} (step {step.id}, {step.operation})"


def _page(title: str, body: Sequence[str]) -> str:
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{_e(title)}</title><style>{STYLE}</style></head><body>",
            '<a class="skip" href="#main">Skip to the steps</a>',
            *body,
            "</body></html>",
        ]
    )


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _e(value: Any) -> str:
    return "" if value is None else html.escape(str(value))
