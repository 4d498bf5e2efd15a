"""The registry of models and adapters: a JSON file that `models add` writes. A recipe names entries, never paths."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kontext_batch.errors import SettingsError

SHIPPED = "tiny"
"""The demo model that comes with the package."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    """Absolute."""
    sha256: str
    """Stands for the weights; part of every step key."""
    signature: str
    """Of names, sizes and times of the files when they were hashed: another one means that they changed."""

    def as_registered(self) -> bool:
        """Whether the files are those that were hashed; without a signature nobody knows, and yes is said."""
        return not self.signature or signature(self.path) == self.signature


class ModelEntry(_Entry):
    """A model folder."""

    layout: str
    native_area: int
    """Pixels that the model was made for."""
    text_length: int
    licence: str = ""
    requires_filter: bool = False
    """Whether the licence asks for a content filter before delivery."""


class AdapterEntry(_Entry):
    """A LoRA file."""

    licence: str = ""


class Registry(BaseModel):
    """Everything registered on this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Mapping[Name, ModelEntry] = {}
    adapters: Mapping[Name, AdapterEntry] = {}

    @classmethod
    def read(cls, file: Path) -> Registry:
        """The registry in `file`; empty without one. Raises `SettingsError` when it is damaged."""
        try:
            return cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError) as error:
            raise SettingsError(f"{file}: the model registry is not readable ({error})") from error

    def write(self, file: Path) -> None:
        """Replace `file` in one move. Raises `SettingsError` when that is not possible."""
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
            os.replace(part, file)
        except OSError as error:
            raise SettingsError(f"{file}: the model registry cannot be written ({error.strerror})") from error

    def with_model(self, name: str, entry: ModelEntry) -> Registry:
        """Checked like everything that is read from the file. Raises `SettingsError` for a name that is none."""
        return self._checked({"models": {**self.models, name: entry}, "adapters": self.adapters})

    def with_adapter(self, name: str, entry: AdapterEntry) -> Registry:
        """As `with_model`."""
        return self._checked({"models": self.models, "adapters": {**self.adapters, name: entry}})

    def without(self, kind: Literal["models", "adapters"], name: str) -> Registry:
        """Raises `SettingsError` when there is none of that name."""
        known = getattr(self, kind)
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise SettingsError(f"{kind.removesuffix('s')} '{name}' is not registered; registered: {listed}")
        return self.model_copy(update={kind: {each: entry for each, entry in known.items() if each != name}})

    @classmethod
    def _checked(cls, values: Mapping[str, object]) -> Registry:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError(f"not a name of a model: {error.errors()[0]['msg']}") from error


def shipped_folder() -> Path:
    """Where the demo model lies. `engine` is not imported: it would bring torch."""
    return Path(__file__).parents[1] / "engine" / "models" / SHIPPED


def signature(path: Path) -> str:
    """Names, sizes and times of the files of a model, or of one file: cheap to read, changes when they do."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    parts = []
    for file in files:
        if file.is_file():
            stat = file.stat()
            parts.append(f"{file.relative_to(path).as_posix()}:{stat.st_size}:{stat.st_mtime_ns}")
    return "|".join(parts)
