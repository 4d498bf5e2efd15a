"""`lineage`: where a picture comes from, what was made from something, and how two pictures differ."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.errors import ObjectNotFound, SettingsError

if TYPE_CHECKING:
    from kontext_batch.ports import Repository, StepRow
    from kontext_batch.ports.tracing import MadeStep, Place, StepDelivery, StepRead, Subject, TracedStep
    from kontext_batch.services.differences import Comparison
    from kontext_batch.services.lineage import Impact, Lineage

SHOWN_MATES = 8
"""Batch mates that a line names; the rest is counted."""
PLACE = re.compile(r"([0-9]{1,18}):([0-9]{1,18})")


def lineage(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="Step, path, URI, sha256 or its beginning, model:NAME, adapter:NAME or recipe:SHA256.",
            show_default=False,
        ),
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="With --diff: the other picture.", show_default=False)
    ] = None,
    down: Annotated[
        bool, typer.Option("--down/--up", help="What was made from it, instead of where it comes from.")
    ] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Say what differs first between WHAT and OTHER.")] = False,
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write one page that needs nothing else.", show_default=False),
    ] = None,
    dot: Annotated[bool, typer.Option("--dot", help="Write a drawing for Graphviz.")] = False,
    prov: Annotated[bool, typer.Option("--prov", help="Write W3C PROV-JSON.")] = False,
    openlineage: Annotated[
        bool, typer.Option("--openlineage", help="Write OpenLineage run events, one a line.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=0, help="With --down: at most so many steps; 0: all.")] = 1000,
    after: Annotated[
        str | None,
        typer.Option("--after", metavar="A:B", help="With --down: from where an answer ended.", show_default=False),
    ] = None,
) -> None:
    """Where a picture comes from: every step above it, up to the photos. With --down what was made from it.

    WHAT may be a picture or a delivered file (a path, its sha256, the number of its step); with --down also a photo,
    the weights of a model or adapter, or the revision of a recipe.

    Example: kontext-batch lineage photos/mug.png --down
    """
    from kontext_batch.services.lineage import above, below

    forms = {"--json": as_json, "--html": html is not None, "--dot": dot, "--prov": prov, "--openlineage": openlineage}
    given = [name for name, chosen in forms.items() if chosen]
    _check(given, other, diff=diff, down=down)
    place = _place(after, down=down)
    with common.opened(workspace) as application:
        repository = application.repository
        subject = asked(repository, what)
        if diff:
            assert other is not None
            pair = one_picture(what, subject), one_picture(other, asked(repository, other))
            one, two = (above(repository, each) for each in pair)
        elif down:
            impact = below(repository, subject, after=place, limit=limit)
        else:
            found = above(repository, subject)
    if diff:
        _say_comparison(what, other or "", one, two, as_json=as_json)
    elif down:
        _write_impact(what, impact, as_json=as_json, html=html, dot=dot)
    else:
        _write_lineage(what, found, given[0] if given else "", html)


def asked(repository: Repository, text: str) -> Subject:
    """What `text` means; a file by its bytes. Raises `ObjectNotFound`."""
    from kontext_batch.cli.steps import is_file, run_hint
    from kontext_batch.services.lineage import meant
    from kontext_batch.storage.uris import file_uri

    path = Path(text)
    if is_file(path):
        return _by_bytes(repository, text, path)
    uri = None if "://" in text or "\0" in text else file_uri(os.path.abspath(text))
    try:
        return meant(repository, text, uri=uri)
    except ObjectNotFound as error:
        hint = run_hint(text)
        if not hint:
            raise
        raise ObjectNotFound(f"{error}; {hint}") from error


def one_picture(text: str, subject: Subject) -> Subject:
    """Raises `ObjectNotFound` for a name that several steps have."""
    if len(subject.step_ids) > 1 and not subject.sha256s:
        raise ObjectNotFound(f"{text} means {len(subject.step_ids)} steps; name one by its number or its file")
    return subject


def _by_bytes(repository: Repository, text: str, path: Path) -> Subject:
    from kontext_batch.cli.steps import file_sha256, not_ours
    from kontext_batch.ports.tracing import SubjectKind
    from kontext_batch.services.lineage import by_hash
    from kontext_batch.storage.uris import file_uri

    found = by_hash(repository, file_sha256(path))
    if found is not None:
        return found
    uri = file_uri(os.path.abspath(path))
    if any(each.kind is SubjectKind.PHOTO for each in repository.known_by_place(uri)):
        raise ObjectNotFound(f"{text}: a photo was read from there, with other bytes; ask for it as {uri}")
    raise not_ours(repository, text, uri)


def _check(given: Sequence[str], other: str | None, *, diff: bool, down: bool) -> None:
    """Raises `typer.BadParameter` for what does not go together."""
    if len(given) > 1:
        raise typer.BadParameter(f"{given[0]} and {given[1]} are two forms; choose one", param_hint=given[1])
    if diff and other is None:
        raise typer.BadParameter("two pictures are compared: name the other one too", param_hint="--diff")
    if other is not None and not diff:
        raise typer.BadParameter("a second picture is taken with --diff alone", param_hint="OTHER")
    if diff and down:
        raise typer.BadParameter("pictures are compared by what they come from", param_hint="--down")
    if diff and given not in ([], ["--json"]):
        raise typer.BadParameter("a comparison is told as text or with --json", param_hint=given[0])
    if down and given and given[0] in ("--prov", "--openlineage"):
        raise typer.BadParameter("this form tells where pictures come from alone", param_hint=given[0])


def _place(after: str | None, *, down: bool) -> Place | None:
    """Raises `typer.BadParameter`."""
    if after is None:
        return None
    if not down:
        raise typer.BadParameter("answers of --down alone are told in parts", param_hint="--after")
    found = PLACE.fullmatch(after)
    if found is None:
        raise typer.BadParameter(f"'{after}': 12:34 is expected, as an answer ended", param_hint="--after")
    return int(found[1]), int(found[2])


# -------------------------------------------------------------------------------------------------------------- up


def _write_lineage(what: str, found: Lineage, form: str, html: Path | None) -> None:
    from kontext_batch.provenance import dot, openlineage, page, prov

    if form == "--json":
        output.say_json(
            {"asked": what, "direction": "up", "subject": found.subject, "photos": found.photos, "steps": found.steps}
        )
    elif form == "--dot":
        output.say(dot.lineage_dot(found))
    elif form == "--prov":
        output.say_json(prov.as_prov(found.steps))
    elif form == "--openlineage":
        for each in reversed(found.steps):
            for event in openlineage.step_events(each):
                output.say(json.dumps(event, ensure_ascii=False))
    elif html is not None:
        _write(html, page.lineage_page(found))
    else:
        _say_chain(found)


def _write(file: Path, text: str) -> None:
    """Raises `SettingsError`."""
    try:
        file.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from error
    output.tell(f"wrote {file}")


def _say_chain(found: Lineage) -> None:
    """Each picture, each step indented under what reads it; a step read twice is written out once."""
    told: set[int] = set()
    by_id = found.by_id
    todo: list[tuple[StepRead | None, int | None, int]] = [(None, each, 0) for each in reversed(found.subject.step_ids)]
    while todo:
        read, step_id, depth = todo.pop()
        indent, role = "  " * depth, f"{read.role}: " if read else ""
        if step_id is None:
            assert read is not None
            output.say_line(f"{indent}{role}{read.uri} sha256 {read.sha256}")
            continue
        traced = by_id[step_id]
        output.say_line(indent + role + _line(traced.step) + (" (above)" if step_id in told else ""))
        if step_id in told:
            continue
        told.add(step_id)
        for line in _facts(traced):
            output.say_line(f"{indent}  {line}")
        todo.extend((each, each.step_id, depth + 1) for each in reversed(traced.reads))


def _facts(traced: TracedStep) -> Iterator[str]:
    step, origin = traced.step, traced.origin
    if step.error:
        yield f"error {step.error}"
    yield f"recipe {origin.file}:{origin.line}, revision {origin.recipe_sha256}, run {origin.run_id}"
    for name in ("prompt", "negative_prompt"):
        if step.params.get(name):
            yield f'{name.replace("_", " ")} "{step.params[name]}"'
    if step.params.get("model_sha256"):
        yield f"model {step.params.get('model')} sha256 {step.params['model_sha256']}, seed {step.params.get('seed')}"
    for each in step.params.get("adapters") or ():
        yield f"adapter {each['name']} at {each['scale']:g} sha256 {each['sha256']}"
    if step.artifact is not None:
        made = step.artifact
        gone = f", removed {traced.collected:%Y-%m-%d %H:%M}" if traced.collected else ""
        yield f"picture {made.width}x{made.height} {made.media_type} sha256 {made.sha256}: {made.uri}{gone}"
    for batch in traced.batches:
        libraries = ", ".join(f"{name} {version}" for name, version in sorted(batch.libraries.items()))
        yield f"batch {batch.id} on {batch.device}, {batch.numeric_mode}" + (f", {libraries}" if libraries else "")
        if batch.mates:
            named = [f"{mate.step_id} ({mate.joined + 1}-{mate.left})" for mate in batch.mates[:SHOWN_MATES]]
            more = f" and {len(batch.mates) - SHOWN_MATES} more" if len(batch.mates) > SHOWN_MATES else ""
            yield f"  denoise steps {batch.joined + 1}-{batch.left}, with steps {', '.join(named)}{more}"
    for attempt in traced.attempts:
        error = f": {attempt.error}" if attempt.error else ""
        began = f"{attempt.started:%Y-%m-%d %H:%M:%S} on {attempt.worker_id}"
        yield f"attempt {attempt.number} {attempt.outcome or 'running'} {began}{error}"
    for delivery in traced.deliveries:
        yield _delivery(delivery)


# ------------------------------------------------------------------------------------------------------------ down


def _write_impact(what: str, impact: Impact, *, as_json: bool, html: Path | None, dot: bool) -> None:
    from kontext_batch.provenance import dot as drawing
    from kontext_batch.provenance import page

    after = None if impact.after is None else f"{impact.after[0]}:{impact.after[1]}"
    more = "" if after is None else f"there is more: --after {after}, or --limit 0 for all"
    if as_json:
        output.say_json(
            {
                "asked": what,
                "direction": "down",
                "subject": impact.subject,
                "direct": impact.direct,
                "after": after,
                "steps": impact.steps,
            }
        )
    elif dot:
        output.say(drawing.impact_dot(impact))
    elif html is not None:
        _write(html, page.impact_page(impact, more=more))
    else:
        _say_impact(impact)
    if more and not as_json:
        output.tell(more)


def _say_impact(impact: Impact) -> None:
    for step in impact.steps:
        output.say_line(_line(step) + (f" sha256 {step.artifact.sha256}" if step.artifact else ""))
        for delivery in step.deliveries:
            output.say_line(f"  {_delivery(delivery)}")
    # Each file once, however often runs have delivered it to its place.
    delivered = {
        each.delivered_path or each.path
        for step in impact.steps
        for each in step.deliveries
        if each.state == "delivered"
    }
    direct = "" if impact.subject.step_ids else f" ({impact.direct} directly)"
    steps, files = _counted(len(impact.steps), "step"), _counted(len(delivered), "file")
    output.say_line(f"{impact.subject.name}: {steps}{' told' if impact.after else direct}, {files} delivered")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _line(step: StepRow | MadeStep) -> str:
    from kontext_batch.planning.render import axes_text

    number = f" #{step.candidate}" if step.candidate > 1 else ""
    return f"step {step.id} {step.node} {axes_text(step.axes)}{number} ({step.operation}) {step.state}"


def _delivery(delivery: StepDelivery) -> str:
    place = delivery.delivered_path or delivery.path
    when = f" {delivery.delivered:%Y-%m-%d %H:%M}" if delivery.delivered else ""
    gone = f", withdrawn {delivery.withdrawn:%Y-%m-%d %H:%M}" if delivery.withdrawn else ""
    return f"{delivery.state} by run {delivery.run_id}{when}{gone}: {place}"


# ------------------------------------------------------------------------------------------------------------ diff


def _say_comparison(what: str, other: str, one: Lineage, two: Lineage, *, as_json: bool) -> None:
    from kontext_batch.services.differences import compare

    found = compare(one, two)
    if as_json:
        output.say_json(
            {
                "one": {"asked": what, "step": found.one.step.id},
                "other": {"asked": other, "step": found.other.step.id},
                "first": found.differences[0] if found.differences else None,
                "differences": found.differences,
                "same_bytes": found.same_bytes,
            }
        )
        return
    for line in _compared(found):
        output.say_line(line)


def _compared(found: Comparison) -> Iterator[str]:
    if not found.differences:
        same = found.one.step.id == found.other.step.id
        made = "made by the same step" if same else "made by two steps"
        bytes_ = {True: "and so are the bytes", False: "nothing differs but the bytes", None: "it is not made yet"}
        yield f"{made}: photos, recipe, prompt, seed and weights are equal; {bytes_[found.same_bytes]}"
        return
    first, *others = found.differences
    harmless = "" if first.matters else ", which changes no pixel by itself"
    yield f"first difference: {first.what} ({first.where}){harmless}"
    yield f"  one:   {first.one}"
    yield f"  other: {first.other}"
    for each in others:
        yield f"then: {each.what} ({each.where}): {each.one} | {each.other}"
    if found.same_bytes:
        yield "the bytes of the two are equal all the same"
