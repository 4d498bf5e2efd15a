"""The models of a registry, and the shipped one among them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from kontext_batch import editor
from kontext_batch.errors import SettingsError
from kontext_batch.registry import SHIPPED, ModelEntry, Registry, shipped_folder, signature


def with_shipped(registry: Registry, file: Path) -> Registry:
    """The registry with the shipped model; its hash is kept in `file` until the model's files change."""
    folder = shipped_folder()
    if not (folder / "model_index.json").is_file():
        return registry
    known = registry.models.get(SHIPPED)
    if known is not None and known.path == folder and known.signature == signature(folder):
        return registry
    complete = registry.with_model(SHIPPED, model_entry(folder, licence="Apache-2.0"))
    with contextlib.suppress(SettingsError):  # a home folder that cannot be written to: hashed again next time
        complete.write(file)
    return complete


def model_entry(folder: Path, *, licence: str = "", requires_filter: bool = False) -> ModelEntry:
    """Check and hash the model at `folder`. Raises `SettingsError`."""
    facts = editor.read_model(folder)
    return ModelEntry(
        path=folder,
        sha256=facts.sha256,
        signature=signature(folder),
        layout=facts.layout,
        native_area=facts.native_area,
        text_length=facts.text_length,
        licence=licence,
        requires_filter=requires_filter,
    )
