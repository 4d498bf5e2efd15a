"""The Pillow operations by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, Protocol

from kontext_batch.errors import StepError
from kontext_batch.operations import contact_sheet, finish
from kontext_batch.operations.pictures import DEFAULT_MAX_PIXELS
from kontext_batch.ports import LoadedPicture, MadePicture

LIBRARIES = ("pillow", "kontext-batch")


class _Operation(Protocol):
    def __call__(
        self, params: Mapping[str, Any], pictures: Sequence[LoadedPicture], *, max_pixels: int, xmp: bytes | None
    ) -> MadePicture: ...


_OPERATIONS: Mapping[str, _Operation] = MappingProxyType(
    {"finish": finish.finish, "contact_sheet": contact_sheet.contact_sheet}
)

OPERATION_VERSIONS: Mapping[str, int] = MappingProxyType(
    {"finish": finish.VERSION, "contact_sheet": contact_sheet.VERSION}
)
"""The version of each operation; `planning.params.VERSIONS` says the same to the step keys."""


class PillowOperations:
    """`ports.Operations`. Holds no state: threads may share one."""

    def __init__(self, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        """`max_pixels`: most pixels of a picture that is read, and of a contact sheet."""
        self._max_pixels = max_pixels

    def run(
        self,
        operation: str,
        params: Mapping[str, Any],
        pictures: Sequence[LoadedPicture],
        *,
        xmp: bytes | None = None,
    ) -> MadePicture:
        """`xmp`: written into the file.

        Raises `StepError` when a picture does not decode or the result cannot meet its limits.
        """
        if operation not in _OPERATIONS:
            raise StepError(f"unknown operation '{operation}'; known: {', '.join(_OPERATIONS)}")
        return _OPERATIONS[operation](params, pictures, max_pixels=self._max_pixels, xmp=xmp)

    def describe(self) -> Mapping[str, Any]:
        """What the bytes of a file depend on, for the lineage."""
        return {"device": "cpu", "libraries": {name: version(name) for name in LIBRARIES}}
