"""`reproduce`: a step computed again and compared with what was stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import act
from kontext_batch.cli.steps import StepArgument, headline, meant
from kontext_batch.errors import SettingsError

if TYPE_CHECKING:
    from kontext_batch.bootstrap import Application
    from kontext_batch.ports import StepRow
    from kontext_batch.services.reproduce import Replay


def reproduce(
    step: StepArgument,
    alone: Annotated[
        bool, typer.Option("--alone", help="Without those that were beside it: shows what batching does to a picture.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Keep the picture that is made.", show_default=False)
    ] = None,
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Compute a step again from what is stored, and compare. Exit code 1: it differs; 5: it cannot be done, and why.

    What a model sampled is sampled again in the batch of then: each joins at the denoise step at which it joined. In
    batch-invariant mode it is sampled alone. Of a finished file the steps that it is made from are computed again too,
    up to the one that a model sampled.

    What is not as it was (device, libraries) is told before. Nothing is uploaded, and the database keeps no more than a
    note in the audit.

    Example: kontext-batch reproduce kontext-out/pictures/mug/mug_ocean_shop.jpg
    """
    from kontext_batch.services.reproduce import finished_from

    with common.opened(workspace) as application:
        rows = meant(application.repository, step)
        if len(rows) > 1:
            numbers = ", ".join(str(row.id) for row in rows[:20]) + (", ..." if len(rows) > 20 else "")
            raise SettingsError(f"{step}: {len(rows)} steps are meant; give the number of one: {numbers}")
        replayer = application.replayer(output.tell)
        chain = finished_from(application.repository, rows[0].id)
        names = {row.id: row for row in application.repository.steps_by_id(chain)}
        replays = [replayer.replay(each, alone=alone) for each in chain]
        if save is not None:
            _keep(save, replays[0].made.data)
        _note(application, replays, alone=alone)
    if as_json:
        output.say_json([_as_data(each) for each in replays])
    else:
        for each in replays:
            _say(names[each.step_id], each)
    raise typer.Exit(0 if all(each.equal for each in replays) else 1)


def _note(application: Application, replays: Sequence[Replay], *, alone: bool) -> None:
    for each in replays:
        psnr = None if each.picture is None else each.picture.psnr
        by = act(application.settings, "reproduce", equal=each.equal, alone=alone, psnr=psnr)
        application.repository.note(by, f"step:{each.step_id}")


def _keep(file: Path, data: bytes) -> None:
    try:
        file.write_bytes(data)
    except OSError as error:
        raise SettingsError(f"{file}: the picture cannot be kept there ({error.strerror})") from error


def _as_data(replay: Replay) -> dict[str, Any]:
    """But for the picture itself, which `--save` keeps."""
    return {field.name: getattr(replay, field.name) for field in dataclasses.fields(replay) if field.name != "made"}


def _say(row: StepRow, replay: Replay) -> None:
    from kontext_batch.planning.params import SAMPLING

    sampled = replay.operation in SAMPLING
    output.say(headline(row))
    if replay.equal:
        output.say("  equal bit for bit" + (", pixels and latents" if replay.latents is not None else ""))
    else:
        output.say("  it differs" + ("" if replay.picture is None or sampled else " as a file"))
    picture = replay.picture
    if picture is not None and picture.size != picture.other:
        output.say("  its size was {}x{} and is {}x{}".format(*picture.size, *picture.other))
    elif picture is not None and picture.box is not None and picture.worst is not None:
        x, y, width, height = picture.box
        output.say(
            f"  PSNR {picture.psnr:.1f} dB; what differs lies in {width}x{height} pixels from {x},{y}; the worst is "
            f"{picture.worst[2]} of 255 levels at {picture.worst[0]},{picture.worst[1]}"
        )
    elif picture is not None:
        output.say("  all pixels are equal")
    if replay.latents:
        output.say(f"  latents differ by at most {replay.latents:.3g}")
    if sampled:
        output.say(f"  {_how(replay)}")


def _how(replay: Replay) -> str:
    if replay.beside:
        beside = ", ".join(map(str, replay.beside))
        return f"sampled as in batch {replay.batch_id}, beside step{'s' if len(replay.beside) > 1 else ''} {beside}"
    then = "" if replay.batch_id is None else f"; then in batch {replay.batch_id}"
    return "sampled alone" + then + (", in batch-invariant mode" if replay.batch_invariant else "")
