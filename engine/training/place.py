"""Where a training lies and where its result goes: looked at before it begins, since hours pass in between."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter

from engine.errors import ConfigError
from engine.training.config import TrainingConfig

TOLD = "training.json"
"""What the training in a folder was told."""
EXPORTED = "exported.txt"
"""Where it has exported to: its own result it may replace, nobody else's."""
LASTING = ("kind", "base", "vae", "deepen", "freeze_encoder", "rank", "targets")
"""Entries that a training keeps for life."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder and keep other trainings out of it. Raises `ConfigError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise ConfigError(f"folder {folder} cannot be used: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another training is running in {folder}; give this one another folder") from error
        yield


def go_on_with(config: TrainingConfig, say: Callable[[str], None]) -> None:
    """Compare what the training in the folder was told last with `config`, and note that.

    Raises `ConfigError` when it would be another training; says what else has changed.
    """
    path = config.folder / TOLD
    now = json.loads(TypeAdapter(TrainingConfig).dump_json(config))
    now |= {f"loop.{name}": value for name, value in now.pop("loop").items()}
    if (config.folder / "checkpoint.safetensors").is_file() and path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is damaged; remove it to go on regardless ({error})") from error
        for name in sorted(now):
            if name not in before or before[name] == now[name]:
                continue
            if name in LASTING:
                raise ConfigError(
                    f"the training in {config.folder} was begun with {name} {before[name]}, not {now[name]}; "
                    "give this one another folder"
                )
            say(f"goes on with {name} {now[name]} instead of {before[name]}")
    part = path.with_suffix(".part")
    part.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def check_export(config: TrainingConfig) -> None:
    """Whether the result can be written where it shall be, without harm to anything. Raises `ConfigError`."""
    if config.export is None:
        return
    export = config.export.resolve()
    for name, other in (("base", config.base), ("vae", config.vae)):
        if other is not None and _overlap(export, other.resolve()):
            raise ConfigError(f"export {config.export} would overwrite {name} {other}; name another place")
    if export == config.folder.resolve() or export in config.folder.resolve().parents:
        raise ConfigError(f"export {config.export} is where the training itself lies; name a place in it or elsewhere")
    if config.kind == "lora" and export.is_dir():
        raise ConfigError(f"export {config.export} is a folder; an adapter is written as a file")
    is_there = export.is_file() or (export.is_dir() and any(export.iterdir()))
    if is_there and str(export) != _exported(config.folder):
        raise ConfigError(f"export {config.export} is there already; remove it or name another place")
    try:
        export.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"export {config.export} cannot be written: {error.strerror}") from error
    if not os.access(export.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"export {config.export} cannot be written: {export.parent} may not be written to")


def export(config: TrainingConfig, write: Callable[[Path], None], say: Callable[[str], None]) -> None:
    """Let `write` make the result beside its place, then put it there in one move."""
    if config.export is None:
        return
    part = config.export.with_name(f".{config.export.name}.part")
    if part.is_dir():  # of a run that was killed here
        shutil.rmtree(part)
    write(part)
    _let_others_read(part)
    if config.export.is_dir():
        shutil.rmtree(config.export)
    os.replace(part, config.export)
    (config.folder / EXPORTED).write_text(str(config.export.resolve()), encoding="utf-8")
    say(f"wrote {config.export}")


def _let_others_read(place: Path) -> None:
    """As any new file is made: safetensors makes its own for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [place] if place.is_file() else [each for each in place.rglob("*") if each.is_file()]:
        file.chmod(0o666 & ~umask)


def _exported(folder: Path) -> str | None:
    path = folder / EXPORTED
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents
