"""`schedules add|list|preview|fires|pause|resume|remove|run-now`."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import YesOption, act, confirm
from kontext_batch.cli.run import announce, submitted

if TYPE_CHECKING:
    from kontext_batch.bootstrap import Application
    from kontext_batch.planning.schedules import StoredSchedule

app = typer.Typer(name="schedules", help="Recipes that run by themselves.", no_args_is_help=True, rich_markup_mode=None)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the schedule.", show_default=False)]


@app.command()
def add(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A recipe.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Left out, the recipe's.", show_default=False)] = None,
    cron: Annotated[str | None, typer.Option(help='Such as "0 22 * * *".', show_default=False)] = None,
    tz: Annotated[str | None, typer.Option(help="Time zone, such as Europe/Berlin.", show_default=False)] = None,
    catch_up: Annotated[str | None, typer.Option(help="Missed times: last, all or none.", show_default=False)] = None,
    overlap: Annotated[
        str | None, typer.Option(help="While its run before is open: skip, queue or cancel.", show_default=False)
    ] = None,
    stop_at: Annotated[
        str | None, typer.Option(help="HH:MM of the zone at which the run is stopped.", show_default=False)
    ] = None,
    only_changed: Annotated[
        bool | None, typer.Option("--only-changed", help="No run when nothing has changed.", show_default=False)
    ] = None,
    priority: common.PriorityOption = 0,
    workspace: common.WorkspaceOption = None,
) -> None:
    """Run a recipe by itself, as its `schedule` says; options win. `workers beat` fires it.

    Example: kontext-batch schedules add spring.yaml --cron "0 22 * * *" --tz Europe/Berlin --stop-at 06:00
    """
    from kontext_batch.planning.schedules import Schedule, next_fire

    at = common.target(file)
    if at.is_plan:
        raise typer.BadParameter("a plan runs once; schedule its recipe", param_hint="FILE")
    with common.opened(workspace, at=at) as application:
        recipe, _ = application.planner().looker.recipe(at.uri, shown=at.shown)
        options = {"cron": cron, "tz": tz, "catch_up": catch_up, "overlap": overlap, "stop_at": stop_at}
        chosen = _chosen(recipe.schedule, options, only_changed)
        by = act(application.settings, "schedules add", recipe=at.uri, cron=chosen["cron"], tz=chosen["tz"])
        application.settle()
        schedule = Schedule(name=name or recipe.name, recipe=at.uri, priority=priority, **chosen)
        application.repository.add_schedule(schedule, by=by)
    first = next_fire(schedule.cron, schedule.tz, datetime.now(UTC))
    output.say(f"schedule {schedule.name}: first at {_local(first, schedule.tz)}")


@app.command("list")
def list_schedules(workspace: common.WorkspaceOption = None, as_json: common.JsonOption = False) -> None:
    """Schedules, and when each fires next.

    Example: kontext-batch schedules list
    """
    from kontext_batch.planning.schedules import next_fire

    with common.opened(workspace) as application:
        found = application.repository.schedules()
    now = datetime.now(UTC)
    following = {each.name: None if each.paused else next_fire(each.cron, each.tz, now) for each in found}
    if as_json:
        output.say_json([{**output.as_json(each), "next": output.as_json(following[each.name])} for each in found])
        return
    output.table(
        ["name", "cron", "zone", "next", "overlap", "stop at", "recipe"],
        [
            [
                each.name,
                each.cron,
                each.tz,
                "paused" if each.paused else _local(following[each.name], each.tz),
                each.overlap,
                each.stop_at,
                each.recipe,
            ]
            for each in found
        ],
    )


@app.command()
def preview(
    name: NameArgument,
    count: Annotated[int, typer.Option(min=1, max=1000, help="So many times.")] = 10,
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """The next times of a schedule, in its zone, clock changes included.

    Example: kontext-batch schedules preview nightly --count 30
    """
    from kontext_batch.planning.schedules import fire_times

    with common.opened(workspace) as application:
        schedule = _named(application, name)
    times = list(islice(fire_times(schedule.cron, schedule.tz, datetime.now(UTC)), count))
    if as_json:
        output.say_json(times)
        return
    for each in times:
        output.say(_local(each, schedule.tz))


@app.command()
def fires(
    name: NameArgument,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    workspace: common.WorkspaceOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """What became of a schedule's times: its runs, and why there was none.

    Example: kontext-batch schedules fires nightly
    """
    with common.opened(workspace) as application:
        schedule = _named(application, name)
        rows = application.repository.fires(name, limit=limit)
    if as_json:
        output.say_json(rows)
        return
    output.table(
        ["time", "state", "run", "reason"],
        [[_local(each.at, schedule.tz), each.state, each.run_id, each.reason] for each in rows],
    )


@app.command()
def pause(name: NameArgument, workspace: common.WorkspaceOption = None) -> None:
    """Let a schedule start nothing; times that go by are not made up for.

    Example: kontext-batch schedules pause nightly
    """
    with common.opened(workspace) as application:
        by = act(application.settings, "schedules pause")
        paused = application.repository.pause_schedule(name, paused=True, by=by)
    output.say(f"schedule {name} is paused" if paused else f"schedule {name} is paused already")


@app.command()
def resume(name: NameArgument, workspace: common.WorkspaceOption = None) -> None:
    """Let a paused schedule fire again, from now on.

    Example: kontext-batch schedules resume nightly
    """
    with common.opened(workspace) as application:
        by = act(application.settings, "schedules resume")
        resumed = application.repository.pause_schedule(name, paused=False, by=by)
    output.say(f"schedule {name} fires again" if resumed else f"schedule {name} is not paused")


@app.command()
def remove(name: NameArgument, yes: YesOption = False, workspace: common.WorkspaceOption = None) -> None:
    """Take a schedule away; its runs stay.

    Example: kontext-batch schedules remove nightly --yes
    """
    with common.opened(workspace) as application:
        _named(application, name)
        confirm(f"Schedule '{name}' and its times will be gone.", yes=yes)
        application.repository.remove_schedule(name, by=act(application.settings, "schedules remove"))
    output.say(f"schedule {name} is removed")


@app.command("run-now")
def run_now(name: NameArgument, workspace: common.WorkspaceOption = None, as_json: common.JsonOption = False) -> None:
    """Submit the recipe of a schedule at once, beside its times.

    Example: kontext-batch schedules run-now nightly
    """
    with common.opened(workspace) as application:
        schedule = _named(application, name)
    at = common.target_of(schedule.recipe)
    with common.opened(workspace, source=schedule.recipe) as application:
        ready = common.prepared(application, at, common.selection(None, None))
        announce(ready, as_json=as_json)
        run_id = submitted(application, ready, priority=schedule.priority, as_json=as_json, action="schedules run-now")
        if as_json:
            output.event("finished", run=run_id, state="running", exit=0)


def _chosen(written: Any, options: dict[str, str | None], only_changed: bool | None) -> dict[str, Any]:
    """What the recipe says, options before it, checked as a recipe is. Raises `BadParameter`."""
    from pydantic import ValidationError

    from kontext_batch.recipes.schema import Schedule

    given = {} if written is None else written.model_dump(exclude_unset=True)
    given |= {option: value for option, value in options.items() if value is not None}
    if only_changed:
        given["only"] = "changed"
    if "cron" not in given:
        raise typer.BadParameter("the recipe has no `schedule`: say when it runs, as in --cron '0 22 * * *'")
    try:
        checked = Schedule(**given)
    except ValidationError as error:
        fault = error.errors()[0]
        raise typer.BadParameter(f"{fault['loc'][0]}: {fault['msg'].removeprefix('Value error, ')}") from error
    return {**checked.model_dump(exclude={"only"}), "only_changed": checked.only == "changed"}


def _named(application: Application, name: str) -> StoredSchedule:
    from kontext_batch.errors import ObjectNotFound

    found = [each for each in application.repository.schedules() if each.name == name]
    if not found:
        raise ObjectNotFound(f"there is no schedule '{name}'; `schedules list` shows them")
    return found[0]


def _local(moment: datetime | None, tz: str) -> str:
    from zoneinfo import ZoneInfo

    return "never" if moment is None else f"{moment.astimezone(ZoneInfo(tz)):%a %Y-%m-%d %H:%M %Z}"
