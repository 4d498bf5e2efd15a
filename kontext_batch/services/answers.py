"""What is written beside a dropped recipe: its status, its plan, what is wrong with it, and the report at the end."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kontext_batch.planning.render import axes_text, count_nodes
from kontext_batch.planning.states import OPEN_RUNS, StepState
from kontext_batch.ports import Repository, RunSummary
from kontext_batch.services.prepare import Prepared

SHOWN = 1000
"""Lines of one list of a report; the rest is counted."""
SHOWN_SKIPPED = 50
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}code{font-size:.9em;overflow-wrap:anywhere}"
    "table{border-collapse:collapse}td,th{padding:.2rem 1rem .2rem 0;text-align:left;vertical-align:top}"
)


def status_text(status: Mapping[str, Any]) -> bytes:
    return (json.dumps(status, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def planning_status(file: str) -> dict[str, Any]:
    return {"file": file, "state": "planning", "message": "it is being read and planned"}


def refused_status(file: str, errors: Sequence[str]) -> dict[str, Any]:
    message = "nothing was run; change the file and drop it again"
    return {"file": file, "state": "refused", "message": message, "errors": list(errors)}


def run_status(file: str, summary: RunSummary) -> dict[str, Any]:
    """Without times: it changes only when there is something to tell."""
    done, total = summary.steps.get(StepState.DONE, 0), sum(summary.steps.values())
    verb = "is" if summary.state in OPEN_RUNS else "ended as"
    return {
        "file": file,
        "state": summary.state.value,
        "message": (
            f"run {summary.id} {verb} {summary.state}: {done} of {total} steps done, "
            f"{summary.delivered} of {summary.deliveries} outputs delivered"
        ),
        "run": summary.id,
        "recipe": summary.recipe,
        "owner": summary.owner,
        "steps": {state.value: count for state, count in sorted(summary.steps.items())},
        "cached": summary.cached,
        "outputs": summary.deliveries,
        "delivered": summary.delivered,
        "skipped_outputs": summary.skipped_deliveries,
        "failed_outputs": summary.failed_deliveries,
    }


def plan_text(ready: Prepared, notes: Iterable[str] = ()) -> bytes:
    """What the recipe comes to, and what stands against it."""
    made = ready.plan
    lines = [f"{made.recipe} of {made.owner}, revision {made.recipe_sha256[:12]}", ""]
    counts = count_nodes(made, ready.explained)
    rows: list[tuple[str, ...]] = [("step", "operation", "run", "cached", "shared", "samples", "est. s")]
    rows += [
        (each.node, each.operation, *map(str, (each.run, each.cached, each.shared, each.samples)), _s(each.gpu_seconds))
        for each in counts
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*words, *numbers]))
    lines.append("")
    for node in counts:
        lines += [f"{node.node} runs {n} time{'s' if n > 1 else ''}: {reason}" for reason, n in node.reasons[:3]]
    for skipped in made.skipped[:SHOWN_SKIPPED]:
        place = f"{skipped.file}:{skipped.line}" if skipped.line else skipped.file
        lines.append(f"skipped {skipped.axis}={skipped.row}: {skipped.reason} ({place})")
    if len(made.skipped) > SHOWN_SKIPPED:
        lines.append(f"... and {len(made.skipped) - SHOWN_SKIPPED} more rows skipped")
    lines += [f"note: {note}" for note in (*made.notes, *notes)]
    budget = ", ".join(f"{name} {value:g}" for name, value in made.budget.items())
    lines.append(f"{len(made.deliveries)} outputs; budget: {budget}")
    lines += [f"refused: {reason}" for reason in ready.refusals]
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _s(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds else "-"


def report_html(file: str, summary: RunSummary, repository: Repository, pictures: str | None = None) -> bytes:
    """One page without anything that it would load: what was delivered and what was not, with the reasons.

    `pictures`: relative link to the report with all pictures, where there is one.
    """
    steps = [(state.value, str(count)) for state, count in sorted(summary.steps.items())]
    bad = (StepState.FAILED, StepState.QUARANTINED)
    failed = [
        (f"{each.node} {axes_text(each.axes)}".strip(), each.error or each.state.value)
        for each in repository.run_steps(summary.id, states=bad)
    ]
    files = [(uri,) for uri in repository.made_files(summary.id)]
    title = f"{summary.recipe}: {summary.state}"
    parts = [
        f"<h1>{_e(title)}</h1>",
        f"<p>Run {summary.id} of <code>{_e(file)}</code>, for {_e(summary.owner)}. "
        f"{summary.delivered} of {summary.deliveries} outputs delivered.</p>",
        "" if pictures is None else f'<p><a href="{_e(pictures)}">All pictures, step by step</a></p>',
        _table("Steps", ("state", "steps"), steps),
        _table("Failed steps", ("step", "reason"), failed),
        _table("Not delivered", ("output", "reason"), repository.failed_deliveries(summary.id)),
        _table("Left out on purpose", ("output", "reason"), repository.skipped_deliveries(summary.id)),
        _table("Delivered", ("file",), files, links=True),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{_e(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    return page.encode("utf-8", "replace")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, links: bool = False) -> str:
    """`links`: the first cell is a URI; only a folder's can be followed by a browser."""
    if not rows:
        return ""
    head = "".join(f"<th>{_e(column)}</th>" for column in columns)
    body = []
    for row in rows[:SHOWN]:
        first = f"<code>{_e(row[0])}</code>"
        if links and row[0].startswith("file:"):
            first = f'<a href="{_e(row[0])}">{first}</a>'
        body.append(f"<tr><td>{first}</td>{''.join(f'<td>{_e(cell)}</td>' for cell in row[1:])}</tr>")
    more = f"<p>and {len(rows) - SHOWN} more</p>" if len(rows) > SHOWN else ""
    return f"<h2>{_e(title)} ({len(rows)})</h2><table><tr>{head}</tr>{''.join(body)}</table>{more}"


def _e(text: str) -> str:
    """As HTML shows it: names and reasons come from recipes and tables."""
    return html.escape(text, quote=True)
