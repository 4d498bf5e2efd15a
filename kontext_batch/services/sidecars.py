"""`NAME.lineage.json` beside a delivered file: what made it, for whoever has the file and no access to the database."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import structlog

from kontext_batch.errors import InfrastructureError, KontextBatchError, StorageReadOnly
from kontext_batch.hashing import canonical_json
from kontext_batch.planning.marking import asset_id, digital_source_type
from kontext_batch.planning.sidecars import sidecar_path
from kontext_batch.ports import Artifact, DeliveredPicture, MadeStep, ObjectStore

log = structlog.get_logger(__name__)

SCHEMA: Final = "kontext-batch/lineage/1"
"""The number grows when something that stands in such a file changes its meaning or goes."""
MAX_BYTES: Final = 64 * 10**6
"""Of what lies where a sidecar is to go."""
PROMPTS: Final = ("prompt", "negative_prompt")
# By name, for texts of the author that come to the parameters one day are not to leave the house unasked.
_TOLD: Final = (
    *("seed", "steps", "guidance", "true_cfg_scale", "target", "canvas", "handoff", "candidate", "take"),
    *("size", "fit", "box", "background", "format", "quality", "max_bytes", "columns", "cell"),
)


def sidecar(
    picture: DeliveredPicture,
    file: Artifact,
    file_sha256: str,
    file_bytes: int,
    *,
    prompts: bool,
    licences: Mapping[str, str],
) -> dict[str, Any]:
    """The document of one delivery. Equal deliveries give equal documents, whenever they are made.

    `file`: the artifact; sha256 and bytes are those of what was delivered. `licences`: by sha256 of the weights, where
    the database knows none.
    """
    known = {**licences, **picture.licences}
    made = picture.steps[0]
    return {
        "schema": SCHEMA,
        "file": {
            "sha256": file_sha256,
            "bytes": file_bytes,
            "media_type": file.media_type,
            "width": file.width,
            "height": file.height,
        },
        "asset": asset_id(made.key),
        "digital_source_type": digital_source_type(picture.ancestry),
        "run": picture.run_id,
        "recipe": {
            "name": picture.recipe,
            "revision": picture.recipe_sha256,
            "file": picture.file.replace("\\", "/").rpartition("/")[2],  # where it lies is nobody's business
            "line": picture.line,
        },
        "step": {
            "node": picture.node,
            "axes": dict(picture.axes),
            "candidate": picture.candidate,
            "take": picture.take,
        },
        "prompts": prompts,
        "steps": [_step(each, known, prompts=prompts) for each in picture.steps],
    }


def _step(step: MadeStep, licences: Mapping[str, str], *, prompts: bool) -> dict[str, Any]:
    params = step.params
    told = (*_TOLD, *PROMPTS) if prompts else _TOLD
    document: dict[str, Any] = {
        "asset": asset_id(step.key),
        "operation": step.operation,
        "sha256": step.sha256,
        "parameters": {name: params[name] for name in told if name in params},
        "parents": [
            {"role": each.role, "position": each.position, "asset": asset_id(each.key), "sha256": each.sha256}
            for each in step.parents
        ],
        "sources": [{"role": each.role, "position": each.position, "sha256": each.sha256} for each in step.sources],
        "device": step.device,
        "numeric_mode": step.numeric_mode,
        "libraries": dict(step.libraries),
        "started": _time(step.started),
        "ended": _time(step.ended),
    }
    if params.get("model_sha256"):
        document["model"] = {
            "name": params.get("model"),
            "sha256": params["model_sha256"],
            "licence": licences.get(params["model_sha256"]),
        }
        document["adapters"] = [
            {
                "name": each.get("name"),
                "sha256": each["sha256"],
                "scale": each.get("scale"),
                "licence": licences.get(each["sha256"]),
            }
            for each in params.get("adapters") or ()
        ]
    return document


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds")


def write_sidecar(store: ObjectStore, path: str, document: Mapping[str, Any]) -> None:
    """Put it beside the file at `path`, unless a sidecar of that very file is there: another run's is as good.

    What is no sidecar of ours stays. The file is delivered whatever becomes of this: raises `InfrastructureError` of
    what passes, so that the delivery is made again and finds the file in its place, and logs the rest.
    """
    at = sidecar_path(path)
    data = (canonical_json(document) + "\n").encode()
    try:
        if store.write_if_absent(at, data, media_type="application/json"):
            return
        there = _document(store.read(at, max_bytes=MAX_BYTES))
        if there is None:
            log.warning("no sidecar: something else lies there", path=at)
        elif (there.get("file"), there.get("prompts")) != (document["file"], document["prompts"]):
            store.write(at, data, media_type="application/json")
    except KontextBatchError as error:
        if isinstance(error, InfrastructureError) and not isinstance(error, StorageReadOnly):
            raise
        log.warning("no sidecar", path=at, error=str(error))


def _document(data: bytes) -> dict[str, Any] | None:
    """A sidecar of ours, of any version."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not str(found.get("schema")).startswith(f"{SCHEMA.rpartition('/')[0]}/"):
        return None
    return found
