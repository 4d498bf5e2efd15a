"""`models list|add|remove|verify|convert|train` and `adapters list|add|remove`: the weights that recipes may name."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kontext_batch.cli import common, output
from kontext_batch.cli.acting import act
from kontext_batch.errors import SettingsError

if TYPE_CHECKING:
    from kontext_batch.ports import Act
    from kontext_batch.registry import ModelEntry, Registry
    from kontext_batch.settings import Settings

app = typer.Typer(name="models", help="Models that recipes may name.", no_args_is_help=True, rich_markup_mode=None)
adapters = typer.Typer(
    name="adapters", help="LoRA adapters that recipes may name.", no_args_is_help=True, rich_markup_mode=None
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="As recipes name it.", show_default=False)]
PathArgument = Annotated[Path, typer.Argument(metavar="PATH", show_default=False)]
LicenceOption = Annotated[str | None, typer.Option("--licence", help="Name of its licence, for the records.")]


@app.command("list")
def list_models(as_json: common.JsonOption = False) -> None:
    """Registered models.

    Example: kontext-batch models list --json
    """
    _, registry = _registry()
    if as_json:
        output.say_json({name: entry.model_dump(mode="json") for name, entry in registry.models.items()})
        return
    output.table(
        ["name", "layout", "native size", "licence", "filter", "sha256", "path"],
        [
            [
                name,
                entry.layout,
                native_size(entry.native_area),
                entry.licence,
                "required" if entry.requires_filter else "",
                entry.sha256[:12],
                entry.path,
            ]
            for name, entry in sorted(registry.models.items())
        ],
        right=(2,),
    )


@app.command()
def add(
    name: NameArgument,
    path: PathArgument,
    licence: LicenceOption = None,
    requires_filter: Annotated[
        bool | None,
        typer.Option(
            "--requires-filter/--no-filter", help="Its licence asks for a content filter before delivery, or does not."
        ),
    ] = None,
    load: Annotated[bool, typer.Option(help="Load it whole to see that nothing is missing; needs its memory.")] = True,
) -> None:
    """Check and hash the model folder at PATH (diffusers or BFL layout) and register it as NAME.

    What is not said of its licence stays as it was under that name.

    Example: kontext-batch models add kontext-dev /models/FLUX.1-Kontext-dev --licence "FLUX.1 dev" --requires-filter
    """
    from kontext_batch import editor
    from kontext_batch.bootstrap import model_entry

    settings, registry = _registry()
    before = registry.models.get(name)
    if before is not None:
        licence = before.licence if licence is None else licence
        requires_filter = before.requires_filter if requires_filter is None else requires_filter
    entry = model_entry(path.absolute(), licence=licence or "", requires_filter=bool(requires_filter))
    complete = registry.with_model(name, entry)
    if load:
        editor.check_model(entry.path)
    by = act(settings, "models add", sha256=entry.sha256)
    complete.write(settings.models_file)
    _note(settings, by, f"model:{name}")
    output.say(f"model {name}: {entry.layout} layout, {native_size(entry.native_area)}, sha256 {entry.sha256[:12]}")


@app.command()
def verify(name: NameArgument) -> None:
    """Hash a model's files again and load it strictly. Exit code 2 when it is not what was registered.

    Example: kontext-batch models verify kontext-dev
    """
    from kontext_batch import editor

    _, registry = _registry()
    entry = _entry(registry, name)
    facts = editor.read_model(entry.path)
    if facts.sha256 != entry.sha256:
        raise SettingsError(f"model '{name}': the files at {entry.path} changed; `models add` it again to use them")
    editor.check_model(entry.path)
    output.say(f"model {name} is whole and unchanged: sha256 {facts.sha256}")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(metavar="NAME|PATH", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="TARGET", show_default=False)],
) -> None:
    """Write a model, of either layout, as a diffusers folder at TARGET.

    Example: kontext-batch models convert /models/bfl /models/kontext-diffusers
    """
    from kontext_batch import editor

    _, registry = _registry()
    path = registry.models[model].path if model in registry.models else Path(model)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SettingsError(f"{target}: something is there already")
    editor.convert_model(path, target)
    output.say(str(target))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; docs/training.md.", show_default=False)],
) -> None:
    """Train a model or an adapter as CONFIG says; stopped or killed, the same command goes on.

    Example: kontext-batch models train brand-lora.yaml
    """
    from kontext_batch import editor

    editor.train_model(config, say=output.tell)


@app.command()
def gate(
    model: Annotated[str, typer.Argument(metavar="NAME|PATH", show_default=False)],
    step_tolerance: Annotated[
        float | None, typer.Option(min=0.0, max=0.99, help="Try this setting; left out, several are.")
    ] = None,
    context_every: Annotated[int | None, typer.Option(min=1, help="Try this one, with the other or alone.")] = None,
    least: Annotated[float, typer.Option(metavar="DB", help="PSNR to the exact image that every image needs.")] = 30.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoise steps.")] = 28,
    images: Annotated[int, typer.Option(min=1, help="Edits of drawn products to make.")] = 9,
    as_json: common.JsonOption = False,
) -> None:
    """Hold approximate sampling against exact, image by image, on any weights. Exit code 1 when a setting fails.

    Example: kontext-batch models gate kontext-dev --step-tolerance 0.05 --context-every 2
    """
    from kontext_batch import editor

    settings, registry = _registry()
    path = registry.models[model].path if model in registry.models else Path(model)
    asked = None if step_tolerance is None and context_every is None else (step_tolerance or 0.0, context_every or 1)
    found = editor.gate_model(path, asked, device=settings.device, dtype=settings.dtype, steps=steps, images=images)
    passed = [each.worst >= least for each in found]
    if as_json:
        output.say_json(
            [
                {
                    **asdict(each.approximation),
                    "median": each.median,
                    "worst": each.worst,
                    "quicker": each.quicker,
                    "passed": good,
                }
                for each, good in zip(found, passed, strict=True)
            ]
        )
    else:
        rows: list[list[object]] = [
            [
                f"{each.approximation.step_tolerance:g}",
                each.approximation.context_every,
                f"{each.median:.1f}",
                f"{each.worst:.1f}",
                f"{each.quicker:.2f}x",
                "passed" if good else f"below {least:g} dB",
            ]
            for each, good in zip(found, passed, strict=True)
        ]
        heads = ["step_tolerance", "context_every", "median dB", "worst dB", "quicker", ""]
        output.table(heads, rows, right=(0, 1, 2, 3, 4))
    if not all(passed):
        raise typer.Exit(1)


@app.command()
def remove(name: NameArgument) -> None:
    """Take a model out of the registry; its files, and what was made with it, stay.

    Example: kontext-batch models remove kontext-old
    """
    from kontext_batch.registry import SHIPPED

    if name == SHIPPED:
        raise SettingsError(f"model '{SHIPPED}' comes with the package")
    settings, registry = _registry()
    by = act(settings, "models remove")
    registry.without("models", name).write(settings.models_file)
    _note(settings, by, f"model:{name}")
    output.say(f"model {name} is no longer registered")


@adapters.command("list")
def list_adapters(as_json: common.JsonOption = False) -> None:
    """Registered adapters.

    Example: kontext-batch adapters list
    """
    _, registry = _registry()
    if as_json:
        output.say_json({name: entry.model_dump(mode="json") for name, entry in registry.adapters.items()})
        return
    rows: list[list[object]] = [
        [name, entry.licence, entry.sha256[:12], entry.path] for name, entry in sorted(registry.adapters.items())
    ]
    output.table(["name", "licence", "sha256", "path"], rows)


@adapters.command("add")
def add_adapter(name: NameArgument, path: PathArgument, licence: LicenceOption = None) -> None:
    """Check and hash the LoRA file at PATH (safetensors) and register it as NAME.

    A licence that is not given stays as it was under that name.

    Example: kontext-batch adapters add brand-look looks/brand.safetensors
    """
    from kontext_batch import editor
    from kontext_batch.registry import AdapterEntry, signature

    if path.suffix != ".safetensors" or not path.is_file():
        raise SettingsError(f"{path}: a safetensors file is expected")
    settings, registry = _registry()
    file = path.absolute()
    sha256 = editor.hash_adapter(file)
    if licence is None:
        before = registry.adapters.get(name)
        licence = "" if before is None else before.licence
    entry = AdapterEntry(path=file, sha256=sha256, signature=signature(file), licence=licence)
    by = act(settings, "adapters add", sha256=sha256)
    registry.with_adapter(name, entry).write(settings.models_file)
    _note(settings, by, f"adapter:{name}")
    output.say(f"adapter {name}: sha256 {sha256[:12]}")


@adapters.command("remove")
def remove_adapter(name: NameArgument) -> None:
    """Take an adapter out of the registry; its file, and what was made with it, stay.

    Example: kontext-batch adapters remove brand-look
    """
    settings, registry = _registry()
    by = act(settings, "adapters remove")
    registry.without("adapters", name).write(settings.models_file)
    _note(settings, by, f"adapter:{name}")
    output.say(f"adapter {name} is no longer registered")


def native_size(area: int) -> str:
    """An area in pixels as the square that a model was made for; it makes other shapes of about that area, too."""
    side = math.isqrt(area)
    return f"{side}x{side}" if side * side == area else f"{area} pixels"


def _registry() -> tuple[Settings, Registry]:
    from kontext_batch.bootstrap import with_shipped
    from kontext_batch.registry import Registry
    from kontext_batch.settings import load_settings

    settings = load_settings()
    return settings, with_shipped(Registry.read(settings.models_file), settings.models_file)


def _entry(registry: Registry, name: str) -> ModelEntry:
    if name not in registry.models:
        known = ", ".join(sorted(registry.models)) or "none"
        raise SettingsError(f"model '{name}' is not registered; registered: {known}")
    return registry.models[name]


def _note(settings: Settings, by: Act, subject: str) -> None:
    """Write down who changed the registry, where a database is at hand: that of the settings, or of a workspace here.

    The registry is a file for all workspaces and has changed already: a database that is away is told and no fault.
    """
    from kontext_batch.errors import KontextBatchError

    if settings.database_url is None and not (Path.cwd() / common.WORKSPACE).is_dir():
        return
    try:
        with common.opened(None) as application:
            application.repository.note(by, subject)
    except KontextBatchError as error:
        output.tell(f"this act could not be written down: {error}")
