"""`steps show|logs|link` and `explain`: questions about single pictures."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import act
from kontext_batch.errors import ObjectNotFound, SettingsError

if TYPE_CHECKING:
    from kontext_batch.ports import AttemptRow, Repository, StepRow

LIKE_A_RUN = re.compile(r"run[ :#-]?([0-9]{1,18})", re.IGNORECASE)
"""What is typed for a run where a step is expected."""

app = typer.Typer(name="steps", help="Single steps.", no_args_is_help=True, rich_markup_mode=None)
StepArgument = Annotated[
    str,
    typer.Argument(
        metavar="STEP|PATH",
        help="Number, key, name of a step in the recipe, or the path of an output.",
        show_default=False,
    ),
]


@app.command()
def show(step: StepArgument, workspace: common.WorkspaceOption = None, as_json: common.JsonOption = False) -> None:
    """What a step is: parameters, state, picture.

    Example: kontext-batch steps show kontext-out/pictures/mug/mug_ocean_shop.jpg
    """
    with common.opened(workspace) as application:
        rows = meant(application.repository, step)
    if as_json:
        output.say_json(rows)
        return
    for row in rows:
        output.say(headline(row))
        output.say(f"  key {row.key}\n  lane {row.lane}")
        for name, value in sorted(row.params.items()):
            if value not in (None, [], {}, ""):
                output.say(f"  {name}: {value}")
        if row.artifact is not None:
            made = row.artifact
            output.say(f"  picture {made.width}x{made.height} {made.media_type}, {made.bytes} bytes: {made.uri}")


@app.command()
def logs(step: StepArgument, workspace: common.WorkspaceOption = None, as_json: common.JsonOption = False) -> None:
    """Every attempt at a step: worker, times, outcome, error.

    Example: kontext-batch steps logs 17
    """
    with common.opened(workspace) as application:
        tries = [(row, application.repository.attempts(row.id)) for row in meant(application.repository, step)]
    if as_json:
        output.say_json([{"step": row.id, "node": row.node, "attempts": attempts} for row, attempts in tries])
        return
    for row, attempts in tries:
        output.say(headline(row))
        _say_attempts(attempts)


@app.command()
def link(
    step: StepArgument,
    workspace: common.WorkspaceOption = None,
    expires: Annotated[
        int,
        typer.Option("--expires", min=1, max=7 * 24 * 3600, help="Seconds for which the link works; at most 7 days."),
    ] = 3600,
    as_json: common.JsonOption = False,
) -> None:
    """A link by which somebody without credentials sees the picture of a step, until it expires.

    A picture in a folder has no such link: its file: URI is written instead.

    Example: kontext-batch steps link 17 --expires 600
    """
    with common.opened(workspace) as application:
        rows = [row for row in meant(application.repository, step) if row.artifact is not None]
        if not rows:
            raise ObjectNotFound(f"{step}: there is no picture yet; `steps show` says how the step stands")
        links = [(row, application.store.link(row.artifact.uri, seconds=expires)) for row in rows if row.artifact]
        # Before anybody has a link; the link itself is a credential and is kept nowhere.
        by = act(application.settings, "steps link", seconds=expires)
        application.repository.note(by, *(f"step:{row.id}" for row in rows))
    if as_json:
        output.say_json([{"step": row.id, "node": row.node, "link": url, "seconds": expires} for row, url in links])
        return
    for _, url in links:
        output.say(url)


def explain(
    what: Annotated[str, typer.Argument(metavar="STEP|PATH|RUN", help="A step, the path of an output, or `run:12`.")],
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Why a step ran or did not, and what became of it; of a run, every step that did not succeed.

    It names what changed since the run before and in which line of the recipe, the step above in which a change began
    or which failed, lost leases, the run that a found picture was made for.

    Example: kontext-batch explain run:12
    """
    from kontext_batch.planning.states import UNSUCCESSFUL
    from kontext_batch.services.questions import run_number
    from kontext_batch.services.why import Explainer

    with common.opened(workspace) as application:
        repository = application.repository
        if what.startswith("run:"):
            summary = repository.run(run_number(what.removeprefix("run:")))
            rows = repository.run_steps(summary.id, states=UNSUCCESSFUL)
            if not as_json:
                output.say(f"run {summary.id} {summary.state}; {len(rows)} steps did not succeed")
        else:
            rows = meant(repository, what, runs_too=True)
        explainer = Explainer(repository)
        told = [(row, explainer.why(row), repository.attempts(row.id)) for row in rows]
    if as_json:
        output.say_json([{"step": row, "why": reasons, "attempts": attempts} for row, reasons, attempts in told])
        return
    for row, reasons, attempts in told:
        output.say(headline(row))
        for reason in reasons:
            output.say(f"  why: {reason}")
        _say_attempts(attempts)


def meant(repository: Repository, text: str, *, runs_too: bool = False) -> Sequence[StepRow]:
    """The steps that `text` means; a file by the hash of its bytes alone, for another's may lie where ours should.

    `runs_too`: the command takes a run as well, which is told to whoever seems to mean one. Raises `ObjectNotFound`.
    """
    from kontext_batch.services.questions import found_steps
    from kontext_batch.storage.uris import file_uri

    path = Path(text)
    if not is_file(path):
        try:
            return found_steps(repository, text)
        except ObjectNotFound as error:
            hint = run_hint(text, runs_too=runs_too)
            if not hint:
                raise
            raise ObjectNotFound(f"{error}; {hint}") from error
    found = repository.find_steps(file_sha256(path))
    if found:
        return found
    raise not_ours(repository, text, file_uri(os.path.abspath(path)))


def hashed_file(text: str) -> tuple[str | None, str | None]:
    """sha256 and URI of a file of this machine; no sha256 where none is there, no URI for what is one already."""
    from kontext_batch.storage.uris import file_uri

    if "://" in text:
        return None, None
    path = Path(text)
    return file_sha256(path) if is_file(path) else None, file_uri(os.path.abspath(path))


def file_sha256(path: Path) -> str:
    """Of a file, which may be large. Raises `SettingsError`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error


def not_ours(repository: Repository, text: str, uri: str) -> ObjectNotFound:
    """Of a file whose bytes are unknown."""
    from kontext_batch.services.questions import run_that_wanted

    run = run_that_wanted(repository, uri)
    wanted = "" if run is None else f"; run {run} delivered there, or wanted to"
    return ObjectNotFound(f"{text}: this picture was not made in this workspace, or was changed since{wanted}")


def run_hint(text: str, *, runs_too: bool = False) -> str:
    """What is said to whoever seems to mean a run; empty for others."""
    run_meant = LIKE_A_RUN.fullmatch(text)
    if run_meant is None:
        return ""
    if runs_too:
        return f"for a run write `run:{run_meant[1]}`"
    return f"a step or a path is taken here, no run (`runs show {run_meant[1]}` lists the steps of one)"


def is_file(path: Path) -> bool:
    """Whether a file lies there; not for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def headline(row: StepRow) -> str:
    """A step in a line: number, name, axes, operation, state."""
    from kontext_batch.planning.render import axes_text

    number = f" #{row.candidate}" if row.candidate > 1 else ""
    error = f": {row.error}" if row.error else ""
    return f"step {row.id} {row.node} {axes_text(row.axes)}{number} ({row.operation}) {row.state}{error}"


def _say_attempts(attempts: Sequence[AttemptRow]) -> None:
    for each in attempts:
        took = "" if each.ended is None else f", {(each.ended - each.started).total_seconds():.1f} s"
        batch = "" if each.batch_id is None else f", batch {each.batch_id}"
        timings = " ".join(f"{name}={seconds:.2f}s" for name, seconds in sorted(each.timings.items()))
        output.say(
            f"  attempt {each.number} {each.outcome or 'running'}: {each.started:%Y-%m-%d %H:%M:%S}{took} "
            f"on {each.worker_id}{batch} {timings}" + (f"\n    {each.error}" if each.error else "")
        )
