"""The entry point: puts the commands together, and turns whatever happens into text and an exit code.

0 done · 1 internal · 2 invalid recipe or usage · 3 finished with failures, or no space left · 5 refused by plan or
budget · 130 interrupted
"""

from __future__ import annotations

import errno
import logging
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core

from kontext_batch.cli import (
    admin,
    archives,
    export,
    forget,
    holds,
    inbox,
    lineage,
    models,
    output,
    plan,
    recipes,
    report,
    reproduce,
    run,
    runs,
    schedules,
    steps,
    verify,
    webhooks,
    workspace,
)
from kontext_batch.errors import (
    AuthorError,
    Held,
    KontextBatchError,
    ObjectChanged,
    ObjectNotFound,
    PlanRefused,
    RecipeError,
    SettingsError,
    StepError,
    StorageFull,
    StorageReadOnly,
)


class Commands(typer.core.TyperGroup):
    """The commands; says under which noun a verb is that was typed without one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Ends with a usage error for a verb that belongs to a noun."""
        verb = args[0]
        if verb not in self.commands and not ctx.resilient_parsing:  # which is how completion looks at a line
            nouns = [name for name, each in self.commands.items() if verb in getattr(each, "commands", {})]
            if nouns:
                meant = " or ".join(f"'{noun} {verb}'" for noun in nouns)
                ctx.fail(f"No such command '{verb}'. Did you mean {meant}?")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="kontext-batch",
    cls=Commands,
    help="Turn photos and a recipe into edited images, and explain every one of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    run.run,
    plan.plan,
    run.submit,
    runs.status,
    steps.explain,
    lineage.lineage,
    report.report,
    reproduce.reproduce,
    verify.verify,
    workspace.doctor,
    workspace.gc,
    forget.forget,
    archives.export,
):
    app.command()(command)
app.command("import")(archives.import_)
runs.app.command()(export.export)
workspace.workers.command("list")(admin.list_workers)
workspace.workers.command()(admin.drain)
for noun in (
    runs.app,
    steps.app,
    admin.batches,
    recipes.app,
    schedules.app,
    inbox.app,
    webhooks.app,
    models.app,
    models.adapters,
    workspace.workers,
    workspace.db,
    admin.audit,
    holds.app,
):
    app.add_typer(noun)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        output.say(version("kontext-batch"))
        raise typer.Exit


@app.callback()
def settings(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens to standard error.")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log as one JSON object a line.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn photos and a recipe into edited images, and explain every one of them."""
    from kontext_batch.observability import hide_password, level_number, set_up_logging
    from kontext_batch.settings import load_settings

    as_json, level = log_json, logging.WARNING
    try:
        chosen = load_settings()
    except SettingsError:
        pass  # told by the command, if it needs them
    else:
        hide_password(chosen.database_url, chosen.broker_url)
        as_json, level = log_json or chosen.log_format == "json", level_number(chosen.log_level)
    set_up_logging(json=as_json, level=min(level, logging.INFO) if verbose else level)


def exit_code(error: BaseException) -> int:
    """Which code an error ends the process with."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, PlanRefused | ObjectChanged | Held):
        return 5
    if isinstance(error, StorageFull | StorageReadOnly | StepError):
        return 3
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 3
    return 2 if isinstance(error, AuthorError | ObjectNotFound) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Nothing but this function ends the process on an error."""
    output.open_closed_streams()
    output.escape_what_is_no_text()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _ended(given)
    except BrokenPipeError:  # whoever read our output has gone (`| head`)
        output.silence()
        return 1
    except output.OutputLost as error:
        output.tell(str(error))
        output.silence()
        return exit_code(error.__cause__ or error)


def _ended(given: list[str]) -> int:
    """Run one command, tell what it ends with, and return its exit code.

    Raises `OutputLost` or `BrokenPipeError` when that cannot be told.
    """
    as_json = "--json" in given
    try:
        app(args=given, prog_name="kontext-batch", standalone_mode=True)
    except SystemExit as end:  # typer's way to end; usage errors are told already
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if as_json and code == 2:
            output.event("error", message="the command was not understood; see standard error", exit=2)
        if as_json and code == 130 and not output.has_ended():  # Ctrl-C before the worker started
            output.event("interrupted", message="nothing was computed", exit=130)
        return code
    except (KontextBatchError, KeyboardInterrupt) as error:
        code = exit_code(error)
        _tell(error, code, as_json=as_json)
        return code
    except (output.OutputLost, BrokenPipeError):
        raise
    except Exception as error:
        if exit_code(error) == 3:  # as for `--help`, which typer writes
            raise output.OutputLost(f"no space is left to write to ({error})") from error
        where = _keep_traceback()
        message = _masked(f"{type(error).__name__}: {error}")
        output.tell(f"internal error: {message}\nthe traceback is in {where}; please report it")
        if as_json:
            output.event("error", message=message, traceback=where, exit=1)
        return 1
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM before the worker has its own handler ends a command as Ctrl-C does."""
    raise KeyboardInterrupt


def _tell(error: BaseException, code: int, *, as_json: bool) -> None:
    problems = list(map(str, error.problems)) if isinstance(error, RecipeError) else []
    reasons = list(error.reasons) if isinstance(error, PlanRefused) else []
    message = "interrupted; nothing is lost: the same command goes on" if code == 130 else str(error)
    problems, reasons, message = [*map(_masked, problems)], [*map(_masked, reasons)], _masked(message)
    for each in problems or [f"refused: {reason}" for reason in reasons] or [message]:
        output.tell(each)
    if problems:
        output.tell(f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'}")
    if isinstance(error, StorageFull):
        output.tell("make room, then run the same command again: it goes on where it stopped")
    if as_json:
        name = "interrupted" if code == 130 else "error"
        output.event(name, message=message, problems=problems or reasons, exit=code)


def _masked(text: str) -> str:
    from kontext_batch.observability import mask

    return mask(text)


def _keep_traceback() -> str:
    """Write the traceback to a file that can be sent along; returns its path."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="kontext-batch-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write(_masked(traceback.format_exc()))
            return file.name
    except OSError:
        output.tell(_masked(traceback.format_exc()))
        return "standard error"


if __name__ == "__main__":
    sys.exit(main())
