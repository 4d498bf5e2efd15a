"""What a report tells of a run, as JSON values. Deciding only: no store, no database, no files."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from kontext_batch.planning.params import SAMPLING
from kontext_batch.planning.states import StepState
from kontext_batch.ports import Artifact, AttemptRow, ExportedDelivery, ExportedInstance, RunSummary

FORMAT = 1
STATES = tuple(StepState)
"""Of instances, which name them by their place here."""
Inputs = Sequence[tuple[str, int, str, str]]
"""As of `Repository.step_inputs`."""


@dataclass(frozen=True, slots=True)
class Told:
    """One instance with its parameters and all that it reads."""

    instance: ExportedInstance
    params: Mapping[str, Any]
    inputs: Inputs

    def pictures(self) -> list[tuple[str, str]]:
        """(sha256, URI) of the result, where there is one, and of each photo that is read."""
        found = [(sha256, uri) for _, _, uri, sha256 in self.inputs if uri]
        if self.instance.artifact is not None:
            found.append((self.instance.artifact.sha256, self.instance.artifact.uri))
        return found


@dataclass(slots=True)
class Node:
    """A step of the recipe, with what was seen of it so far."""

    name: str
    operation: str
    axes: list[int] = field(default_factory=list)
    candidates: int = 1
    instances: int = 0
    outputs: int = 0


class Telling:
    """Makes the rows of the grid and the details of instances, which come in plan order: parents first."""

    def __init__(self, folder: str) -> None:
        """`folder`: URI of the report's, ending in `/`; links are relative to it."""
        self._folder = folder
        self._axes: dict[str, dict[str, int]] = {}
        self._nodes: dict[str, Node] = {}
        self._places: dict[str, int] = {}
        """Key of a step -> the place of its first instance."""
        self._prompts: dict[str, tuple[str, ...]] = {}
        """Key of a step -> its prompt and those of all steps above it, each once."""

    def row(self, told: Told, shown: bool, texts: dict[str, int]) -> list[Any]:
        """What the grid wants: [place, node, state, candidate, cached, sha256 or '', prompts, error, axis values ...].

        `shown`: whether there is a small picture of it. Prompts, its own and those of the steps above, and error are
        places in `texts`, -1 for no error; an axis that the instance does not name has the value -1.
        """
        each = told.instance
        self._places.setdefault(each.key, each.ordinal)
        self._prompts.setdefault(each.key, self._prompts_of(told))
        node = self._node(told)
        return [
            each.ordinal,
            list(self._nodes).index(node.name),
            STATES.index(each.state),
            each.candidate,
            int(each.cached),
            each.artifact.sha256 if shown and each.artifact else "",
            [_placed(texts, prompt) for prompt in self._prompts[each.key]],
            _placed(texts, _fault(each)),
            *self._values(each.axes),
        ]

    def detail(self, told: Told, missing: Mapping[str, str]) -> dict[str, Any]:
        """Everything about one instance. `missing`: sha256 of pictures that cannot be shown -> why."""
        each, params = told.instance, told.params
        return {
            "place": each.ordinal,
            "step": each.step_id,
            "key": each.key,
            "operation": each.operation,
            "state": each.state.value,
            "error": each.error,
            "prompt": params.get("prompt"),
            "facts": facts(each.operation, params, take=each.take),
            "picture": self._picture(each.artifact, missing),
            "reads": [self._read(each_input, missing) for each_input in told.inputs],
            "outputs": [self._output(delivery) for delivery in each.deliveries],
            "attempts": [_attempt(attempt) for attempt in each.attempts],
        }

    def run(self, summary: RunSummary, *, written: datetime, counts: Mapping[str, int]) -> dict[str, Any]:
        """The head of the report, once every instance was told."""
        ended = summary.finished or written
        return {
            "format": FORMAT,
            "id": summary.id,
            "recipe": summary.recipe,
            "revision": summary.recipe_sha256,
            "source": summary.source,
            "owner": summary.owner,
            "trigger": summary.trigger,
            "state": summary.state.value,
            "reason": summary.reason,
            "created": summary.created.isoformat(),
            "finished": None if summary.finished is None else summary.finished.isoformat(),
            "written": written.isoformat(),
            "seconds": max(0.0, (ended - summary.created).total_seconds()),
            "steps": {state.value: count for state, count in sorted(summary.steps.items())},
            "cached": summary.cached,
            "gpu_seconds": summary.gpu_seconds,
            "budget": dict(summary.budget),
            "outputs": summary.deliveries,
            "delivered": summary.delivered - summary.skipped_deliveries,
            "left_out": summary.skipped_deliveries,
            "not_delivered": summary.failed_deliveries,
            "states": [state.value for state in STATES],
            "axes": [{"name": name, "values": list(values)} for name, values in self._axes.items()],
            "nodes": [
                {"name": node.name, "operation": node.operation, "axes": node.axes, "candidates": node.candidates}
                for node in self._nodes.values()
            ],
            "first": self._first(),
            **counts,
        }

    def href(self, uri: str) -> str | None:
        """Relative link from the report to a URI of its own disk or bucket; None where there is no way."""
        here, there = _path(self._folder), _path(uri)
        if here is None or there is None or here[0] != there[0]:
            return None
        path = posixpath.relpath(there[1], here[1])
        # `./`: a name with a colon is not to be read as a scheme.
        return path if path.startswith("../") else f"./{path}"

    def _node(self, told: Told) -> Node:
        each = told.instance
        node = self._nodes.setdefault(each.node, Node(each.node, each.operation))
        for name, _ in each.axes:
            self._axes.setdefault(name, {})
            place = list(self._axes).index(name)
            if place not in node.axes:
                node.axes.append(place)
        node.candidates = max(node.candidates, each.candidate)
        node.instances += 1
        node.outputs += len(each.deliveries)
        return node

    def _prompts_of(self, told: Told) -> tuple[str, ...]:
        own = told.params.get("prompt")
        above = (prompt for _, _, uri, key in told.inputs if not uri for prompt in self._prompts.get(key, ()))
        return tuple(dict.fromkeys([*([own] if own else []), *above]))

    def _values(self, axes: Sequence[tuple[str, str]]) -> list[int]:
        named = dict(axes)
        return [
            values.setdefault(named[name], len(values)) if name in named else -1 for name, values in self._axes.items()
        ]

    def _first(self) -> int:
        """The node that is shown at first: the one with most outputs."""
        nodes = list(self._nodes.values())
        return max(range(len(nodes)), key=lambda at: (nodes[at].outputs, nodes[at].instances, at), default=0)

    def _picture(self, artifact: Artifact | None, missing: Mapping[str, str]) -> dict[str, Any] | None:
        if artifact is None:
            return None
        return {
            "sha256": artifact.sha256,
            "missing": missing.get(artifact.sha256),
            "type": artifact.media_type,
            "width": artifact.width,
            "height": artifact.height,
            "bytes": artifact.bytes,
            "uri": artifact.uri,
            "href": self.href(artifact.uri),
        }

    def _read(self, read: tuple[str, int, str, str], missing: Mapping[str, str]) -> dict[str, Any]:
        role, _, uri, identity = read
        if not uri:
            return {"role": role, "parent": self._places.get(identity)}
        return {
            "role": role,
            "sha256": identity,
            "missing": missing.get(identity),
            "uri": uri,
            "href": self.href(uri),
        }

    def _output(self, delivery: ExportedDelivery) -> dict[str, Any]:
        uri = delivery.delivered_path or delivery.path
        there = delivery.state == "delivered" and delivery.withdrawn is None
        return {
            "state": "withdrawn" if delivery.withdrawn else delivery.state,
            "uri": uri,
            "href": self.href(uri) if there else None,
            "error": delivery.error,
        }


def facts(operation: str, params: Mapping[str, Any], *, take: int) -> list[list[str]]:
    """What a person would ask about a step beside its prompt: [label, text]."""
    found: list[tuple[str, Any]] = []
    if operation in SAMPLING:
        adapters = ", ".join(f"{each['name']} × {each['scale']:g}" for each in params.get("adapters") or ())
        cfg = params.get("true_cfg_scale", 1.0)
        found = [
            ("Model", params.get("model")),
            ("Adapters", adapters or None),
            ("Seed", params.get("seed")),
            ("Denoise steps", params.get("steps")),
            ("Guidance", params.get("guidance")),
            ("CFG scale", cfg if cfg != 1 else None),
            ("Negative prompt", params.get("negative_prompt")),
            ("Size", _size(params.get("target"))),
            ("Handed on as", params.get("handoff")),
            ("Take", take or None),
        ]
    else:
        found = [
            ("Size", _size(params.get("size"))),
            ("Fit", params.get("fit")),
            ("Background", params.get("background")),
            ("Format", params.get("format")),
            ("Quality", params.get("quality")),
            ("Most bytes", params.get("max_bytes")),
            ("Columns", params.get("columns")),
        ]
    return [[label, f"{value:g}" if isinstance(value, float) else str(value)] for label, value in found if _said(value)]


def _said(value: Any) -> bool:
    return value is not None and value != ""


def _size(value: Any) -> str | None:
    return f"{value['width']} × {value['height']}" if isinstance(value, Mapping) else None


def _placed(texts: dict[str, int], text: Any) -> int:
    return texts.setdefault(str(text), len(texts)) if text else -1


def _fault(each: ExportedInstance) -> str | None:
    """What went wrong with it, or with bringing it where it is wanted."""
    lost = (delivery.error for delivery in each.deliveries if delivery.state == "failed")
    return each.error if each.state is not StepState.DONE else next(lost, None)


def _attempt(attempt: AttemptRow) -> dict[str, Any]:
    ended = attempt.ended
    return {
        "number": attempt.number,
        "outcome": attempt.outcome or "running",
        "started": attempt.started.isoformat(),
        "seconds": None if ended is None else max(0.0, (ended - attempt.started).total_seconds()),
        "worker": attempt.worker_id,
        "batch": attempt.batch_id,
        "error": attempt.error,
        "timings": sorted([name, round(seconds, 3)] for name, seconds in attempt.timings.items()),
    }


def _path(uri: str) -> tuple[str, str] | None:
    """(disk or bucket, absolute path, percent-encoded) of a URI that a browser might follow a relative link to."""
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        return "file", quote_from_bytes(unquote_to_bytes(rest))
    if scheme == "s3":
        bucket, _, key = rest.partition("/")
        return bucket, "/" + quote_from_bytes(key.encode())
    return None
