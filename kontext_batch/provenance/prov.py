"""Lineage as W3C PROV-JSON (Member Submission of 24 April 2013).

Entities are photos, pictures, delivered files, weights and recipe revisions (plans); activities are steps; agents are
workers, on behalf of the owners of recipes. Names are hashes of content, so that documents of several databases fit
together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote

from kontext_batch.hashing import sha256_hex
from kontext_batch.planning.params import materials
from kontext_batch.planning.render import axes_text
from kontext_batch.ports import AttemptRow
from kontext_batch.ports.tracing import StepDelivery, StepRead, TracedStep

PREFIXES = {
    "kb": "urn:kontext-batch:",
    "prov": "http://www.w3.org/ns/prov#",
    "xsd": "http://www.w3.org/2001/XMLSchema#",
}
SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance", "true_cfg_scale", "take", "numeric_mode")
"""Parameters that are written one by one."""


def as_prov(steps: Iterable[TracedStep]) -> dict[str, Any]:
    """One document about these steps and all that they read."""
    document = _Document()
    for each in steps:
        document.add(each)
    return document.data()


class _Document:
    """Collects statements; what is stated twice stands once."""

    def __init__(self) -> None:
        self._said: dict[str, dict[str, dict[str, Any]]] = {}

    def data(self) -> dict[str, Any]:
        return {"prefix": PREFIXES, **self._said}

    def add(self, traced: TracedStep) -> None:
        step, activity = traced.step, f"kb:step-{_local(traced.step.key)}"
        last = _last(traced.attempts)
        self._say(
            "activity",
            activity,
            {
                "prov:type": _name(f"kb:{step.operation}"),
                "prov:label": f"{step.node} {axes_text(step.axes)}".strip(),
                "prov:startTime": _time(last.started if last else None),
                "prov:endTime": _time(last.ended if last else None),
                "kb:state": step.state.value,
                "kb:attempts": len(traced.attempts),
                **{f"kb:{name}": step.params.get(name) for name in SETTINGS},
                **self._batch(traced),
            },
        )
        self._agents(traced, activity, last)
        for sha256, kind in materials(step.params).items():
            self._say("entity", f"kb:weights-{sha256}", {"prov:type": _name(f"kb:{kind}"), "kb:sha256": sha256})
            self._relate("used", {"prov:activity": activity, "prov:entity": f"kb:weights-{sha256}", "prov:role": kind})
        used = [self._read(read, activity) for read in traced.reads]
        if step.artifact is None:
            return
        picture = _picture(step.artifact.sha256)
        self._say(
            "entity",
            picture,
            {
                "prov:type": _name("kb:picture"),
                "prov:location": step.artifact.uri,
                "kb:sha256": step.artifact.sha256,
                "kb:mediaType": step.artifact.media_type,
                "kb:width": step.artifact.width,
                "kb:height": step.artifact.height,
                "kb:bytes": step.artifact.bytes,
            },
        )
        self._relate(
            "wasGeneratedBy", {"prov:entity": picture, "prov:activity": activity, "prov:time": _time(traced.made)}
        )
        for entity in filter(None, used):
            self._relate(
                "wasDerivedFrom",
                {"prov:generatedEntity": picture, "prov:usedEntity": entity, "prov:activity": activity},
            )
        for delivery in traced.deliveries:
            self._deliver(delivery, picture)

    def _batch(self, traced: TracedStep) -> dict[str, Any]:
        if not traced.batches:
            return {}
        batch = traced.batches[-1]
        return {
            "kb:batch": batch.id,
            "kb:batchMates": [_local(mate.key) for mate in batch.mates],
            "kb:joined": batch.joined,
            "kb:left": batch.left,
            "kb:device": batch.device,
            "kb:batchNumericMode": batch.numeric_mode,
            "kb:libraries": [f"{name} {version}" for name, version in sorted(batch.libraries.items())],
        }

    def _agents(self, traced: TracedStep, activity: str, last: AttemptRow | None) -> None:
        origin = traced.origin
        plan, owner = f"kb:recipe-{origin.recipe_sha256}", f"kb:owner-{_local(origin.owner)}"
        self._say(
            "entity",
            plan,
            {
                "prov:type": _name("prov:Plan"),
                "prov:label": origin.recipe,
                "prov:location": origin.source,
                "kb:sha256": origin.recipe_sha256,
            },
        )
        self._say("agent", owner, {"prov:label": origin.owner})
        association = {"prov:activity": activity, "prov:plan": plan, "kb:file": origin.file, "kb:line": origin.line}
        if last is None:
            self._relate("wasAssociatedWith", {**association, "prov:agent": owner})
            return
        worker = f"kb:worker-{_local(last.worker_id)}"
        self._say("agent", worker, {"prov:type": _name("prov:SoftwareAgent"), "prov:label": last.worker_id})
        self._relate("wasAssociatedWith", {**association, "prov:agent": worker})
        self._relate("actedOnBehalfOf", {"prov:delegate": worker, "prov:responsible": owner, "prov:activity": activity})

    def _read(self, read: StepRead, activity: str) -> str | None:
        """The entity that was read; None when it is not there yet."""
        if read.sha256 is None:
            return None
        entity = _picture(read.sha256)
        if read.step_id is None:
            self._say(
                "entity",
                entity,
                {"prov:type": _name("kb:photo"), "prov:location": read.uri, "kb:sha256": read.sha256},
            )
        self._relate(
            "used",
            {
                "prov:activity": activity,
                "prov:entity": entity,
                "prov:role": read.role,
                "kb:position": read.position,
            },
        )
        return entity

    def _deliver(self, delivery: StepDelivery, picture: str) -> None:
        if delivery.state != "delivered" or delivery.delivered_path is None:
            return
        sha256 = delivery.file_sha256 or delivery.sha256
        file = f"kb:file-{sha256_hex(f'{delivery.delivered_path} {sha256}'.encode())[:40]}"
        self._say(
            "entity",
            file,
            {
                "prov:type": _name("kb:deliveredFile"),
                "prov:location": delivery.delivered_path,
                "kb:sha256": sha256,
                "kb:delivered": _time(delivery.delivered),
                "kb:withdrawn": _time(delivery.withdrawn),
            },
        )
        self._relate("specializationOf", {"prov:specificEntity": file, "prov:generalEntity": picture})

    def _say(self, kind: str, name: str, values: Mapping[str, Any]) -> None:
        self._said.setdefault(kind, {})[name] = {
            key: value for key, value in values.items() if value is not None and value != []
        }

    def _relate(self, kind: str, values: Mapping[str, Any]) -> None:
        given = {key: value for key, value in values.items() if value is not None}
        name = f"_:{kind}-{sha256_hex(repr(sorted(given.items())).encode())[:16]}"
        self._said.setdefault(kind, {})[name] = given


def _picture(sha256: str) -> str:
    """A photo and a picture of the same bytes are one entity."""
    return f"kb:image-{sha256}"


def _last(attempts: Iterable[AttemptRow]) -> AttemptRow | None:
    """The newest successful attempt, else the newest."""
    listed = list(attempts)
    return next((each for each in reversed(listed) if each.outcome == "ok"), listed[-1] if listed else None)


def _local(text: str) -> str:
    """As the local part of a qualified name."""
    return quote(text.replace(":", "-"), safe="")


def _name(qualified: str) -> dict[str, str]:
    return {"$": qualified, "type": "prov:QUALIFIED_NAME"}


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
