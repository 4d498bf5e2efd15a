"""`forget`: a photo is taken down, with all that came from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import YesOption, act, confirm
from kontext_batch.cli.run import shown_uri
from kontext_batch.cli.steps import hashed_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kontext_batch.ports import Descent, Tombstone
    from kontext_batch.services.takedown import Photo


def forget(
    photo: Annotated[
        str, typer.Argument(metavar="PHOTO", help="Path, URI or sha256 of a source picture.", show_default=False)
    ],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why it is taken down.", show_default=False)],
    workspace: common.WorkspaceOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what came from it.")] = False,
    source_too: Annotated[
        bool, typer.Option("--source-too", help="Delete the photo itself where the settings allow writing.")
    ] = False,
    despite_hold: Annotated[
        bool, typer.Option("--despite-hold", help="Even if a hold says that something of it is kept.")
    ] = False,
    yes: YesOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Take a photo down: delete all that was made from it, wherever it lay, and let no plan read it again.

    Steps that are not computed yet are cancelled, whoever wants them; what a worker computes at that moment is
    dropped. Pictures, latents, delivered files in all versions and their sidecars are deleted. Rows that say what was
    made of what stay, with a tombstone that says who took it down and why. What was moved, copied or changed is named
    and left.

    The same command goes on where it was stopped; so does `gc`. Exit code 1: something is left to be deleted later.

    Example: kontext-batch forget photos/model-7.jpg --reason "consent withdrawn" --dry-run
    """
    from kontext_batch.services.takedown import go_on, which_photo

    if not reason.strip():
        raise typer.BadParameter("say why", param_hint="--reason")
    sha256, uri = hashed_file(photo)
    with common.opened(workspace) as application:
        repository, store, bundles = application.repository, application.store, application.artifact_keys.bundles
        found = which_photo(repository, store, photo, sha256=sha256, uri=uri)
        descent = repository.descent(found.sha256)
        if not as_json:
            _say_descent(found, descent)
        if dry_run:
            if as_json:
                output.say_json({"photo": found, "came_from_it": descent, "tombstones": []})
            return
        if not descent.holds or despite_hold:  # else it is refused, and nothing is asked
            confirm("All this will be deleted for good.", yes=yes)
        by = act(application.settings, "forget", reason=reason, despite_hold=despite_hold, source_too=source_too)
        repository.take_down(
            found.sha256,
            reason,
            uris=[] if found.uri is None else [found.uri],
            removes=lambda place: source_too or place.startswith(bundles),
            despite_hold=despite_hold,
            by=by,
        )
        progress = go_on(repository, store, admit=application.admit)
        repository.finish_runs()  # whose last steps were cancelled
        stones = repository.tombstones(photo=found.sha256)
    if as_json:
        output.say_json({"photo": found, "came_from_it": descent, "tombstones": stones})
    else:
        _say_stones(stones)
    if progress.silent:
        output.tell(f"{progress.silent}; the same command, or `gc`, goes on")
    raise typer.Exit(1 if any(each.pending for each in stones) else 0)


def _say_descent(photo: Photo, descent: Descent) -> None:
    output.say(f"photo {photo.sha256}")
    for uri in descent.uris or ((photo.uri,) if photo.uri else ()):
        output.say(f"  lay at {shown_uri(uri)}")
    for other in photo.others:
        output.say(f"  at another time another photo lay there, which is not meant: {other}")
    runs = ", ".join(map(str, descent.runs)) or "none"
    output.say(f"made from it: {descent.steps} steps, {descent.live} of them not computed yet; of runs: {runs}")
    total = sum(each.bytes for each in descent.artifacts)
    output.say(f"kept of that: {len(descent.artifacts)} artifacts of {total} bytes")
    for each in descent.shared:
        output.say(f"  stays, for other photos' steps made the same bytes: {each.sha256}")
    for delivery in descent.deliveries:
        if delivery.state == "delivered" and delivery.withdrawn is None:
            output.say(f"  delivered by run {delivery.run_id}: {shown_uri(delivery.delivered_path or delivery.path)}")
    for hold in descent.holds:
        output.say(f"held: {hold.subject}, by {hold.who}: {hold.reason}")


def _say_stones(stones: Sequence[Tombstone]) -> None:
    gone = sum(each.deleted is not None for each in stones)
    left = [each for each in stones if each.deleted is None]
    output.say(f"{gone} objects are deleted, {len(left)} are not")
    for each in stones:
        if each.note is not None:
            output.say(f"  {shown_uri(each.uri)}: {each.note}")
        elif each.deleted is None:
            output.say(f"  {shown_uri(each.uri)}: still to be deleted")
    output.say(
        "out of reach: copies that were made of delivered files, links and caches outside, versions that a bucket "
        "keeps, backups, models trained with them, and run reports until they are written again"
    )
