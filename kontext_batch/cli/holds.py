"""`holds add|list|release`: what may not be removed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import act
from kontext_batch.cli.steps import hashed_file
from kontext_batch.errors import ObjectNotFound

if TYPE_CHECKING:
    from kontext_batch.ports import Repository

app = typer.Typer(name="holds", help="What may not be removed.", no_args_is_help=True, rich_markup_mode=None)
SubjectArgument = Annotated[
    str,
    typer.Argument(
        metavar="SUBJECT",
        help="run:12, step:7, a photo or a delivered picture by its path, or a sha256.",
        show_default=False,
    ),
]
_NUMBERED = re.compile(r"(run|step):([0-9]{1,18})")
_HASHED = re.compile(r"(?:(photo|picture):)?([0-9a-f]{64})")


@app.command()
def add(
    subject: SubjectArgument,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why it is kept.", show_default=False)],
    workspace: common.WorkspaceOption = None,
) -> None:
    """Keep what a run, a step, a delivered picture or a photo names, whatever `gc` is told, and let nothing forget it.

    Kept are its pictures and those of every step above, which explain them; of a photo, all that came from it and all
    above that. What lies in folders of yours is yours to keep.

    Example: kontext-batch holds add run:12 --reason "case 4711"
    """
    if not reason.strip():
        raise typer.BadParameter("say why", param_hint="--reason")
    with common.opened(workspace) as application:
        named = meant(application.repository, subject)
        by = act(application.settings, "holds add", reason=reason)
        added = application.repository.add_hold(named, reason, by=by)
    output.say(f"{named} is held" if added else f"{named} is held already")


@app.command("list")
def list_holds(
    workspace: common.WorkspaceOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Those that were released too.")] = False,
    as_json: common.JsonOption = False,
) -> None:
    """Holds that stand, the oldest first.

    Example: kontext-batch holds list --all
    """
    with common.opened(workspace) as application:
        found = application.repository.holds(released=everything)
    if as_json:
        output.say_json(found)
        return
    output.table(
        ["subject", "reason", "by", "since", "released"],
        [
            [
                each.subject,
                each.reason,
                each.who,
                f"{each.placed:%Y-%m-%d %H:%M}",
                None if each.released is None else f"{each.released:%Y-%m-%d %H:%M}",
            ]
            for each in found
        ],
    )


@app.command()
def release(subject: SubjectArgument, workspace: common.WorkspaceOption = None) -> None:
    """Let what was held be removed again, as the policy says.

    Example: kontext-batch holds release run:12
    """
    with common.opened(workspace) as application:
        repository = application.repository
        standing = {each.subject for each in repository.holds()}
        named = subject if subject in standing else meant(repository, subject)
        if not repository.release_hold(named, by=act(application.settings, "holds release")):
            raise ObjectNotFound(f"{named} is not held; `holds list` shows what is")
    output.say(f"{named} is held no more")


def meant(repository: Repository, text: str) -> str:
    """The subject that `text` means, as it is kept. Raises `ObjectNotFound`."""
    from kontext_batch.services.holds import held_subject

    numbered = _NUMBERED.fullmatch(text)
    if numbered:
        return f"{numbered[1]}:{int(numbered[2])}"
    hashed = _HASHED.fullmatch(text)
    if hashed:
        return held_subject(repository, hashed[2], kind=hashed[1], shown=text)
    sha256, uri = hashed_file(text)
    return held_subject(repository, sha256, uri=uri or text, shown=text)
