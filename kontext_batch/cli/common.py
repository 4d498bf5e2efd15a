"""What the commands share: options with one meaning everywhere, and opening a workspace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kontext_batch.errors import InfrastructureError, SettingsError, StorageFull

if TYPE_CHECKING:
    from kontext_batch.bootstrap import Application
    from kontext_batch.planning.plan import InstanceId, Plan, SkippedRow
    from kontext_batch.services.prepare import Prepared, Selection

NO_ROOM = 256 * 1024
"""Bytes left on a disk with which nothing can be done."""
WORKSPACE = "kontext-out"
"""Name of a workspace's folder, as in `bootstrap`, which takes a second to import."""

FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="A recipe, or a plan.json that `plan --json` wrote.", show_default=False)
]
WorkspaceOption = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        metavar="DIR",
        help="Folder of database and artifacts; left out, kontext-out/ beside the recipe, else in the working folder.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write data for machines instead of text.")]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="AXIS=VALUE,...",
        help="Only these values: item=RX-100,RX-200,locale=de. May be given several times.",
        show_default=False,
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only the first so many outputs.", show_default=False)
]
MetricsPortOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=65535, help="Serve /metrics, /healthz and /readyz here; left out, metrics_port.", show_default=False
    ),
]
PriorityOption = Annotated[int, typer.Option("--priority", help="Higher runs first.")]


@dataclass(frozen=True, slots=True)
class Target:
    """The file of a command: where it is, and what comes with it."""

    uri: str
    shown: str
    folder: Path | None
    """The folder that a recipe lies in; None for one in a bucket."""

    @property
    def is_plan(self) -> bool:
        """Whether it is a plan that `plan --json` wrote."""
        return self.shown.endswith(".json")


def target(file: str) -> Target:
    """Raises `SettingsError` when there is no such file."""
    if "://" in file:
        return Target(file, file, None)
    path = Path(os.path.abspath(file))  # without `..`, which may not stand in a URI
    try:
        if path.is_dir():
            raise SettingsError(f"{file}: this is a folder; a recipe is a file")
        if not path.is_file():
            raise SettingsError(f"{file}: there is no such file")
    except OSError as error:
        raise SettingsError(f"{file[:80]}: {error.strerror}") from error
    from kontext_batch.storage.uris import file_uri

    return Target(file_uri(path), file, path.parent)


def target_of(source: str) -> Target:
    """The file that a run came from, by its URI. Raises `SettingsError` when it is gone."""
    from kontext_batch.storage.uris import file_path

    return target(file_path(source) if source.startswith("file:") else source)


def folder_of(source: str) -> Path | None:
    """The folder of the file that a run came from; None for one in a bucket."""
    from kontext_batch.storage.uris import file_path

    return Path(file_path(source)).parent if source.startswith("file:") else None


def chosen_workspace(workspace: Path | None, at: Target | None = None) -> Path:
    """The workspace asked for, else the one beside the recipe, else the one in the working folder."""
    return workspace if workspace is not None else (at.folder if at and at.folder else Path.cwd()) / WORKSPACE


@contextmanager
def opened(workspace: Path | None, *, at: Target | None = None, source: str | None = None) -> Iterator[Application]:
    """The workspace asked for, else the one beside the recipe, else the one in the working folder.

    Only a command with a recipe makes a workspace, and not before its plan is accepted (`Application.settle`); the
    others raise `SettingsError` when there is none. `source`: the URI of a recipe that ran here, whose folder may be
    used again.
    """
    from kontext_batch.bootstrap import open_application
    from kontext_batch.settings import load_settings

    folder = at.folder if at is not None else None if source is None else folder_of(source)
    settings = load_settings()
    chosen = chosen_workspace(workspace, at)
    if at is None and settings.database_url is None and not chosen.is_dir():
        raise SettingsError(f"{chosen}: there is no workspace here; name one with --workspace DIR")
    with full_disks_told(chosen):
        application = open_application(settings, workspace=chosen, recipe_folder=folder, make=at is None)
        try:
            yield application
        finally:
            application.close()


@contextmanager
def full_disks_told(workspace: Path) -> Iterator[None]:
    """Within, what fails because there is no room for the workspace raises `StorageFull`."""
    try:
        yield
    except InfrastructureError as error:
        if not isinstance(error, StorageFull) and _is_full(workspace):
            raise StorageFull(f"no space is left in {workspace} ({error})") from error
        raise


def _is_full(folder: Path) -> bool:
    """SQLite says "disk I/O error" where there is no room for the files beside its database."""
    import shutil

    try:
        return shutil.disk_usage(folder).free < NO_ROOM
    except OSError:
        return False


def selection(only: Sequence[str] | None, limit: int | None) -> Selection:
    """`item=RX-100,RX-200,locale=de` as axis -> values. Raises `typer.BadParameter`."""
    from kontext_batch.services.prepare import Selection

    chosen: dict[str, list[str]] = {}
    axis = ""
    for text in only or ():
        for number, part in enumerate(text.split(",")):
            name, equals, value = part.partition("=")
            if equals:
                axis = name.strip()
            elif number == 0:
                axis = ""
            if not axis or not (value if equals else part).strip():
                raise typer.BadParameter(f"'{text}': item=RX-100,locale=de is expected", param_hint="--only")
            chosen.setdefault(axis, []).append((value if equals else part).strip())
    return Selection(chosen, limit)


def prepared(
    application: Application,
    at: Target,
    chosen: Selection,
    *,
    takes: Mapping[InstanceId, int] | None = None,
    within: Set[InstanceId] | None = None,
) -> Prepared:
    """Plan the recipe, or read the plan. `within`: nothing but these. Raises `RecipeError` and `PlanRefused`."""
    planner = application.planner()
    if not at.is_plan:
        return planner.from_recipe(at.uri, shown=at.shown, selection=chosen, takes=takes, within=within)
    if chosen.only or chosen.limit is not None:
        raise typer.BadParameter("a plan is taken whole: use --only and --limit when it is made", param_hint="--only")
    return planner.from_plan(read_plan(application, at), at.uri)


def skipped_line(row: SkippedRow) -> str:
    """A row that takes no part; a file of a glob has no line."""
    place = f"{row.file}:{row.line}" if row.line else row.file
    return f"skipped {row.axis}={row.row}: {row.reason} ({place})"


def read_plan(application: Application, at: Target) -> Plan:
    """The plan in a file. Raises `RecipeError` when it is none."""
    import json

    from kontext_batch.errors import Problem, RecipeError
    from kontext_batch.planning.render import plan_from_data

    try:
        data = json.loads(application.store.read(at.uri))
    except (ValueError, RecursionError) as error:
        raise RecipeError([Problem(at.shown, 0, 0, "", f"this is no JSON ({error})")]) from error
    return plan_from_data(data, file=at.shown)
