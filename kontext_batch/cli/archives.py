"""`export` and `import`: a run as one file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import act
from kontext_batch.errors import SettingsError


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Number of the run.", show_default=False)],
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="File to be made.", show_default=False)],
    intermediates: Annotated[
        bool, typer.Option("--intermediates", help="Pictures and latents of every step, not only of what is delivered.")
    ] = False,
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Make one archive of a finished run: recipe, photos, pictures, and every row that explains them.

    It is a plain tar with a manifest of hashes; `import` restores it elsewhere. Tables and brand files that the recipe
    reads are not kept by a workspace and are not in it. For a list or table of a run there is `runs export`.

    Example: kontext-batch export 12 run-12.tar
    """
    import tempfile

    from kontext_batch.services.archives import export_run
    from kontext_batch.services.questions import run_number

    number = run_number(run)
    if archive.exists():
        raise SettingsError(f"{archive}: something is there already")
    with common.opened(workspace) as application:
        source = application.repository.run(number).source
    with common.opened(workspace, source=source) as application:
        try:
            descriptor, made = tempfile.mkstemp(dir=archive.parent, prefix=f".{archive.name}.")
        except OSError as error:
            raise SettingsError(f"{archive}: cannot be written ({error.strerror})") from error
        with _temporary(descriptor, made) as file:
            told = export_run(
                application.repository,
                application.store,
                number,
                file,
                intermediates=intermediates,
                max_input_bytes=application.settings.max_input_bytes,
                uri_of=application.artifact_keys,
            )
            file.flush()
            os.fsync(file.fileno())
            by = act(application.settings, "export", pictures=told.pictures, inputs=told.inputs)
            application.repository.note(by, f"run:{number}")
            _give_name(made, archive)
    if as_json:
        output.say_json(told)
        return
    output.say(f"run {number}: {told.steps} steps, {told.pictures} pictures, {told.inputs} photos in {archive}")
    for each in told.left_out:
        output.say(f"left out: {each['uri']}: {each['reason']}")


@contextmanager
def _temporary(descriptor: int, path: str) -> Iterator[BinaryIO]:
    """Within, the file is written; afterwards it is gone, unless it has another name by then."""
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _give_name(made: str, archive: Path) -> None:
    """Whole or not at all, and over nothing. Raises `SettingsError`."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(made, 0o666 & ~mask)
    try:
        os.link(made, archive)
    except FileExistsError as error:
        raise SettingsError(f"{archive}: something is there already") from error
    except OSError:  # a file system without hard links
        try:
            os.replace(made, archive)
        except OSError as error:
            raise SettingsError(f"{archive}: cannot be written ({error.strerror})") from error


def import_(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="What `export` has made.", show_default=False)],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Write recipe, photos and outputs there too.", show_default=False),
    ] = None,
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Restore an exported run in this workspace: its steps, pictures and all that explains them, with equal hashes.

    The archive is verified before anything is written. A step that is here, by its key, stays as it is; the run gets a
    new number; what was taken down here is left out. Imported twice, nothing changes. Deliveries are told as records of
    where they were; files are written only with --to, and never over another.

    Example: kontext-batch import run-12.tar --to spring --workspace spring/kontext-out
    """
    from kontext_batch.bootstrap import open_application
    from kontext_batch.bootstrap.adapters import store_of
    from kontext_batch.services.archives import Archive, import_run, unpack
    from kontext_batch.settings import load_settings
    from kontext_batch.storage.uris import file_uri

    try:
        file = archive.open("rb")
    except OSError as error:
        raise SettingsError(f"{archive}: {error.strerror}") from error
    chosen = common.chosen_workspace(workspace)
    with file, common.full_disks_told(chosen):
        checked = Archive(file)
        settings = load_settings()
        application = open_application(settings, workspace=chosen)
        try:
            by = act(settings, "import", archive=archive.name, run=checked.manifest.get("run"))
            done = import_run(application.repository, application.store, checked, application.artifact_keys, by=by)
            if to is not None:
                folder = file_uri(to.resolve()).rstrip("/") + "/"
                named = {*checked.inputs(), *checked.pictures()}
                gone = application.repository.forgotten(named)
                from dataclasses import replace

                files, kept = unpack(checked, store_of(settings, [], [folder]), folder, without=gone)
                done = replace(done, files=files, kept=tuple(kept))
        finally:
            application.close()
    if as_json:
        output.say_json({**output.as_json(done), "changed": done.changed})
        return
    new = done.imported
    if not done.changed:
        output.say(f"run {new.run_id}: all of it is here already, nothing was changed")
    else:
        output.say(
            f"run {new.old_run} is run {new.run_id} here: {new.new_steps} steps are new, {new.known_steps} were here; "
            f"{done.pictures} pictures were put, {done.files} files written"
        )
    for count, what in (
        (new.differing, "steps are done here with other bytes: what is here stays"),
        (new.undone, "steps count as not done: something that they read is not done here, or they were not done there"),
        (new.forgotten, "steps are left out: they were made from a photo that was taken down here"),
    ):
        if count:
            output.say(f"{count} {what}")
    for uri in done.kept:
        output.say(f"another file is there, and stays: {uri}")
